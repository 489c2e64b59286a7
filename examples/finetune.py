"""
Fine-tunes a ViViT on your videos, with transformers' Trainer.

    python examples/finetune.py --train_dir videos/train --validation_dir videos/test \\
        --model_name_or_path google/vit-base-patch16-224-in21k --recipe small-data --output_dir my_vivit
    python examples/finetune.py settings.yaml --learning_rate 1e-4      arguments from a file, the command line beats it
    python examples/finetune.py --help-all                              all arguments, transformers' included
    torchrun --nproc_per_node 8 examples/finetune.py ...                several GPUs; on CPUs add --use_cpu

Data are a folder of class folders (--train_dir), a CSV or JSON of paths and labels or the annotations of Kinetics,
Something-Something v2 or EPIC-Kitchens (--train_file), or a data set of the Hub (--dataset_name). Everything about them
is checked before a model is loaded. Run again after an interruption, it goes on from the last whole checkpoint.
"""

import argparse
import copy
import difflib
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from finetuning_data import DataArguments, Splits, load_splits
from finetuning_model import ModelArguments, Start, build_model, check_checkpoint
from transformers import HfArgumentParser, TrainingArguments, set_seed

from vivit_hf import ViViTForVideoClassification, write_model_card
from vivit_hf.data.annotations import AnnotationError
from vivit_hf.data.labels import LabelMap, class_weights
from vivit_hf.explain.batch_picture import draw_batch
from vivit_hf.hub.model_card import is_repo_id
from vivit_hf.inference.metrics import describe_chance
from vivit_hf.inference.views import AVERAGINGS, describe_views
from vivit_hf.training.augmentation import ClipAugmentation, names_with_sides
from vivit_hf.training.clips import StreamedClips, VideoClips
from vivit_hf.training.mixing import ClipCollator
from vivit_hf.training.overfitting import overfit_one_batch
from vivit_hf.training.recipes import RECIPES
from vivit_hf.training.trainer import (
    ClipTrainer,
    freeze,
    is_complete_checkpoint,
    last_complete_checkpoint,
    parameter_groups,
)


@dataclass
class AugmentationArguments:
    """Regularisation; each is off unless it is given here or in the recipe. Random crops are always on."""

    horizontal_flip: str = field(
        default="no", metadata={"help": "yes, no, or auto: yes unless class names speak of a side or a turn"}
    )
    scale_jitter: str | None = field(default=None, metadata={"help": "least and greatest factor, such as 0.9,1.33"})
    colour_jitter: float = field(default=0.0, metadata={"help": "probability"})
    colour_drop: float = field(default=0.0, metadata={"help": "probability of a grey clip"})
    rand_augment_layers: int = field(default=0, metadata={"help": "operations per clip"})
    rand_augment_magnitude: float = field(default=10.0, metadata={"help": "10 is the full scale"})
    mixup_alpha: float = field(default=0.0, metadata={"help": "of the Beta distribution"})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "of the Beta distribution"})


@dataclass
class FineTuningArguments(TrainingArguments):
    """transformers' own arguments, with defaults for videos, and a few more."""

    recipe: str | None = field(default=None, metadata={"help": f"arguments to start from: {', '.join(RECIPES)}"})
    layer_decay: float = field(default=1.0, metadata={"help": "factor of the learning rate from layer to layer"})
    class_weights: bool = field(default=False, metadata={"help": "weigh the loss of rare classes up"})
    balanced_sampling: bool = field(default=False, metadata={"help": "draw all classes equally often"})
    averaging: str = field(default="probabilities", metadata={"help": "of views: probabilities or logits"})
    overfit_one_batch: bool = field(default=False, metadata={"help": "only try whether one batch can be learnt"})
    overfit_steps: int = field(default=200, metadata={"help": "at most"})
    save_batch_picture: str | None = field(default=None, metadata={"help": "draw the first training batch into FILE"})
    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "no, steps, epoch or best"})
    logging_steps: float = field(default=10, metadata={"help": "optimiser steps; below 1 a share of all"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "items are not rows of a table"})
    dataloader_num_workers: int = field(
        default=min(8, os.cpu_count() or 1), metadata={"help": "processes that decode, per device"}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the order that HfArgumentParser reads)
        default="tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        metadata={"help": "tensorboard, wandb, all, none, ..."},
    )


