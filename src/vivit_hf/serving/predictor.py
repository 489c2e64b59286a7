"""
Threads that decode the videos of many requests and classify them together.

    submit --waiting--> decoders --decoded--> model --> future of each job

The model takes every video that is decoded, up to a batch, and never waits for more: while it computes, the decoders
fill the next batch. Batches are full when they help, which is when the model is the slower part.
"""

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from ..inference.clips import check_takes_masks
from ..inference.finite_outputs import NonFiniteError, check_finite
from ..inference.optimization import optimized
from ..inference.prediction import Answers, VideoPrediction
from ..inference.view_batches import Views, decode_views
from ..video_processing_vivit import ViViTVideoProcessor
from .metrics import Metrics
from .serving_limits import ServingLimits


@dataclass(eq=False)
class Job:
    """
    A video to classify. Its future has a `VideoPrediction`.

    `source`: an input of the processor, whose file is closed once it is decoded or nobody waits for the answer.
    `deadline`: see `time.monotonic`.
    """

    source: dict[str, Any]
    deadline: float
    future: Future[VideoPrediction] = field(default_factory=Future)
    begin: float = field(default_factory=time.monotonic)
    _file_lock: threading.Lock = field(default_factory=threading.Lock)

    def is_over(self) -> bool:
        """Return whether nobody waits for the answer any more."""
        return self.future.cancelled() or time.monotonic() > self.deadline

    def take_file(self) -> bool:
        """Return True to the first caller, who then uses and closes the file, and False to others."""
        return self._file_lock.acquire(blocking=False)

    def give_up(self) -> None:
        """Save the work that has not begun, and the file, which may be large while others are decoded first."""
        self.future.cancel()
        if self.take_file():
            self.source["bytes"].close()

    def answer(self, result: VideoPrediction | Exception) -> None:
        if self.future.set_running_or_notify_cancel():
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class Predictor:
    """
    Classify the videos of many requests on one model.

    Args:
        model: a `ViViTForVideoClassification` in eval mode, on its device.
        processor: makes clips with the model's number of frames and size.
        num_clips, num_crops: views per video.
        averaging: "probabilities" or "logits", see `average_views`.
        batch_size: clips that the model sees at a time; videos with fewer views go through it together.
        num_decoders: threads that decode.
        limits: those of a video are applied.
        metrics: counts batches, and measures how long they take.

    Raises:
        ValueError: if the processor cannot make these views or masks frames for a model that does not take masks, or
            the rule for unknown videos is damaged.
        NonFiniteError: if the scores of a clip of zeros are NaN or infinite.
    """

    def __init__(
        self,
        model: Any,
        processor: ViViTVideoProcessor,
        *,
        num_clips: int,
        num_crops: int,
        averaging: str = "probabilities",
        batch_size: int,
        num_decoders: int,
        limits: ServingLimits,
        metrics: Metrics,
    ):
        self.views: dict[str, Any] = {"num_clips": num_clips, "num_crops": num_crops}
        processor.settings.updated(self.views)  # which checks them
        check_takes_masks(model, processor)
        self.processor = processor
        self._model = model
        self._answers = Answers.of(model, averaging, batch_size)
        self.averaging, self.label_map = averaging, self._answers.label_map
        self._limits, self._metrics = limits, metrics
        self._most_videos = max(1, batch_size // (num_clips * num_crops))
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # Views are large, so that only a batch of them waits.
        self._decoded: queue.Queue[tuple[Job, Views] | None] = queue.Queue(self._most_videos)
        # Daemons, so that a server which is told twice to end does so at once.
        decoders = range(num_decoders)
        self._decoders = [threading.Thread(target=self._decode, name="decoder", daemon=True) for _ in decoders]
        self._classifier = threading.Thread(target=self._classify, name="model", daemon=True)
        self._warm_up()

    def start(self) -> None:
        """Start the threads."""
        for thread in (*self._decoders, self._classifier):
            thread.start()

    def stop(self) -> None:
        """Answer what was submitted, and end the threads."""
        for _ in self._decoders:
            self._waiting.put(None)
        for thread in self._decoders:
            thread.join()
        self._decoded.put(None)
        self._classifier.join()

    def is_alive(self) -> bool:
        """Return whether all threads run."""
        return all(thread.is_alive() for thread in (*self._decoders, self._classifier))

    def _warm_up(self) -> None:
        """Classify a clip of zeros, so that the first request is no slower than others."""
        config = self._model.config
        clip = torch.zeros(1, config.num_frames, config.num_channels, *config.frame_size, device=self._model.device)
        with torch.inference_mode(), optimized(self._model):
            check_finite(self._model(pixel_values=clip.to(self._model.dtype)).logits, self._model)

    def submit(self, job: Job) -> None:
        """Queue a video. Callers bound the number of jobs that they wait for."""
        self._waiting.put(job)

    def _decode(self) -> None:
        while (job := self._waiting.get()) is not None:
            begin = time.monotonic()
            self._metrics.stage_seconds.labels("wait").observe(begin - job.begin)
            if job.is_over() or not job.take_file():
                job.give_up()
                continue
            # With several threads, FFmpeg fills the gaps of a damaged picture with other pixels every time.
            settings = {**self.views, "video_limits": self._limits.of_video(job.deadline - begin), "num_threads": 1}
            try:
                with job.source["bytes"]:
                    views = decode_views(self.processor, job.source, **settings)
            except Exception as error:  # a bug, or no memory: it costs one answer and no thread
                job.answer(error)
                continue
            self._metrics.stage_seconds.labels("decode").observe(time.monotonic() - begin)
            if views.error is not None:
                job.answer(VideoPrediction(0, error=views.error))
            else:
                self._decoded.put((job, views))
            del job, views  # the next video may take long to come

    def _classify(self) -> None:
        with optimized(self._model):
            while (first := self._decoded.get()) is not None:
                begin = time.monotonic()
                batch, is_last = [first], False
                while len(batch) < self._most_videos and not is_last:
                    try:
                        item = self._decoded.get_nowait()
                    except queue.Empty:
                        break
                    if item is None:
                        is_last = True
                    else:
                        batch.append(item)
                self._answer([(job, views) for job, views in batch if not job.is_over()])
                del batch, first  # views are large, and the next ones may take long to come
                self._metrics.stage_seconds.labels("model").observe(time.monotonic() - begin)
                if is_last:
                    return

    def _answer(self, batch: Sequence[tuple[Job, Views]]) -> None:
        """Classify a batch; if that fails, each video alone, so that one cannot spoil the answers of others."""
        if not batch:
            return
        self._metrics.batch_videos.observe(len(batch))
        try:
            views = [views for _, views in batch]
            predictions = self._answers.of_decoded(views)
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._answer([one])
                return
            is_about_video = isinstance(error, NonFiniteError)  # as for `classify`
            batch[0][0].answer(VideoPrediction(0, error=str(error)) if is_about_video else error)
            return
        for (job, _), prediction in zip(batch, predictions, strict=True):
            job.answer(prediction)
