"""The arguments of `vivit-hf finetune` and their help, without importing torch, which takes seconds."""

# ruff: noqa: RUF009 (`argument` makes a dataclass field)

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..presets_vivit import SHORT_VIDEO_POLICIES
from .recipes import RECIPES


Say = Callable[[str], None]

DTYPES = ("float32", "bfloat16")
CLASSIFIER_INITS = ("random", "probe")
DISTILLATION_TEMPERATURE = 3.0  # as in DeiT
DISTILLATION_WEIGHT = 0.5
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification")
_FLIPS = {"yes": 0.5, "true": 0.5, "auto": 0.5, "no": 0.0, "false": 0.0}  # YAML reads yes and no as true and false
SOURCES = (
    "Hub id or folder of a ViViT or an image ViT; timm (.safetensors) or JAX (.npz) weights; or a preset such as "
    "vivit-tiny, with new weights"
)


def argument(default: Any, text: str) -> Any:
    """Return the field of an argument with its help text."""
    return field(default=default, metadata={"help": text})


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"--{name} {value}: expected one of {', '.join(choices)}.")


@dataclass
class StartArguments:
    """The model that training starts from."""

    model_name_or_path: str = argument("google/vit-base-patch16-224-in21k", SOURCES)
    attention_type: str | None = argument(
        None,
        "from an image ViT: spatio_temporal, factorised_encoder, factorised_self_attention, "
        "factorised_dot_product_attention (default: factorised_encoder)",
    )
    embedding_type: str | None = argument(None, "from an image ViT: tubelet, uniform_frame_sampling")
    tubelet_size: str | None = argument(
        None, "from an image ViT: time,height,width; time alone keeps the patches of the image ViT"
    )
    num_sampled_frames: int | None = argument(None, "frames that uniform_frame_sampling takes from a clip")
    num_temporal_layers: int | None = argument(
        None, "layers of Model 2's temporal encoder; 0 is the average-pool baseline"
    )
    temporal_pooling: str | None = argument(
        None,
        "from an image ViT, Model 2: pooling over time: cls, mean, max, sum, concatenate, attention (default: as over "
        "space); with any but cls, the temporal encoder starts without effect",
    )
    tubelet_init: str | None = argument(
        None,
        "from an image ViT: central_frame, filter_inflation, approximate_rank_pooling, or random (default: "
        "central_frame)",
    )
    num_frames: int | None = argument(None, "frames of a clip (default: those of a ViViT, the recipe's, or 32)")
    image_size: int | None = argument(
        None, "height and width of a frame (default: that of a ViViT, the recipe's, or an image ViT's up to 224)"
    )
    merge_tokens: str | None = argument(
        None, "Models 1 and 2: tokens that each layer merges into similar ones: one number, or one per layer (8,8,4,0)"
    )
    attn_implementation: str | None = argument(None, "eager, sdpa, flash_attention_2, ...")


@dataclass
class ModelArguments(StartArguments):
    """The model to start from, and which of its weights are trained."""

    temporal_attention_init: str | None = argument(
        None, "from an image ViT, Model 3: zero_output, zero, copy, random (default: zero_output)"
    )
    temporal_encoder_init: str | None = argument(
        None,
        "from an image ViT, Model 2: random, zero_output, copy_last (default: zero_output with a "
        "temporal_pooling other than cls, else random)",
    )
    drop_path_rate: float | None = argument(None, "stochastic depth")
    dtype: str = argument(
        "float32",
        f"dtype of the weights in training, however they are stored: {', '.join(DTYPES)}; --bf16 computes in bfloat16 "
        "with float32 weights",
    )
    freeze: str = argument("none", "none, spatial, all_but_head")
    cache_features: bool = argument(
        False, "Model 2 with --freeze: compute the frozen spatial encoder once, and train from the stored tokens"
    )
    num_cached_views: int = argument(
        1, "random clips of each training video that --cache_features stores, one for each epoch in turn"
    )
    classifier_init: str = argument(
        "random",
        "random, or probe: fit the classifier to the stored training tokens by logistic regression, and train on from "
        "there (with --cache_features; requires scikit-learn)",
    )
    lora_rank: int = argument(
        0,
        "train low-rank updates of the query and value projections, and new temporal modules in full; requires peft",
    )
    lora_alpha: float = argument(16.0, "scale of the low-rank updates")

    def __post_init__(self) -> None:
        from .parameters import FREEZINGS  # imports torch

        check_choice("dtype", self.dtype, DTYPES)
        check_choice("freeze", self.freeze, FREEZINGS)
        check_choice("classifier_init", self.classifier_init, CLASSIFIER_INITS)
        if self.num_cached_views < 1 or (self.num_cached_views > 1 and not self.cache_features):
            raise ValueError(
                f"--num_cached_views {self.num_cached_views}: expected at least 1, together with --cache_features."
            )
        if self.cache_features and self.lora_rank:
            raise ValueError(
                "--lora_rank changes the weights whose outputs --cache_features stores: leave one of them out."
            )
        if self.cache_features and self.freeze == "none":
            raise ValueError("--cache_features stores the outputs of frozen weights: add --freeze spatial.")
        if self.classifier_init == "probe" and not self.cache_features:
            raise ValueError("--classifier_init probe fits the classifier to stored tokens: add --cache_features.")
        if self.classifier_init == "probe" and not importlib.util.find_spec("sklearn"):
            raise ValueError(
                "--classifier_init probe requires scikit-learn: run `pip install 'vivit-hf[probe]'`, or give "
                "--classifier_init random."
            )
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank {self.lora_rank}: expected a positive rank, or 0 to train without LoRA.")
        if self.lora_rank and self.freeze != "none":
            raise ValueError("--lora_rank freezes all weights but its updates and the classifier: leave --freeze out.")
        if self.lora_rank and not importlib.util.find_spec("peft"):
            raise ValueError("--lora_rank requires peft: run `pip install peft`.")


