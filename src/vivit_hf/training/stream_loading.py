"""Loading of streams: shared evenly among processes and workers, and resumed where they stopped."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from .clips import StreamedClips, StreamedVideo


class StreamBatches:
    """The batches of one process, as lists of unopened `StreamedVideo`.

    All processes read the same stream. A round takes `batch_size` videos for each process in turn, so that all of them
    get the same number of batches of the same size.

    In training (`clips` has an augmentation), the last rounds of a pass are filled up with videos from its beginning,
    with other random crops. In evaluation each video comes once: the remainder is divided among the processes, and a
    process with one video fewer than another gets a `StreamedVideo` without a video.

    Args:
        clips: the stream.
        batch_size: videos per batch and process.
        num_processes, process_index: the number of processes, and the index of this one.
        rounds_per_step: in training, the number of rounds in a pass is a multiple of it (gradient accumulation).
        drop_last: in training, drop incomplete last rounds instead of filling them up.

    After an iteration, `num_videos` is its number of videos over all processes.

    Raises:
        ValueError: for an empty stream, or with `drop_last` for one with fewer videos than a step.
    """

    def __init__(
        self,
        clips: StreamedClips,
        batch_size: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        rounds_per_step: int = 1,
        drop_last: bool = False,
    ):
        self.clips, self.batch_size, self.drop_last = clips, batch_size, drop_last
        self.num_processes, self.process_index, self.rounds_per_step = num_processes, process_index, rounds_per_step
        self.num_videos = 0

    def __iter__(self) -> Iterator[list[StreamedVideo]]:
        return self._evaluation() if self.clips.augmentation is None else self._training()

    def _training(self) -> Iterator[list[StreamedVideo]]:
        own: list[StreamedVideo] = []
        step_size = self.batch_size * self.num_processes * self.rounds_per_step
        self.num_videos = 0
        for one in self.clips.read() if self.drop_last else self._filled_up(step_size):
            if one.place // self.batch_size % self.num_processes == self.process_index:
                own.append(one)
            if (one.place + 1) % step_size == 0:
                for start in range(0, len(own), self.batch_size):
                    yield own[start : start + self.batch_size]
                own = []
            self.num_videos = one.place + 1
        if self.drop_last and self.num_videos < step_size:
            raise ValueError(
                f"The stream has {self.num_videos or 'no'} videos, fewer than the {step_size} of one step: leave "
                "drop_last out, and they are filled up."
            )

    def _filled_up(self, step_size: int) -> Iterator[StreamedVideo]:
        """Yield a pass, and its first videos again until the steps are complete."""
        count = 0
        while count == 0 or count % step_size:
            begun_at = count
            for one in self.clips.read(first_place=count):
                yield one
                count = one.place + 1
                if begun_at and count % step_size == 0:
                    break
            if count == begun_at:
                raise ValueError("The stream has no videos, or cannot be read a second time.")

    def _evaluation(self) -> Iterator[list[StreamedVideo]]:
        batch, processes, this = self.batch_size, self.num_processes, self.process_index
        a_round: list[StreamedVideo] = []
        self.num_videos = 0
        for one in self.clips.read():
            a_round.append(one)
            self.num_videos += 1
            if len(a_round) == batch * processes:
                yield a_round[this * batch : (this + 1) * batch]
                a_round = []
        if self.num_videos == 0:
            raise ValueError("The stream has no videos.")
        if a_round:
            share = -(-len(a_round) // processes)
            padding = StreamedVideo(a_round[0].epoch, self.num_videos, None)
            a_round += [padding] * (share * processes - len(a_round))
            yield a_round[this * share : (this + 1) * share]


class StreamLoader(DataLoader):
    """A loader of a stream: the main process lists the videos, and the workers decode them.

    Several workers can therefore decode a stream without shards, and the batches do not depend on their number.
    """

    def __init__(self, clips: StreamedClips, batches: StreamBatches, **settings: Any):
        # Without its own generator, a loader draws from torch's when it starts workers, and a resumed run starts them
        # at other times.
        super().__init__(_Items(clips), batch_sampler=batches, generator=torch.Generator(), **settings)
        self.clips, self.batches = clips, batches

    def set_epoch(self, epoch: int) -> None:
        self.clips.set_epoch(epoch)


class _Items(Dataset):
    def __init__(self, clips: StreamedClips):
        self.clips = clips

    def __getitems__(self, batch: Sequence[StreamedVideo]) -> list[dict[str, Any]]:
        return self.clips.items(batch)


class StreamPosition(TrainerCallback, ExportableState):
    """The current pass over a stream and the step at which it began, saved in checkpoints.

    `Trainer` derives both from the length of the data, and a stream has none.
    """

    def __init__(self) -> None:
        self.epoch, self.first_step = 0, 0

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **settings: Any) -> None:
        if not (control.should_training_stop or control.should_epoch_stop):
            self.epoch, self.first_step = self.epoch + 1, state.global_step

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"epoch": self.epoch, "first_step": self.first_step}}

    def restore(self, state: TrainerState) -> None:
        """Restore the position from the state of a checkpoint, or start at the beginning before the first step."""
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step else StreamPosition().state()
        if stored is None:
            raise ValueError(
                "The checkpoint has no position in a stream: an older version wrote it, or its data were not streamed. "
                "Start again in another output folder."
            )
        self.epoch, self.first_step = stored["attributes"]["epoch"], stored["attributes"]["first_step"]