Arguments = tuple[ModelArguments, DataArguments, AugmentationArguments, FineTuningArguments]
USAGE = "finetune.py [settings.yaml] --output_dir DIR [arguments]; --help-all lists transformers' too"
# Of the Trainer's arguments, those that --help shows.
_COMMON = (
    "output_dir do_eval num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate weight_decay warmup_steps lr_scheduler_type max_grad_norm optim "
    "label_smoothing_factor seed bf16 gradient_checkpointing torch_compile use_cpu ddp_backend save_total_limit "
    "load_best_model_at_end metric_for_best_model resume_from_checkpoint push_to_hub hub_model_id hub_private_repo"
).split()


def help_text(parser: HfArgumentParser, is_all: bool) -> str:
    """Return our arguments in groups, and the most used of the Trainer's; with `is_all`, all of them."""
    sections = {
        "model": list(ModelArguments.__annotations__),
        "data": list(DataArguments.__annotations__),
        "augmentation": list(AugmentationArguments.__annotations__),
        "training and evaluation": list(FineTuningArguments.__annotations__),
        "of transformers' Trainer, the most used": [*_COMMON],
    }
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    if is_all:
        shown = {name for names in sections.values() for name in names}
        sections["the other arguments of transformers' Trainer"] = [name for name in actions if name not in shown][::-1]
    formatter = argparse.RawDescriptionHelpFormatter("finetune.py", max_help_position=36, width=120)
    formatter.add_text(f"usage: {USAGE}\n{__doc__}")
    for title, names in sections.items():
        formatter.start_section(title)
        for name in names:
            action = copy.copy(actions[name])
            action.option_strings = action.option_strings[:1]  # the same with hyphens need not be shown
            action.metavar = "VALUE"
            formatter.add_argument(action)
        formatter.end_section()
    return formatter.format_help()


def parse_arguments(argv: list[str]) -> Arguments:
    """From least to most important: the defaults, the recipe, the file, the command line."""
    classes = (ModelArguments, DataArguments, AugmentationArguments, FineTuningArguments)
    parser = HfArgumentParser(classes, usage=USAGE)
    if {"-h", "--help", "--help-all"} & set(argv):
        print(help_text(parser, is_all="--help-all" in argv))
        sys.exit()
    given: dict[str, Any] = {}
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        given = read_settings(Path(argv[0]), classes)
        argv = argv[1:]
    # What is on the command line, and nothing else.
    explicit = HfArgumentParser(classes, usage=USAGE)
    for action in explicit._actions:
        action.default, action.required = argparse.SUPPRESS, False
    given |= vars(explicit.parse_args(argv))
    recipe = given.get("recipe")
    if recipe is not None and recipe not in RECIPES:
        parser.error(f"--recipe {recipe}: there are {', '.join(RECIPES)}")
    settings = {**(RECIPES[recipe].arguments if recipe else {}), **given}
    if "output_dir" not in settings:
        parser.error("--output_dir is needed: the folder for checkpoints and results")
    arguments = parser.parse_dict(settings)
    training: FineTuningArguments = arguments[3]
    training.do_train = bool(given.get("do_train", not given.get("do_eval")))  # --do_eval alone only evaluates
    if recipe and "learning_rate" not in given:
        batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        training.learning_rate = RECIPES[recipe].learning_rate(batch)
        say(
            training,
            f"Recipe {recipe}: learning rate {RECIPES[recipe].arguments['learning_rate']:g} for 64 clips per step, "
            f"so {training.learning_rate:g} for {batch}.",
        )
    return arguments


