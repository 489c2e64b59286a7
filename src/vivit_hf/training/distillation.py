"""
Distillation: a trained teacher's soft predictions as targets beside the labels (Hinton et al., 2015).

    loss = (1 - weight) * loss of the labels + weight * temperature² * KL(teacher / temperature ‖ student / temperature)

as in DeiT (Touvron et al., 2021, equation 2). The teacher sees the student's clips, mixed ones as well, in its own
normalisation, frame size and number of frames. A ViViT sees short clips with the student's mask; to other teachers they
end with their last visible frame, repeated.
"""

import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, kl_div
from transformers import AutoConfig, AutoModelForVideoClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES

from ..configuration_vivit import ViViTConfig
from ..data.labels import IGNORED, LabelMap
from ..hub.model_card import linked
from ..inference.clips import shown_masks
from ..inference.finite_outputs import check_finite
from ..initialisation.weight_files import find_weights, has_processor, loading_problems, read_config, read_json
from ..limits_vivit import LIMITS, check_count, check_labels
from ..modeling_vivit import ViViTForVideoClassification, nearest_visible_frames
from ..processor_settings import ProcessorSettings
from ..video_frames import rescale_and_normalize
from ..video_processing_vivit import ViViTVideoProcessor
from .feature_cache import Autocast
from .finetuning_arguments import Say
from .finetuning_model import is_vivit, without_load_report


DISTILLATION_FILE = "distillation.json"  # in a checkpoint

_PIXEL_SETTINGS = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor")


# The loss


def distillation_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    label_map: LabelMap,
    temperature: float,
    num_items_in_batch: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """
    Return temperature² times the mean Kullback-Leibler divergence of the student's predictions from the teacher's.

    The divergence is that of the softmax, in each group of labels; with several labels per video it is that of the
    sigmoid of each label. The square keeps gradients at the scale of those of the labels (Hinton et al., section 2).

    Args:
        logits, teacher_logits: (batch, num_labels), in the same order.
        labels: in the form of `video_classification_loss`; where they are ignored, so is the divergence.
        num_items_in_batch: elements of the labels of all batches of one optimiser step, as `Trainer` counts them.

    Returns:
        float32 ().
    """
    student, teacher = logits.float() / temperature, teacher_logits.float() / temperature
    is_counted = labels != IGNORED
    if label_map.has_several:
        targets = teacher.sigmoid()
        divergences = binary_cross_entropy_with_logits(student, targets, reduction="none")
        divergences = divergences - binary_cross_entropy_with_logits(teacher, targets, reduction="none")
    else:
        parts = zip(student.split(label_map.sizes, dim=1), teacher.split(label_map.sizes, dim=1), strict=True)
        of_groups = [
            kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True).sum(dim=1)
            for ours, theirs in parts
        ]
        divergences = torch.stack(of_groups, dim=1)  # (batch, groups)
        if labels.is_floating_point():  # probabilities, all zero in a group without a label
            of_groups = [part.any(dim=1) for part in labels.split(label_map.sizes, dim=1)]
            is_counted = torch.stack(of_groups, dim=1)  # (batch, groups)
    total = (divergences * is_counted.reshape(divergences.shape)).sum()
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORED).sum()
    # `Trainer` counts elements of the labels: of probabilities, there are several for each divergence.
    count = torch.as_tensor(num_items_in_batch, device=total.device) * divergences.numel() / labels.numel()
    return temperature**2 * total / count.clamp(min=1)


# The teacher


