"""A fine-tuning run: everything is checked first, then the model is trained, saved, evaluated and pushed."""

import itertools
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, set_seed

from ..data.labels import LabelMap, class_weights
from ..explain.batch_picture import draw_batch
from ..hub.model_card import is_repo_id
from ..inference.metrics import describe_chance
from ..inference.views import describe_views
from ..modeling_vivit import ViViTForVideoClassification
from .augmentation import ClipAugmentation, names_with_sides
from .clip_lengths import GROUP_BY_LENGTH, describe_lengths
from .clips import StreamedClips, VideoClips
from .distillation import Distillation, check_distillation, load_teacher
from .feature_cache import CachedClips, FeatureCacheError, fill_caches, spatial_settings
from .finetuning_arguments import ModelArguments, Say
from .finetuning_data import Splits, load_splits
from .finetuning_model import Start, build_model, check_cache, labels_to_score
from .finetuning_parser import Arguments, FineTuningArguments, speaker
from .mixing import ClipCollator
from .overfitting import overfit_one_batch
from .parameters import freeze, parameter_groups
from .recipes import RECIPES, REFERENCE_BATCH_SIZE, REFERENCE_WIDTH
from .run_checks import check_machine, check_repository, check_start, find_checkpoint
from .trainer import ClipTrainer
from .training_run import TrainingRun


_ADAPTER_FOLDER, _CACHE_FOLDER = "adapter", "feature_cache"


@dataclass
class FineTuning(TrainingRun):
    """A fine-tuning run that has passed its checks, see `prepare`.

    `validation` has all views for the final evaluation, or is None.
    """

    validation: VideoClips | StreamedClips | None

    command = "finetune"
    model_class = ViViTForVideoClassification

    def run(self) -> None:
        """Train, save, evaluate and push, as far as the arguments ask for it."""
        training = self.arguments.training
        if training.save_batch_picture:
            draw_first_batch(self.trainer, training.save_batch_picture, self.say)
        num_workers = training.dataloader_num_workers
        if self.arguments.model.cache_features:
            self._fill_caches()
        if self.arguments.model.classifier_init == "probe" and self.checkpoint is None:
            from .probe_start import start_from_probe  # imports scikit-learn

            self.say(start_from_probe(self.trainer.model, self.trainer.train_dataset, training.seed))
        if training.overfit_one_batch:
            try_one_batch(self.trainer, training, self.say)
        if training.do_train:
            self.train()
            training.dataloader_num_workers = num_workers
        results = self._evaluate()
        damaged = self.trainer.all_damaged_files()
        if training.do_train:
            self.trainer.save_state()
            if training.should_save:
                self._publish(results, damaged)
        self.end()

    def _fill_caches(self) -> None:
        """Compute the tokens that are missing; reading them takes no further processes."""
        training = self.arguments.training
        try:
            fill_caches(self.trainer, training.dataloader_num_workers, self.say)
        except FeatureCacheError as error:
            raise SystemExit(f"finetune: {error}") from error
        training.dataloader_num_workers, training.dataloader_prefetch_factor = 0, None
        training.dataloader_persistent_workers = False

    def save(self) -> None:
        """Save model and processor; with LoRA also the adapter, and merge it into the model to evaluate."""
        trainer, adapter = self.trainer, self.folder / _ADAPTER_FOLDER
        if self.arguments.model.lora_rank:
            trainer.check_weights()
            if trainer.args.should_save:
                trainer.model.save_pretrained(adapter)
            trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
        elif trainer.args.should_save and (adapter / "adapter_config.json").exists():
            shutil.rmtree(adapter)  # it belongs to an earlier model in this folder
        super().save()

    def _evaluate(self) -> dict[str, Any]:
        """Score the model on all views of the validation videos; return no scores if there are none."""
        if self.validation is None:
            return {}
        data, training = self.arguments.data, self.arguments.training
        results: dict[str, Any] = self.trainer.evaluate(self.validation)
        results["eval_protocol"] = describe_views(
            self.start.processor, data.num_clips, data.num_crops, training.averaging
        )
        results["eval_damaged_files"] = len(self.trainer.all_damaged_files()["eval"])
        self.report("eval", results)
        if near_chance := describe_chance({name.removeprefix("eval_"): value for name, value in results.items()}):
            self.say(near_chance)
        return results

    def _publish(self, results: dict[str, Any], damaged: dict[str, dict[str, str]]) -> None:
        scores = {
            name.removeprefix("eval_"): value
            for name, value in results.items()
            if name.endswith(("top1", "top5", "_map")) and isinstance(value, float)
        }
        dataset = self.arguments.data.dataset_name
        self.publish(
            damaged,
            endpoint=self.arguments.training.hub_endpoint,
            report=self.start.report,
            datasets=dataset if is_repo_id(dataset) else None,
            metrics=["accuracy"],
            results=scores,
            protocol=results.get("eval_protocol"),
            distillation=self.trainer.distillation.describe() if self.trainer.distillation else "",
        )


