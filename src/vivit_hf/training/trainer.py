"""Fine-tuning: what is trained and how fast, a `Trainer` for clips with views, and checkpoints that are whole."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy
from transformers.utils import logging

from ..data.labels import IGNORED, LabelMap
from ..inference.metrics import classification_metrics, collapsed_class
from ..inference.views import average_views, predict_views
from ..loss_vivit import video_classification_loss
from ..video_sources import VideoDecodingError
from .clips import ClipSampler, StreamedClips, VideoClips
from .stream_loading import StreamBatches, StreamLoader, StreamPosition


logger = logging.get_logger(__name__)

FREEZINGS = ("none", "spatial", "all_but_head")
MAX_UNREADABLE = 100  # videos of a stream in a row, in one process
LORA_TARGETS = r".*\.(q_proj|v_proj)"
_TEMPORAL = re.compile(
    r"(^|\.)(temporal_embeddings|temporal_encoder|temporal_layernorm|attention_time|layernorm_time)\."
)
_LAYER = re.compile(r"(?:^|\.)(encoder|temporal_encoder)\.layer\.(\d+)\.")


# What is trained, and how fast


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to: embeddings, encoder, temporal or classifier."""
    if re.search(r"(^|\.)classifier\.", name):
        return "classifier"
    if _TEMPORAL.search(name):
        return "temporal"
    return "embeddings" if re.search(r"(^|\.)embeddings\.", name) else "encoder"


def freeze(model: torch.nn.Module, what: str) -> list[str]:
    """
    Keeps parameters as they are; returns their names.

    "spatial": all that comes from an image transformer, which leaves Model 2's temporal encoder or Model 3's temporal
    attention and position embeddings, and the classifier. "all_but_head": leaves only the classifier. "none": nothing.

    Raises ValueError for "spatial" where space and time share their parameters (Models 1 and 4, average pooling).
    """
    if what not in FREEZINGS:
        raise ValueError(f"`freeze` must be one of {', '.join(FREEZINGS)}, got {what!r}.")
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    trained = {"none": set(parts.values()), "spatial": {"temporal", "classifier"}, "all_but_head": {"classifier"}}[what]
    if what == "spatial" and "temporal" not in parts.values():
        raise ValueError(
            "freeze='spatial' leaves nothing over time to train: this model has no parameters of its own for time "
            "(Models 2 and 3 have). Use 'all_but_head', or LoRA."
        )
    # Without temporal embeddings of its own, a model tells time steps apart by the position embeddings of its tokens.
    has_own_positions = any(".temporal_embeddings." in f".{name}" for name in parts)
    frozen = []
    for name, parameter in model.named_parameters():
        is_position = name.endswith("position_embeddings") and what == "spatial" and not has_own_positions
        parameter.requires_grad_(parts[name] in trained or is_position)
        if not parameter.requires_grad:
            frozen.append(name)
    return frozen


def untrained_modules(model: Any) -> list[str]:
    """
    Return the modules that still ignore the order of frames, as an image ViT leaves them, in the form in which
    peft's `modules_to_save` takes them.

    These are the embeddings if their position embeddings are the same at every time step, and the modules over time if
    their LayerNorms still have their initial values. If they are frozen, or trained by low-rank updates alone, the
    model cannot learn the order of frames.

    Args:
        model: a `ViViTForVideoClassification`.
    """
    embeddings, names = model.vivit.embeddings, []
    positions = embeddings.position_embeddings.detach()[:, embeddings.num_prefix_tokens :]
    positions = positions.unflatten(1, (embeddings.grid[0], -1))  # (1, time, space, hidden)
    if embeddings.grid[0] > 1 and torch.allclose(positions, positions[:, :1].expand_as(positions), atol=1e-6):
        names.append("vivit.embeddings")
    norms = {
        name: module
        for name, module in model.named_modules()
        if name.endswith((".temporal_layernorm", ".layernorm_time"))
    }
    if norms and all(bool((norm.weight == 1).all()) and not norm.bias.any() for norm in norms.values()):
        is_second_encoder = any(name.endswith(".temporal_layernorm") for name in norms)
        names += (
            ["temporal_embeddings", "temporal_encoder", "temporal_layernorm"]
            if is_second_encoder
            else ["attention_time", "layernorm_time"]
        )
    return names


