"""The main road of a user: an image ViT becomes a ViViT, learns from videos as phones make them, is scored and shared.

With every kind of processor that image models have, for every variant, from the converted folder and straight from the
image model.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import av
import finetune
import numpy as np
import pyarrow.parquet
import pytest
import torch
from command_line import invoke
from paths import EXAMPLES
from python_without import python_without
from tiny_models import ATTENTION_TYPES
from transformers import (
    AutoImageProcessor,
    AutoModelForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)
from typer.testing import CliRunner
from video_files import moving_frames, set_rotation, write_video

from vivit_hf import VideoReader
from vivit_hf.cli.app import app
from vivit_hf.conversion.command import main as convert


pytestmark = pytest.mark.slow


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
DECODER = {f"decoder_{name}": value for name, value in SIZES.items()}

# Image models as they are published, in small: the class, the processor, and the short side for a crop of 32.
IMAGE_MODELS = {
    "resize only": (ViTModel, {**HALF, "size": {"height": 32, "width": 32}}, 37),
    "DeiT, resize and crop": (
        ViTForImageClassification,
        {
            **IMAGENET,
            "image_processor_type": "DeiTImageProcessor",
            "size": {"height": 36, "width": 36},
            "do_center_crop": True,
            "crop_size": {"height": 32, "width": 32},
            "resample": 3,
        },
        36,
    ),
    "shortest edge": (ViTModel, {**IMAGENET, "size": {"shortest_edge": 32}}, 37),
    "no processor": (ViTModel, None, 37),
    "MAE": (ViTMAEForPreTraining, {**IMAGENET, "size": 32, "feature_extractor_type": "ViTFeatureExtractor"}, 37),
}
# Each image model on both roads, each variant on both roads.
ROADS = [
    *zip(IMAGE_MODELS, ["converted"] * 5, [*ATTENTION_TYPES, "factorised_encoder"], strict=True),
    *zip(IMAGE_MODELS, ["straight"] * 5, ["factorised_encoder", *reversed(ATTENTION_TYPES)], strict=True),
]


# What there is to begin with


def save_image_model(folder, name):
    cls, processor, _ = IMAGE_MODELS[name]
    config = ViTMAEConfig(**SIZES, **DECODER, image_size=32, patch_size=16) if cls is ViTMAEForPreTraining else None
    cls(config or ViTConfig(**SIZES, image_size=32, patch_size=16)).save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": True, **processor}))
    return folder


def trim_start(path, num_frames):
    """Makes the edit list of an mp4 file begin `num_frames` later, as a phone does that trims a video."""
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 16  # version and flags, number of entries, duration; then the start
    with av.open(str(path)) as container:
        ticks = round(1 / (container.streams.video[0].average_rate * container.streams.video[0].time_base))
    start = int.from_bytes(data[place : place + 4], "big") + num_frames * ticks
    data[place : place + 4] = start.to_bytes(4, "big")
    path.write_bytes(data)
    return path


def write_phone_videos(folder, shift, damaged):
    """Portrait and landscape, turned by the container, trimmed, of variable rate, small, short, and a damaged one."""
    folder.mkdir(parents=True)

    def write(name, height, width, num_frames=16, **options):
        frames = np.roll(moving_frames(num_frames, height, width), shift, axis=3)
        return write_video(folder / f"{name}.mp4", frames, **options)

    write("landscape", 48, 84)
    write("portrait", 84, 48, options={"bf": "2"})
    set_rotation(write("turned", 48, 84), 90)
    trim_start(write("trimmed", 64, 48, options={"bf": "2"}), 4)
    write("variable", 48, 64, pts=np.cumsum(np.arange(16) % 7 * 13 + 11))
    write("small", 20, 26)
    write("short", 36, 36, num_frames=3)
    if damaged:
        broken = write("damaged", 48, 64)
        broken.write_bytes(broken.read_bytes()[:300])


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for split in ("train", "test"):
        for shift, name in enumerate(("red", "green")):
            write_phone_videos(folder / split / name, shift, damaged=name == "red")
    with VideoReader(folder / "test" / "red" / "trimmed.mp4") as video:
        assert video.num_frames == 12, "the edit list counts"
    with VideoReader(folder / "test" / "red" / "turned.mp4") as video:
        assert video.frames_at([0]).shape == (1, 84, 48, 3)
    return folder


# The stations of a road


def convert_command(source, variant, output):
    command = ["--source", source, "--attention-type", variant, "--num-frames", 4, "--output", output]
    return [*command, "--num-temporal-layers", 1] if variant == "factorised_encoder" else command


def finetune_command(source, videos, output, *more):
    command = ["--model_name_or_path", source, "--recipe", "small-data", "--output_dir", output, "--use_cpu"]
    command += ["--train_dir", videos / "train", "--validation_dir", videos / "test", "--num_train_epochs", 1]
    return [*command, "--report_to", "none", "--disable_tqdm", "True", "--learning_rate", "1e-3", *more]


def evaluate_command(model, videos, output):
    command = ["--model", model, "--data", videos / "test", "--num_clips", 4, "--num_crops", 3, "--use_cpu"]
    return [*command, "--output_dir", output]


def classify_command(model, videos):
    return ["classify", videos / "test", "--model", model, "--json", "--device", "cpu"]


def strings(command):
    return list(map(str, command))


def check_results(model, scores, classified, short_side):
    """Three programs have to say the same about the same views of the same videos."""
    trained = json.loads((model / "all_results.json").read_text())
    evaluated = json.loads((scores / "results.json").read_text())
    views = f"4 clips x 3 crops of 4 frames, stride 2, resized to short side {short_side}, cropped to 32 x 32"
    assert trained["eval_protocol"].startswith(views) and evaluated["eval_protocol"] == trained["eval_protocol"]
    assert trained["train_damaged_files"] == trained["eval_damaged_files"] == evaluated["eval_damaged_files"] == 1
    assert evaluated["eval_samples"] == 14 and evaluated["eval_top1"] == pytest.approx(trained["eval_top1"])
    damaged = json.loads((model / "damaged_files.json").read_text())
    assert [Path(name).stem for split in ("train", "eval") for name in damaged[split]] == ["damaged"] * 2

    predictions = pyarrow.parquet.read_table(scores / "predictions.parquet").to_pydict()
    expected = dict(zip(predictions["video"], predictions["probabilities"], strict=True))
    rows = {row["file"]: row for row in map(json.loads, classified.splitlines())}
    assert set(rows) == set(expected) and len(rows) == 15
    for file, probabilities in expected.items():
        if probabilities is None:
            assert "damaged.mp4" in file and rows[file]["error"]
            continue
        found = {one["label"]: one["score"] for one in rows[file]["predictions"]}
        assert [found["green"], found["red"]] == pytest.approx(probabilities, abs=2e-3), file
        assert np.isfinite(probabilities).all()


@pytest.fixture(scope="module")
def travelled(videos, tmp_path_factory):
    """Goes a road in this process, once; returns its folder and what fine-tuning printed."""

    @functools.cache
    def travel(image_model, road, variant):
        folder = tmp_path_factory.mktemp("road")
        source = save_image_model(folder / "vit", image_model)
        more = ["--dataloader_num_workers", 0]
        if road == "converted":
            assert convert("vit", strings(convert_command(source, variant, folder / "start"))) == 0
            source = folder / "start"
        else:
            more += ["--attention_type", variant, "--num_frames", 4, "--image_size", 32]
            more += ["--num_temporal_layers", 1] if variant == "factorised_encoder" else []
        finetune.main(strings(finetune_command(source, videos, folder / "model", *more)))
        command = evaluate_command(folder / "model", videos, folder / "scores")
        evaluated = invoke("evaluate", *command, "--num_workers", 0)
        assert evaluated.exit_code == 0, evaluated.output
        return folder

    return travel


@pytest.mark.parametrize(("image_model", "road", "variant"), ROADS)
def test_every_road_ends_in_a_model_of_its_own_size(travelled, videos, image_model, road, variant):
    folder = travelled(image_model, road, variant)
    result = CliRunner().invoke(app, strings(classify_command(folder / "model", videos)))
    is_own = road == "converted" and image_model == "DeiT, resize and crop"  # else the recipe's or the official ratio
    check_results(folder / "model", folder / "scores", result.stdout, IMAGE_MODELS[image_model][2] if is_own else 37)

    model = AutoModelForVideoClassification.from_pretrained(folder / "model")
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    assert (model.config.attention_type, model.config.num_frames, model.config.image_size) == (variant, 4, 32)
    if variant == "factorised_encoder":
        assert model.config.num_temporal_layers == 1
    pixels = IMAGE_MODELS[image_model][1] or HALF
    assert (processor.image_mean, processor.image_std) == (pixels["image_mean"], pixels["image_std"])


LOAD = """
import sys
import torch
from transformers import AutoImageProcessor, AutoModelForVideoClassification

