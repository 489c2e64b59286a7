"""The files that the pages speak of, at miniature size: videos, lists of labels, trained models, image models."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from moving_shapes import MOTIONS, write_moving_shapes
from tiny_models import make_model
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
    VivitConfig,
    VivitForVideoClassification,
)
from video_files import write_video

from vivit_hf import ViViTConfig, ViViTVideoProcessor, demo_model_path


SIZES = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_page_files(folder: Path) -> None:
    """Write what `vivit-hf demo` and `make demo` leave behind, small models under their Hub ids, and "your" files."""
    samples = demo_model_path() / "samples"
    shutil.copytree(samples, folder / "vivit_demo")
    write_moving_shapes(folder / "demo_output" / "videos", clips_per_class=2, test_clips_per_class=1, seed=0)
    for name in ("demo_output/model", "my_vivit"):
        shutil.copytree(demo_model_path(), folder / name, ignore=shutil.ignore_patterns("samples"))
    shutil.copyfile(folder / "my_vivit" / "config.json", folder / "config.json")
    write_image_models(folder)
    videos = sorted((folder / "demo_output" / "videos").rglob("*.mp4"))
    for name in ("my.mp4", "new.mp4", "screen.mp4", "lecture.mp4"):
        shutil.copyfile(samples / "up_left.mp4", folder / name)
    write_folders(folder, videos)
    write_lists(folder)


def write_image_models(folder: Path) -> None:
    """Write models of one layer with the names and kinds of models on the Hub, and ViViTs of four frames."""
    torch.manual_seed(0)
    for name in ("small_vivit", "big_vivit"):
        config = ViViTConfig.from_preset("vivit-tiny", num_frames=4, id2label=dict(enumerate(MOTIONS)))
        make_model(config).save_pretrained(folder / name)
        ViViTVideoProcessor(
            num_frames=4, frame_stride=1, size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
        ).save_pretrained(folder / name)
    vivit = VivitConfig(**SIZES, intermediate_size=48)
    VivitForVideoClassification(vivit).save_pretrained(folder / "google" / "vivit-b-16x2-kinetics400")
    vit = ViTConfig(**SIZES, intermediate_size=48)
    ViTModel(vit).save_pretrained(folder / "google" / "vit-base-patch16-224-in21k")
    dinov2 = Dinov2Config(**SIZES, patch_size=14, image_size=518)
    Dinov2Model(dinov2).save_pretrained(folder / "facebook" / "dinov2-small")
    registers = Dinov2WithRegistersConfig(**SIZES, patch_size=14)
    Dinov2WithRegistersModel(registers).save_pretrained(folder / "facebook" / "dinov2-with-registers-small")
    settings = {"do_resize": True, "size": {"shortest_edge": 224}, "image_mean": [0.485, 0.456, 0.406]}
    settings |= {"image_std": [0.229, 0.224, 0.225], "image_processor_type": "BitImageProcessor"}
    (folder / "facebook" / "dinov2-small" / "preprocessor_config.json").write_text(json.dumps(settings))


def write_folders(folder: Path, videos: list[Path]) -> None:
    """Copy the videos into folders of clips and of classes, and write videos of other things."""
    for name in ("clips", "my_videos"):
        (folder / name).mkdir()
        for index, video in enumerate(videos[:8]):
            shutil.copyfile(video, folder / name / f"{index}.mp4")
    (folder / "more").mkdir()
    write_video(folder / "more" / "a.webm", num_frames=20, codec="libvpx-vp9")
    for split, copies in {"train": 2, "validation": 5, "test": 1}.items():
        for label in MOTIONS:
            ours = [video for video in videos if video.parent.name == label]
            for index in range(copies):
                target = folder / "videos" / split / label / f"{index}.mp4"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ours[index % len(ours)], target)
    strange = folder / "videos" / "of_other_things"
    strange.mkdir()
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
        write_video(strange / f"{seed}.mp4", noise)


def write_lists(folder: Path) -> None:
    """Write lists of the clips with labels and patients, and of their parts."""
    clips = sorted((folder / "clips").iterdir())
    for name, videos in {"labels.csv": "clips", "train.csv": "clips", "test.csv": "my_videos"}.items():
        rows = [
            (f"{videos}/{clip.name}", list(MOTIONS)[index % 2], f"patient {index // 2} of {videos}")
            for index, clip in enumerate(clips)
        ]
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "patient"), *rows])
    rows = [(clip.name, list(MOTIONS)[index % 2]) for index, clip in enumerate(clips)]
    with (folder / "clips" / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    with (folder / "parts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "start", "end"), ("my.mp4", 0, 1), ("my.mp4", 1, 2)])
    (folder / "labels.json").write_text(json.dumps(list(MOTIONS)))
    (folder / "list.txt").write_text("".join(f"clips/{clip.name}\n" for clip in clips))