def depths(model: torch.nn.Module) -> dict[str, int]:
    """How far each parameter is from the output, 0 for the classifier and final norms and 1 more per layer below."""
    places = {}
    for name, _ in model.named_parameters():
        match = _LAYER.search(name.replace(".modules_to_save.default.", "."))  # a copy that peft trains
        if match:
            places[name] = (1 if match[1] == "encoder" else 2, int(match[2]))
        elif part_of(name) == "embeddings":
            places[name] = (0, 0)
        elif "temporal_embeddings" in name or re.search(r"(^|\.)vivit\.layernorm\.", name):
            places[name] = (2, 0)  # between Model 2's encoders; without a second one, at the end
        else:
            places[name] = (3, 0)
    has_second = any(
        place[0] == 2 and part_of(name) == "temporal" and ".layer." in name for name, place in places.items()
    )
    if not has_second:
        places = {name: (3, 0) if place[0] == 2 else place for name, place in places.items()}
    order = sorted(set(places.values()), reverse=True)
    if (3, 0) not in order:
        order.insert(0, (3, 0))
    return {name: order.index(place) for name, place in places.items()}


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """
    Groups for an optimiser: learning_rate * layer_decay ** depth (see `depths`), and no weight decay for biases, norms,
    class tokens and position embeddings. Frozen parameters are left out.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay={layer_decay!r}` must be above 0 and at most 1.")
    depth_of = depths(model)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(("cls_token", "position_embeddings"))
        depth = depth_of[name] if layer_decay != 1 else 0
        group = groups.setdefault(
            (depth, decays),
            {
                "params": [],
                "lr": learning_rate * layer_decay**depth,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("No parameter is left to train.")
    return [groups[key] for key in sorted(groups)]


def gradient_norms(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The norm of the gradient of each part of the model (see `part_of`), and of all of it as "total": tensors ()."""
    norms: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad.detach().float())
            norms.setdefault(part_of(name), []).append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    result = {part: torch.stack(values).norm() for part, values in norms.items()}
    return {**result, "total": torch.stack(list(result.values())).norm()} if result else {}


# Checkpoints


def is_complete_checkpoint(folder: Path) -> bool:
    """Whether everything that a `Trainer` checkpoint has is there to its last byte: a killed process leaves less."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        weights = list(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        if index.exists():
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if not named <= {path.name for path in weights}:
                return False
        for path in weights:
            with safe_open(path, framework="pt"):  # compares the header with the size of the file
                continue
        zipped = [*folder.glob("*.pt"), *folder.glob("*.pth")]
        names = {path.name for path in zipped}
        is_sharded = any(path.is_dir() for path in folder.glob("*_fsdp_*")) or any(folder.glob("optimizer_*"))
        has_optimizer = is_sharded or {"optimizer.pt", "scheduler.pt"} <= names
        has_random_state = any(name.startswith("rng_state") for name in names)
        return (
            "global_step" in state
            and bool(weights or is_sharded)
            and has_optimizer
            and has_random_state
            and all(zipfile.is_zipfile(path) for path in zipped)  # their directory stands at the end
        )
    except (OSError, ValueError, KeyError, SafetensorError):
        return False


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The latest `checkpoint-N` of a folder that is whole; those that are not are passed over, with a warning."""
    folder = Path(folder)
    numbered = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, path in sorted(numbered, reverse=True):
        if is_complete_checkpoint(path):
            return path
        logger.warning(f"{path} is not whole, as a process leaves it that was killed while writing: it is passed over.")
    return None


# The trainer