logits = []
for folder in sys.argv[2:]:
    model = AutoModelForVideoClassification.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert "vivit_hf" not in sys.modules
    with torch.no_grad():
        logits.append(model(**processor("portrait.mp4", num_clips=4, num_crops=3)).logits)
torch.save(logits, sys.argv[1])
"""


def test_the_models_load_where_the_package_is_not(travelled, videos, tmp_path):
    models = [travelled(*road) / "model" for road in ROADS[:5]]  # every variant
    (tmp_path / "load.py").write_text(LOAD)
    (tmp_path / "portrait.mp4").write_bytes((videos / "test" / "red" / "portrait.mp4").read_bytes())
    command = [*python_without(tmp_path / "site", "vivit_hf", "_vivit_hf"), "load.py", "logits.pt", *models]
    process = subprocess.run(strings(command), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-3000:]
    for folder, found in zip(models, torch.load(tmp_path / "logits.pt"), strict=True):
        model = AutoModelForVideoClassification.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        with torch.no_grad():
            expected = model(**processor(str(tmp_path / "portrait.mp4"), num_clips=4, num_crops=3)).logits
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_road_as_the_readme_has_it(videos, tmp_path):
    """The commands, each in a process of its own, with workers that decode."""

    def run(script, command, returncode=0):
        command = [sys.executable, *script, *strings(command)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert process.returncode == returncode, process.stderr[-3000:]
        return process.stdout

    source = save_image_model(tmp_path / "vit", "resize only")
    start, model, scores = tmp_path / "start", tmp_path / "model", tmp_path / "scores"
    run(["-m", "vivit_hf", "convert", "vit"], convert_command(source, "factorised_encoder", start))
    printed = run([finetune.__file__], finetune_command(start, videos, model, "--dataloader_num_workers", 2))
    assert f"  {start}: attention_type factorised_encoder, num_temporal_layers 1, " in printed
    assert (
        "num_frames 4, image_size 32, frame_stride 2, short_video_policy repeat_last, short side resized to 37"
        in printed
    )
    assert f"{start} overrides these settings of recipe small-data: num_temporal_layers 4" in printed
    run([EXAMPLES / "evaluate.py"], evaluate_command(model, videos, scores))
    classified = run(["-m", "vivit_hf"], classify_command(model, videos), returncode=1)  # one cannot be read
    check_results(model, scores, classified, short_side=37)
