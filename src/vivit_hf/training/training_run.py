"""What the training commands do alike once a run has passed its checks: train, save, report and publish."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..configuration_vivit import ViViTConfig
from ..hub.model_card import write_model_card
from .checkpoints import deferred_interrupt, last_complete_checkpoint
from .clips import VideoClips
from .finetuning_arguments import Say
from .finetuning_model import Start
from .run_checks import lack_of_space, repository_of
from .trainer import ClipTrainer


@dataclass
class TrainingRun:
    """A run that has passed its checks; `checkpoint` is what to resume from, or None.

    A command has a subclass with a method `run`, its name and the class of its model.
    """

    arguments: Any
    start: Start
    trainer: ClipTrainer
    checkpoint: str | None
    push: bool
    say: Say

    command: ClassVar[str]
    model_class: ClassVar[Any]

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint that the run would resume from now, or None."""
        return last_complete_checkpoint(self.folder)

    def train(self) -> dict[str, Any]:
        """Train, save model and processor before anything else can fail, and report the metrics; return them."""
        trainer = self.trainer
        try:
            result = trainer.train(resume_from_checkpoint=self.checkpoint)
            with deferred_interrupt():
                self.save()
        except Exception as error:
            if (reason := lack_of_space(trainer.args, trainer.model)) is not None:
                raise SystemExit(f"{self.command}: {reason}") from error
            raise
        metrics = {**result.metrics, "train_damaged_files": len(trainer.all_damaged_files()["train"])}
        if isinstance(trainer.train_dataset, VideoClips):
            metrics["train_samples"] = len(trainer.train_dataset)
        self.report("train", metrics)
        return metrics

    def save(self) -> None:
        """Save model and processor."""
        self.trainer.save_model()  # in all processes: each may hold a part of it

    def report(self, split: str, metrics: dict[str, Any]) -> None:
        self.trainer.log_metrics(split, metrics)
        self.trainer.save_metrics(split, metrics)

    def publish(self, damaged: dict[str, dict[str, str]], endpoint: bool = False, **card: Any) -> None:
        """
        Write the list of damaged files and the model card (see `write_model_card`); push the model if asked to.

        `endpoint`: see `push_to_hub`.
        """
        path = self.folder / "damaged_files.json"
        path.write_text(json.dumps(damaged, indent=2) + "\n", encoding="utf-8")
        if any(damaged.values()):
            counts = " and ".join(f"{len(files)} {split}" for split, files in damaged.items())
            self.say(f"Files that could not be read ({counts}): see {path}")
        model = self.model_class.from_pretrained(self.folder)
        source, training = self.start.source, self.trainer.args
        card["base_model"] = None if source in ViViTConfig.presets else source
        write_model_card(self.folder, model, repo_id=training.hub_model_id, **card)
        if not self.push:
            return
        repository = repository_of(training)
        settings = {"private": bool(training.hub_private_repo), "token": training.hub_token}
        try:
            model.push_to_hub(repository, **settings, **card, endpoint=endpoint)
            self.start.processor.push_to_hub(repository, **settings)
        except Exception as error:
            raise SystemExit(
                f"The model is saved in {self.folder}, but it could not be pushed to {repository}: {error}"
            ) from error
        self.say(f"Uploaded to {repository}.")

    def end(self) -> None:
        """Wait for the other processes, and leave their group."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            # The wrapper of the model holds the group, whose threads would go on while Python ends: now and then, a
            # process was aborted by that, and the launcher then stopped the others.
            self.trainer.model_wrapped = self.trainer.model
            self.trainer.accelerator.free_memory()
            torch.distributed.destroy_process_group()