@dataclass(frozen=True)
class Teacher:
    """
    A trained classifier that predicts for the clips of a student.

    `model`: in eval mode, without gradients.
    `frames`: int64 (teacher's frames,), the places in the student's clip.
    `size`: (height, width) of the teacher's frames.
    `scale`, `shift`: float32 (channels, 1, 1); the teacher's pixels are the student's * scale + shift.
    `outputs`: int64 (num_labels,), the teacher's output for each of the student's labels.
    `takes_masks`: whether the model takes `frame_mask`.
    """

    model: Any
    frames: torch.Tensor
    size: tuple[int, int]
    scale: torch.Tensor
    shift: torch.Tensor
    outputs: torch.Tensor
    takes_masks: bool = False

    def pixel_values(self, clips: torch.Tensor, frame_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Turn clips of the student (batch, frames, channels, height, width) into clips of the teacher.

        Frames of another size are resized, bilinear and antialiased, whatever their aspect ratio. Frames that are
        masked in `frame_mask`, bool (batch, frames), show the nearest visible one.
        """
        if frame_mask is not None:
            rows = torch.arange(len(clips), device=clips.device)[:, None]
            clips = clips[rows, nearest_visible_frames(frame_mask)]
        clips = clips[:, self.frames].float()
        if clips.shape[-2:] != self.size:
            images = interpolate(clips.flatten(0, 1), self.size, mode="bilinear", antialias=True)
            clips = images.unflatten(0, clips.shape[:2])  # (batch, frames, channels, height, width)
        return (clips * self.scale + self.shift).to(self.model.dtype)

    def frame_mask(self, frame_mask: torch.Tensor) -> torch.Tensor:
        """
        Turn masks of the student's clips, bool (batch, frames), into masks of the teacher's.

        A clip so short that none of the teacher's frames is visible is shown whole: its last frame, repeated.
        """
        return shown_masks(frame_mask[:, self.frames], self.model.config)

    @torch.no_grad()
    def logits(
        self, clips: torch.Tensor, autocast: Autocast = nullcontext, frame_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Return the logits for clips of the student, float32 (batch, num_labels), in the order of its labels.

        `frame_mask`: the visible frames of the clips, bool (batch, frames).
        """
        pixel_values = self.pixel_values(clips, frame_mask)
        masks = {} if frame_mask is None or not self.takes_masks else {"frame_mask": self.frame_mask(frame_mask)}
        with autocast():
            logits = self.all_logits(pixel_values, **masks)
        return logits[:, self.outputs].float()

    @torch.no_grad()
    def all_logits(self, pixel_values: torch.Tensor, **masks: torch.Tensor) -> torch.Tensor:
        """Return the logits of all outputs for clips of the teacher, (batch, outputs)."""
        logits = self.model(**{self.model.main_input_name: pixel_values}, **masks).logits
        return logits.flatten(1)  # VideoPrism's are (batch, 1, outputs)


def load_teacher(
    source: str,
    processor: ViViTVideoProcessor,
    label_map: LabelMap,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    say: Say = print,
) -> Teacher:
    """
    Load a teacher and try it on a clip of zeros. Code in its folder or repository is never run.

    Args:
        source: Hub id or folder of a ViViT, or of another video classification model of transformers.
        processor: of the student.
        label_map: the student's labels; a label of the same name must be among the teacher's.

    Raises:
        ValueError: for a teacher of another kind, without a label, a processor or a weight, with more frames than the
            student's clips, or with outputs that are not finite.
        OSError: if there is no such folder or repository.
    """
    stored = read_config(source)
    model_type, known = stored.get("model_type"), [*MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES, "vivit_hf"]
    if model_type not in known:
        raise ValueError(
            f"--teacher {source} has the model_type {model_type!r}; expected a trained model for video classification "
            f"({', '.join(sorted(set(known)))}). Code in a repository is never run."
        )
    is_own = is_vivit(source, stored)
    config = ViViTConfig.from_pretrained(source) if is_own else _read_config(source)
    outputs = _outputs_for(source, config, label_map)
    frames = _frames_for(source, config, processor.num_frames)
    scale, shift = _pixel_change(processor.settings, _pixel_settings(source, is_own))
    height, width = _frame_size(config)
    has_masks = processor.short_video_policy == "mask"
    with torch.random.fork_rng(devices=[]):  # the student must not depend on the teacher
        model = _load_model(ViViTForVideoClassification if is_own else AutoModelForVideoClassification, source, dtype)
    model.eval().requires_grad_(False).to(device)
    places, labels = (torch.tensor(indices, device=device) for indices in (frames, outputs))
    takes_masks = is_own and (config.merge_tokens is None or config.attention_type != "spatio_temporal")
    teacher = Teacher(model, places, (height, width), scale.to(device), shift.to(device), labels, takes_masks)
    crop = processor.crop_size["height"], processor.crop_size["width"]
    _try(teacher, source, torch.zeros(1, processor.num_frames, 3, *crop, device=device), config.num_labels)
    say(
        f"Teacher {source}: {type(model).__name__}, {len(frames)} of the {processor.num_frames} frames of a clip, "
        f"{crop[0]} x {crop[1]} pixels{f' resized to {height} x {width}' if crop != (height, width) else ''}, "
        f"{len(outputs)} of its {config.num_labels} labels"
        + (f", short clips {'masked' if takes_masks else 'ended by their last frame, repeated'}" * has_masks)
    )
    return teacher


def _read_config(source: str) -> Any:
    """Return the configuration of a model of transformers. Raises ValueError if its values are none of such a model."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        for name in LIMITS:
            value = getattr(config, name, None)
            for size in value if isinstance(value, (list, tuple)) else [value]:
                if size is not None:
                    check_count(name, size, least=0)
        check_count("num_frames", _num_frames(config))
        check_labels(config.id2label)
    except Exception as error:  # transformers and the checks of dataclasses raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"--teacher {source}: its config.json cannot be used: {reason}") from error
    _check_size(source, config)
    return config


def _check_size(source: str, config: Any) -> None:
    """Raise ValueError if the weights cannot hold the attention of all layers, before memory is taken for them."""
    weights = find_weights(source)
    size = weights.stat().st_size
    if weights.suffix == ".json":  # of a repository, the files may not be here yet
        size = int(read_json(weights)["metadata"].get("total_size", sys.maxsize))
    layers, width = getattr(config, "num_hidden_layers", 1), config.hidden_size
    if 4 * layers * width**2 > size:  # four matrices, at a byte per number or more
        raise ValueError(
            f"--teacher {source}: {layers} layers of width {width:,}, as its config.json says, do not fit into the "
            f"{size:,} bytes of its weights."
        )


def _outputs_for(source: str, config: Any, label_map: LabelMap) -> list[int]:
    """Return the teacher's output for each label. Raises ValueError for labels of another kind, or missing ones."""
    own = LabelMap.from_config(config)
    kinds = [_kind_of(own), _kind_of(label_map)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"--teacher {source} predicts {kinds[0]}, and the videos have {kinds[1]} (problem_type and label_groups "
            "of a config.json tell which): its predictions are no targets for them."
        )
    counts = Counter(own.names)
    if missing := [name for name in label_map.names if counts[name] != 1]:
        has_many = any(counts[name] for name in missing)
        raise ValueError(
            f"--teacher {source} has {'no single' if has_many else 'no'} output for {len(missing)} of the "
            f"{len(label_map.names)} labels: {_listed(missing)}. Labels are matched by name, and it has "
            f"{_listed(own.names)}."
        )
    return [own.names.index(name) for name in label_map.names]


def _kind_of(label_map: LabelMap) -> str:
    if label_map.is_regression:
        return "a value"
    if label_map.has_several:
        return "any number of labels per video"
    return f"the groups {', '.join(sorted(label_map.groups))}" if label_map.is_grouped else "one label per video"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + ", ..." * (len(names) > 5)


def _frames_for(source: str, config: Any, num_frames: int) -> list[int]:
    """Return the frames that a teacher takes of a clip: the middle of each of as many equal parts."""
    wanted = _num_frames(config)
    if wanted > num_frames:
        raise ValueError(
            f"--teacher {source} takes clips of {wanted} frames, and the student's have {num_frames}: give "
            f"--num_frames {wanted} or more, or a teacher of fewer frames."
        )
    return [(2 * place + 1) * num_frames // (2 * wanted) for place in range(wanted)]


def _num_frames(config: Any) -> int:
    return config.frames_per_clip if hasattr(config, "frames_per_clip") else config.num_frames


def _frame_size(config: Any) -> tuple[int, int]:
    size = next(getattr(config, name) for name in ("frame_size", "image_size", "crop_size") if hasattr(config, name))
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _pixel_settings(source: str, is_own: bool) -> ProcessorSettings:
    """Return the settings of a teacher's processor that say how its pixels are scaled."""
    if not has_processor(source):
        raise ValueError(f"--teacher {source} has no processor beside it, which tells the scaling of its pixels.")
    if is_own:
        return ViViTVideoProcessor.from_pretrained(source).settings
    stored, _ = ViViTVideoProcessor.get_image_processor_dict(source)
    if stored.get("do_normalize", True) and not (stored.get("image_mean") and stored.get("image_std")):
        raise ValueError(f"--teacher {source}: its processor has no image_mean and image_std.")
    return ProcessorSettings(**{name: stored[name] for name in _PIXEL_SETTINGS if stored.get(name) is not None})


def _pixel_change(student: ProcessorSettings, teacher: ProcessorSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and shift (channels, 1, 1) from the student's pixels to the teacher's."""
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    (black, white), (their_black, their_white) = (
        rescale_and_normalize(extremes, settings).double() for settings in (student, teacher)
    )
    scale = (their_white - their_black) / (white - black)
    return scale.float(), (their_black - black * scale).float()


def _load_model(cls: Any, source: str, dtype: torch.dtype) -> Any:
    """Load a model whose parameters are exactly those of its files. Raises ValueError if they are not."""
    weights = find_weights(source)
    try:
        with without_load_report():
            model, info = cls.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors="safetensors" in weights.name,
                ignore_mismatched_sizes=True,  # mismatches are reported by name below
                output_loading_info=True,
            )
    except Exception as error:  # the modules of a model raise many kinds for settings that contradict each other
        raise ValueError(f"--teacher {source}: it cannot be loaded: {error}") from error
    problems = [*loading_problems(info), *(f"no place for: {name}" for name in sorted(info["unexpected_keys"]))]
    if problems:
        raise ValueError(
            f"--teacher {source}: its weights do not fit its config.json ({len(problems)} differences, such as "
            f"{'; '.join(problems[:3])}). A teacher needs a trained classifier, and all of its weights."
        )
    return model


def _try(teacher: Teacher, source: str, clip: torch.Tensor, num_labels: int) -> None:
    """Raise ValueError unless a teacher has finite outputs for a clip."""
    pixel_values = teacher.pixel_values(clip)
    try:
        logits = teacher.all_logits(pixel_values)
        check_finite(logits, teacher.model)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"--teacher {source} fails on a clip of {tuple(pixel_values.shape[1:])}: {error}") from error
    if logits.shape != (1, num_labels):
        raise ValueError(
            f"--teacher {source} has logits {tuple(logits.shape)} for one clip, expected (1, {num_labels})."
        )


# A run


@dataclass(frozen=True)
class Distillation:
    """A teacher with its Hub id or folder, the temperature, and the share of its loss, above 0 and at most 1."""

    teacher: Teacher
    source: str
    temperature: float
    weight: float

    def loss(
        self,
        label_loss: torch.Tensor,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        labels: torch.Tensor,
        label_map: LabelMap,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Return the weighted sum of the loss of the labels and of `distillation_loss`."""
        soft = distillation_loss(logits, teacher_logits, labels, label_map, self.temperature, num_items_in_batch)
        return (1 - self.weight) * label_loss + self.weight * soft

    def describe(self) -> str:
        """Return a sentence for the model card, in Markdown."""
        return (
            f"Distilled from {linked(self.source)} ([Hinton et al., 2015](https://arxiv.org/abs/1503.02531)) with "
            f"temperature {self.temperature:g} and weight {self.weight:g}."
        )

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the one that wrote the checkpoint."""
        source = str(Path(self.source).resolve()) if Path(self.source).is_dir() else self.source
        return {"teacher": source, "temperature": self.temperature, "weight": self.weight}

    def save(self, folder: str | Path) -> None:
        """Write the settings into a checkpoint."""
        Path(folder, DISTILLATION_FILE).write_text(json.dumps(self.settings(), indent=2) + "\n", encoding="utf-8")


def check_distillation(checkpoint: str, distillation: Distillation | None) -> None:
    """Raise ValueError for a checkpoint of a run with another teacher, temperature or weight."""
    path = Path(checkpoint, DISTILLATION_FILE)
    stored = read_json(path) if path.exists() else None
    if stored == (distillation.settings() if distillation else None):
        return
    given = "out --teacher"
    if isinstance(stored, dict):
        names = ("teacher", "temperature", "weight")
        given = "".join(f" --{'distillation_' * (name != 'teacher')}{name} {stored.get(name)}" for name in names)
    raise ValueError(
        f"{checkpoint} was trained with{given}, unlike this run: give another --output_dir, or "
        "--resume_from_checkpoint no to start anew."
    )
