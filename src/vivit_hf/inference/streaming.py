"""
Classify a sliding window over a stream of frames, without encoding any tubelet twice.

In the factorised encoder (section 3.3.2), the encoding of a tubelet does not depend on the other tubelets. So the
spatial encoder runs once per tubelet, its tokens are cached, and each step costs only the new tubelets and the small
temporal encoder:

    sampled frames   0 1 2 3 4 5 6 7 8 9 ...      tubelets of 2, windows of 6, hop 2
    window 0         [a a b b c c]                a, b and c are encoded
    window 1             [b b c c d d]            only d is new
    window 2                 [c c d d e e]        only e is new

If the hop is not a whole number of tubelets, successive windows cut the frames into different tubelets, and each phase
needs tokens of its own (see `StreamingClassifier.tubelets_per_window`). The other variants run on every whole window.

A tubelet whose pixels equal those of the last encoded one takes its token (see unchanged_steps.py), and a window with
the tokens of the window before takes its logits: what stands still costs no more than decoding and comparing.
"""

import math
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.labels import LabelMap, to_probabilities
from ..frame_sampling import TIME_TOLERANCE, apply_short_video_policy, mask_missing_frames
from ..modeling_vivit import check_frame_size, check_values
from ..video_processing_vivit import ViViTVideoProcessor
from .clips import BATCH, check_takes_masks, shown_masks, step_starts
from .cuts import find_cut, frame_change
from .finite_outputs import check_finite
from .optimization import optimize_if_plain
from .unchanged_steps import StepReuse, check_threshold, level_size, step_change
from .unknown import UnknownRule, classifier_inputs


@dataclass
class WindowPrediction:
    """
    The prediction for one window.

    `start`, `end`: the times in seconds at which its first and last frames are shown.
    `first_frame`: the index of its first frame among the sampled frames of the stream.
    `logits`: float32 (num_labels,).
    `cut`: the time of the first frame after a cut, the strongest one if there are several; None without a cut.
    `unknown`: whether the answer is "none of these", None for a model without a rule for that.
    """

    start: float
    end: float
    first_frame: int
    logits: torch.Tensor
    cut: float | None = None
    unknown: bool | None = None


class _Sampled(NamedTuple):
    """A sampled frame: its index, its time, the model's input, and its `frame_change` from the frame before."""

    number: int
    seconds: float
    pixels: torch.Tensor  # (channels, height, width)
    change: float


class _Step(NamedTuple):
    """An encoded time step: the first frame of the step that was encoded for it, and its token (hidden,)."""

    source: int
    token: torch.Tensor


class _Reference(NamedTuple):
    """The last step that was encoded."""

    step: _Step
    pixels: torch.Tensor  # (frames, channels, height, width)


@dataclass
class _Sampler:
    """Choose the frames of a stream by the processor's `frame_stride`, or by `frames_per_second` and their times."""

    processor: ViViTVideoProcessor
    num_seen: int = 0
    num_chosen: int = 0
    first_time: float = 0.0
    last_time: float = -math.inf
    held: tuple[Any, float] | None = None  # the last frame, until the next one tells how long it is shown

    def sample(self, frame: Any, time: float) -> list[tuple[Any, float]]:
        """Return the frames, with their times, that the arrival of this frame causes to be sampled."""
        number, self.num_seen, self.last_time = self.num_seen, self.num_seen + 1, time
        if self.processor.frames_per_second is None:
            return [] if number % self.processor.frame_stride else [(frame, time)]
        chosen = []
        if self.held is None:
            self.first_time = time
        else:
            # The frame sampled at a moment is the last one shown at or before it.
            while self._next_moment() + TIME_TOLERANCE < time:
                chosen.append(self.held)
                self.num_chosen += 1
        self.held = (frame, time)
        return chosen

    def flush(self) -> list[tuple[Any, float]]:
        """Return the last frame if it is still to be sampled."""
        if self.held is None or self._next_moment() > self.held[1] + TIME_TOLERANCE:
            return []
        self.num_chosen += 1
        return [self.held]

    def _next_moment(self) -> float:
        return self.first_time + self.num_chosen / float(self.processor.frames_per_second or 1)