def prepare(arguments: Arguments, echo: Say = print) -> FineTuning:
    """Check everything that can be checked before training, and set the run up.

    `echo` prints one text; only the first process uses it. Raises ValueError for arguments, data, a model, a checkpoint
    or an output folder that cannot be used, and OSError for files that cannot be read.
    """
    model_arguments, data, _, training = arguments
    say = speaker(training, echo)
    check_output(model_arguments, training)
    check_machine(training, say)
    own_labels = None if training.do_train else labels_to_score(model_arguments.model_name_or_path)
    splits = load_splits(data, training.seed, say, own_labels)
    check_fit(training, splits)
    if training.hub_endpoint and not training.push_to_hub:
        raise ValueError("--hub_endpoint uploads a handler with the model: give --push_to_hub as well.")
    push = check_repository(training)
    set_seed(training.seed)
    checkpoint = find_checkpoint(training, say)
    start = build_model(model_arguments, data, splits.label_map, say, recipe=training.recipe)
    check_cache(arguments, start.model.config)
    check_views(arguments, start, splits, say)
    check_lengths(training, start)
    frozen = [] if model_arguments.lora_rank else freeze(start.model, model_arguments.freeze)
    if training.do_train:
        check_start(training, start, model_arguments, checkpoint)
        if training.scales_learning_rate:
            scale_learning_rate(training, start.model.config.hidden_size, say)
        trained = sum(parameter.numel() for parameter in start.model.parameters() if parameter.requires_grad)
        say(f"{trained:,} parameters to train" + f", {len(frozen)} tensors frozen" * bool(frozen))
    label_map = LabelMap.from_config(start.model.config)  # in the order of a classifier that is kept
    splits = replace(splits, label_map=label_map)
    distillation = make_distillation(arguments, start, label_map, say)
    if checkpoint is not None:
        check_distillation(checkpoint, distillation)
    trainer, validation = make_trainer(arguments, splits, start.model, start.processor, say, distillation)
    if training.do_train and training.train_sampling_strategy == GROUP_BY_LENGTH:
        say(describe_lengths(trainer.clip_lengths, start.processor.num_frames))
    return FineTuning(arguments, start, trainer, checkpoint, push, say, validation)


def scale_learning_rate(training: FineTuningArguments, width: int, say: Say) -> None:
    """Scale the learning rate of a recipe to the batch and to the width of the model."""
    recipe = RECIPES[str(training.recipe)]
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    training.learning_rate = recipe.learning_rate(batch, width)
    known, found = (f" and width {size}" * recipe.is_adaptive for size in (REFERENCE_WIDTH, width))
    say(
        f"Recipe {recipe.name}: learning rate {recipe.arguments['learning_rate']:g} for {REFERENCE_BATCH_SIZE} clips "
        f"per step{known}, so {training.learning_rate:.3g} for {batch}{found}."
    )


# Checks before training


def check_output(arguments: ModelArguments, training: FineTuningArguments) -> None:
    """Raise ValueError if the output folder is the base of LoRA, or a picture has no folder."""
    folder = Path(training.output_dir)
    if arguments.lora_rank and Path(arguments.model_name_or_path).resolve() == folder.resolve():
        raise ValueError(
            f"--output_dir {folder} is the model itself, whose original weights --lora_rank needs to resume: give "
            "another folder."
        )
    picture = training.save_batch_picture
    if picture is not None and not Path(picture).absolute().parent.is_dir():
        raise ValueError(f"--save_batch_picture {picture}: there is no such folder.")