def read_settings(path: Path, classes: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments in a YAML or JSON file, each of the type that it has on the command line."""
    if not path.is_file():
        raise AnnotationError(f"{path}: there is no such file of settings.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            settings = json.loads(text)
        else:
            import yaml

            settings = yaml.safe_load(text)
    except Exception as error:
        raise AnnotationError(f"{path}: the settings cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise AnnotationError(f"{path}: expected names of arguments with their values.")
    # The first action of a name: a second one is its negation, such as --no_average_tokens_across_devices.
    actions = {action.dest: action for action in reversed(HfArgumentParser(classes)._actions) if action.dest != "help"}
    kinds = {name: kind for one in classes for name, kind in get_type_hints(one).items()}
    typed = {}
    for name, value in settings.items():
        if name not in actions:
            near = "".join(f"; did you mean {one!r}?" for one in difflib.get_close_matches(str(name), actions, n=1))
            raise AnnotationError(f"{path}: there is no argument {name!r}{near}")
        try:
            typed[name] = typed_value(value, actions[name], kinds[name])
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise AnnotationError(f"{path}: {name}: {error}") from error
    return typed


def typed_value(value: Any, action: argparse.Action, kind: Any) -> Any:
    """Convert a value of a settings file to the type of its argument; `kind` is the annotation of its field."""
    parts = set(get_args(kind)) or {kind}
    is_list = action.nargs in ("+", "*")
    if value is None:
        if type(None) in parts:
            return None
        raise ValueError("null is not possible here; leave the key out for the default")
    if isinstance(value, dict):
        if any(part is dict or get_origin(part) is dict for part in parts):
            return value
        raise ValueError(f"expected one value, got {value!r}")
    if isinstance(value, list):
        if not (is_list or any(part is list or get_origin(part) is list for part in parts)):
            raise ValueError(f"expected one value, got the list {value!r}")
        return [typed_value(one, argparse.Action([], "", type=action.type), str) for one in value]
    convert = action.type or str
    try:
        converted = convert(str(value))  # as on the command line
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        expected = "true or false" if bool in parts else getattr(convert, "__name__", str(convert))
        raise ValueError(f"expected {expected}, got {value!r}") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {value!r}")
    return [converted] if is_list else converted


def say(training: TrainingArguments, text: str) -> None:
    if training.process_index == 0:
        print(text, flush=True)


def check_processes(training: TrainingArguments) -> None:
    """Launchers that seem to train on several processes and do not: they are errors here."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and training.device.type == "cpu":
        sys.exit("FSDP is set up, but on CPUs it would silently be plain data parallelism: it needs GPUs.")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != training.world_size:
        sys.exit(
            f"{started} processes were started, but this one trains by itself (world size {training.world_size}): "
            f"there would be {started} independent copies. On CPUs add --use_cpu --ddp_backend gloo."
        )
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" and started == 1:
        say(training, "One process only. On CPUs, `torchrun --nproc_per_node N ... --use_cpu` starts several.")
    say(training, f"Training on {training.world_size} process(es), device type {training.device.type}.")


def make_augmentation(
    arguments: AugmentationArguments, training: FineTuningArguments, names: list[str], crop: tuple[int, int]
) -> ClipAugmentation:
    flip = {"yes": 0.5, "true": 0.5, "auto": 0.5, "no": 0.0, "false": 0.0}.get(str(arguments.horizontal_flip).lower())
    if flip is None:
        raise ValueError(f"--horizontal_flip is yes, no or auto, got {arguments.horizontal_flip!r}.")
    sides = names_with_sides(names)
    if str(arguments.horizontal_flip).lower() == "auto" and sides:
        flip = 0.0
        say(
            training,
            f"No horizontal flips: {len(sides)} class names speak of a side or a turn ({', '.join(sides[:4])}"
            f"{', ...' * (len(sides) > 4)}). --horizontal_flip yes forces them.",
        )
    jitter = None
    if arguments.scale_jitter:
        try:
            least, greatest = (float(factor) for factor in arguments.scale_jitter.split(","))
        except ValueError:
            raise ValueError(f"--scale_jitter is two factors as 0.9,1.33, got {arguments.scale_jitter!r}.") from None
        jitter = (least, greatest)
    return ClipAugmentation(
        crop_size=crop,
        flip_probability=flip,
        scale_jitter=jitter,
        colour_jitter_probability=arguments.colour_jitter,
        colour_drop_probability=arguments.colour_drop,
        rand_augment_layers=arguments.rand_augment_layers,
        rand_augment_magnitude=arguments.rand_augment_magnitude,
    )


def find_checkpoint(training: FineTuningArguments) -> str | None:
    """Where to go on from: the last whole checkpoint, unless --resume_from_checkpoint says otherwise."""
    wish = training.resume_from_checkpoint
    if wish in (None, True, "True", "true", "last"):
        found = last_complete_checkpoint(training.output_dir)
        if found is not None:
            say(training, f"Going on from {found}; --resume_from_checkpoint no starts anew.")
        return None if found is None else str(found)
    if wish in (False, "False", "false", "no"):
        return None
    if not is_complete_checkpoint(Path(wish)):
        raise ValueError(f"--resume_from_checkpoint {wish}: this is not a whole checkpoint.")
    return wish


def make_trainer(arguments: Arguments, splits: Splits, model: Any, processor: Any) -> tuple[ClipTrainer, Any]:
    """The trainer, which evaluates one view per video, and the validation data with all views for the end."""
    _, data, augmentation, training = arguments
    label_map, seed = splits.label_map, training.seed if training.data_seed is None else training.data_seed
    crop = (processor.crop_size["height"], processor.crop_size["width"])
    common = {"processor": processor, "label_map": label_map, "seed": seed}

    def clips(videos: Any, **settings: Any) -> Any:
        if videos is None:
            return None
        return (VideoClips if isinstance(videos, list) else StreamedClips)(videos, **common, **settings)

    train = clips(splits.train, augmentation=make_augmentation(augmentation, training, label_map.names, crop))
    weights = None
    if training.class_weights or training.balanced_sampling:
        if not isinstance(train, VideoClips):
            raise ValueError("Class weights and balanced sampling need data that are not streamed: labels are counted.")
        weights = class_weights(train.targets, label_map) if training.class_weights else None
    collator = ClipCollator(
        label_map,
        label_smoothing=training.label_smoothing_factor,
        mixup_alpha=augmentation.mixup_alpha,
        cutmix_alpha=augmentation.cutmix_alpha,
        class_weights=weights,
        seed=seed,
    )
    training.label_smoothing_factor = 0.0  # done by the collator, in the soft labels
    training.label_names = ["labels"]
    training.dataloader_pin_memory &= training.device.type != "cpu"  # else torch warns that there is nothing to pin for
    training.dataloader_persistent_workers = training.dataloader_num_workers > 0
    if splits.validation is None:
        training.eval_strategy, training.do_eval = "no", False
    trainer = ClipTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=clips(splits.validation),
        data_collator=collator,
        processing_class=processor,
        label_map=label_map,
        layer_decay=training.layer_decay,
        is_balanced=training.balanced_sampling,
        averaging=training.averaging,
    )
    return trainer, clips(splits.validation, num_clips=data.num_clips, num_crops=data.num_crops)


