"""The clips that an exported model is checked with, and those that its int8 activations are scaled by."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..configuration_vivit import ViViTConfig
from ..data.scan import find_videos
from ..inference.clips import step_starts
from ..initialisation.weight_files import ConversionError
from ..video_processing_vivit import ViViTVideoProcessor
from .onnx_models import INPUT, MASK, Clip, name_of
from .parity import clip_shape, random_clip


BATCHES = (1, 3)  # one clip, and more than the two clips that the graph is traced with
CALIBRATION_CLIPS = 16


@dataclass(frozen=True)
class ClipSet:
    """Clips, a description of them in words, and their files, relative to the user's folder."""

    clips: list[Clip]
    description: str
    files: list[str]


def choose_clips(
    args: argparse.Namespace, config: ViViTConfig, processor: ViViTVideoProcessor
) -> tuple[ClipSet, ClipSet | None]:
    """
    Return the clips to check with, and those to calibrate with if that is asked for; no file is in both.

    Raises:
        ConversionError: if a folder has too few videos.
    """
    folder, calibration = args.videos or args.calibration, None
    taken: list[Path] = []
    if args.calibration is not None:
        videos = find_videos(args.calibration)
        is_shared = Path(folder).resolve() == Path(args.calibration).resolve()
        taken = _spread(videos, min(CALIBRATION_CLIPS, len(videos) // 2 if is_shared else len(videos)))
        if not taken:
            raise ConversionError(f"{args.calibration} has {len(videos)} video files; --calibration needs more.")
        calibration = _clips_of(args.calibration, taken, len(videos), config, processor)
    if folder is None:
        is_masked = processor.short_video_policy == "mask"
        clips: list[Clip] = [partial(_random_inputs, config, is_masked, seed) for seed in range(args.num_clips_checked)]
        description = f"{len(clips)} random ones, which say little about videos: see --videos"
        return ClipSet(clips, description, []), calibration
    all_videos, seen = find_videos(folder), {path.resolve() for path in taken}
    videos = [path for path in all_videos if path.resolve() not in seen]
    if len(videos) < sum(BATCHES):
        besides = f" besides the {len(taken)} of the calibration" if len(videos) < len(all_videos) else ""
        raise ConversionError(f"{folder} has {len(videos)} video files{besides}; expected {sum(BATCHES)} or more.")
    chosen = _spread(videos, min(args.num_clips_checked, len(videos)))
    return _clips_of(folder, chosen, len(all_videos), config, processor), calibration


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """Spread a choice over a folder, because neighbours often have the same class."""
    return [paths[place] for place in np.linspace(0, len(paths) - 1, count).round().astype(int)]


def _clips_of(
    folder: str, paths: Sequence[Path], total: int, config: ViViTConfig, processor: ViViTVideoProcessor
) -> ClipSet:
    return ClipSet(
        [partial(_read_clip, path, config, processor) for path in paths],
        f"one of each of {len(paths)} videos of the {total} in {name_of(folder)}",
        [path.relative_to(folder).as_posix() for path in paths],
    )


def _random_inputs(config: ViViTConfig, is_masked: bool, seed: int) -> dict[str, torch.Tensor]:
    """Return a random clip, and a mask whose number of visible time steps depends on the seed."""
    inputs = {INPUT: random_clip(config, seed)}
    if is_masked:
        ends = step_starts(config) + config.tubelet_size[0]
        inputs[MASK] = torch.arange(config.num_frames)[None] < int(ends[len(ends) - 1 - seed % len(ends)])
    return inputs


def _read_clip(path: Path, config: ViViTConfig, processor: ViViTVideoProcessor) -> dict[str, torch.Tensor]:
    inputs = dict(processor(path, num_clips=1, num_crops=1, on_error="raise", generator=0))
    expected, shape = (1, *clip_shape(config)), tuple(inputs[INPUT].shape)
    if shape != expected:
        raise ConversionError(
            f"The processor makes a clip of {shape} from {path}, but the model takes {expected}; correct "
            "`size` or `crop_size` in preprocessor_config.json."
        )
    return inputs
