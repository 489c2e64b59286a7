"""
How well strange videos are told from known ones, on videos that no threshold was chosen on.

    python benchmarks/how_sure.py --output runs                             20 minutes of a core
    python benchmarks/how_sure.py --output runs --only demo --other FOLDER  a minute, and the videos of FOLDER
    python benchmarks/how_sure.py --output runs --only features --data D --image_model M
    python benchmarks/how_sure.py --output runs --smoke                     a minute, for the tests

    demo        the demo model: the windows of new moving shapes, and of videos that show none, that it calls "none of
                these"; of generated videos, and of those in the folders of --other
    shapes      a motion that is left out of training: the AUROC of the two scores, on the test videos of a small ViViT
                that is trained on the other three, from random weights; each motion in turn, with several seeds
    features    a class that is left out of training: the same for the ordered linear probe on a frozen image model,
                each class in turn, with several draws of --groups people and with all people

For `features`, D has TASK_train_all.csv and TASK_test.csv (--task) with the columns path, label and group, as for
few_labels.py. What is finished is only read when the script runs again. Exits with 1 if a target is missed.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from few_labels import read_rows
from measuring import Row, at_least, file_to_write, report
from transformers import AutoConfig, set_seed


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import demo  # noqa: E402
from moving_shapes import MOTIONS, write_moving_shapes  # noqa: E402
from strange_videos import STRANGE, write_strange_videos  # noqa: E402

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path  # noqa: E402
from vivit_hf.data import LabelMap, find_videos  # noqa: E402
from vivit_hf.inference.feature_files import read_features  # noqa: E402
from vivit_hf.inference.prediction import VideoOutputs, predict_videos  # noqa: E402
from vivit_hf.inference.segments import merge_windows  # noqa: E402
from vivit_hf.inference.timeline import file_windows  # noqa: E402
from vivit_hf.inference.unknown import UNKNOWN, distances, energies  # noqa: E402
from vivit_hf.inference.unknown_choice import auroc  # noqa: E402
from vivit_hf.training.probe_heads import fit_linear  # noqa: E402
from vivit_hf.training.probes import inner_folds  # noqa: E402


SECTIONS = ("demo", "shapes", "features")
SCORES = ("energy", "neighbours")
LEAST_CALLED, LEAST_AUROC = 0.95, 0.9
VIEWS = {"num_clips": 4, "num_crops": 3}  # those of `vivit-hf classify`
SHAPES = {"clips_per_class": 200, "test_clips_per_class": 50, "epochs": 4}  # as `make demo`
NEW_SCENES = 5000  # a seed that neither the demo model nor its calibration has seen


# The demo model


def called(model: Any, processor: ViViTVideoProcessor, videos: Sequence[Path]) -> tuple[int, int, float]:
    """Return the windows of the videos that are "none of these", all windows, and the share of time that is."""
    found, windows, unknown, seconds = 0, 0, 0.0, 0.0
    for video in videos:
        answers = list(file_windows(model, processor, video))
        found, windows = found + sum(bool(one.unknown) for one in answers), windows + len(answers)
        for segment in merge_windows(answers, model.config):
            seconds += segment.end - segment.start
            unknown += (segment.end - segment.start) * (segment.label == UNKNOWN)
    return found, windows, unknown / max(seconds, 1e-9)


def measure_demo(output: Path, others: Sequence[Path], is_smoke: bool) -> list[Row]:
    """Count the windows of known and of strange videos that the demo model calls "none of these"."""
    model = ViViTForVideoClassification.from_pretrained(demo_model_path()).eval()
    processor = ViViTVideoProcessor.from_pretrained(demo_model_path(), on_error="repeat_last")
    write_moving_shapes(output / "new", 1, NEW_SCENES, test_clips_per_class=2 if is_smoke else 100)
    strange = write_strange_videos(output / "strange", 2 if is_smoke else 25)
    groups: dict[str, Sequence[Path]] = {"new moving shapes": find_videos(output / "new" / "test")}
    groups |= {f"generated: {name}": [one for one in strange if one.stem.startswith(name)] for name in STRANGE}
    groups |= {f"folder {folder.name}": find_videos(folder) for folder in others}
    rows, totals = [], {"generated": [0, 0], "folder": [0, 0]}
    for name, videos in groups.items():
        found, windows, time = called(model, processor, videos)
        print(f"{name}: {found} of {windows} windows, {time:.1%} of the time, {len(videos)} videos", flush=True)
        if (kind := name.split(maxsplit=1)[0].rstrip(":")) in totals:
            totals[kind][0] += found
            totals[kind][1] += windows
        else:
            rows.append(Row("demo: windows of new moving shapes called unknown", round(found / windows, 4), ""))
    for kind, (found, windows) in totals.items():
        if windows:
            what = "generated strange videos" if kind == "generated" else "videos of --other"
            rows.append(at_least(f"demo: windows of {what} called unknown", found / windows, "", LEAST_CALLED))
    return rows


# Moving shapes with a motion left out


def measure_shapes(output: Path, seeds: Sequence[int], is_smoke: bool) -> list[Row]:
    """Leave out each motion in turn, and return the mean AUROC of each score over the motions and seeds."""
    found: dict[str, list[float]] = {score: [] for score in SCORES}
    for seed in seeds:
        videos = output / f"shapes_{seed}"
        if not (videos / "test").is_dir():
            counts = (4, 2) if is_smoke else (SHAPES["clips_per_class"], SHAPES["test_clips_per_class"])
            write_moving_shapes(videos, counts[0], 100 + seed, test_clips_per_class=counts[1])
        for left in list(MOTIONS)[: 1 if is_smoke else None]:
            finished = output / f"shapes_{seed}_without_{left}.json"
            if not finished.exists():
                model = output / f"shapes_{seed}_without_{left}"
                values = leave_out_motion(model, videos, left, 1 if is_smoke else SHAPES["epochs"], seed)
                finished.write_text(json.dumps(values))
            values = json.loads(finished.read_text())
            print(f"shapes, seed {seed}, without {left}: {json.dumps(values)}", flush=True)
            for score in SCORES:
                found[score].append(values[score])
    return auroc_rows("shapes", found)


def leave_out_motion(folder: Path, videos: Path, left: str, epochs: float, seed: int) -> dict[str, float]:
    """Train on the other motions; return the accuracy on them, and the AUROC of each score."""
    train = sorted(one for one in videos.glob("train/*/*.mp4") if one.parent.name != left)
    test = sorted(videos.glob("test/*/*.mp4"))
    set_seed(seed)
    demo.build_image_vit(folder / "image_vit")
    demo.finetune(folder, folder / "image_vit", train, epochs, seed)
    model = ViViTForVideoClassification.from_pretrained(folder).eval()
    processor = ViViTVideoProcessor.from_pretrained(folder)
    answers = list(predict_videos(model, processor, [*train, *test], **VIEWS, with_outputs=True))
    outputs = [one.outputs for one in answers if one.outputs is not None]
    of_train, of_test = outputs[: len(train)], outputs[len(train) :]
    is_left = np.array([one.parent.name == left for one in test])
    best = [model.config.id2label[int(one.logits.argmax())] for one in answers[len(train) :]]  # type: ignore[union-attr]
    right = [label == one.parent.name for label, one in zip(best, test, strict=True) if one.parent.name != left]
    strangeness = {"energy": np.array([one.energy for one in of_test]), "neighbours": _distances(of_test, of_train)}
    aurocs = {name: auroc(values[~is_left], values[is_left]) for name, values in strangeness.items()}
    return {"accuracy": statistics.mean(right), **aurocs}


def _distances(outputs: Sequence[VideoOutputs], known: Sequence[VideoOutputs]) -> np.ndarray:
    bank, features = (torch.from_numpy(np.stack([one.features for one in part])) for part in (known, outputs))
    return distances(features, bank).numpy()


def auroc_rows(section: str, found: dict[str, list[float]]) -> list[Row]:
    """Return the mean of each score, of which the better one is held to the target, and the range of that."""
    means = {score: statistics.mean(values) for score, values in found.items()}
    best = max(means, key=lambda score: means[score])
    rows = [
        at_least(
            f"{section}: AUROC of {score}, mean of {len(found[score])}",
            mean,
            "",
            LEAST_AUROC if score == best else None,
        )
        for score, mean in means.items()
    ]
    return [*rows, Row(f"{section}: AUROC of {best}, the lowest", round(min(found[best]), 3), "")]


# A frozen image model with a class left out


class Features:
    """Ordered features of the videos of a task, from a frozen image model."""

    def __init__(self, args: argparse.Namespace):
        self.output, self.model, self.size = args.output, args.image_model, args.image_size
        self.num_frames = args.num_frames
        files = {
            split: args.data / f"{args.task}_{name}.csv" for split, name in (("train", "train_all"), ("test", "test"))
        }
        self.rows = {split: read_rows(file) for split, file in files.items()}
        if shared := self.groups("train") & self.groups("test"):
            sys.exit(f"{args.data}: the group {sorted(shared)[0]} is in both files.")
        self.vectors = {split: self.embed(split, file) for split, file in files.items()}

    def groups(self, split: str) -> set[str]:
        return {row["group"] for row in self.rows[split]}

    def embed(self, split: str, videos: Path) -> np.ndarray:
        """Return float32 (videos, steps, hidden), by `vivit-hf convert` and `vivit-hf embed`."""
        encoder, features = self.output / "encoder", self.output / f"{split}.parquet"
        if not encoder.exists():
            patch = AutoConfig.from_pretrained(self.model).patch_size
            structure = ["--attention-type", "factorised_encoder", "--num-temporal-layers", 0]
            sizes = ["--tubelet-size", 1, patch, patch, "--image-size", self.size, "--num-frames", self.num_frames]
            command("convert", "vit", "--source", self.model, "--output", encoder, "--skip-parity", *structure, *sizes)
        if not features.exists():
            views = ["--num-clips", 1, "--num-crops", 1, "--frame-sampling", "uniform"]
            command("embed", videos, "--model", encoder, "--output", features, "--per-step", "--workers", 0, *views)
        found = read_features([features])
        place = {file: number for number, file in enumerate(found.files)}
        return found.vectors[[place[row["path"]] for row in self.rows[split]]]

    def leave_out(self, left: str, people: set[str], seed: int) -> dict[str, float]:
        """Fit the ordered linear probe to the other classes of these people; return its accuracy and the AUROCs."""
        kept = [i for i, row in enumerate(self.rows["train"]) if row["label"] != left and row["group"] in people]
        rows, vectors, test = [self.rows["train"][i] for i in kept], self.vectors["train"][kept], self.vectors["test"]
        names, labels = np.unique([row["label"] for row in rows], return_inverse=True)
        _, groups = np.unique([row["group"] for row in rows], return_inverse=True)
        head = fit_linear(vectors, labels, inner_folds(labels, groups, seed), "concatenate")
        logits = torch.from_numpy(head.logits(test))
        known, ordered = (torch.from_numpy(one.reshape(len(one), -1)) for one in (vectors, test))
        true = np.array([row["label"] for row in self.rows["test"]])
        is_left = true == left
        strangeness = {
            "energy": energies(logits, LabelMap({"": names.tolist()})).numpy(),
            "neighbours": distances(ordered, known).numpy(),
        }
        accuracy = float((names[logits.argmax(dim=1).numpy()] == true)[~is_left].mean())
        return {"accuracy": accuracy, **{name: auroc(one[~is_left], one[is_left]) for name, one in strangeness.items()}}


def command(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "vivit_hf", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def measure_features(args: argparse.Namespace) -> list[Row]:
    """Leave out each class in turn, for several draws of people and for all of them."""
    task = Features(args)
    people, classes = sorted(task.groups("train")), sorted({row["label"] for row in task.rows["train"]})
    draws = {f"all {len(people)} groups": [set(people)]}
    if args.groups < len(people):
        some = [set(random.Random(seed).sample(people, args.groups)) for seed in args.seeds]
        draws = {f"{args.groups} of {len(people)} groups": some, **draws}
    rows = []
    for what, parts in draws.items():
        found: dict[str, list[float]] = {score: [] for score in SCORES}
        for left in classes:
            of_class = [task.leave_out(left, part, seed) for seed, part in enumerate(parts)]
            means = {name: statistics.mean(one[name] for one in of_class) for name in ("accuracy", *SCORES)}
            shown = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(f"features, {what}, without {left}: {shown}", flush=True)
            for score in SCORES:
                found[score] += [one[score] for one in of_class]
        rows += auroc_rows(f"features, {what}", found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for videos, features, models and results")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections (default: what is given)")
    parser.add_argument("--other", nargs="+", type=Path, default=[], help="folders of videos that show no moving shape")
    parser.add_argument("--data", type=Path, help="folder of CSV files, for `features`")
    parser.add_argument("--image_model", type=Path, help="folder of an image model, for `features`")
    parser.add_argument("--task", default="a", help="beginning of the names of the CSV files")
    parser.add_argument("--image_size", type=int, default=112, help="of frames, in pixels")
    parser.add_argument("--num_frames", type=int, default=8, help="frames per video")
    parser.add_argument("--groups", type=int, default=30, help="groups (people) in a draw of training videos")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of draws, videos and training")
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="write the rows into this file")
    parser.add_argument("--smoke", action="store_true", help="few videos, one epoch and motion, no targets")
    args = parser.parse_args()
    sections = args.only or [one for one in SECTIONS if one != "features" or args.data is not None]
    if "features" in sections and (args.data is None or args.image_model is None):
        parser.error("features needs --data and --image_model")
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    if "demo" in sections:
        rows += measure_demo(args.output, args.other, args.smoke)
    if "shapes" in sections:
        rows += measure_shapes(args.output, args.seeds[: 1 if args.smoke else None], args.smoke)
    if "features" in sections:
        rows += measure_features(args)
    sys.exit(report([Row(row.name, row.value, row.unit) for row in rows] if args.smoke else rows, args.json))


if __name__ == "__main__":
    main()
