"""
Keep the outputs of Model 2's frozen spatial encoder on disk, and train on them in place of pixels.

Each view of a video is a file that is written whole or not at all, so that several processes can write at once and a
killed run goes on where it stopped. With short_video_policy="mask", it also has the mask of the frames. Its name is a
digest of everything that its tokens depend on: weights, processor, augmentation, dtype, and the name, size, time and
ends of the video file. Labels are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..configuration_vivit import ViViTConfig
from ..data.video_identity import content_of, identity_of
from ..data.whole_files import written_whole
from ..explain.relevance import evaluating
from ..inference.clips import shown_masks
from ..video_sources import VideoDecodingError
from .clips import UNREADABLE, Tensors, VideoClips


_AFTER_SPACE = ("temporal_", "pre_logits")  # the modules of `ViViTModel` that follow the spatial encoder
# Fields of the configuration that do not change what they compute in eval mode.
_NOT_SPATIAL = (
    "num_temporal_layers temporal_num_attention_heads temporal_intermediate_size temporal_pooling representation_size "
    "label_groups problem_type hidden_dropout_prob attention_probs_dropout_prob drop_path_rate initializer_range"
).split()
_NOT_COMPARED = ("_name_or_path", "transformers_version", "auto_map")
_SETTINGS, _STEPS, _MASK, _CHECKSUM = "settings.json", "steps", "frame_mask", "crc32"
_VIEW, _ORDER = 0x76696577, 0x6F72646572  # separate the random numbers of views and of their order from others
_HEADER_BYTES = 200  # of a file, about

Autocast = Callable[[], AbstractContextManager]


class FeatureCacheError(ValueError):
    """Stored tokens that are missing or damaged, or cannot be written."""


# The frozen part


def has_frozen_space(model: Any) -> bool:
    """Return whether a model is Model 2 with a spatial encoder of which nothing is trained."""
    config = getattr(model, "config", None)
    if getattr(config, "attention_type", None) != "factorised_encoder" or hasattr(model, "peft_config"):
        return False
    return not any(parameter.requires_grad for _, parameter in _spatial_parameters(model))


def _spatial_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in model.vivit.named_parameters():
        if not name.startswith(_AFTER_SPACE):
            yield name, parameter


@torch.no_grad()
def encode_clips(
    model: Any,
    pixel_values: torch.Tensor,
    autocast: Autocast = nullcontext,
    frame_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Encode clips (clips, frames, channels, height, width) as tokens of their time steps, (clips, time, hidden).

    With `frame_mask`, bool (clips, frames), masked steps repeat visible ones, so that mixup mixes tokens as it mixes
    pixels; the model takes the mask again with the tokens.

    Each clip runs by itself: a matrix product may round differently in a larger batch, and stored tokens must equal
    those of a run without a cache.
    """
    masks = [None] * len(pixel_values) if frame_mask is None else shown_masks(frame_mask, model.config).split(1)
    with autocast():
        pairs = zip(pixel_values.split(1), masks, strict=True)
        return torch.cat([model.vivit.encode_steps(clip, mask) for clip, mask in pairs])


def spatial_settings(model: Any) -> dict[str, Any]:
    """Return what the tokens of a clip depend on: a digest of the frozen weights, and the configuration."""
    digest = hashlib.sha256()
    for name, parameter in _spatial_parameters(model):
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    config = {name: getattr(model.config, name) for name in ViViTConfig.__annotations__ if name not in _NOT_SPATIAL}
    config["attn_implementation"] = model.config._attn_implementation
    return {"weights": digest.hexdigest(), "config": config}


# The stored tokens