class StreamingClassifier:
    """
    Classify a sliding window over a stream of frames, from video files and cameras alike.

    Args:
        model: a `ViViTForVideoClassification` in eval mode. It runs on its own device and in its own dtype, and is
            optimised in place (see `vivit_hf.inference.optimize`; `restore` undoes it).
        processor: its `ViViTVideoProcessor`. It defines size, crop and normalisation, and which frames are sampled:
            every `frame_stride`-th frame, or `frames_per_second` by their times. A window has
            `model.config.num_frames` sampled frames.
        hop: sampled frames from one window to the next. None: one tubelet in the factorised encoder with tubelets, else
            half a window.
        unchanged_threshold: the largest `step_change`, in grey levels of 255, by which a time step of the factorised
            encoder may differ from the last encoded one to take its token. 0: equal pixels only. None: encode every
            step.

    Up to a threshold of 0, the logits equal those of the model on the same window, whatever the hop. `reuse` counts the
    steps. Above 0 it also tells how much probabilities change, from windows that are computed in full, too; a step is
    encoded for that for every ten reused ones. `tubelets_per_window` tells the cost if no step is unchanged:

    | variant | hop | spatial encodings per window |
    | --- | --- | --- |
    | factorised encoder, tubelets | h, a whole number of tubelets of t frames | h / t |
    | the same | any other h | h / gcd(h, t), at most the tubelets of a window |
    | factorised encoder, uniform frame sampling | any h | distinct places of its frames modulo h |
    | every other model | any | the whole model runs on the whole window |

    Call `reset` after changing the weights of the model: tokens are kept as long as nothing moves.

    ```python
    stream = StreamingClassifier(model, processor)
    for frame, time in camera:
        for window in stream.push(frame, time):
            print(window.start, window.end, window.logits.softmax(-1))
    ```

    Raises:
        TypeError: if the model has no classifier.
        ValueError: if the hop is below 1, the processor has frame_sampling="uniform", or the threshold is no number
            from 0 to 255 or is above 0 for a model without reusable steps. If the processor masks frames, and the model
            does not take masks.
        NonFiniteError: from `push`, `flush` and `last_window`, if logits are NaN or infinite.
    """

    def __init__(
        self,
        model: Any,
        processor: ViViTVideoProcessor,
        *,
        hop: int | None = None,
        unchanged_threshold: float | None = 0.0,
    ):
        config = model.config
        if not hasattr(model, "classify_steps") or not config.num_labels:
            raise TypeError(
                f"`model` must be a ViViTForVideoClassification with labels, got {type(model).__name__} with "
                f"num_labels={config.num_labels}."
            )
        self.model, self.processor = model, processor
        self.reuses_tubelets = config.attention_type == "factorised_encoder"
        self._tubelet = config.tubelet_size[0]
        self._num_frames = config.num_frames
        self._places = step_starts(config).tolist()
        is_one_tubelet = self.reuses_tubelets and config.embedding_type == "tubelet"
        default = self._tubelet if is_one_tubelet else max(1, config.num_frames // 2)
        self.hop = default if hop is None else hop
        if not isinstance(self.hop, (int, np.integer)) or isinstance(self.hop, bool) or self.hop < 1:
            raise ValueError(f"`hop` must be a whole number of sampled frames, at least 1, got {hop!r}.")
        self.hop = int(self.hop)
        if processor.frame_sampling == "uniform":
            raise ValueError(
                "A processor with frame_sampling='uniform' spreads its frames over a whole video, which a stream does "
                "not have: use frame_sampling='clip' with a `frame_stride` or with `frames_per_second`."
            )
        self._threshold = None if unchanged_threshold is None else check_threshold(unchanged_threshold)
        if self._threshold and not self.reuses_tubelets:
            raise ValueError(
                f"`unchanged_threshold={unchanged_threshold!r}` needs a factorised encoder, which encodes time steps "
                f"one by one. This model has attention_type={config.attention_type!r}, where every token depends on "
                "the whole window: leave the threshold at 0."
            )
        self._label_map = LabelMap.from_config(config)
        self._rule = UnknownRule.of(model)
        optimize_if_plain(model)
        check_takes_masks(model, processor)
        self.reset()

    def reset(self) -> None:
        """Forget all frames. The next frame starts a new stream."""
        self.num_windows = 0
        self.reuse = StepReuse(self._threshold)
        self._level = level_size(self.processor, self.model.config.num_channels)
        self._reference: _Reference | None = None
        self._last_window: tuple[tuple[int, ...], torch.Tensor] | None = None  # sources of its steps, answer
        self._sampler = _Sampler(self.processor)
        self._frames: deque[_Sampled] = deque()
        self._steps: dict[int, _Step] = {}  # by the index of the step's first sampled frame
        self._num_sampled = self._next_window = 0

    @property
    def num_frames_seen(self) -> int:
        """Frames pushed so far, sampled or not."""
        return self._sampler.num_seen

    @property
    def tubelets_per_window(self) -> int:
        """Tubelets to encode per window in the long run, if all differ; without reuse all `config.grid_size[0]`."""
        if not self.reuses_tubelets:
            return int(self.model.config.grid_size[0])
        return len({place % self.hop for place in self._places})

    @property
    def num_tubelets_encoded(self) -> int:
        """Tubelets encoded so far."""
        return self.reuse.num_encoded

    def push(self, frames: Any, times: float | Sequence[float] | None = None) -> list[WindowPrediction]:
        """
        Add the next frames of the stream, without gaps, and return the windows that they complete.

        Args:
            frames: one or several frames in a format of the processor: uint8 (height, width, channels) or
                (frames, height, width, channels), PIL images, tensors.
            times: the seconds at which they are shown, one per frame, not decreasing. None numbers the frames instead;
                a processor with `frames_per_second` needs times.

        Raises:
            ValueError: if the times do not fit the frames; and the errors of the processor.
        """
        frames = self._as_list(frames)
        if times is None:
            if self.processor.frames_per_second is not None:
                raise ValueError("A processor with `frames_per_second` needs the `times` of the frames, in seconds.")
            times = range(self.num_frames_seen, self.num_frames_seen + len(frames))
        times = [float(time) for time in np.atleast_1d(np.asarray(times, dtype=np.float64))]
        if len(times) != len(frames):
            raise ValueError(f"{len(frames)} frames came with {len(times)} times; expected one each.")
        for before, time in pairwise([self._sampler.last_time, *times]):
            if not time >= before:
                raise ValueError(
                    f"The times of frames must not decrease, got {time:g} s after {before:g} s. Call `reset` where "
                    "another video begins."
                )
        sampler, num_sampled = replace(self._sampler), self._num_sampled
        chosen = [pair for frame, time in zip(frames, times, strict=True) for pair in self._sampler.sample(frame, time)]
        try:
            return self.push_sampled([frame for frame, _ in chosen], [time for _, time in chosen])
        except (TypeError, ValueError):
            if self._num_sampled == num_sampled:  # no frame was added: as if nothing had been pushed
                self._sampler = sampler
            raise

    def flush(self) -> list[WindowPrediction]:
        """Return the windows that the last frame completes. Call it at the end of a stream sampled by rate."""
        last = self._sampler.flush()
        return self.push_sampled([frame for frame, _ in last], [time for _, time in last])

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

    @torch.inference_mode()
    def push_sampled(self, frames: Sequence[Any], times: Sequence[float]) -> list[WindowPrediction]:
        """Add frames that are already sampled at the processor's stride or rate; otherwise like `push`."""
        windows: list[WindowPrediction] = []
        for first in range(0, len(frames), BATCH):
            part = slice(first, first + BATCH)
            whole: dict[str, Any] = {"do_sample_frames": False, "num_clips": 1, "num_crops": 1}
            features = self.processor(list(frames[part]), crop_position="centre", **whole)
            pixel_values = features["pixel_values"]  # (1, frames, channels, height, width)
            check_values(pixel_values, self.model.config)
            check_frame_size(pixel_values, self.model.config)
            for time, pixels in zip(times[part], pixel_values[0], strict=True):
                change = frame_change(self._frames[-1].pixels, pixels) if self._frames else 0.0
                self._frames.append(_Sampled(self._num_sampled, time, pixels, change))
                self._num_sampled += 1
            windows += self._complete()
        return windows

    def last_window(self) -> list[WindowPrediction]:
        """
        Return the window that ends with the last frame, unless it was returned already. Call it at the end of a stream.

        If the stream has fewer sampled frames than a window, the window is filled by the processor's
        `short_video_policy`; "mask" masks the rest of it, and "error" raises ValueError.
        """
        start = max(0, self._num_sampled - self._num_frames)
        if not self._num_sampled or start == self._next_window - self.hop:
            return []
        frames = min(self._num_sampled, self._num_frames)
        policy = self.processor.short_video_policy
        places = apply_short_video_policy(np.arange(self._num_frames)[None], frames, policy)
        places, mask = mask_missing_frames(places)
        inputs = {"pixel_values": self._pixels(start, frames)[places]}  # (1, frames, channels, height, width)
        if not mask.all():
            inputs["frame_mask"] = shown_masks(torch.from_numpy(mask), self.model.config)
        with torch.inference_mode():
            (answer,) = self._answers(**inputs)
        return [self._prediction(start, answer)]

    def _complete(self) -> list[WindowPrediction]:
        """Return the windows whose frames have all arrived."""
        starts = list(range(self._next_window, self._num_sampled - self._num_frames + 1, self.hop))
        if self.reuses_tubelets:
            self._encode_tubelets()
        classify = self._classify_steps if self.reuses_tubelets else self._classify_frames
        found = []
        for first in range(0, len(starts), BATCH):
            batch = starts[first : first + BATCH]
            found += [self._prediction(*one) for one in zip(batch, classify(batch), strict=True)]
        self._next_window += len(starts) * self.hop
        self.num_windows += len(starts)
        self._forget()
        return found

    def _answers(self, **inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of windows and their unknown score, (num_labels + 1,) each."""
        nothing: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
        with classifier_inputs(self.model) if self._rule is not None else nothing as seen:
            logits = self.model(**inputs, return_dict=True).logits
        scores = torch.zeros(len(logits), device=logits.device)
        if self._rule is not None:
            scores = self._rule.scores(logits[:, None], torch.cat(seen)[:, None])
        return list(torch.cat([logits.float(), scores[:, None]], dim=1).cpu())

    def _prediction(self, start: int, answer: torch.Tensor) -> WindowPrediction:
        logits = answer[:-1]
        check_finite(logits, self.model)
        offset = start - self._frames[0].number
        frames = list(islice(self._frames, offset, offset + self._num_frames))
        place = find_cut([frame.change for frame in frames[1:]])
        cut = None if place is None else frames[1 + place].seconds
        unknown = None if self._rule is None else self._rule.is_unknown(float(answer[-1]), num_views=1)
        return WindowPrediction(frames[0].seconds, frames[-1].seconds, start, logits, cut, unknown)

    def _frames_from(self, start: int, count: int) -> torch.Tensor:
        """Return sampled frames as the processor made them, (count, channels, height, width)."""
        offset = start - self._frames[0].number
        return torch.stack([frame.pixels for frame in islice(self._frames, offset, offset + count)])

    def _pixels(self, start: int, count: int) -> torch.Tensor:
        return self._frames_from(start, count).to(self.model.device, self.model.dtype)

    def _classify_frames(self, starts: Sequence[int]) -> list[torch.Tensor]:
        """Return the `_answers` of windows, each by the whole model."""
        return self._answers(pixel_values=torch.stack([self._pixels(start, self._num_frames) for start in starts]))

    def _classify_steps(self, starts: Sequence[int]) -> list[torch.Tensor]:
        """Return the `_answers` of windows from the tokens of their steps. Windows with the same tokens share them."""
        steps = [[self._steps[start + place] for place in self._places] for start in starts]
        sources = [tuple(step.source for step in window) for window in steps]
        known = dict([self._last_window] if self._last_window is not None else [])
        new = {key: window for key, window in zip(sources, steps, strict=True) if key not in known}
        if new:
            tokens = torch.stack([torch.stack([step.token for step in window]) for window in new.values()])
            known.update(zip(new, self._answers(steps=tokens), strict=True))  # tokens (windows, time, hidden)
        found = [known[key] for key in sources]
        for start, window, answer in zip(starts, steps, found, strict=True):
            self._check_reuse(start, window, answer[:-1])
        self._last_window = (sources[-1], found[-1])
        return found

    def _check_reuse(self, start: int, steps: Sequence[_Step], logits: torch.Tensor) -> None:
        """If it is time to, compute a window from tokens of its own, and note how much its probabilities change."""
        reused = [index for index, place in enumerate(self._places) if steps[index].source != start + place]
        if not reused or not self.reuse.is_check_due:
            return
        tokens = [step.token for step in steps]
        clips = torch.stack([self._pixels(start + self._places[index], self._tubelet) for index in reused])
        for index, token in zip(reused, self.model.vivit.encode_steps(clips)[:, 0], strict=True):
            tokens[index] = token
        exact = self.model.classify_steps(torch.stack(tokens)[None])[0].float().cpu()  # from (1, time, hidden)
        changes = to_probabilities(exact, self._label_map) - to_probabilities(logits, self._label_map)
        self.reuse.num_checked_windows += 1
        self.reuse.num_checked_steps += len(reused)
        self.reuse.largest_change = max(self.reuse.largest_change, float(changes.abs().max()))

    def _encode_tubelets(self) -> None:
        """Encode every complete tubelet that a coming window needs, unless it equals the one encoded before it."""
        # Only windows that have already begun can have complete tubelets.
        windows = range(self._next_window, self._num_sampled, self.hop)
        starts = {window + place for window in windows for place in self._places}
        is_complete = self._num_sampled - self._tubelet
        needed = sorted(start for start in starts if start <= is_complete and start not in self._steps)
        clips: dict[int, torch.Tensor] = {}  # of the steps to encode
        sources: dict[int, int] = {}  # of all steps
        tokens: dict[int, torch.Tensor] = {}
        last: tuple[int, torch.Tensor] | None = None
        if self._reference is not None:
            source, token = self._reference.step
            last, tokens[source] = (source, self._reference.pixels), token
        for start in needed:
            pixels = self._frames_from(start, self._tubelet)
            if last is None or not self._is_unchanged(last[1], pixels):
                last, clips[start] = (start, pixels), pixels
            sources[start] = last[0]
        encoded = list(clips)
        for first in range(0, len(encoded), BATCH):
            batch = encoded[first : first + BATCH]
            inputs = torch.stack([clips[start] for start in batch]).to(self.model.device, self.model.dtype)
            tokens.update(zip(batch, self.model.vivit.encode_steps(inputs)[:, 0], strict=True))
        self._steps.update((start, _Step(source, tokens[source])) for start, source in sources.items())
        if encoded:
            self._reference = _Reference(self._steps[encoded[-1]], clips[encoded[-1]])
        self.reuse.num_encoded += len(encoded)
        self.reuse.num_reused += len(needed) - len(encoded)

    def _is_unchanged(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        if self._threshold is None:
            return False
        height, width = self.model.config.tubelet_size[1:]
        return step_change(before, after, (height, width), self._level) <= self._threshold

    def _forget(self) -> None:
        """Drop the tokens before the next window, and the frames before both it and `last_window`."""
        first = min(self._next_window, self._num_sampled - self._num_frames)
        while self._frames and self._frames[0].number < first:
            self._frames.popleft()
        for start in [start for start in self._steps if start < self._next_window]:
            del self._steps[start]