class ClipTrainer(Trainer):
    """
    A `Trainer` for `VideoClips` and `StreamedClips`.

    Beyond transformers': evaluation averages the views of a video and gives top-1 and top-5, mean average precision or
    noun, verb and action scores; the learning rate can fall from layer to layer; the order of the videos depends on
    seed and epoch alone; files that could not be read are gathered (`all_damaged_files`); the log has the norm of the
    gradient per part of the model, before it is clipped; and predictions that collapse to one class are warned of.

    Args:
        label_map: of the data set.
        layer_decay: factor of the learning rate per layer, counted from the output.
        is_balanced: draw training videos so that all classes come up equally often.
        averaging: how views are averaged, see `average_views`.
        arguments, settings: of `Trainer`.
    """

    def __init__(
        self,
        *arguments: Any,
        label_map: LabelMap,
        layer_decay: float = 1.0,
        is_balanced: bool = False,
        averaging: str = "probabilities",
        **settings: Any,
    ):
        settings.setdefault("compute_metrics", self._metrics)
        super().__init__(*arguments, **settings)
        self.label_map, self.layer_decay, self.is_balanced = label_map, layer_decay, is_balanced
        self.averaging = averaging
        self.damaged_files: dict[str, dict[str, str]] = {"train": {}, "eval": {}}
        self._gradient_norms: dict[str, torch.Tensor] = {}
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_unreadable = 0
        if isinstance(self.train_dataset, StreamedClips):
            self.add_callback(StreamPosition())

    # Data

    def _get_train_sampler(self, *arguments: Any, **settings: Any) -> Any:
        if isinstance(self.train_dataset, StreamedClips):
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ClipSampler(self.train_dataset, seed, self.is_balanced)

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, StreamedClips):
            return self._stream(
                self.train_dataset,
                self.args.train_batch_size,
                rounds_per_step=self.args.gradient_accumulation_steps,
                drop_last=self.args.dataloader_drop_last,
            )
        loader = super().get_train_dataloader()
        # Starting workers would draw from torch's random numbers, which a resumed run does at other moments.
        loader.base_dataloader.generator = torch.Generator()
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, StreamedClips):
            return self._stream(dataset, self.args.eval_batch_size)
        if isinstance(eval_dataset, VideoClips) and eval_dataset is not self.eval_dataset:
            # Trainer keeps the loader of persistent workers, and would give it back for any other data set.
            return self.get_test_dataloader(eval_dataset)
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

    def _init_training_state(self, *arguments: Any, **settings: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*arguments, **settings)
        for position in self.callback_handler.callbacks:
            if isinstance(position, StreamPosition):
                position.restore(self.state)
                self.train_dataset.set_epoch(position.epoch)
                steps = self.state.global_step - position.first_step
                epochs, batches = position.epoch, steps * self.args.gradient_accumulation_steps
        return epochs, 0 if self.args.ignore_data_skip else batches

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        known = self.damaged_files["train" if self.model.training else "eval"]
        damaged = inputs.pop("damaged_files", ())
        inputs.pop("files", None)
        for file, reason in damaged:
            if file not in known:
                known[file] = reason
                logger.warning(f"A video cannot be read. {file}: {reason}")
        if self.model.training and isinstance(self.train_dataset, StreamedClips):
            is_unreadable = len(damaged) == len(inputs["labels"])
            self._num_unreadable = self._num_unreadable + len(damaged) if is_unreadable else 0
            if self._num_unreadable >= MAX_UNREADABLE:
                raise VideoDecodingError(
                    f"{self._num_unreadable} videos of the stream in a row cannot be read, which is too many to go on "
                    f"({damaged[-1][0]}: {damaged[-1][1]}; ...)."
                )
        return super()._prepare_inputs(inputs)

    def all_damaged_files(self) -> dict[str, dict[str, str]]:
        """For "train" and "eval", the files of all processes with the reasons, sorted."""
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
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **settings)
        if model.training and not self.label_map.has_several and not self.label_map.is_grouped:
            labels = inputs["labels"]
            targets = labels.argmax(dim=1) if labels.ndim == 2 else labels
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
            counted = targets != IGNORED
            self._seen.append((logits.detach().argmax(dim=1)[counted], targets[counted]))
            del self._seen[:-256]
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **settings: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *arguments, **settings)
        if self.accelerator.sync_gradients and self._is_logged(self.state.global_step + 1):
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            self._gradient_norms = {part: norm / scale for part, norm in gradient_norms(self.model).items()}
        return loss

    def _is_logged(self, step: int) -> bool:
        """Return whether the log gets an entry after this step; one per epoch can come after any."""
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return True
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
        if "loss" in logs:
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
                f"Nearly all predictions on {where} are {name!r}, and few of the labels are. The usual reasons: a "
                "learning rate that is too high or has hardly begun to rise, a classifier that is new, wrong labels, "
                "uneven classes (class weights, balanced sampling). Try whether one batch can be learnt by heart "
                "(overfit_one_batch)."
            )

    # Evaluation

    def evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
        try:
            return super().evaluate(*arguments, **settings)
        except Exception:
            if self.is_in_train:  # what has been learnt is worth more than its score
                self._save_checkpoint(self.model, trial=None)
            raise

    def evaluation_loop(self, dataloader: DataLoader, *arguments: Any, **settings: Any) -> EvalLoopOutput:
        # A run that is resumed behind an evaluation must not miss the random numbers that it drew.
        with torch.random.fork_rng():
            if not isinstance(dataloader, StreamLoader):
                return super().evaluation_loop(dataloader, *arguments, **settings)
            # `gather_for_metrics` would drop what makes the last batch of another loader whole, the training data's.
            self.gather_function = self.accelerator.gather
            output = super().evaluation_loop(dataloader, *arguments, **settings)
        count = dataloader.batches.num_videos  # behind them is what made the shares of the processes even
        predictions, labels = (
            None if values is None else values[:count] for values in (output.predictions, output.label_ids)
        )
        return output._replace(predictions=predictions, label_ids=labels, num_samples=count)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = predict_views(model, inputs["pixel_values"], max(self.args.eval_batch_size, 1))
        logits = average_views(logits.float(), self.label_map, self.averaging)
        loss = self._loss(logits, labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        problem = "multi_label_classification" if self.label_map.has_several else "single_label_classification"
        sizes = self.label_map.sizes if self.label_map.is_grouped else None
        return video_classification_loss(logits, labels, problem, group_sizes=sizes)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if not self.label_map.has_several and not self.label_map.is_grouped:
            counted = labels >= 0
            self._warn_of_collapse(logits[counted].argmax(axis=1), labels[counted], "the validation videos")
        # Over all videos at once: `Trainer` takes the mean over batches, in which videos do not count equally.
        loss = self._loss(torch.from_numpy(logits), torch.from_numpy(labels)).item()
        return {**classification_metrics(logits, labels, self.label_map), "loss": loss}