def picture_first_batch(trainer: ClipTrainer, training: FineTuningArguments) -> None:
    """--save_batch_picture: what training begins with; leaves the random numbers as they were."""
    with torch.random.fork_rng():
        batch = next(iter(trainer.get_train_dataloader()))
    if training.process_index == 0:
        picture = draw_batch(
            batch["pixel_values"], batch["labels"], trainer.processing_class, trainer.label_map, batch["files"]
        )
        picture.save(training.save_batch_picture)
        say(training, f"The first batch as the model sees it: {training.save_batch_picture}")


def try_one_batch(trainer: ClipTrainer, training: FineTuningArguments) -> None:
    """--overfit_one_batch: the clips of the first batch with their plain labels; ends the program."""
    data = trainer.train_dataset
    clips = iter(data) if isinstance(data, StreamedClips) else map(data.__getitem__, trainer._get_train_sampler())
    items = list(itertools.islice(clips, training.train_batch_size))
    collator = ClipCollator(trainer.label_map)
    optimizer_class, settings = trainer.get_optimizer_cls_and_kwargs(training, trainer.model)
    report = overfit_one_batch(
        trainer.model,
        collator(items),
        trainer.label_map,
        lambda groups: optimizer_class(groups, **settings),
        parameter_groups(trainer.model, training.learning_rate, 0.0, training.layer_decay),
        training.overfit_steps,
    )
    say(training, str(report))
    sys.exit(0 if report.is_reached else 1)


