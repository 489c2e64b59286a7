"""The official training recipes by name (google-research/scenic projects/vivit, configs), and one for small data.

A recipe is a set of arguments of `vivit-hf finetune`; explicit arguments override it. Its settings of the model and of
clips apply to a model that starts from an image ViT; a ViViT keeps its own. Learning rates are for
`REFERENCE_BATCH_SIZE` clips per step and are scaled to the actual batch, Adam's also to the width (see
`Recipe.learning_rate`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


REFERENCE_BATCH_SIZE = 64
REFERENCE_WIDTH = 768  # hidden size of ViT-B
_WARMUP_EPOCHS = 2.5

_BASE = {"model_name_or_path": "google/vit-base-patch16-224-in21k"}
_LARGE = {"model_name_or_path": "google/vit-large-patch16-224-in21k"}
_KINETICS_B = {**_BASE, "num_train_epochs": 30, "colour_jitter": 0.8, "colour_drop": 0.1}
_KINETICS_L = {**_KINETICS_B, **_LARGE}
_FACTORISED = {"attention_type": "factorised_encoder", "num_temporal_layers": 4}
_FACTORISED_24 = {**_FACTORISED, "num_temporal_layers": 24}


@dataclass(frozen=True)
class Recipe:
    """Arguments of `vivit-hf finetune`.

    `arguments` always apply; their `learning_rate` is for `REFERENCE_BATCH_SIZE` clips per step, and with Adam for a
    model of `REFERENCE_WIDTH`. Those in `model` (structure, frames, sizes) apply unless the model that training starts
    from has its own.
    """

    name: str
    description: str
    arguments: Mapping[str, Any]
    model: Mapping[str, Any]

    @property
    def is_adaptive(self) -> bool:
        """Whether the optimiser is an Adam, which divides gradients by their size."""
        return self.arguments["optim"] != "sgd"

    def learning_rate(self, batch_size: int, width: int) -> float:
        """Return the learning rate for a batch size and the hidden size of a model.

        That of SGD is proportional to the batch (Goyal et al., 2017, arXiv:1706.02677). That of Adam is proportional to
        the square root of the batch (Malladi et al., 2022, arXiv:2205.10287) and to 1 / width (Yang et al., 2022,
        arXiv:2203.03466, table 3).

        Args:
            batch_size: clips per step, over all devices and accumulated batches.
            width: `hidden_size` of the model.
        """
        rate, ratio = float(self.arguments["learning_rate"]), batch_size / REFERENCE_BATCH_SIZE
        return rate * ratio**0.5 * REFERENCE_WIDTH / width if self.is_adaptive else rate * ratio


# The short side of a frame is relative to the crop, so that it fits any --image_size.
_OFFICIAL_MODEL: dict[str, Any] = {
    "embedding_type": "tubelet",
    "tubelet_init": "central_frame",
    "num_frames": 32,
    "frame_stride": 2,
    "image_size": 224,
    "resize_ratio": 256 / 224,
}


def _official(name: str, description: str, learning_rate: float, model: Mapping[str, Any], **arguments: Any) -> Recipe:
    """Return an official recipe; the views are those of the paper's tests."""
    merged = {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": learning_rate,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": _WARMUP_EPOCHS / arguments["num_train_epochs"],  # below 1: a share of all steps
        "per_device_train_batch_size": 64,
        "horizontal_flip": "auto",
        "scale_jitter": "0.9,1.33",
        "num_clips": 4,
        "num_crops": 3,
        **arguments,
    }
    return Recipe(name, description, merged, {**_OFFICIAL_MODEL, **model})


_ALL = (
    _official("k400-b", "Kinetics-400, B/16x2, Model 1", 0.1, {"attention_type": "spatio_temporal"}, **_KINETICS_B),
    _official("k400-b-fe", "Kinetics-400, B/16x2 factorised encoder", 0.05, _FACTORISED, **_KINETICS_B),
    _official("k400-l-fe", "Kinetics-400, L/16x2 factorised encoder", 0.1, _FACTORISED_24, **_KINETICS_L),
    _official("k600-l-fe", "Kinetics-600, L/16x2 factorised encoder", 0.05, _FACTORISED_24, **_KINETICS_L),
    _official(
        "ssv2-l-fe",
        "Something-Something v2, L/16x2 factorised encoder",
        0.4,
        {**_FACTORISED, "frame_stride": 1, "image_size": 256, "resize_ratio": 288 / 256},
        **_LARGE,
        num_train_epochs=35,
        drop_path_rate=0.3,
        label_smoothing_factor=0.3,
        mixup_alpha=0.3,
        rand_augment_layers=2,
        rand_augment_magnitude=20,
    ),
    _official(
        "epic-l-fe",
        "EPIC-Kitchens-100, L/16x2 factorised encoder",
        0.5,
        {**_FACTORISED, "frame_stride": 1},
        **_LARGE,
        num_train_epochs=50,
        drop_path_rate=0.2,
        label_smoothing_factor=0.2,
        mixup_alpha=0.1,
        rand_augment_layers=2,
        rand_augment_magnitude=15,
        num_crops=1,
    ),
    # Ours: AdamW, and low learning rates near the input. Weight decay, layer decay and label smoothing are those of
    # fine-tuning in VideoMAE (Tong et al., 2022, arXiv:2203.12602), drop path that of its runs on UCF101; the learning
    # rate is near those of VideoMAE for batches of 256 to 768 (tests/training/test_recipes.py). Mixup is that of ViViT
    # on Something-Something v2.
    Recipe(
        "small-data",
        "a few hundred clips and one GPU",
        {
            **_BASE,
            "optim": "adamw_torch",
            "learning_rate": 4e-4,
            "weight_decay": 0.05,
            "max_grad_norm": 1.0,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "num_train_epochs": 30,
            "per_device_train_batch_size": 8,
            "layer_decay": 0.75,
            "horizontal_flip": "auto",
            "scale_jitter": "0.9,1.33",
            "rand_augment_layers": 1,  # people cannot recognise clips after two at full scale
            "rand_augment_magnitude": 4,
            "drop_path_rate": 0.2,
            "label_smoothing_factor": 0.1,
            "mixup_alpha": 0.3,
            "early_stopping_patience": 10,
            "num_clips": 4,
            "num_crops": 3,
        },
        {**_OFFICIAL_MODEL, **_FACTORISED},
    ),
    # Ours: the image model stays as it is, and its features are computed once.
    Recipe(
        "few-labels",
        "a handful of clips per class, and no GPU",
        {
            "model_name_or_path": "facebook/dinov2-small",
            "freeze": "spatial",
            "cache_features": True,
            "num_cached_views": 2,
            "classifier_init": "probe",
            "optim": "adamw_torch",
            "learning_rate": 7e-5,  # 5e-5 for 8 clips and DINOv2 ViT-S: the classifier is trained already
            "weight_decay": 0.05,
            "max_grad_norm": 1.0,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "num_train_epochs": 10,
            "per_device_train_batch_size": 8,
            # Without scale jitter: a classifier of few clips must see them as they are in the test.
            "horizontal_flip": "auto",
            "save_strategy": "no",
        },
        {
            "attention_type": "factorised_encoder",
            "embedding_type": "tubelet",
            "tubelet_size": [1],
            "num_temporal_layers": 1,
            "temporal_pooling": "concatenate",
            "num_frames": 16,
            "frame_sampling": "uniform",
            "resize_ratio": 1.0,  # the whole short side: crops move along the long side alone
        },
    ),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
