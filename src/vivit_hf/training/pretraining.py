"""A pretraining run on videos without labels: everything is checked first, then the model is trained and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ..configuration_vivit import ViViTConfig
from ..data.annotations import ONE_GROUP, LabelledVideo, read_videos
from ..data.escaping import counted
from ..data.labels import LabelMap
from ..data.whole_files import written_whole
from ..explain.reconstruction_picture import draw_reconstructions
from ..initialisation.weight_files import has_processor
from ..modeling_vivit import ViViTForPreTraining, random_tube_masks
from ..video_processing_vivit import ViViTVideoProcessor
from .augmentation import ClipAugmentation
from .clips import VideoClips
from .finetuning_arguments import AugmentationArguments, DataArguments, ModelArguments, Say
from .finetuning_model import Start, build_model, is_vivit, stored_config
from .finetuning_parser import speaker
from .mixing import refuse_frame_mask
from .pretraining_arguments import PRETRAINING_POLICIES, PretrainingDataArguments
from .pretraining_parser import PretrainingRun
from .run_checks import check_machine, check_repository, check_start, find_checkpoint
from .trainer import ClipTrainer
from .training_run import TrainingRun


UNLABELLED = LabelMap({ONE_GROUP: ()}, has_several=True)  # any number of labels, and there are none
PICTURE_FOLDER = "reconstructions"
_MASKS = 0x6D61736B73  # separates these random numbers from those of the augmentation
_PICTURED_CLIPS = 3


class TubeMaskCollator:
    """
    Collate items of `VideoClips` into a batch with tube masks for `ViViTForPreTraining`.

    A batch has `pixel_values` (batch, frames, channels, height, width), `bool_masked_pos`, bool (batch, space), and
    `damaged_files`, a list of (file, reason). Masks depend only on the seed, the epoch and the index of the video, not
    on processes and workers.
    """

    def __init__(self, config: ViViTConfig, seed: int = 0):
        self.config, self.seed = config, seed

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        refuse_frame_mask(items[0], "TubeMaskCollator")
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "bool_masked_pos": torch.cat([self._mask(item["epoch"], item["index"]) for item in items]),
            "damaged_files": [file for item in items for file in item.get("damaged_files", ())],
        }

    def _mask(self, epoch: int, index: int) -> torch.Tensor:
        _, height, width = self.config.grid_size
        seeds = np.random.SeedSequence((_MASKS, self.seed, epoch, index)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seeds[0]))
        return random_tube_masks(1, height * width, self.config.mask_ratio, generator)


class ReconstructionPictures(TrainerCallback):
    """
    Draw what the model predicts for the same clips and masks every few steps, and at the end of the training.

    Args:
        batch: a batch of `TubeMaskCollator`.
        processor: the processor of the clips.
        folder: for the pictures, `step-000100.png` and so on.
        steps: optimiser steps between two pictures.
    """

    def __init__(self, batch: dict[str, Any], processor: ViViTVideoProcessor, folder: Path, steps: int):
        self.batch, self.processor, self.folder, self.steps = batch, processor, folder, steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **settings: Any
    ) -> None:
        step = state.global_step
        if state.is_world_process_zero and (step % self.steps == 0 or step == state.max_steps):
            clips, masks = self.batch["pixel_values"], self.batch["bool_masked_pos"]
            picture = draw_reconstructions(settings["model"], clips, masks, self.processor)
            self.folder.mkdir(exist_ok=True)
            with written_whole(self.folder / f"step-{step:06d}.png") as unfinished:
                picture.save(unfinished, format="PNG")


class Pretraining(TrainingRun):
    """A pretraining run that has passed its checks, see `prepare`."""

    command = "pretrain"
    model_class = ViViTForPreTraining

    def run(self) -> None:
        """Train, save, and push if the arguments ask for it."""
        metrics, damaged = self.train(), self.trainer.all_damaged_files()["train"]
        self.trainer.save_state()
        if self.trainer.args.should_save:
            text = (
                f"Pretrained without labels on {metrics['train_samples']} videos for {metrics['epoch']:g} epochs: "
                f"masked autoencoding with tube masks over {self.start.model.config.mask_ratio:.0%} of the places, "
                f"mean training loss {metrics['train_loss']:.4f}."
            )
            report = self.start.report
            self.publish({"train": damaged}, report=text if report is None else f"{text}\n\n{report.to_markdown()}")
        self.end()


def prepare(arguments: PretrainingRun, echo: Say = print) -> Pretraining:
    """
    Check everything that can be checked before training, and set the run up.

    Args:
        arguments: the arguments of the run.
        echo: prints one text; only the first process uses it.

    Raises:
        ValueError: for arguments, videos, a model, a checkpoint or an output folder that cannot be used.
        OSError: for files that cannot be read.
    """
    _, data, training = arguments
    say = speaker(training, echo)
    check_policy(arguments)
    check_machine(training, say)
    videos = read_unlabelled_videos(data, say)
    push = check_repository(training)
    set_seed(training.seed)
    checkpoint = find_checkpoint(training, say)
    start = make_model(arguments, say)
    check_start(training, start, ModelArguments(), checkpoint)
    return Pretraining(arguments, start, make_trainer(arguments, videos, start, say), checkpoint, push, say)


def check_policy(arguments: PretrainingRun) -> None:
    """Raise ValueError if the processor of the start masks the frames that a short video lacks. Loads no weights."""
    source = arguments.model.model_name_or_path
    if arguments.data.short_video_policy is not None or source in ViViTConfig.presets:
        return
    if is_vivit(source, stored_config(source)) and has_processor(source):
        policy = ViViTVideoProcessor.from_pretrained(source).short_video_policy
        if policy not in PRETRAINING_POLICIES:
            raise ValueError(
                f"{source}: its processor has short_video_policy={policy!r}, but pretraining takes no `frame_mask`: "
                "tube masks hide the same places in all time steps. Give --short_video_policy repeat_last, which fills "
                "short clips."
            )


def read_unlabelled_videos(data: PretrainingDataArguments, say: Say) -> list[LabelledVideo]:
    """Return the videos of a folder and its subfolders or of a file, without labels. Opens none."""

    def training_rows(where: str, counts: dict[str, int]) -> list[str]:
        listed = ", ".join(f"{count} {split}" for split, count in counts.items())
        used = ["train"] if "train" in counts else list(counts)
        say(f"{where}: {listed}; the {' and '.join(used)} rows are used.")
        return used

    found = read_videos(
        data.videos,
        needs_labels=False,
        video_root=data.video_root,
        video_column=data.video_column_name,
        missing_videos=data.missing_videos,
        split_column=data.split_column,
        choose_splits=training_rows,
    ).videos
    say(f"{len(found)} videos to train on, without labels")
    return [replace(one, labels=()) for one in found]  # annotations of large data sets have them


def make_model(arguments: PretrainingRun, say: Say) -> Start:
    """Load or make the model and its processor. Raises ValueError for a source that cannot be used."""
    wanted, data, _ = arguments
    own = ("mask_ratio", "decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads")
    fields = {name: getattr(wanted, name) for name in own if getattr(wanted, name) is not None}
    shared = {name: value for name, value in vars(wanted).items() if name not in own}
    sampling = ("frame_stride", "frames_per_second", "short_video_policy", "resize", "resize_ratio")
    others = ("allow_private_addresses",)
    clips = DataArguments(**{name: getattr(data, name) for name in (*sampling, *others)})
    start = build_model(ModelArguments(**shared), clips, None, say, pretraining=fields)
    width, layers, heads = start.model.config.decoder_sizes
    say(
        f"  masks over {start.model.config.mask_ratio:.0%} of the places; a decoder of "
        f"{counted(layers, 'layer')}, width {width}, {counted(heads, 'head')}"
    )
    return start


def make_trainer(arguments: PretrainingRun, videos: list[LabelledVideo], start: Start, say: Say) -> ClipTrainer:
    """Return the trainer, which also draws pictures of reconstructions."""
    _, data, training = arguments
    processor, seed = start.processor, training.seed if training.data_seed is None else training.data_seed
    wanted = AugmentationArguments(horizontal_flip=data.horizontal_flip, scale_jitter=data.scale_jitter)
    augmentation = ClipAugmentation(
        crop_size=(processor.crop_size["height"], processor.crop_size["width"]),
        flip_probability=wanted.flip_probability([]),
        scale_jitter=wanted.scale_factors(),
    )

    def clips() -> VideoClips:
        return VideoClips(videos, processor, UNLABELLED, augmentation=augmentation, seed=seed)

    collator = TubeMaskCollator(start.model.config, seed)
    training.dataloader_pin_memory &= training.device.type != "cpu"  # without a GPU, torch would warn
    training.dataloader_persistent_workers = training.dataloader_num_workers > 0
    trainer = ClipTrainer(
        model=start.model,
        args=training,
        train_dataset=clips(),
        data_collator=collator,
        processing_class=processor,
        label_map=UNLABELLED,
        ema_decay=training.ema_decay,
    )
    if training.picture_steps and training.process_index == 0:
        first = clips()  # its epoch stays 0, so that all pictures show the same clips
        batch = collator([first[index] for index in range(min(_PICTURED_CLIPS, len(first)))])
        folder = Path(training.output_dir, PICTURE_FOLDER)
        trainer.add_callback(ReconstructionPictures(batch, processor, folder, training.picture_steps))
        say(f"Reconstructions every {training.picture_steps} steps: {folder}")
    return trainer
