"""Train the small model that ships with the package, `vivit_hf.demo_model_path()`, on videos of moving shapes.

    python examples/train_demo_model.py                    about five minutes on a CPU core
    python examples/train_demo_model.py --calibrate-only   keeps the weights

The weights are reproducible with the same library versions on the same kind of machine. The folder is replaced only
if the new model reaches `REQUIRED_ACCURACY` on held-out videos.

The model is then calibrated on the held-out videos, as `vivit-hf evaluate --calibrate --unknown auto` does, with the
features of `KNOWN_PER_CLASS` training videos of each class, and with pans over random textures as videos that show none
of its labels. Videos of one scene stay together.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import demo
import numpy as np
import torch
from moving_shapes import MOTIONS, Scene, write_moving_shapes, write_video
from transformers import set_seed

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.data import LabelledVideo, read_videos
from vivit_hf.inference.calibration import calibrate
from vivit_hf.inference.calibration_files import store_calibration, stored_fingerprint
from vivit_hf.inference.evaluation import evaluate_videos
from vivit_hf.inference.prediction import predict_videos
from vivit_hf.inference.unknown_choice import choose_rule


CLIPS_PER_CLASS, TEST_CLIPS_PER_CLASS, EPOCHS, REQUIRED_ACCURACY = 400, 100, 15, 0.98
KNOWN_PER_CLASS, HELD_OUT_PER_CLASS, NUM_OTHER = 100, 50, 100  # for the calibration
VIEWS = {"num_clips": 4, "num_crops": 3}  # those of `vivit-hf classify`


def write_samples(folder: Path) -> None:
    """Write a video of each class, and `all.mp4` with all classes in turn, four seconds each."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, motion in enumerate(MOTIONS):
        scene = Scene.draw(np.random.default_rng([2, number]), num_frames=24, height=80, width=96)
        write_video(folder / f"{motion}.mp4", scene.render(motion, 24))
        parts.append(scene.render(motion, 48))
    write_video(folder / "all.mp4", np.concatenate(parts))


def write_other_videos(folder: Path, count: int = NUM_OTHER) -> None:
    """Write videos without any shape: slow and fast pans over smooth random textures, in grey and in colour."""
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng([3, number])
        # Noise whose strength falls with the frequency, as in photographs.
        frequency = np.hypot(np.fft.fftfreq(160)[:, None], np.fft.rfftfreq(192)[None]) + 1 / 192
        noise = np.fft.rfft2(rng.normal(size=(1 if number % 2 else 3, 160, 192))) / frequency ** rng.uniform(0.7, 1.5)
        texture = np.fft.irfft2(noise, s=(160, 192))
        texture = np.clip(128 + 55 * (texture - texture.mean()) / texture.std(), 0, 255).transpose(1, 2, 0)
        texture = np.broadcast_to(texture, (160, 192, 3)).astype(np.uint8)
        steps = np.rint(np.arange(24)[:, None] * rng.uniform(-3, 3, 2)).astype(int)
        frames = [np.roll(texture, step, axis=(0, 1))[:80, :96] for step in steps]
        write_video(folder / f"{number:03d}.mp4", np.stack(frames))


def calibrate_demo(folder: Path, videos: Path) -> None:
    """Calibrate the model in `folder` on `videos/test`, with features of `videos/train`, against `videos/other`."""
    model = ViViTForVideoClassification.from_pretrained(folder).eval()
    processor = ViViTVideoProcessor.from_pretrained(folder)
    settings = {**VIEWS, "with_outputs": True}

    def first(split: str, count: int) -> list[LabelledVideo]:
        found = [one for one in read_videos(videos / split).videos if int(Path(one.video).stem) < count]
        return [replace(one, keep_together=(f"scene={Path(one.video).stem}",)) for one in found]

    held_out, known = first("test", HELD_OUT_PER_CLASS), first("train", KNOWN_PER_CLASS)
    found = evaluate_videos(model, processor, held_out, **settings)
    labels = [model.config.label2id[one.labels[0]] for one in known]
    of_known = list(predict_videos(model, processor, [one.video for one in known], **settings))
    others = sorted((videos / "other").glob("*.mp4"))
    of_others = list(predict_videos(model, processor, others, **settings))
    choice = choose_rule(found, "auto", known=of_known, known_labels=labels, unknown=of_others)
    report = calibrate(found, *VIEWS.values(), "probabilities", stored_fingerprint(str(folder)))
    store_calibration(folder, replace(report.calibration, unknown=choice.rule), choice.known)
    print("\n".join([*report.lines, *choice.lines]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=demo_model_path(), help="folder to replace (the package's)")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--clips-per-class", type=int, default=CLIPS_PER_CLASS)
    parser.add_argument("--required-accuracy", type=float, default=REQUIRED_ACCURACY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrate-only", action="store_true", help="keep the weights and the samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # with several threads, the order of sums is not fixed

    with tempfile.TemporaryDirectory() as temporary:
        videos, trained = Path(temporary, "videos"), Path(temporary, "model")
        clips_per_class = KNOWN_PER_CLASS if arguments.calibrate_only else arguments.clips_per_class
        test_clips_per_class = HELD_OUT_PER_CLASS if arguments.calibrate_only else TEST_CLIPS_PER_CLASS
        counts = {"clips_per_class": clips_per_class, "test_clips_per_class": test_clips_per_class}
        write_moving_shapes(videos, **counts, seed=arguments.seed + 1000)  # the demo and the tests use seed 0
        write_other_videos(videos / "other")
        if arguments.calibrate_only:
            calibrate_demo(arguments.output, videos)
            return
        train_files, test_files = (sorted(videos.glob(f"{split}/*/*.mp4")) for split in ("train", "test"))
        set_seed(arguments.seed)
        demo.build_image_vit(Path(temporary, "image_vit"))
        demo.finetune(trained, Path(temporary, "image_vit"), train_files, arguments.epochs, arguments.seed)
        best = [prediction[0][0] for prediction in demo.classify(trained, test_files)]
        correct = sum(label == file.parent.name for label, file in zip(best, test_files, strict=True))
        accuracy = correct / len(test_files)
        print(f"Accuracy on {len(test_files)} held-out files: {accuracy:.3f}")
        if accuracy < arguments.required_accuracy:
            raise SystemExit(f"At least {arguments.required_accuracy} was expected: {arguments.output} is unchanged.")

        # The package has the code that `auto_map` refers to.
        for name in ("config.json", "preprocessor_config.json"):
            settings = json.loads((trained / name).read_text())
            settings.pop("auto_map", None)
            (trained / name).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        arguments.output.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
            shutil.copyfile(trained / name, arguments.output / name)
        calibrate_demo(arguments.output, videos)
    write_samples(arguments.output / "samples")
    size = sum(file.stat().st_size for file in arguments.output.rglob("*.*"))
    print(f"{arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