@dataclass
class DataArguments:
    """The videos, their labels, and how clips are taken from them."""

    train_dir: str | None = argument(None, "folder with one folder of videos per class")
    validation_dir: str | None = argument(None, "the same for the validation videos")
    train_file: str | None = argument(None, "CSV, JSON or JSON lines of paths and labels")
    validation_file: str | None = argument(None, "the same for the validation videos")
    video_root: str | None = argument(None, "folder that the paths in files are relative to")
    annotation_format: str = argument("auto", "format of the files: auto, plain, kinetics, ssv2, epic")
    missing_videos: str = argument("error", "error, or skip to leave missing files out")
    allow_private_addresses: bool = argument(False, "allow downloads from this machine and the local network")
    dataset_name: str | None = argument(None, "Hub id or folder of a data set")
    dataset_config_name: str | None = argument(None, "configuration of the data set")
    train_split_name: str = argument("train", "split of the data set for training")
    validation_split_name: str | None = argument(
        None, "split of the data set for validation (default: validation or test, if there is one)"
    )
    streaming: bool = argument(
        False, "do not download the data set first; requires --max_steps; every process reads the whole stream"
    )
    shuffle_buffer_size: int = argument(100, "number of videos that a stream is shuffled among")
    video_column_name: str | None = argument(None, "default: path, video, file, ...")
    label_column_name: str | None = argument(
        None, "default: label, class, ...; several, as noun,verb, are groups of labels"
    )
    label_separator: str | None = argument(None, "separator between several labels of a video")
    split_column: str = argument(
        "auto",
        "column that says train, validation or test (default: split, subset or partition, if there is one; none: use "
        "all rows). Test rows serve as validation if there are no others; otherwise they are left out",
    )
    group_column: str | None = argument(
        None, "column whose values the split keeps together, such as patient, tape or speaker"
    )
    labels_file: str | None = argument(None, "all labels in the order of the model's output")
    problem_type: str = argument(PROBLEM_TYPES[0], " or ".join(PROBLEM_TYPES))
    allow_missing_labels: bool = argument(False, "allow classes without a validation video")
    train_val_split: float | None = argument(
        0.15,
        "share of the training data to validate on if there are no validation data; 0: none. Parts of one file, and "
        "videos of one --group_column value, stay together",
    )
    max_train_samples: int | None = argument(None, "use at most this many videos")
    max_eval_samples: int | None = argument(None, "use at most this many videos")
    frame_stride: int | None = argument(
        None, "distance between the frames of a clip (default: a ViViT's, the recipe's, or 2)"
    )
    frames_per_second: float | None = argument(None, "frame rate of a clip, in place of a stride")
    frame_sampling: str | None = argument(
        None,
        "clip: frames at that distance, or uniform: spread over the whole video (default: the start's, or clip)",
    )
    short_video_policy: str | None = argument(
        None,
        "videos with too few frames for a clip: repeat_last, loop, mask (the model sees the frames that there are and "
        "nothing else), or error (default: the start's, or repeat_last)",
    )
    resize: int | None = argument(None, "short side before the crop, in pixels")
    resize_ratio: float | None = argument(
        None, "the same as a multiple of the crop (default: the start's or the recipe's, or 256 / 224)"
    )
    num_clips: int = argument(1, "clips per video in the final evaluation (paper: 4)")
    num_crops: int = argument(1, "crops per clip in the final evaluation, 1 or 3 (paper: 3)")

    def __post_init__(self) -> None:
        check_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        if self.frame_sampling is not None:
            check_choice("frame_sampling", self.frame_sampling, ("clip", "uniform"))
        if self.short_video_policy is not None:
            check_choice("short_video_policy", self.short_video_policy, SHORT_VIDEO_POLICIES)
        for name in ("max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1.")


