"""
A sliding window over frames as they come, without doing work twice (section 3.3.2).

In the factorised encoder, the token of a tubelet does not depend on its neighbours. So the spatial encoder sees every
tubelet once, the tokens of the window are kept, and a step costs no more than the new tubelets and the small temporal
encoder:

    sampled frames   0 1 2 3 4 5 6 7 8 9 ...      tubelets of 2, windows of 6, hop 2
    window 0         [a a b b c c]                a, b, c are encoded
    window 1             [b b c c d d]            d alone is new
    window 2                 [c c d d e e]        e alone is new

Windows that are not a whole number of tubelets apart cut the frames into other tubelets: those make a stream of their
own for each phase (see `StreamingClassifier.tubelets_per_window`). The other variants look at the whole window again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from ..embeddings_vivit import check_frame_size, check_pixel_values, check_values
from ..frame_sampling import TIME_TOLERANCE, apply_short_video_policy
from ..video_processing_vivit import ViViTVideoProcessor
from .finite_outputs import check_finite


# Tubelets or clips that go through the model at a time.
BATCH = 16
# A picture is another one if it differs from the last by half of its own contrast (standard deviation), and by three
# times what frames of that window differ usually. Pictures that have nothing in common differ by about 1.1; what
# moves in one take stays below 0.3 or moves in the other frames, too.
_CUT_CONTRAST, _CUT_OVER_MEDIAN = 0.5, 3.0


@dataclass
class WindowPrediction:
    """
    What the model says of one window.

    `start` and `end` are the times in seconds at which its first and its last frame are shown, `first_frame` counts the
    sampled frames from the beginning of the stream, `logits` are float32 (num_labels,). `cut` is the time of the frame
    with which another picture begins, the most different one if there are several; None where all goes on.
    """

    start: float
    end: float
    first_frame: int
    logits: torch.Tensor
    cut: float | None = None


class _Sampled(NamedTuple):
    """A sampled frame: how many came before it, its time, the model's input, how much is new in it."""

    number: int
    seconds: float
    pixels: torch.Tensor  # (channels, height, width)
    change: float


def reuses_tubelets(config: Any) -> bool:
    """Whether the tokens of a model's tubelets serve in every window that holds them: in Model 2, with tubelets."""
    return config.attention_type == "factorised_encoder" and config.embedding_type == "tubelet"