def report_results(trainer: ClipTrainer, split: str, metrics: dict[str, Any]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def main(argv: list[str] | None = None) -> None:
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        model_arguments, data, _, training = arguments
        check_processes(training)
        splits = load_splits(data, training.seed, lambda text: say(training, text))
        set_seed(training.seed)
        source = model_arguments.model_name_or_path
        if model_arguments.lora_rank and Path(source).resolve() == Path(training.output_dir).resolve():
            raise ValueError(
                f"--output_dir {training.output_dir} is the model itself, to whose weights --lora_rank needs to come "
                "back when it is resumed: give another folder."
            )
        picture = training.save_batch_picture
        if picture is not None and not Path(picture).absolute().parent.is_dir():
            raise ValueError(f"--save_batch_picture {picture}: there is no such folder.")
        uploads, training.push_to_hub = training.push_to_hub, False  # once, at the end, with all that belongs to it
        if not isinstance(splits.train, list) and training.max_steps <= 0:
            raise ValueError("A streamed data set has no length: give --max_steps.")
        checkpoint = find_checkpoint(training)
        recipe = RECIPES[training.recipe] if training.recipe else None
        start = build_model(model_arguments, data, splits.label_map, lambda text: say(training, text), recipe)
        model, processor = start.model, start.processor
        if checkpoint is not None and training.do_train:
            check_checkpoint(checkpoint, start, model_arguments.lora_rank)
        if recipe and processor.frame_sampling == "uniform" and data.num_clips == recipe.arguments["num_clips"]:
            data.num_clips = 1
            say(training, f"One clip is spread over a video: num_clips of the recipe {recipe.name} does not count.")
        if splits.validation is not None:  # raises what the views would raise after training
            processor.settings_with({"num_clips": data.num_clips, "num_crops": data.num_crops})
        if training.averaging not in AVERAGINGS:
            raise ValueError(f"--averaging {training.averaging}: expected one of {', '.join(AVERAGINGS)}.")
        splits.label_map = LabelMap.from_config(model.config)  # in the order of a classifier that goes on
        frozen = freeze(model, model_arguments.freeze) if not model_arguments.lora_rank else []
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        say(training, f"{trained:,} parameters to train" + f", {len(frozen)} tensors frozen" * bool(frozen))
        trainer, final_validation = make_trainer(arguments, splits, model, processor)
    except (AnnotationError, ValueError, OSError) as error:
        raise SystemExit(f"finetune.py: {error}") from error

    if training.save_batch_picture:
        picture_first_batch(trainer, training)
    if training.overfit_one_batch:
        try_one_batch(trainer, training)

    if training.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        save_model(trainer, start, is_lora=bool(model_arguments.lora_rank))  # before anything else can fail
        metrics = {**result.metrics, "train_damaged_files": len(trainer.all_damaged_files()["train"])}
        if isinstance(splits.train, list):
            metrics["train_samples"] = len(splits.train)
        report_results(trainer, "train", metrics)
    results: dict[str, Any] = {}
    if final_validation is not None:
        results = trainer.evaluate(final_validation)
        results["eval_protocol"] = describe_views(processor, data.num_clips, data.num_crops, training.averaging)
        results["eval_damaged_files"] = len(trainer.all_damaged_files()["eval"])
        report_results(trainer, "eval", results)
        near_chance = describe_chance({name.removeprefix("eval_"): value for name, value in results.items()})
        if near_chance is not None:
            say(training, near_chance)
    damaged = trainer.all_damaged_files()
    if training.do_train:
        trainer.save_state()
        if training.should_save:
            finish(arguments, start, results, damaged, uploads)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def save_model(trainer: ClipTrainer, start: Start, is_lora: bool) -> None:
    """Save model and processor; with LoRA the adapter too, merged into the model that is evaluated afterwards."""
    folder = Path(trainer.args.output_dir)
    if is_lora:
        if trainer.args.should_save:
            trainer.model.save_pretrained(folder / "adapter")
        trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
        if trainer.args.should_save:
            trainer.model.save_pretrained(folder)
    else:
        trainer.save_model()  # in all processes: each may hold a part of it
    if trainer.args.should_save:
        start.processor.save_pretrained(folder)


def finish(
    arguments: Arguments, start: Start, results: dict[str, Any], damaged: dict[str, dict[str, str]], uploads: bool
) -> None:
    """What belongs to the saved model: processor, damaged files, a card with the scores; and the upload, if wanted."""
    _, data, _, training = arguments
    folder = Path(training.output_dir)
    model = ViViTForVideoClassification.from_pretrained(folder)
    (folder / "damaged_files.json").write_text(json.dumps(damaged, indent=2) + "\n", encoding="utf-8")
    if any(damaged.values()):
        counts = " and ".join(f"{len(files)} {split}" for split, files in damaged.items())
        say(training, f"Files that could not be read ({counts}): see {folder / 'damaged_files.json'}")
    scores = {
        name.removeprefix("eval_"): value
        for name, value in results.items()
        if name.endswith(("top1", "top5", "_map")) and isinstance(value, float)
    }
    card = {
        "base_model": start.source if start.is_pretrained else None,
        "report": start.report,
        "datasets": data.dataset_name if is_repo_id(data.dataset_name) else None,
        "metrics": ["accuracy"],
        "results": scores,
        "protocol": results.get("eval_protocol"),
    }
    write_model_card(folder, model, repo_id=training.hub_model_id, **card)
    if uploads:
        repository = training.hub_model_id or folder.resolve().name
        private = bool(training.hub_private_repo)
        model.push_to_hub(repository, private=private, token=training.hub_token, **card)
        start.processor.push_to_hub(repository, private=private, token=training.hub_token)
        say(training, f"Uploaded to {repository}.")


if __name__ == "__main__":
    main()