@dataclass
class AugmentationArguments:
    """Regularisation. All of it is off unless it is given here or in the recipe; random crops are always on."""

    horizontal_flip: str = argument("no", "yes, no, or auto: yes unless class names mention a side or a turn")
    scale_jitter: str | None = argument(None, "smallest and largest factor, such as 0.9,1.33")
    colour_jitter: float = argument(0.0, "probability")
    colour_drop: float = argument(0.0, "probability of a grey clip")
    rand_augment_layers: int = argument(0, "operations per clip")
    rand_augment_magnitude: float = argument(10.0, "10 is the full scale")
    mixup_alpha: float = argument(0.0, "alpha of the Beta distribution")
    cutmix_alpha: float = argument(0.0, "alpha of the Beta distribution")

    def __post_init__(self) -> None:
        if str(self.horizontal_flip).lower() not in _FLIPS:
            raise ValueError(f"--horizontal_flip {self.horizontal_flip}: expected yes, no or auto.")
        self.scale_factors()

    def flip_probability(self, names_with_sides: Sequence[str]) -> float:
        """Return the probability of a flip; with "auto" it is 0 if class names mention a side."""
        choice = str(self.horizontal_flip).lower()
        return 0.0 if choice == "auto" and names_with_sides else _FLIPS[choice]

    def scale_factors(self) -> tuple[float, float] | None:
        """Return the smallest and the largest factor of the scale jitter, or None without one."""
        if not self.scale_jitter:
            return None
        try:
            smallest, largest = (float(factor) for factor in self.scale_jitter.split(","))
        except ValueError:
            raise ValueError(f"--scale_jitter {self.scale_jitter}: expected two factors such as 0.9,1.33.") from None
        return smallest, largest


@dataclass
class VideoDefaults:
    """What all training on videos adds to transformers' `TrainingArguments`, and other defaults."""

    ema_decay: float = argument(0.0, "decay of a moving average of the weights, which is evaluated and saved; 0: none")
    ddp_find_unused_parameters: bool | None = argument(False, "search for parameters without a gradient in each step")
    logging_steps: float = argument(10, "optimiser steps; below 1, a share of all steps")
    remove_unused_columns: bool = argument(False, "has no effect on videos")
    dataloader_num_workers: int = argument(min(8, os.cpu_count() or 1), "processes that decode videos, per device")
    report_to: None | str | list[str] = argument(  # noqa: RUF036 (the order that HfArgumentParser reads)
        "tensorboard" if importlib.util.find_spec("tensorboard") else "none", "tensorboard, wandb, all, none, ..."
    )


@dataclass
class OurTrainingArguments(VideoDefaults):
    """What `FineTuningArguments` adds to transformers' `TrainingArguments`, and other defaults for videos."""

    recipe: str | None = argument(
        None,
        "arguments to start from: " + "; ".join(f"{one.name} ({one.description})" for one in RECIPES.values()),
    )
    layer_decay: float = argument(1.0, "factor of the learning rate from layer to layer")
    early_stopping_patience: int = argument(
        0,
        "stop after this many evaluations without a lower loss, or a better --metric_for_best_model; 0: never",
    )
    teacher: str | None = argument(
        None,
        "Hub id or folder of a trained ViViT, VideoMAE, TimeSformer, V-JEPA 2, ... to distil from; its labels are "
        "matched by name",
    )
    distillation_temperature: float = argument(
        DISTILLATION_TEMPERATURE, "divides the logits of teacher and student in the distillation loss"
    )
    distillation_weight: float = argument(
        DISTILLATION_WEIGHT, "share of the distillation loss; the rest is that of the labels"
    )
    class_weights: bool = argument(False, "give the loss of rare classes more weight")
    balanced_sampling: bool = argument(False, "draw all classes equally often")
    averaging: str = argument("probabilities", "what is averaged over views: probabilities or logits")
    overfit_one_batch: bool = argument(False, "only test whether the model can learn one batch by heart")
    overfit_steps: int = argument(200, "maximum number of steps of that test")
    save_batch_picture: str | None = argument(None, "save a picture of the first training batch to FILE")
    hub_endpoint: bool = argument(
        False, "with --push_to_hub, also upload a handler for Hugging Face's Inference Endpoints"
    )
    eval_strategy: str = argument("epoch", "no, steps or epoch")
    save_strategy: str = argument("epoch", "no, steps, epoch or best")


