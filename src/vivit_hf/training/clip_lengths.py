"""Batches of clips of similar length: count the frames that a clip shows of each video, and group equal counts."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..video_decoding import VideoReader
from ..video_processing_vivit import choose_frames
from ..video_sources import VideoDecodingError, VideoLimits
from .clips import VideoClips


GROUP_BY_LENGTH = "group_by_length"  # of transformers' `train_sampling_strategy`
_MOST_BATCHES = 50  # that are sorted together, as in transformers' LengthGroupedSampler


class _Lengths(Dataset):
    """The number of visible frames in a clip of each video, by the times of its frames; decodes none."""

    def __init__(self, clips: VideoClips):
        self.videos = clips.videos
        # A random clip of a short video starts at its first frame, too.
        self.settings = clips.processor.settings.updated({"clip_start": "centre", "num_clips": 1})

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> int:
        limits = VideoLimits(**(self.settings.video_limits or {}))
        try:
            source = self.videos[index].source()
            with VideoReader(source, limits=limits, num_threads=1) as reader:
                _, mask = choose_frames(reader.timestamps, source, self.settings, None)
        except (VideoDecodingError, OSError):
            return self.settings.num_frames  # of the video that will take its place
        return int(mask.sum())


def measure_lengths(
    clips: VideoClips, *, process_index: int = 0, num_processes: int = 1, num_workers: int = 0
) -> np.ndarray:
    """
    Return the number of visible frames in a clip of each video, int64 (videos,), in every process.

    Each of `num_processes` opens every `num_processes`-th video, in `num_workers` processes. A video that cannot be
    read counts as long, because another one takes its place.
    """
    share = range(len(clips))[process_index::num_processes]
    # A generator of its own: starting workers must not draw from that of the training.
    settings: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    own = list(DataLoader(_Lengths(clips), batch_size=None, sampler=share, **settings))
    found = [own]
    if num_processes > 1:
        found = [[]] * num_processes
        torch.distributed.all_gather_object(found, own)
    lengths = np.zeros(len(clips), dtype=np.int64)
    for index, theirs in enumerate(found):
        lengths[index::num_processes] = theirs
    return lengths


def describe_lengths(lengths: np.ndarray, num_frames: int) -> str:
    """Describe the lengths of the clips of all videos on one line."""
    short = int((lengths < num_frames).sum())
    return (
        f"Batches by length: {short} of {len(lengths)} videos have fewer than the {num_frames} frames of a clip, "
        f"{lengths.min()} to {lengths.max()} of them visible."
    )


def group_by_length(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, generator: np.random.Generator
) -> np.ndarray:
    """
    Rearrange an order of videos so that those of one batch have similar lengths.

        order      . | . : . | : | . :       (. short, | middle, : long)
        batches    . . . . | | | : : :       of one pool, sorted and cut
        returned   | |  . .  : :  . |        the batches in random order, an incomplete one last

    Pools of up to 50 batches, and at most a quarter of the videos, are sorted, so batches differ from epoch to epoch.

    Args:
        order: indices of videos, int64 (videos,); they may repeat.
        lengths: int64, of each video.
        batch_size: clips of a batch in all processes together, which wait for each other.
        generator: draws the order of the batches.

    Returns:
        The same indices, int64 (videos,).
    """
    pool = batch_size * max(1, min(len(order) // (4 * batch_size), _MOST_BATCHES))
    parts = [order[start : start + pool] for start in range(0, len(order), pool)]
    ordered = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    whole = len(ordered) // batch_size * batch_size
    batches = generator.permutation(ordered[:whole].reshape(-1, batch_size))
    return np.concatenate([batches.reshape(-1), ordered[whole:]])