class StreamingClassifier:
    """
    Classifies a sliding window over a stream of frames, video files and cameras alike.

    Args:
        model: a `ViViTForVideoClassification`, which is used on its device and in its dtype; put it in eval mode.
        processor: its `ViViTVideoProcessor`, for size, crop and normalisation, and for which frames are sampled:
            every `frame_stride`-th, or `frames_per_second` by their times. Windows are `model.config.num_frames` long.
        hop: sampled frames from one window to the next. None: a tubelet where tokens are reused, else half a window.

    Logits are those of the model on the same window, whatever the hop. What a hop costs tells `tubelets_per_window`:

    | variant | hop | spatial encodings per window |
    | --- | --- | --- |
    | factorised encoder, tubelets | h, a whole number of tubelets of t frames | h / t |
    | the same | any other h | h / gcd(h, t), but not more than the window has |
    | every other model | any | the whole model runs on the whole window |

    ```python
    stream = StreamingClassifier(model, processor)
    for frame, time in camera:
        for window in stream.push(frame, time):
            print(window.start, window.end, window.logits.softmax(-1))
    ```

    Raises TypeError for a model without a classifier, ValueError for a hop below 1 and for a processor that samples
    otherwise ("uniform"). `push`, `flush` and `last_window` raise NonFiniteError for NaN or infinite logits.
    """

    def __init__(self, model: Any, processor: ViViTVideoProcessor, *, hop: int | None = None):
        config = model.config
        if not hasattr(model, "classify_steps") or not config.num_labels:
            raise TypeError(
                f"`model` must be a ViViTForVideoClassification with labels, got {type(model).__name__} with "
                f"num_labels={config.num_labels}."
            )
        self.model, self.processor = model, processor
        self.reuses_tubelets = reuses_tubelets(config)
        self._tubelet = config.tubelet_size[0] if self.reuses_tubelets else config.num_frames
        self._num_frames = config.num_frames
        self._num_tubelets = config.num_frames // self._tubelet
        default = self._tubelet if self.reuses_tubelets else max(1, config.num_frames // 2)
        self.hop = default if hop is None else hop
        if not isinstance(self.hop, (int, np.integer)) or isinstance(self.hop, bool) or self.hop < 1:
            raise ValueError(f"`hop` must be a whole number of sampled frames, at least 1, got {hop!r}.")
        self.hop = int(self.hop)
        if processor.frame_sampling == "uniform":
            raise ValueError(
                "A processor with frame_sampling='uniform' spreads its frames over a whole video, which a stream does "
                "not have: use frame_sampling='clip' with a `frame_stride` or with `frames_per_second`."
            )
        self.reset()

    def reset(self) -> None:
        """Forgets every frame: the next one begins another stream."""
        self.num_frames_seen = 0
        self.num_windows = self.num_tubelets_encoded = 0
        self._frames: deque[_Sampled] = deque()
        self._tokens: dict[int, torch.Tensor] = {}  # of the tubelet that begins with that sampled frame
        self._num_sampled = self._num_chosen = self._next_window = 0
        self._held: tuple[Any, float] | None = None  # the last frame, while it is not clear how long it is shown
        self._first_time, self._last_time = 0.0, -math.inf

    @property
    def tubelets_per_window(self) -> int:
        """Tubelets that are encoded anew in a window, in the long run: all of `config.grid_size[0]` without reuse."""
        if not self.reuses_tubelets:
            return int(self.model.config.grid_size[0])
        return min(self._num_tubelets, self.hop // math.gcd(self.hop, self._tubelet))

    @property
    def window_frames(self) -> int:
        """Sampled frames in a window."""
        return self._num_frames

    def push(self, frames: Any, times: float | Sequence[float] | None = None) -> list[WindowPrediction]:
        """
        Takes the next frames, all of them, in order; gives the windows that they complete.

        Args:
            frames: one frame or several, as the processor takes them: uint8 (height, width, channels) or
                (frames, height, width, channels), PIL images, tensors.
            times: seconds at which they are shown, one or one per frame, not decreasing. None: they are counted, which
                `frames_per_second` cannot do without.

        Raises ValueError for times that do not fit the frames, and what the processor raises.
        """
        frames = self._as_list(frames)
        if times is None:
            if self.processor.frames_per_second is not None:
                raise ValueError("A processor with `frames_per_second` needs the `times` of the frames, in seconds.")
            times = range(self.num_frames_seen, self.num_frames_seen + len(frames))
        times = [float(time) for time in np.atleast_1d(np.asarray(times, dtype=np.float64))]
        if len(times) != len(frames):
            raise ValueError(f"{len(frames)} frames came with {len(times)} times; expected one each.")
        for before, time in pairwise([self._last_time, *times]):
            if not time >= before:
                raise ValueError(
                    f"The times of frames must not decrease, got {time:g} s after {before:g} s. Call `reset` where "
                    "another video begins."
                )
        state = dict(vars(self))
        chosen = [pair for frame, time in zip(frames, times, strict=True) for pair in self._sampled(frame, time)]
        self._last_time = times[-1] if times else self._last_time
        try:
            return self.push_sampled([frame for frame, _ in chosen], [time for _, time in chosen])
        except (TypeError, ValueError):
            if self._num_sampled == state["_num_sampled"]:  # nothing was taken: as if it had not been pushed
                vars(self).update(state)
            raise

    def flush(self) -> list[WindowPrediction]:
        """The windows that the last frame completes, at the end of a stream that is sampled by `frames_per_second`."""
        if self._held is None:
            return []
        held, self._held = self._held, None
        return self.push_sampled([held[0]], [held[1]]) if self._next_moment() <= held[1] + TIME_TOLERANCE else []

    @staticmethod
    def _as_list(frames: Any) -> list[Any]:
        if isinstance(frames, (np.ndarray, torch.Tensor)):
            if frames.ndim not in (2, 3, 4):
                raise ValueError(
                    f"Frames are (height, width, channels), or (frames, height, width, channels) for several, got "
                    f"{tuple(frames.shape)}."
                )
            return list(frames) if frames.ndim == 4 else [frames]
        return list(frames) if isinstance(frames, (list, tuple)) else [frames]

    def _sampled(self, frame: Any, time: float) -> list[tuple[Any, float]]:
        """Which frames are sampled now that this one is there, each with its time."""
        number, self.num_frames_seen = self.num_frames_seen, self.num_frames_seen + 1
        if self.processor.frames_per_second is None:
            return [] if number % self.processor.frame_stride else [(frame, time)]
        chosen = []
        if self._held is None:
            self._first_time = time
        else:
            # A moment of the rate shows the last frame that came at or before it.
            while self._next_moment() + TIME_TOLERANCE < time:
                chosen.append(self._held)
                self._num_chosen += 1
        self._held = (frame, time)
        return chosen

    def _next_moment(self) -> float:
        return self._first_time + self._num_chosen / float(self.processor.frames_per_second or 1)

    @torch.inference_mode()
    def push_sampled(self, frames: Sequence[Any], times: Sequence[float]) -> list[WindowPrediction]:
        """As `push`, for frames that are already those of the processor's stride or rate."""
        windows: list[WindowPrediction] = []
        for first in range(0, len(frames), BATCH):
            part = slice(first, first + BATCH)
            whole: dict[str, Any] = {"do_sample_frames": False, "num_clips": 1, "num_crops": 1}
            features = self.processor(list(frames[part]), crop_position="centre", **whole)
            pixel_values = features["pixel_values"]  # (1, frames, channels, height, width)
            check_values(pixel_values, self.model.config)
            check_frame_size(pixel_values, self.model.config)
            for time, pixels in zip(times[part], pixel_values[0], strict=True):
                self._frames.append(_Sampled(self._num_sampled, time, pixels, self._change_to(pixels)))
                self._num_sampled += 1
            windows += self._complete()
        return windows

    def _change_to(self, pixels: torch.Tensor) -> float:
        """How much a frame differs from the last one: the mean difference over the contrast of the richer of them."""
        if not self._frames:
            return 0.0
        last = self._frames[-1].pixels
        return float((pixels - last).abs().mean() / torch.maximum(pixels.std(), last.std()).clamp(min=1e-6))

    def last_window(self) -> list[WindowPrediction]:
        """
        At the end of a stream: the window that ends with the last frame, if the hops have left frames out.

        Of fewer frames than a window has, it is filled as the processor's `short_video_policy` says, from the sampled
        ones: "error" is a ValueError.
        """
        start = max(0, self._num_sampled - self._num_frames)
        if not self._num_sampled or start == self._next_window - self.hop:
            return []
        frames = min(self._num_sampled, self._num_frames)
        policy = self.processor.short_video_policy
        places = apply_short_video_policy(np.arange(self._num_frames), frames, policy)
        with torch.inference_mode():
            logits = self.model(self._pixels(start, frames)[None, places], return_dict=True).logits[0]
        return [self._prediction(start, logits.float().cpu())]

    def _complete(self) -> list[WindowPrediction]:
        """The windows whose frames are all there now."""
        starts = list(range(self._next_window, self._num_sampled - self._num_frames + 1, self.hop))
        if self.reuses_tubelets:
            self._encode_tubelets()
        found = []
        for first in range(0, len(starts), BATCH):
            batch = starts[first : first + BATCH]
            if self.reuses_tubelets:
                tokens = [self._tokens[start + place] for start in batch for place in self._places]
                steps = torch.stack(tokens).unflatten(0, (len(batch), -1))  # (windows, time, hidden)
                logits = self.model.classify_steps(steps)
            else:
                clips = torch.stack([self._pixels(start, self._num_frames) for start in batch])
                logits = self.model(clips, return_dict=True).logits
            found += [self._prediction(*one) for one in zip(batch, logits.float().cpu(), strict=True)]
        self._next_window += len(starts) * self.hop
        self.num_windows += len(starts)
        self._forget()
        return found

    def _prediction(self, start: int, logits: torch.Tensor) -> WindowPrediction:
        check_finite(logits, self.model)
        offset = start - self._frames[0].number
        frames = list(islice(self._frames, offset, offset + self._num_frames))
        changes = [frame.change for frame in frames[1:]] or [0.0]
        most = max(changes)
        is_cut = most > max(_CUT_CONTRAST, _CUT_OVER_MEDIAN * median(changes))
        cut = frames[1 + changes.index(most)].seconds if is_cut else None
        return WindowPrediction(frames[0].seconds, frames[-1].seconds, start, logits, cut)

    @property
    def _places(self) -> range:
        """Where the tubelets of a window begin in it."""
        return range(0, self._num_tubelets * self._tubelet, self._tubelet)

    def _pixels(self, start: int, count: int) -> torch.Tensor:
        offset = start - self._frames[0].number
        frames = [frame.pixels for frame in islice(self._frames, offset, offset + count)]
        return torch.stack(frames).to(self.model.device, self.model.dtype)

    def _encode_tubelets(self) -> None:
        """The tokens of every tubelet that a window to come needs, and whose frames are there."""
        needed: dict[int, None] = {}  # each once, whatever the number of windows, and in order
        # Of later windows only those matter that have begun.
        for window in range(self._next_window, self._num_sampled, self.hop):
            for place in self._places:
                start = window + place
                if start + self._tubelet <= self._num_sampled and start not in self._tokens:
                    needed[start] = None
        starts = list(needed)
        for first in range(0, len(starts), BATCH):
            batch = starts[first : first + BATCH]
            clips = torch.stack([self._pixels(start, self._tubelet) for start in batch])
            for start, token in zip(batch, self.model.vivit.encode_steps(clips)[:, 0], strict=True):
                self._tokens[start] = token
        self.num_tubelets_encoded += len(needed)

    def _forget(self) -> None:
        """Tokens before the next window are of no use any more, nor frames before it and before `last_window`."""
        first = min(self._next_window, self._num_sampled - self._num_frames)
        while self._frames and self._frames[0].number < first:
            self._frames.popleft()
        for start in [start for start in self._tokens if start < self._next_window]:
            del self._tokens[start]


def predict_clips(
    model: Any, clips: torch.Tensor, frame_ids: np.ndarray | None = None, max_clips: int = BATCH
) -> torch.Tensor:
    """
    Logits (clips, num_labels) of (clips, frames, channels, height, width), `max_clips` at a time.

    Clips of one video overlap where it is short or they are many. With `frame_ids`, int64 (clips, frames) as
    `VideoFeatures` has them, equal numbers stand for equal frames, and the factorised encoder encodes every tubelet
    once; the logits are those of the model.

    Raises ValueError for clips that are not of the model's frames and size.
    """
    check_pixel_values(clips, model.config, any_size=False)
    tubelet = model.config.tubelet_size[0]
    time = clips.shape[1] // tubelet
    if frame_ids is not None and reuses_tubelets(model.config):
        ids = np.asarray(frame_ids)[:, : time * tubelet].reshape(-1, tubelet)
        _, firsts, places = np.unique(ids, axis=0, return_index=True, return_inverse=True)
        if len(firsts) < len(ids):
            # (clips, frames, ...) -> (clips * time, tubelet, ...)
            tubelets = clips[:, : time * tubelet].unflatten(1, (time, tubelet)).flatten(0, 1)
            groups = torch.from_numpy(firsts).split(max_clips * time)
            encoded = torch.cat([model.vivit.encode_steps(tubelets[group])[:, 0] for group in groups])
            steps = encoded[torch.from_numpy(places.reshape(-1, time)).to(encoded.device)]  # (clips, time, hidden)
            return torch.cat([model.classify_steps(part) for part in steps.split(max_clips)])
    return torch.cat([model(pixel_values=part, return_dict=True).logits for part in clips.split(max_clips)])