class StepStore:
    """
    Tokens of time steps in files, one for each view of a video.

    Args:
        root: the folder; stores of other settings may be in it, too.
        settings: everything that all tokens of the store depend on, ready for JSON.
    """

    def __init__(self, root: Path, settings: dict[str, Any]):
        self.root, self.settings = root, json.loads(json.dumps(settings, default=str))
        self.folder = root / hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def start(self) -> None:
        """Create the folder with its settings.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.folder / _SETTINGS) as unfinished:
            unfinished.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    def path(self, identity: str, view: int) -> Path:
        """Return the file of one view of a video; see `identity_of`."""
        name = hashlib.sha256(f"{identity} {view}".encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, path: Path) -> Tensors:
        """
        Return the `steps` in a file and, of clips that may be short, their `frame_mask`.

        Raises FeatureCacheError if the file is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
                checksum = (file.metadata() or {}).get(_CHECKSUM)
        except (OSError, SafetensorError) as error:
            raise FeatureCacheError(f"{path} cannot be read ({error}): run again to compute it anew.") from error
        if _STEPS not in stored or checksum != str(_checksum(stored)):
            raise FeatureCacheError(f"{path} is damaged: run again to compute it anew.")
        return stored

    def write(self, path: Path, tensors: Tensors) -> None:
        """Write `steps` and `frame_mask` whole, or not at all. Raises FeatureCacheError if they cannot be written."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            path.parent.mkdir(exist_ok=True)
            with written_whole(path) as unfinished:
                save_file(tensors, unfinished, metadata={_CHECKSUM: str(_checksum(tensors))})
        except (OSError, SafetensorError) as error:
            raise FeatureCacheError(
                f"{self.folder}: the tokens cannot be written ({error}). What is stored is whole: free some space and "
                "run again to go on, or leave --cache_features out."
            ) from error


def _checksum(tensors: Tensors) -> int:
    checksum = 0
    for name in sorted(tensors, reverse=True):  # the steps first
        checksum = zlib.crc32(tensors[name].view(torch.uint8).numpy().tobytes(), checksum)
    return checksum


def remove_stale(root: Path, stores: Sequence[StepStore]) -> list[str]:
    """
    Remove what other settings have left in a cache, and unfinished files of killed processes.

    Returns the settings that differ from those of `stores`, one text for each store that was removed.
    """
    changes = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        if folder in [store.folder for store in stores]:
            for unfinished in folder.rglob(".*.unfinished"):
                unfinished.unlink()
            continue
        try:
            old = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            of_kind = [store.settings for store in stores if store.settings["views"].keys() == old["views"].keys()]
            changed = sorted({name for new in of_kind[:1] for name in new if new[name] != old.get(name)})
        except (OSError, ValueError, KeyError, AttributeError):
            changed = [_SETTINGS]
        shutil.rmtree(folder)
        changes.append(", ".join(changed) or "views")
    return changes


# The data set


class CachedClips(VideoClips):
    """
    A data set like `VideoClips`, whose items have `steps` from a cache in place of `pixel_values`.

    In training, `steps` (time, hidden) are those of one of `num_views` random clips of the video, which are drawn once,
    by seed and content of the video. In `num_views` epochs each of them comes up once, in an order that depends on
    (seed, epoch, index) alone. In evaluation, `steps` are those of all views, (views, time, hidden). With
    short_video_policy="mask", items also have `frame_mask`, as those of `VideoClips`; it is stored with the tokens.

    Args:
        arguments, settings: as for `VideoClips`.
        root: the folder of the cache.
        frozen: what the tokens depend on beside the clips; see `spatial_settings`.
        step_shape: (time, hidden) of the tokens of a clip.
        num_views: number of random clips of each video.
    """

    def __init__(
        self,
        *arguments: Any,
        root: Path,
        frozen: dict[str, Any],
        step_shape: tuple[int, int],
        num_views: int = 1,
        **settings: Any,
    ):
        super().__init__(*arguments, **settings)
        processor = {name: value for name, value in self.processor.to_dict().items() if name not in _NOT_COMPARED}
        views: dict[str, Any] = {"num_clips": self.num_clips, "num_crops": self.num_crops}
        if self.augmentation is not None:
            views = {"augmentation": self.augmentation.to_dict(), "seed": self.seed}
        self.store = StepStore(root, {**frozen, "processor": processor, "views": views})
        self.num_views = 1 if self.augmentation is None else num_views
        self.unreadable: dict[tuple[int, int], str] = {}  # (index, view) -> reason
        views_shape = (self.num_clips * self.num_crops,) if self.augmentation is None else ()
        self._shapes = {_STEPS: (*views_shape, *step_shape)}
        if self.processor.short_video_policy == "mask":
            self._shapes[_MASK] = (*views_shape, self.processor.num_frames)

    @cached_property
    def identities(self) -> list[str | None]:
        """Of each video its identity; None if its file is missing."""
        return [self._identity(index) for index in range(len(self))]

    def _identity(self, index: int) -> str | None:
        try:
            return identity_of(self.videos[index].source())
        except (OSError, VideoDecodingError):
            return None

    def read(self, index: int, epoch: int, generator: np.random.Generator) -> Tensors:
        if self.augmentation is None:
            return self._stored(index, 0)
        order = np.random.default_rng((_ORDER, self.seed, epoch // self.num_views, index)).permutation(self.num_views)
        return self._stored(index, int(order[epoch % self.num_views]))

    def empty(self) -> Tensors:
        blank = {_STEPS: torch.zeros(self._shapes[_STEPS])}
        return {**blank, _MASK: torch.ones(self._shapes[_MASK], dtype=torch.bool)} if _MASK in self._shapes else blank

    def stored_views(self) -> tuple[Tensors, list[int]]:
        """
        Return the `steps` (views, time, hidden) and `frame_mask` (views, frames) of all views that can be read, and the
        index of each one's video.
        """
        views = [(index, view) for index in range(len(self)) for view in range(self.num_views)]
        readable = [one for one in views if one not in self.unreadable]
        stored = [self._stored(*one) for one in readable] or [self.empty()]
        stacked = {name: torch.stack([one[name] for one in stored])[: len(readable)] for name in self._shapes}
        return stacked, [index for index, _ in readable]

    def _stored(self, index: int, view: int) -> Tensors:
        if (reason := self.unreadable.get((index, view))) is not None:
            raise VideoDecodingError(reason, reason=reason)
        return self.store.read(self._path(index, view))

    def _path(self, index: int, view: int) -> Path:
        return self.store.path(str(self.identities[index]), view)

    def pixels(self, index: int, view: int) -> Tensors:
        """Return the clips of a view, `pixel_values` and `frame_mask`: one clip in training, else all views."""
        identity = self.identities[index]  # a copy of a data set has the same clips
        digest = hashlib.sha256(("" if identity is None else content_of(identity)).encode()).digest()
        generator = np.random.default_rng((_VIEW, self.seed, view, *digest[:16]))
        clips = super().read(index, view, generator)
        return clips if self.augmentation is None else {name: clip[None] for name, clip in clips.items()}

    def fill(
        self,
        encode: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        *,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        has_progress_bar: bool = False,
    ) -> int:
        """
        Compute and store what is missing or damaged in this process's share of the cache; return the number of views.

        Videos that cannot be read are noted in `unreadable`, for this run alone.

        Args:
            encode: turns clips (clips, frames, channels, height, width), and their masks (clips, frames) or None, into
                tokens (clips, time, hidden).
            process_index, num_processes: every `num_processes`-th view is this process's.
            num_workers: processes that decode.

        Raises:
            FeatureCacheError: if the tokens cannot be written; those before are kept.
        """
        share = [(index, view) for index in range(len(self)) for view in range(self.num_views)]
        share = share[process_index::num_processes]
        missing = [one for one in share if not self._is_stored(*one)]
        needed = len(missing) * (int(np.prod(self._shapes[_STEPS])) * 4 + _HEADER_BYTES)
        if (free := shutil.disk_usage(self.store.folder).free) < needed:
            raise FeatureCacheError(
                f"{self.store.folder}: {free / 1e6:.1f} MB are free on its disk, and the tokens of {len(missing)} "
                f"views take about {needed / 1e6:.1f} MB: free some space, or lower --num_cached_views."
            )
        # A generator of its own: starting workers must not draw from that of the training.
        loader = DataLoader(
            _Views(self, missing), batch_size=None, num_workers=num_workers, generator=torch.Generator()
        )
        for one, (clips, reason) in zip(
            missing, logging.tqdm(loader, "tokens", disable=not has_progress_bar), strict=True
        ):
            if clips is None or self.identities[one[0]] is None:
                self.unreadable[one] = reason or "it was not there when the run began"
                continue
            frame_mask = clips.get(_MASK)
            found = {_STEPS: encode(clips["pixel_values"], frame_mask)}
            found |= {} if frame_mask is None else {_MASK: frame_mask}
            if self.augmentation is not None:
                found = {name: tensor[0] for name, tensor in found.items()}
            self.store.write(self._path(*one), found)
        return len(missing)

    def _is_stored(self, index: int, view: int) -> bool:
        if self.identities[index] is None:
            return False
        try:
            stored = self.store.read(self._path(index, view))
            return {name: tuple(tensor.shape) for name, tensor in stored.items()} == self._shapes
        except FeatureCacheError:
            return False


class _Views(Dataset):
    """The clips of (index, view), or None and the reason if the video cannot be read."""

    def __init__(self, clips: CachedClips, views: Sequence[tuple[int, int]]):
        self.clips, self.views = clips, views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, place: int) -> tuple[Tensors | None, str]:
        try:
            return self.clips.pixels(*self.views[place]), ""
        except UNREADABLE as error:
            return None, getattr(error, "reason", None) or str(error)


def fill_caches(trainer: Any, num_workers: int, say: Callable[[str], None]) -> None:
    """
    Fill the caches of a trainer's data sets before training, each process with its share.

    Raises:
        FeatureCacheError: in every process, if the tokens of one of them cannot be written.
    """
    args, model = trainer.args, trainer.model
    caches = [one for one in (trainer.train_dataset, trainer.eval_dataset) if isinstance(one, CachedClips)]
    if args.process_index == 0:
        stores = [one.store for one in caches]
        for store in stores:
            store.start()
        for changes in remove_stale(stores[0].root, stores):
            say(f"{stores[0].root}: stored tokens are stale and removed; changed: {changes}")
    if args.world_size > 1:
        torch.distributed.barrier()
    problem, count = "", 0
    try:
        with evaluating(model), torch.random.fork_rng():
            for clips in caches:
                count += clips.fill(
                    lambda pixels, mask: encode_clips(
                        model, pixels.to(model.device), trainer.accelerator.autocast, mask
                    ),
                    process_index=args.process_index,
                    num_processes=args.world_size,
                    num_workers=num_workers,
                    has_progress_bar=args.process_index == 0 and not args.disable_tqdm,
                )
    except FeatureCacheError as error:
        problem = str(error)
    found = [(problem, count, [one.unreadable for one in caches])]
    if args.world_size > 1:
        found *= args.world_size
        torch.distributed.all_gather_object(found, (problem, count, [one.unreadable for one in caches]))
    for problem, _, unreadable in found:
        if problem:
            raise FeatureCacheError(problem)
        for clips, theirs in zip(caches, unreadable, strict=True):
            clips.unreadable.update(theirs)
    total = sum(len(one) * one.num_views for one in caches)
    say(f"{caches[0].store.root}: tokens of {total} views, {sum(count for _, count, _ in found)} of them computed now")
