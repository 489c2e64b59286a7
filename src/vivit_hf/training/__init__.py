"""Clips, augmentation, mixing, optimiser groups, checkpoints, the trainer, recipes and fine-tuning."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .augmentation import ClipAugmentation as ClipAugmentation
    from .clips import ClipSampler as ClipSampler, StreamedClips as StreamedClips, VideoClips as VideoClips
    from .finetuning import FineTuning as FineTuning, prepare as prepare
    from .finetuning_model import add_lora as add_lora
    from .finetuning_parser import parse_arguments as parse_arguments
    from .mixing import ClipCollator as ClipCollator, cutmix as cutmix, mixup as mixup, soft_labels as soft_labels
    from .overfitting import OverfitReport as OverfitReport, overfit_one_batch as overfit_one_batch
    from .parameters import freeze as freeze, gradient_norms as gradient_norms, parameter_groups as parameter_groups
    from .recipes import RECIPES as RECIPES, Recipe as Recipe
    from .trainer import ClipTrainer as ClipTrainer

__getattr__, __dir__, __all__ = lazy_exports(__name__)
