"""A `Trainer` for clips and views of videos."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, IntervalStrategy
from transformers.utils import logging

from ..data.labels import IGNORED, LabelMap
from ..inference.clips import shown_masks
from ..inference.finite_outputs import NonFiniteError, broken_weights, check_finite
from ..inference.metrics import classification_metrics, collapsed_class
from ..inference.views import average_views
from ..modeling_vivit import video_classification_loss
from ..video_sources import VideoDecodingError
from .checkpoints import deferred_interrupt
from .clip_lengths import GROUP_BY_LENGTH, group_by_length, measure_lengths
from .clips import ClipSampler, StreamedClips, VideoClips
from .distillation import Distillation
from .feature_cache import encode_clips, has_frozen_space
from .parameters import frozen_modules, gradient_norms, parameter_groups
from .stream_loading import StreamBatches, StreamLoader, StreamPosition
from .weight_average import WeightAverage


logger = logging.get_logger(__name__)

MAX_UNREADABLE = 100  # videos of a stream in a row, in one process


class ClipTrainer(Trainer):
    """A `Trainer` for `VideoClips` and `StreamedClips`.

    It adds to transformers' trainer:

    - Evaluation averages the views of a video, and returns top-1 and top-5, mean average precision, or noun, verb and
      action scores.
    - The learning rate can fall from layer to layer.
    - The order of the videos depends only on seed and epoch. With `train_sampling_strategy="group_by_length"`, clips of
      similar visible length share a batch, see `group_by_length`.
    - Unreadable files are collected (`all_damaged_files`).
    - Modules that are frozen as a whole run in evaluation mode, without dropout and stochastic depth.
    - The log has the gradient norm of each part of the model, before clipping.
    - A warning if the predictions collapse to one class.
    - A moving average of the weights can be evaluated and saved in place of the weights.
    - A teacher's predictions can be targets beside the labels; evaluation has the loss of the labels alone.
    - Ctrl-C waits until a checkpoint is whole; if writing it fails, it is removed.
    - Gradients, weights to save and scores that are not finite raise a `NonFiniteError`. `Trainer` alone would log
      other losses in place of NaN, and save the weights.

    Args:
        label_map: the labels of the data set.
        layer_decay: factor of the learning rate per layer, counted from the output.
        is_balanced: draw training videos so that all classes come up equally often.
        averaging: how views are averaged, see `average_views`.
        ema_decay: above 0, a moving average of the weights is evaluated and saved, see `WeightAverage`.
        distillation: a teacher, whose predictions are targets in training beside the labels.
        arguments, settings: passed on to `Trainer`.
    """

    def __init__(
        self,
        *arguments: Any,
        label_map: LabelMap,
        layer_decay: float = 1.0,
        is_balanced: bool = False,
        averaging: str = "probabilities",
        ema_decay: float = 0.0,
        distillation: Distillation | None = None,
        **settings: Any,
    ):
        settings.setdefault("compute_metrics", self._metrics)
        if distillation is not None:
            settings["compute_loss_func"] = self._distilled_loss
        super().__init__(*arguments, **settings)
        self.label_map, self.layer_decay, self.is_balanced = label_map, layer_decay, is_balanced
        self.averaging, self.distillation = averaging, distillation
        self.damaged_files: dict[str, dict[str, str]] = {"train": {}, "eval": {}}
        self._gradient_norms: dict[str, torch.Tensor] = {}
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_unreadable = 0
        self._used_again: list[DataLoader] = []  # by the next epoch or evaluation of a training
        if isinstance(self.train_dataset, StreamedClips):
            self.add_callback(StreamPosition())
        self.weight_average = WeightAverage(self.model, ema_decay)
        if ema_decay:
            self.add_callback(self.weight_average)

    # Data

    def _get_train_sampler(self, *arguments: Any, **settings: Any) -> Any:
        if isinstance(self.train_dataset, StreamedClips):
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        arrange = None
        if self.args.train_sampling_strategy == GROUP_BY_LENGTH:
            size = self.args.train_batch_size * self.args.world_size
            lengths = self.clip_lengths

            def arrange(order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
                return group_by_length(order, lengths, size, generator)

        return ClipSampler(self.train_dataset, seed, self.is_balanced, arrange)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # In order, whatever the order of training is; on several processes, `accelerate` divides the videos.
        return SequentialSampler(eval_dataset) if self.args.world_size == 1 else None

    @cached_property
    def clip_lengths(self) -> np.ndarray:
        """The number of visible frames in a clip of each training video, int64 (videos,); the first use opens them."""
        processes = {"num_processes": self.args.world_size, "process_index": self.args.process_index}
        return measure_lengths(self.train_dataset, num_workers=self.args.dataloader_num_workers, **processes)

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, StreamedClips):
            settings = {"rounds_per_step": self.args.gradient_accumulation_steps}
            settings["drop_last"] = self.args.dataloader_drop_last
            loader: Any = self._stream(self.train_dataset, self.args.train_batch_size, **settings)
        else:
            loader = super().get_train_dataloader()
            # Starting workers draws from torch's generator, and a resumed run starts them at other times.
            loader.base_dataloader.generator = torch.Generator()
        self._used_again.append(loader)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        # Trainer caches the loader of persistent workers, and would return it for another data set.
        is_another = isinstance(dataset, VideoClips) and dataset is not self.eval_dataset
        if is_another or isinstance(dataset, StreamedClips):
            return self.get_test_dataloader(dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        if isinstance(test_dataset, StreamedClips):
            return self._stream(test_dataset, self.args.eval_batch_size)
        return super().get_test_dataloader(test_dataset)

    def _stream(self, clips: StreamedClips, batch_size: int, **settings: Any) -> StreamLoader:
        processes = {"num_processes": self.args.world_size, "process_index": self.args.process_index}
        has_workers = self.args.dataloader_num_workers > 0
        return StreamLoader(
            clips,
            StreamBatches(clips, batch_size, **processes, **settings),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and has_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if has_workers else None,
        )

    def train(self, *arguments: Any, **settings: Any) -> Any:
        try:
            return super().train(*arguments, **settings)
        finally:
            for loader in self._used_again:
                _stop_workers(loader)
            self._used_again = []

    def _init_training_state(self, *arguments: Any, **settings: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*arguments, **settings)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, StreamPosition):
                callback.restore(self.state)
                self.train_dataset.set_epoch(callback.epoch)
                steps = self.state.global_step - callback.first_step
                epochs, batches = callback.epoch, steps * self.args.gradient_accumulation_steps
            elif isinstance(callback, EarlyStoppingCallback):
                stored = self.state.stateful_callbacks.get(type(callback).__name__) if self.state.global_step else None
                counter = stored["attributes"]["early_stopping_patience_counter"] if stored else 0
                callback.early_stopping_patience_counter = counter
        return epochs, 0 if self.args.ignore_data_skip else batches

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        known = self.damaged_files["train" if self.model.training else "eval"]
        damaged = inputs.pop("damaged_files", ())
        inputs.pop("files", None)
        if "frame_mask" in inputs:
            inputs["frame_mask"] = shown_masks(inputs["frame_mask"], self.model.config)
        for file, reason in damaged:
            if file not in known:
                known[file] = reason
                logger.warning(f"A video cannot be read. {file}: {reason}")
        if self.model.training and isinstance(self.train_dataset, StreamedClips):
            is_unreadable = len(damaged) == len(inputs["labels"])
            self._num_unreadable = self._num_unreadable + len(damaged) if is_unreadable else 0
            if self._num_unreadable >= MAX_UNREADABLE:
                raise VideoDecodingError(
                    f"{self._num_unreadable} videos of the stream in a row cannot be read, which are too many to go on "
                    f"({damaged[-1][0]}: {damaged[-1][1]}; ...). `vivit-hf scan` lists what is wrong with a folder."
                )
        return super()._prepare_inputs(inputs)

    def all_damaged_files(self) -> dict[str, dict[str, str]]:
        """Return the unreadable files of all processes with the reasons, sorted, for "train" and for "eval"."""
        found = [self.damaged_files]
        if self.args.world_size > 1:
            found = [{}] * self.args.world_size
            torch.distributed.all_gather_object(found, self.damaged_files)
        return {
            split: dict(sorted(item for files in found for item in files[split].items())) for split in ("train", "eval")
        }

    # Optimisation

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if getattr(self, "optimizer", None) is None:
            model = self.model if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **settings: Any) -> Any:
        if model.training and not hasattr(self.model, "peft_config"):
            for module in frozen_modules(self.model):
                module.eval()
        targets = inputs.get("labels")  # masked pretraining has none
        if self.distillation is not None:
            clips, frame_mask = inputs["pixel_values"], inputs.get("frame_mask")
            teacher_logits = self.distillation.teacher.logits(clips, self.accelerator.autocast, frame_mask)
            inputs = {**inputs, "labels": (targets, teacher_logits)}  # both for `_distilled_loss`
        inputs = self._without_frozen_part(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **settings)
        if model.training and not self.label_map.has_several and not self.label_map.is_grouped:
            targets = targets.argmax(dim=1) if targets.ndim == 2 else targets
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[int(self.distillation is None)]
            counted = targets != IGNORED
            self._seen.append((logits.detach().argmax(dim=1)[counted], targets[counted]))
            del self._seen[:-256]
        return (loss, outputs) if return_outputs else loss

    def _distilled_loss(
        self,
        outputs: Any,
        labels: tuple[torch.Tensor, torch.Tensor],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of the labels and the teacher's logits, which `compute_loss` passes in their place."""
        assert self.distillation is not None
        targets, teacher_logits = labels
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        loss = self._loss(logits, targets, num_items_in_batch)
        return self.distillation.loss(loss, logits, teacher_logits, targets, self.label_map, num_items_in_batch)

    def _without_frozen_part(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Replace clips by the tokens of their time steps where Model 2's spatial encoder is frozen."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if "steps" in inputs or is_sharded or not has_frozen_space(self.model):
            return inputs
        others = {name: value for name, value in inputs.items() if name != "pixel_values"}
        *batch, frames, channels, height, width = inputs["pixel_values"].shape
        clips = inputs["pixel_values"].reshape(-1, frames, channels, height, width)
        frame_mask = inputs["frame_mask"].reshape(-1, frames) if "frame_mask" in inputs else None
        steps = encode_clips(self.model, clips, self.accelerator.autocast, frame_mask)  # (clips, time, hidden)
        return {**others, "steps": steps.unflatten(0, batch)}

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **settings: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *arguments, **settings)
        if self.accelerator.sync_gradients and self._is_logged(self.state.global_step + 1):
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            self._gradient_norms = {part: norm / scale for part, norm in gradient_norms(self.model).items()}
        return loss

    def _is_logged(self, step: int) -> bool:
        """Return whether the log may get an entry after this step; with one entry per epoch, it may after any."""
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return True
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
        if "loss" in logs:
            if self.accelerator.scaler is None and not all(norm.isfinite() for norm in self._gradient_norms.values()):
                raise self._diverged("gradients are")  # with a scaler, the step is skipped
            logs |= {f"grad_norm/{part}": norm.item() for part, norm in self._gradient_norms.items() if part != "total"}
            self._gradient_norms = {}
            if self._seen:
                predictions, targets = (torch.cat(list(part)).cpu().numpy() for part in zip(*self._seen, strict=True))
                self._warn_of_collapse(predictions, targets, "the last training batches")
                self._seen.clear()
        super().log(logs, *arguments, **settings)

    def _warn_of_collapse(self, predictions: np.ndarray, labels: np.ndarray, where: str) -> None:
        winner = collapsed_class(predictions, labels)
        if winner is not None:
            name = self.label_map.names[winner]
            logger.warning_once(
                f"Nearly all predictions on {where} are {name!r}, but few of the labels are. The usual reasons: a "
                "learning rate that is too high or still warming up, a new classifier, wrong labels, or uneven "
                "classes (try class weights or balanced sampling). Test whether the model can learn one batch by "
                "heart (overfit_one_batch)."
            )

    def _diverged(self, what: str) -> NonFiniteError:
        settings = f"learning_rate={self.args.learning_rate:g}, max_grad_norm={self.args.max_grad_norm:g}"
        return NonFiniteError(
            f"Training has diverged: at step {self.state.global_step}, {what} NaN or infinite ({settings}). Nothing "
            "was saved at this step. Take a lower learning rate or a longer warm-up, and clip gradients; checkpoints "
            "of earlier steps are whole, but may have begun to diverge."
        )

    # Checkpoints

    def _save_checkpoint(self, *arguments: Any, **settings: Any) -> None:
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            with deferred_interrupt():
                super()._save_checkpoint(*arguments, **settings)
        except Exception:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint would take up space for nothing
            raise

    def check_weights(self) -> None:
        """Raise NonFiniteError if weights are NaN or infinite; sharded ones are not looked at."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not is_sharded and (broken := broken_weights(self.model)):
            raise self._diverged(f"the weights {broken} are")

    def save_model(self, *arguments: Any, **settings: Any) -> None:
        with self.weight_average.applied():
            self.check_weights()
            super().save_model(*arguments, **settings)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.weight_average.average and self.args.should_save:
            self.weight_average.save(output_dir)
        if self.distillation is not None and self.args.should_save:
            self.distillation.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.weight_average.decay:
            self.weight_average.load(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.weight_average.forget()  # the checkpoint has the average of its step

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and hasattr(self.model, "peft_config"):
            # An adapter alone does not tell for which model and which clips it was trained.
            self.model.config.save_pretrained(output_dir or self.args.output_dir)

    # Evaluation

    def evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
        try:
            return super().evaluate(*arguments, **settings)
        except Exception as error:
            if self.is_in_train and not isinstance(error, NonFiniteError):  # keep weights that cannot be scored
                self._save_checkpoint(self.model, trial=None)
            raise

    def evaluation_loop(self, dataloader: DataLoader, *arguments: Any, **settings: Any) -> EvalLoopOutput:
        try:
            return self._evaluation_loop(dataloader, *arguments, **settings)
        finally:
            # `Trainer` keeps the loader of this set alone.
            if not self.is_in_train or dataloader.dataset is not self.eval_dataset:
                _stop_workers(dataloader)
            elif dataloader not in self._used_again:
                self._used_again.append(dataloader)

    def _evaluation_loop(self, dataloader: DataLoader, *arguments: Any, **settings: Any) -> EvalLoopOutput:
        # Evaluation must not change the random numbers of training: a resumed run may skip it.
        with torch.random.fork_rng(), self.weight_average.applied():
            if not isinstance(dataloader, StreamLoader):
                return super().evaluation_loop(dataloader, *arguments, **settings)
            # `gather_for_metrics` would cut the last batch to the size that the training loader remembers.
            self.gather_function = self.accelerator.gather
            output = super().evaluation_loop(dataloader, *arguments, **settings)
        count = dataloader.batches.num_videos  # padding that makes the shares of the processes even follows them
        predictions, labels = (
            None if values is None else values[:count] for values in (output.predictions, output.label_ids)
        )
        return output._replace(predictions=predictions, label_ids=labels, num_samples=count)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._without_frozen_part(self._prepare_inputs(inputs))
        labels = inputs["labels"]
        # Each is (batch, views, ...).
        views = {name: inputs[name] for name in ("pixel_values", "steps", "frame_mask") if name in inputs}
        size = next(iter(views.values())).shape[:2]
        split = [values.flatten(0, 1).split(max(self.args.eval_batch_size, 1)) for values in views.values()]
        parts = [dict(zip(views, part, strict=True)) for part in zip(*split, strict=True)]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = torch.cat([model(**part, return_dict=True).logits for part in parts])
        logits = average_views(logits.unflatten(0, size).float(), self.label_map, self.averaging)
        loss = self._loss(logits, labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        problem = "multi_label_classification" if self.label_map.has_several else "single_label_classification"
        sizes = self.label_map.sizes if self.label_map.is_grouped else None
        return video_classification_loss(logits, labels, problem, num_items_in_batch, group_sizes=sizes)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        check_finite(torch.from_numpy(logits), self.model)
        if not self.label_map.has_several and not self.label_map.is_grouped:
            counted = labels >= 0
            self._warn_of_collapse(logits[counted].argmax(axis=1), labels[counted], "the validation videos")
        # Over all videos at once: `Trainer` averages batches, which may differ in size.
        loss = self._loss(torch.from_numpy(logits), torch.from_numpy(labels)).item()
        return {**classification_metrics(logits, labels, self.label_map), "loss": loss}


def _stop_workers(loader: DataLoader) -> None:
    """
    End the processes of a loader that would wait for another epoch.

    Left to the garbage collector, they keep their memory until then, and each may take five seconds to end.
    """
    base: Any = getattr(loader, "base_dataloader", loader)  # within that of accelerate
    if base._iterator is not None:  # of persistent workers alone
        base._iterator._shutdown_workers()
        base._iterator = None
