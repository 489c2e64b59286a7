"""Data sets of clips from video files: deterministic per (seed, epoch, index), and tolerant of damaged files."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from ..data.annotations import LabelledVideo
from ..data.labels import LabelMap, balanced_weights
from ..frame_sampling import ShortVideoError
from ..video_processing_vivit import ViViTVideoProcessor
from ..video_sources import VideoDecodingError, source_name
from .augmentation import ClipAugmentation, clip_generator


_ORDER, _REPLACEMENT = 0x6F72646572, 0x7265706C  # separate these random numbers from those of the augmentation
_BLANK_SIZE = (64, 64)  # pixels
UNREADABLE = (VideoDecodingError, ShortVideoError, OSError)  # what another video is trained on for
_OF_A_VIDEO = ("pixel_values", "frame_mask", "labels", "file")  # in an item, beside the place that it fills

Tensors = dict[str, torch.Tensor]


@dataclass(eq=False)
class _Clips:
    """What data sets of files and of streams have in common."""

    videos: Any
    processor: ViViTVideoProcessor
    label_map: LabelMap
    _: KW_ONLY
    augmentation: ClipAugmentation | None = None
    seed: int = 0
    num_clips: int = 1
    num_crops: int = 1

    def __post_init__(self) -> None:
        # In shared memory: workers that outlive an epoch see the next one begin.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch[0] = int(epoch)

    def _make(self, video: Any, generator: np.random.Generator) -> Tensors:
        """Return `pixel_values` and `frame_mask` of a random clip, or without an augmentation of all views."""
        if self.augmentation is None:
            return dict(self.processor(video, num_clips=self.num_clips, num_crops=self.num_crops))
        # The whole frame as uint8: the augmentation crops it.
        raw: dict[str, Any] = dict.fromkeys(("do_center_crop", "do_rescale", "do_normalize"), False)
        raw |= {"clip_start": "random", "num_clips": 1, "num_crops": 1, "return_tensors": "np"}
        features = self.processor(video, generator=generator, **raw)
        frames = features["pixel_values"][0].transpose(0, 2, 3, 1)  # (frames, height, width, channels)
        masks = {name: features[name][0] for name in ("frame_mask",) if name in features}
        clip = _augmented(frames, masks.get("frame_mask"), self.augmentation, generator)
        values = torch.from_numpy(np.require(clip, requirements="W"))  # arrays from Pillow are read-only
        pixel_values = self.processor.rescale_and_normalize(values.permute(0, 3, 1, 2))
        return {"pixel_values": pixel_values, **{name: torch.from_numpy(mask) for name, mask in masks.items()}}

    def empty(self) -> Tensors:
        """Return zeros in the shape of a clip or of the views; they count as visible."""
        if self.augmentation is not None:
            pixel_values = torch.zeros(self.processor.num_frames, 3, *self.augmentation.crop_size)
        else:
            # Process a blank video to learn the size of a clip.
            blank = np.zeros((self.processor.num_frames, *_BLANK_SIZE, 3), dtype=np.uint8)
            clip = self.processor(blank, do_sample_frames=False, num_clips=1, num_crops=1)["pixel_values"]
            pixel_values = torch.zeros(self.num_clips * self.num_crops, *clip.shape[1:])
        if self.processor.short_video_policy != "mask":
            return {"pixel_values": pixel_values}
        return {"pixel_values": pixel_values, "frame_mask": torch.ones(pixel_values.shape[:-3], dtype=torch.bool)}


def _augmented(
    frames: np.ndarray, mask: np.ndarray | None, augmentation: ClipAugmentation, generator: np.random.Generator
) -> np.ndarray:
    """
    Augment frames (frames, height, width, channels). If some are masked, the visible ones are augmented by themselves,
    so that brightness and contrast are theirs, and masked frames repeat the last visible one.
    """
    if mask is None or mask.all():
        return augmentation(np.ascontiguousarray(frames), generator)
    visible = augmentation(np.ascontiguousarray(frames[mask]), generator)
    return visible[np.maximum(np.cumsum(mask) - 1, 0)]


@dataclass(eq=False)
class VideoClips(_Clips, Dataset):
    """A map-style data set of labelled videos.

    With an augmentation (training), an item is a random clip: `pixel_values` (frames, channels, height, width). Without
    one (evaluation), it has all views of its video: (views, frames, channels, height, width). An item also has
    `labels` (see `LabelMap.encode`), `file`, the name of the video, `index`, `epoch`, and `damaged_files`, a list of
    (file, reason). With short_video_policy="mask" of the processor, it has `frame_mask`, bool (frames,) or
    (views, frames), True where a frame is visible. Masked frames repeat the last visible one, also when augmented.

    A file that cannot be read is replaced in training by another video, chosen by (seed, epoch, index), and in
    evaluation by zeros with ignored labels. `damaged_files` names it in both cases.

    Args:
        videos: the labelled videos.
        processor: samples, resizes and normalises the frames.
        label_map: the order of the labels.
        augmentation: the augmentation of training clips; None for evaluation.
        seed: seed of clip starts, augmentation and replacements.
        num_clips, num_crops: the views of the evaluation.
        max_replacements: how many damaged files in a row are replaced before an error is raised.
    """

    videos: Sequence[LabelledVideo]
    _: KW_ONLY
    max_replacements: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.targets = [self.label_map.encode(one) for one in self.videos]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no video {index} of {len(self)}.")
        index %= len(self)
        epoch = 0 if self.augmentation is None else int(self._epoch[0])
        generator = clip_generator(self.seed, epoch, index)
        damaged: list[tuple[str, str]] = []
        common = {"index": index, "epoch": epoch, "damaged_files": damaged}
        chosen = index
        for attempt in range(1 if self.augmentation is None else self.max_replacements + 1):
            one = self.videos[chosen]
            try:
                clip = self.read(chosen, epoch, generator)
                return {**clip, "labels": self.targets[chosen], "file": _name_of(one), **common}
            except UNREADABLE as error:
                damaged.append(_damage(one, error))
                replacement = np.random.default_rng((_REPLACEMENT, self.seed, epoch, index, attempt))
                chosen = int(replacement.integers(len(self)))
        if self.augmentation is None:
            ignored = {**self.empty(), "labels": self.label_map.ignored()}
            return {**ignored, "file": _name_of(self.videos[index]), **common}
        listed = "; ".join(f"{name}: {reason}" for name, reason in damaged[:3])
        raise VideoDecodingError(
            f"{len(damaged)} videos in a row cannot be read, which are too many to go on ({listed}; ...). "
            "`vivit-hf scan` lists what is wrong with a folder."
        )

    def read(self, index: int, epoch: int, generator: np.random.Generator) -> Tensors:
        """Return a random clip of a video with random numbers from `generator`, or its views without augmentation."""
        return self._make(self.videos[index].source(), generator)


@dataclass(frozen=True)
class StreamedVideo:
    """One video of one pass over a stream.

    `place` counts the videos of the whole stream, over all processes. `video` is None if this process has none left
    while others still have one: the item is then a clip of zeros with ignored labels.
    """

    epoch: int
    place: int
    video: LabelledVideo | None


@dataclass(eq=False)
class StreamedClips(_Clips, IterableDataset):
    """Clips of a data set that is read in one pass, such as a streamed one of the Hub. Items are those of `VideoClips`.

    `ClipTrainer` reads a stream through `StreamLoader`, which distributes it over processes and workers. Random numbers
    depend on (seed, epoch, place in the whole stream).

    A file that cannot be read is replaced in training by another video of its batch. If the batch has none, and in
    evaluation, the item is a clip of zeros with ignored labels. `damaged_files` names the file in both cases. Iterating
    over the stream itself yields items without batches: in training it skips unreadable files, and names them with the
    next item (at the end of the stream, with an item of ignored labels).

    Args:
        videos: an iterable of `LabelledVideo` that is read again in every epoch. It must yield the same videos in every
            process and worker. Its `set_epoch` is called in every epoch if it has one.
        processor, label_map, augmentation, seed, num_clips, num_crops: as for `VideoClips`.
    """

    videos: Iterable[LabelledVideo]

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.videos, "set_epoch"):
            self.videos.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        unreadable: list[dict[str, Any]] = []
        damaged: list[tuple[str, str]] = []
        for one in self.read():
            if worker is not None and one.place % worker.num_workers != worker.id:
                continue
            item = self.items([one])[0]
            damaged += item["damaged_files"]
            if self.augmentation is not None and item["damaged_files"]:
                unreadable = [item]
                continue
            yield {**item, "damaged_files": damaged}
            unreadable, damaged = [], []
        for item in unreadable:  # at the end of the stream, where no other item could name it
            yield {**item, "damaged_files": damaged}

    def read(self, first_place: int = 0) -> Iterator[StreamedVideo]:
        """Yield all videos of this epoch without opening them; places count from `first_place`."""
        epoch = int(self._epoch[0])
        for place, video in enumerate(self.videos, first_place):
            yield StreamedVideo(epoch, place, video)

    def items(self, batch: Sequence[StreamedVideo]) -> list[dict[str, Any]]:
        """Return the items of a batch, in its order."""
        items = [self._item(one) for one in batch]
        readable = [item for item in items if item["pixel_values"] is not None]
        for item in (item for item in items if item["pixel_values"] is None):
            if self.augmentation is not None and readable:
                key = (_REPLACEMENT, self.seed, item["epoch"], item["index"])
                chosen = readable[int(np.random.default_rng(key).integers(len(readable)))]
                item |= {name: value for name, value in chosen.items() if name in _OF_A_VIDEO}
            else:
                item |= {**self.empty(), "labels": self.label_map.ignored()}
        return items

    def _item(self, one: StreamedVideo) -> dict[str, Any]:
        """Return an item; `pixel_values` and `labels` are None without a video, `pixel_values` if it cannot be read."""
        item: dict[str, Any] = {"pixel_values": None, "labels": None, "index": one.place, "epoch": one.epoch}
        item["damaged_files"] = []
        if one.video is None:
            return item
        item["labels"], item["file"] = self.label_map.encode(one.video), _name_of(one.video)
        try:
            item |= self._make(one.video.source(), clip_generator(self.seed, one.epoch, one.place))
        except UNREADABLE as error:
            item["damaged_files"] = [_damage(one.video, error)]
        return item


def _name_of(one: LabelledVideo) -> str:
    name = one.where if callable(one.video) else source_name(one.video)
    # Two addresses may differ only in the redacted part.
    return f"{one.where}: {name}" if "***" in name else name


def _damage(one: LabelledVideo, error: Exception) -> tuple[str, str]:
    name = _name_of(one)
    if isinstance(one.video, dict) and one.video.get("bytes") is not None:
        # A video inside a table has a file name without its folder, or none.
        name += f" (SHA-256 {hashlib.sha256(one.video['bytes']).hexdigest()[:12]})"
    return name, getattr(error, "reason", None) or str(error)


class ClipSampler(Sampler):
    """The order of the videos in an epoch, the same in every process and for any number of workers.

    Args:
        dataset: the data set; `set_epoch` also sets its epoch.
        seed: seed of the order.
        is_balanced: draw with replacement, so that all labels come up equally often; otherwise each video comes once.
        arrange: rearranges the order of an epoch with random numbers from a generator, see `group_by_length`.
    """

    def __init__(
        self,
        dataset: VideoClips,
        seed: int = 0,
        is_balanced: bool = False,
        arrange: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    ):
        self.dataset, self.seed, self.epoch, self.arrange = dataset, seed, 0, arrange
        self.weights = balanced_weights(dataset.targets, dataset.label_map).numpy() if is_balanced else None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((_ORDER, self.seed, self.epoch))
        if self.weights is None:
            order = generator.permutation(len(self))
        else:
            order = generator.choice(len(self), size=len(self), p=self.weights / self.weights.sum())
        if self.arrange is not None:
            order = self.arrange(order, generator)
        return iter(order.tolist())