def check_fit(training: FineTuningArguments, splits: Splits) -> None:
    """Raise ValueError for arguments that do not go with the data."""
    if not training.do_train:
        if splits.validation is None:
            raise ValueError("--do_eval: there are no validation videos: give --validation_dir or --validation_file.")
        for name in ("overfit_one_batch", "save_batch_picture", "teacher"):
            if getattr(training, name):
                raise ValueError(f"--{name} needs training videos: leave it or --do_eval out.")
        return
    if isinstance(splits.train, list):
        return
    if training.train_sampling_strategy == GROUP_BY_LENGTH:
        raise ValueError(
            f"--train_sampling_strategy {GROUP_BY_LENGTH} needs the lengths of the training videos, which a stream "
            "does not list: leave it or --streaming out."
        )
    for name in ("class_weights", "balanced_sampling"):
        if getattr(training, name):
            raise ValueError(
                f"--{name} counts the labels of the training videos, which a stream does not list: leave it or "
                "--streaming out."
            )
    if training.max_steps <= 0:
        raise ValueError("A streamed data set has no length: give --max_steps.")


def check_lengths(training: FineTuningArguments, start: Start) -> None:
    """Raise ValueError for batches by length if all clips have the same."""
    policy = start.processor.short_video_policy
    if training.train_sampling_strategy == GROUP_BY_LENGTH and policy != "mask":
        raise ValueError(
            f"--train_sampling_strategy {GROUP_BY_LENGTH}: with --short_video_policy {policy}, all clips have "
            f"{start.processor.num_frames} frames. Add --short_video_policy mask, or leave it out."
        )


def check_views(arguments: Arguments, start: Start, splits: Splits, say: Say) -> None:
    """Raise ValueError for views of the final evaluation that the processor does not offer."""
    data, recipe = arguments.data, arguments.training.recipe
    is_uniform = start.processor.frame_sampling == "uniform"
    if recipe and is_uniform and data.num_clips == RECIPES[recipe].arguments.get("num_clips"):
        data.num_clips = 1
        say(f"Uniform sampling takes one clip per video: num_clips of the recipe {recipe} does not apply.")
    if splits.validation is not None:
        start.processor.settings.updated({"num_clips": data.num_clips, "num_crops": data.num_crops})


# The trainer


def make_augmentation(arguments: Arguments, names: list[str], crop: tuple[int, int], say: Say) -> ClipAugmentation:
    """Return the augmentation of the training clips. Raises ValueError for values out of range."""
    wanted, sides = arguments.augmentation, names_with_sides(names)
    flip = wanted.flip_probability(sides)
    if sides and wanted.horizontal_flip == "auto":
        say(
            f"No horizontal flips: {len(sides)} class names mention a side or a turn ({', '.join(sides[:4])}"
            f"{', ...' * (len(sides) > 4)}). --horizontal_flip yes forces them."
        )
    return ClipAugmentation(
        crop_size=crop,
        flip_probability=flip,
        scale_jitter=wanted.scale_factors(),
        colour_jitter_probability=wanted.colour_jitter,
        colour_drop_probability=wanted.colour_drop,
        rand_augment_layers=wanted.rand_augment_layers,
        rand_augment_magnitude=wanted.rand_augment_magnitude,
    )


def make_distillation(arguments: Arguments, start: Start, label_map: LabelMap, say: Say) -> Distillation | None:
    """Load the teacher; return None without one. Raises ValueError for one that the clips or labels do not fit."""
    training = arguments.training
    if training.teacher is None:
        return None
    settings: dict[str, Any] = {"dtype": getattr(torch, arguments.model.dtype), "device": training.device, "say": say}
    teacher = load_teacher(training.teacher, start.processor, label_map, **settings)
    return Distillation(teacher, training.teacher, training.distillation_temperature, training.distillation_weight)


