"""The arguments of `vivit-hf pretrain` and their help, without importing torch, which takes seconds."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..presets_vivit import SHORT_VIDEO_POLICIES
from .finetuning_arguments import (
    SOURCES,
    TRAINER_ARGUMENTS,
    StartArguments,
    VideoDefaults,
    argument,
    check_choice,
    format_help,
)


# Tube masks hide the same places in all time steps of a clip, so no step is masked as a whole.
PRETRAINING_POLICIES = tuple(policy for policy in SHORT_VIDEO_POLICIES if policy != "mask")


@dataclass
class PretrainingModelArguments(StartArguments):
    """The model to start from, its decoder and its masks."""

    model_name_or_path: str = argument("vivit-b-16x2-fe", SOURCES)
    attention_type: str | None = argument(
        None, "of a preset or from an image ViT: spatio_temporal or factorised_encoder (default)"
    )
    mask_ratio: float | None = argument(
        None, "share of the places to mask in all time steps (default: a pretrained ViViT's, or 0.9)"
    )
    decoder_hidden_size: int | None = argument(
        None, "width of a new decoder (default: half of the encoder's, in whole heads)"
    )
    decoder_num_hidden_layers: int | None = argument(None, "its layers (default: a quarter of the encoder's)")
    decoder_num_attention_heads: int | None = argument(None, "its heads (default: half of the encoder's)")


@dataclass
class PretrainingDataArguments:
    """The videos, and how clips are taken from them."""

    videos: str = field(metadata={"help": "the folder or file of videos, if it is not the first argument"})
    video_root: str | None = argument(None, "folder that the paths in a file are relative to")
    video_column_name: str | None = argument(None, "default: path, video, file, ...")
    split_column: str = argument(
        "auto",
        "column that says train, validation or test (default: split, subset or partition, if there is one; none: use "
        "all rows); only training rows are used",
    )
    missing_videos: str = argument("error", "error, or skip to leave missing files out")
    allow_private_addresses: bool = argument(False, "allow downloads from this machine and the local network")
    frame_stride: int | None = argument(None, "distance between the frames of a clip (default: a ViViT's, or 2)")
    frames_per_second: float | None = argument(None, "frame rate of a clip, in place of a stride")
    short_video_policy: str | None = argument(
        None,
        f"videos with too few frames for a clip: {', '.join(PRETRAINING_POLICIES)} (default: the start's, or "
        "repeat_last)",
    )
    resize: int | None = argument(None, "short side of a frame before the crop, in pixels")
    resize_ratio: float | None = argument(None, "the same as a multiple of the crop (default: 256 / 224)")
    horizontal_flip: str = argument("yes", "yes: flip half of the clips; or no")
    scale_jitter: str | None = argument("0.9,1.33", "smallest and largest factor of a random scale")

    def __post_init__(self) -> None:
        if str(self.horizontal_flip).lower() not in ("yes", "no"):
            raise ValueError(f"--horizontal_flip {self.horizontal_flip}: expected yes or no.")
        if self.short_video_policy is not None:
            check_choice("short_video_policy", self.short_video_policy, PRETRAINING_POLICIES)


@dataclass
class PretrainingDefaults(VideoDefaults):
    """What `PretrainingArguments` adds to transformers' `TrainingArguments`, and other defaults."""

    picture_steps: int = argument(100, "draw reconstructions into OUTPUT_DIR/reconstructions every N steps; 0: never")
    num_train_epochs: float = argument(100.0, "passes over the videos, each with another clip of them")
    learning_rate: float = argument(3e-4, "highest learning rate")
    weight_decay: float = argument(0.05, "of AdamW")
    adam_beta2: float = argument(0.95, "of AdamW")
    warmup_steps: float = argument(0.1, "steps of the warm-up; below 1, a share of all steps")
    lr_scheduler_type: str = argument("cosine", "course of the learning rate")
    save_strategy: str = argument("epoch", "no, steps or epoch")
    save_total_limit: int | None = argument(2, "checkpoints to keep")


_NOT_HERE = (
    "do_eval",
    "per_device_eval_batch_size",
    "label_smoothing_factor",
    "load_best_model_at_end",
    "metric_for_best_model",
    "train_sampling_strategy",
)
_GROUPS = {"model": PretrainingModelArguments, "data": PretrainingDataArguments, "training": PretrainingDefaults}
COMMON = {
    name: text
    for name, text in TRAINER_ARGUMENTS.items()
    if name not in (*_NOT_HERE, *PretrainingDefaults.__dataclass_fields__)
}
USAGE = "vivit-hf pretrain VIDEOS --output_dir DIR [arguments]"
_DESCRIPTION = """
Pretrain a ViViT on videos without labels: masked autoencoding with tube masks (VideoMAE), for Models 1 and 2.

    vivit-hf pretrain videos --model_name_or_path vivit-tiny --output_dir pretrained            new weights
    vivit-hf pretrain videos.csv --model_name_or_path google/vit-base-patch16-224-in21k --output_dir pretrained
    vivit-hf finetune --train_dir labelled --model_name_or_path pretrained --output_dir my_vivit
    vivit-hf pretrain --help-all                                   all arguments, including all of the Trainer's
    torchrun --nproc_per_node 8 -m vivit_hf pretrain ...           several GPUs; on CPUs add --use_cpu

VIDEOS is a folder, searched with its subfolders, or a CSV or JSON with a column of paths; labels are ignored. After an
interruption, run the same command again to continue from the last whole checkpoint.
"""


def help_text(others: Iterable[argparse.Action] = ()) -> str:
    """Return our arguments in groups, the Trainer's most common ones, and other arguments of the Trainer."""
    return format_help("vivit-hf pretrain", f"usage: {USAGE}\n{_DESCRIPTION}", _GROUPS, COMMON, others)
