"""The arguments of `vivit-hf finetune`, which are those of `examples/finetune.py`."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import TrainingArguments

from ..configuration_vivit import ATTENTION_TYPES, EMBEDDING_TYPES
from ..data.annotations import FORMATS
from ..inference.views import AVERAGINGS
from ..initialisation.from_image import TEMPORAL_ATTENTION_INITS, TEMPORAL_ENCODER_INITS, TUBELET_INITS
from .parameters import FREEZINGS
from .recipes import RECIPES


DTYPES = ("float32", "bfloat16")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification")
_FLIPS = {"yes": 0.5, "true": 0.5, "auto": 0.5, "no": 0.0, "false": 0.0}  # YAML reads yes and no as true and false


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"--{name} {value}: expected one of {', '.join(choices)}.")


@dataclass
class ModelArguments:
    """The model to start from, and which of its weights are trained."""

    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={
            "help": "Hub id or folder of a ViViT or an image ViT; timm (.safetensors) or JAX (.npz) weights; or a "
            "preset such as vivit-tiny"
        },
    )
    attention_type: str | None = field(
        default=None,
        metadata={"help": f"from an image ViT: {', '.join(ATTENTION_TYPES)} (default: factorised_encoder)"},
    )
    embedding_type: str | None = field(
        default=None, metadata={"help": f"from an image ViT: {', '.join(EMBEDDING_TYPES)}"}
    )
    tubelet_size: str | None = field(default=None, metadata={"help": "from an image ViT: time,height,width"})
    num_sampled_frames: int | None = field(default=None, metadata={"help": "with uniform_frame_sampling"})
    num_temporal_layers: int | None = field(
        default=None, metadata={"help": "layers of Model 2's temporal encoder; 0 is the average-pool baseline"}
    )
    tubelet_init: str | None = field(
        default=None,
        metadata={"help": f"from an image ViT: {', '.join(TUBELET_INITS)}, or random (default: central_frame)"},
    )
    temporal_attention_init: str | None = field(
        default=None,
        metadata={"help": f"from an image ViT, Model 3: {', '.join(TEMPORAL_ATTENTION_INITS)} (default: zero_output)"},
    )
    temporal_encoder_init: str | None = field(
        default=None,
        metadata={"help": f"from an image ViT, Model 2: {', '.join(TEMPORAL_ENCODER_INITS)} (default: random)"},
    )
    num_frames: int | None = field(
        default=None, metadata={"help": "frames of a clip (default: those of a ViViT, the recipe's, or 32)"}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "height and width of a frame (default: that of a ViViT, the recipe's, or an image ViT's up to 224)"
        },
    )
    drop_path_rate: float | None = field(default=None, metadata={"help": "stochastic depth"})
    dtype: str = field(
        default="float32",
        metadata={
            "help": f"dtype of the weights in training, however they are stored: {', '.join(DTYPES)}; --bf16 computes "
            "in bfloat16 with float32 weights"
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    freeze: str = field(default="none", metadata={"help": ", ".join(FREEZINGS)})
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "train low-rank updates of the query and value projections, and new temporal modules in full; "
            "requires peft"
        },
    )
    lora_alpha: float = field(default=16.0, metadata={"help": "scale of the low-rank updates"})

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("freeze", self.freeze, FREEZINGS)
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank {self.lora_rank}: expected a positive rank, or 0 to train without LoRA.")
        if self.lora_rank and self.freeze != "none":
            raise ValueError("--lora_rank freezes all weights but its updates and the classifier: leave --freeze out.")
        if self.lora_rank and not importlib.util.find_spec("peft"):
            raise ValueError("--lora_rank requires peft: run `pip install peft`.")


@dataclass
class DataArguments:
    """The videos, their labels, and how clips are taken from them."""

    train_dir: str | None = field(default=None, metadata={"help": "folder with one folder of videos per class"})
    validation_dir: str | None = field(default=None, metadata={"help": "the same for validation"})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON or JSON lines of paths and labels"})
    validation_file: str | None = field(default=None, metadata={"help": "the same for validation"})
    video_root: str | None = field(default=None, metadata={"help": "folder that the paths in files are relative to"})
    annotation_format: str = field(default="auto", metadata={"help": f"format of the files: {', '.join(FORMATS)}"})
    missing_videos: str = field(default="error", metadata={"help": "error, or skip to leave missing files out"})
    allow_private_addresses: bool = field(
        default=False, metadata={"help": "allow downloads from this machine and the local network"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder of a data set"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of the data set"})
    train_split_name: str = field(default="train", metadata={"help": "split of the data set for training"})
    validation_split_name: str | None = field(
        default=None,
        metadata={"help": "split of the data set for validation (default: validation or test, if there is one)"},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "do not download the data set first; requires --max_steps; every process reads the whole stream"
        },
    )
    shuffle_buffer_size: int = field(default=100, metadata={"help": "number of videos that a stream is shuffled among"})
    video_column_name: str | None = field(default=None, metadata={"help": "default: path, video, file, ..."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "default: label, class, ...; several, as noun,verb, are groups of labels"}
    )
    label_separator: str | None = field(default=None, metadata={"help": "separator between several labels of a video"})
    split_column: str = field(
        default="auto",
        metadata={
            "help": "column that says train, validation or test (default: split, subset or partition, if there is "
            "one; none: use all rows). Test rows serve as validation if there are no others; otherwise they are "
            "left out"
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "column whose values the split keeps together, such as patient, tape or speaker"},
    )
    labels_file: str | None = field(default=None, metadata={"help": "all labels in the order of the model's output"})
    problem_type: str = field(default=PROBLEM_TYPES[0], metadata={"help": " or ".join(PROBLEM_TYPES)})
    allow_missing_labels: bool = field(default=False, metadata={"help": "allow classes without a validation video"})
    train_val_split: float | None = field(
        default=0.15,
        metadata={
            "help": "share of the training data to validate on if there are no validation data; 0: none. Parts of one "
            "file, and videos of one --group_column value, stay together"
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use at most this many videos"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use at most this many videos"})
    frame_stride: int | None = field(
        default=None,
        metadata={"help": "distance between the frames of a clip (default: a ViViT's, the recipe's, or 2)"},
    )
    frames_per_second: float | None = field(
        default=None, metadata={"help": "frame rate of a clip, in place of a stride"}
    )
    resize: int | None = field(default=None, metadata={"help": "short side before the crop, in pixels"})
    resize_ratio: float | None = field(
        default=None,
        metadata={"help": "the same as a multiple of the crop (default: the start's or the recipe's, or 256 / 224)"},
    )
    num_clips: int = field(default=1, metadata={"help": "clips per video in the final evaluation (paper: 4)"})
    num_crops: int = field(default=1, metadata={"help": "crops per clip in the final evaluation, 1 or 3 (paper: 3)"})

    def __post_init__(self) -> None:
        _check_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        for name in ("max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1.")


@dataclass
class AugmentationArguments:
    """Regularisation. All of it is off unless it is given here or in the recipe; random crops are always on."""

    horizontal_flip: str = field(
        default="no", metadata={"help": "yes, no, or auto: yes unless class names mention a side or a turn"}
    )
    scale_jitter: str | None = field(default=None, metadata={"help": "smallest and largest factor, such as 0.9,1.33"})
    colour_jitter: float = field(default=0.0, metadata={"help": "probability"})
    colour_drop: float = field(default=0.0, metadata={"help": "probability of a grey clip"})
    rand_augment_layers: int = field(default=0, metadata={"help": "operations per clip"})
    rand_augment_magnitude: float = field(default=10.0, metadata={"help": "10 is the full scale"})
    mixup_alpha: float = field(default=0.0, metadata={"help": "alpha of the Beta distribution"})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "alpha of the Beta distribution"})

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
class FineTuningArguments(TrainingArguments):
    """transformers' `TrainingArguments` with defaults for videos, and a few more."""

    recipe: str | None = field(default=None, metadata={"help": f"arguments to start from: {', '.join(RECIPES)}"})
    layer_decay: float = field(default=1.0, metadata={"help": "factor of the learning rate from layer to layer"})
    class_weights: bool = field(default=False, metadata={"help": "weigh the loss of rare classes up"})
    balanced_sampling: bool = field(default=False, metadata={"help": "draw all classes equally often"})
    averaging: str = field(default="probabilities", metadata={"help": f"over views: {' or '.join(AVERAGINGS)}"})
    overfit_one_batch: bool = field(default=False, metadata={"help": "only test whether one batch can be learnt"})
    overfit_steps: int = field(default=200, metadata={"help": "maximum number of steps of that test"})
    save_batch_picture: str | None = field(default=None, metadata={"help": "draw the first training batch into FILE"})
    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "no, steps, epoch or best"})
    logging_steps: float = field(default=10, metadata={"help": "optimiser steps; below 1, a share of all steps"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "has no effect on videos"})
    dataloader_num_workers: int = field(
        default=min(8, os.cpu_count() or 1), metadata={"help": "processes that decode videos, per device"}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the order that HfArgumentParser reads)
        default="tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        metadata={"help": "tensorboard, wandb, all, none, ..."},
    )

    def __post_init__(self) -> None:
        _check_choice("averaging", self.averaging, AVERAGINGS)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay {self.layer_decay}: expected a factor above 0 and at most 1.")
        super().__post_init__()


class Arguments(NamedTuple):
    """All arguments of a run, by subject."""

    model: ModelArguments
    data: DataArguments
    augmentation: AugmentationArguments
    training: FineTuningArguments