def make_trainer(
    arguments: Arguments,
    splits: Splits,
    model: Any,
    processor: Any,
    say: Say,
    distillation: Distillation | None = None,
) -> tuple[ClipTrainer, VideoClips | StreamedClips | None]:
    """Return the trainer, which evaluates one view per video, and the validation data with all views."""
    _, data, augmentation, training = arguments
    label_map, seed = splits.label_map, training.seed if training.data_seed is None else training.data_seed
    crop = (processor.crop_size["height"], processor.crop_size["width"])

    def clips(videos: Any, kind: Any = None, **settings: Any) -> Any:
        if videos is None:
            return None
        kind = kind or (VideoClips if isinstance(videos, list) else StreamedClips)
        return kind(videos, processor, label_map, seed=seed, **settings)

    train, cached = None, _cached_kind(arguments, model)
    if training.do_train:
        train = clips(splits.train, cached, augmentation=make_augmentation(arguments, label_map.names, crop, say))
    collator = ClipCollator(
        label_map,
        label_smoothing=training.label_smoothing_factor,
        mixup_alpha=augmentation.mixup_alpha,
        cutmix_alpha=augmentation.cutmix_alpha,
        class_weights=class_weights(train.targets, label_map) if train and training.class_weights else None,
        seed=seed,
    )
    training.label_smoothing_factor = 0.0  # the collator smooths the labels
    training.label_names = ["labels"]
    training.dataloader_pin_memory &= training.device.type != "cpu"  # without a GPU, torch would warn
    training.dataloader_persistent_workers = training.dataloader_num_workers > 0
    if splits.validation is None:
        training.eval_strategy, training.do_eval, training.load_best_model_at_end = "no", False, False
    callbacks = []
    if training.do_train and training.early_stopping_patience:
        if training.eval_strategy == "no":
            say("There are no evaluations during training, so --early_stopping_patience has no effect.")
        else:
            callbacks.append(EarlyStoppingCallback(training.early_stopping_patience))
    trainer = ClipTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=clips(splits.validation, cached),
        data_collator=collator,
        processing_class=processor,
        label_map=label_map,
        layer_decay=training.layer_decay,
        is_balanced=training.balanced_sampling,
        averaging=training.averaging,
        ema_decay=training.ema_decay,
        distillation=distillation,
        callbacks=callbacks,
    )
    if cached is not None and data.num_clips * data.num_crops == 1:
        return trainer, trainer.eval_dataset
    return trainer, clips(splits.validation, num_clips=data.num_clips, num_crops=data.num_crops)


def _cached_kind(arguments: Arguments, model: Any) -> Any:
    """Return what makes a data set of stored tokens; None without --cache_features."""
    wanted, training = arguments.model, arguments.training
    if not wanted.cache_features:
        return None
    autocast = "bfloat16" if training.bf16 else "float16" if training.fp16 else None
    return partial(
        CachedClips,
        root=Path(training.output_dir, _CACHE_FOLDER),
        frozen={**spatial_settings(model), "autocast": autocast},
        step_shape=(model.config.grid_size[0], model.config.hidden_size),
        num_views=wanted.num_cached_views,
    )


# Looking at the first batch


def draw_first_batch(trainer: ClipTrainer, path: str, say: Say) -> None:
    """Draw the first training batch into a file; the state of the random numbers stays as it was."""
    with torch.random.fork_rng():
        batch = next(iter(trainer.get_train_dataloader()))
    if trainer.args.process_index == 0:
        draw_batch(
            batch["pixel_values"],
            batch["labels"],
            trainer.processing_class,
            trainer.label_map,
            batch["files"],
            batch.get("frame_mask"),
        ).save(path)
        say(f"The first batch as the model sees it: {path}")


def try_one_batch(trainer: ClipTrainer, training: FineTuningArguments, say: Say) -> None:
    """Learn the clips of the first batch by heart, with their plain labels, and exit with code 0 if that succeeds."""
    data: Any = trainer.train_dataset
    clips = iter(data) if isinstance(data, StreamedClips) else map(data.__getitem__, trainer._get_train_sampler())
    items = list(itertools.islice(clips, training.train_batch_size))
    optimizer_class, settings = trainer.get_optimizer_cls_and_kwargs(training, trainer.model)
    report = overfit_one_batch(
        trainer.model,
        ClipCollator(trainer.label_map)(items),
        trainer.label_map,
        lambda groups: optimizer_class(groups, **settings),
        parameter_groups(trainer.model, training.learning_rate, 0.0, training.layer_decay),
        training.overfit_steps,
    )
    say(str(report))
    raise SystemExit(0 if report.is_reached else 1)