USAGE = "vivit-hf finetune [settings.yaml] --output_dir DIR [arguments]"
_DESCRIPTION = """
Fine-tune a ViViT on your videos with transformers' Trainer.

    vivit-hf finetune --train_dir videos/train --validation_dir videos/test \\
        --model_name_or_path google/vit-base-patch16-224-in21k --recipe small-data --output_dir my_vivit
    vivit-hf finetune settings.yaml --learning_rate 1e-4           arguments from a file; the command line overrides it
    vivit-hf finetune --do_eval --model_name_or_path my_vivit --validation_dir videos/test --output_dir scores
    vivit-hf finetune --help-all                                   all arguments, including all of the Trainer's
    torchrun --nproc_per_node 8 -m vivit_hf finetune ...           several GPUs; on CPUs add --use_cpu

The data are a folder of class folders (--train_dir), a CSV or JSON of paths and labels or the annotations of Kinetics,
Something-Something v2 or EPIC-Kitchens (--train_file), or a data set of the Hub (--dataset_name). They are checked
before a model is loaded. After an interruption, run the same command again to continue from the last whole checkpoint.
"""
# Those of the Trainer's arguments that --help shows.
TRAINER_ARGUMENTS = {
    "output_dir": "folder for checkpoints and results",
    "do_eval": "evaluate at the end; without --do_train, do nothing else",
    "num_train_epochs": "passes over the training videos",
    "max_steps": "optimiser steps, in place of passes",
    "per_device_train_batch_size": "clips per device and step in training",
    "per_device_eval_batch_size": "clips per device and step in evaluation",
    "gradient_accumulation_steps": "steps whose gradients are added up for one update",
    "learning_rate": "learning rate after the warm-up",
    "weight_decay": "weight decay of the optimiser",
    "warmup_steps": "steps in which the learning rate rises; below 1, a share of all steps",
    "lr_scheduler_type": "how the learning rate falls: linear, cosine, constant ...",
    "max_grad_norm": "norm at which gradients are clipped",
    "optim": "optimiser: adamw_torch, sgd ...",
    "label_smoothing_factor": "share of each label that is spread over all classes",
    "train_sampling_strategy": "random, or group_by_length: batches of clips of similar length, with "
    "--short_video_policy mask",
    "seed": "seed of weights, order and augmentation",
    "bf16": "compute in bfloat16 with float32 weights",
    "gradient_checkpointing": "compute activations twice to save memory",
    "torch_compile": "compile the model",
    "use_cpu": "train on the CPU even if there is a GPU",
    "ddp_backend": "how several processes communicate: nccl, gloo ...",
    "save_total_limit": "checkpoints to keep",
    "load_best_model_at_end": "end with the best checkpoint",
    "metric_for_best_model": "the score that decides which checkpoint is best",
    "resume_from_checkpoint": "checkpoint to continue from (default: the last one in --output_dir)",
    "push_to_hub": "upload the model to the Hub",
    "hub_model_id": "repository on the Hub",
    "hub_private_repo": "make the repository private if it is created",
}


def help_text(others: Iterable[argparse.Action] = ()) -> str:
    """Return our arguments in groups, the Trainer's most common ones, and other arguments of the Trainer."""
    groups = {
        "model": ModelArguments,
        "data": DataArguments,
        "augmentation": AugmentationArguments,
        "training and evaluation": OurTrainingArguments,
    }
    return format_help("vivit-hf finetune", f"usage: {USAGE}\n{_DESCRIPTION}", groups, TRAINER_ARGUMENTS, others)


def format_help(
    program: str,
    introduction: str,
    groups: Mapping[str, Any],
    trainer_arguments: Mapping[str, str],
    others: Iterable[argparse.Action],
) -> str:
    """Return the help of a training command: an introduction, and its arguments in sections with titles."""
    sections: dict[str, list[tuple[str, str, Any]]] = {
        title: [
            (one.name, one.metadata["help"], "?" if one.type is bool else None)
            # The defaults of all training on videos come last.
            for one in sorted(fields(group), key=lambda one: one.name in VideoDefaults.__annotations__)
        ]
        for title, group in groups.items()
    }
    sections["the most common arguments of transformers' Trainer"] = [
        (name, text, None) for name, text in trainer_arguments.items()
    ]
    sections["the other arguments of transformers' Trainer"] = [
        (action.dest, action.help or "", action.nargs) for action in others
    ]
    formatter = argparse.RawDescriptionHelpFormatter(program, max_help_position=36, width=120)
    formatter.add_text(introduction)
    for title, arguments in sections.items():
        formatter.start_section(title)
        for name, text, nargs in arguments:
            formatter.add_argument(argparse.Action([f"--{name}"], name, nargs=nargs, metavar="VALUE", help=text))
        formatter.end_section()
    return formatter.format_help()
