"""The jobs of the page, run in a separate process that is killed if a job takes too long.

Python cannot interrupt FFmpeg and torch, and killing a process frees everything that it held. Only that process loads
torch, which takes seconds: the page is served before.
"""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


DEMO = "demo (moving shapes)"
TOP_K = 5
MOST_PIXELS = 8_000_000_000  # of all frames of a file: ten minutes of 480p, or half a minute of 4K
TOO_LARGE = (
    "{name} is too large: it has {megabytes} MB, and this page accepts up to {limit} MB. Cut out the part that "
    "matters, or save it in a smaller size."
)


class UserError(Exception):
    """An error that the visitor can fix. Its text is shown on the page."""


def spoken(seconds: float) -> str:
    """Return a duration in words, in seconds or minutes."""
    return f"{round(seconds, 1):g} seconds" if seconds < 120 else f"{round(seconds / 60, 1):g} minutes"


@dataclass(frozen=True)
class Limits:
    """The longest and the largest file of a visitor, and the deadline of a job."""

    max_seconds: float = 600.0
    max_megabytes: float = 200.0
    job_seconds: float = 120.0


@dataclass(frozen=True)
class Job:
    """
    The request of a visitor.

    `task`: a name in `answers.TASKS`.
    `method`, `folder`: of the explanation, and where its pictures are written.
    `features`, `features_model`: the files to search, and where the model that made them is now (None: as they say).
    `folders`: those whose videos may be shown.
    """

    task: str
    path: str | None
    models: tuple[str, ...]
    limits: Limits
    method: str = "gradient"
    folder: str = ""
    features: tuple[str, ...] = ()
    features_model: str | None = None
    folders: tuple[str, ...] = ()


def _serve(connection: Any) -> None:
    """Answer jobs until the connection closes; runs in the process of a `Worker`."""
    import logging

    from answers import answer

    from vivit_hf.video_sources import VideoDecodingError

    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            for part in answer(job):
                connection.send(part)
            connection.send({"end": True})
        except (UserError, VideoDecodingError, ValueError) as error:
            connection.send({"error": str(error)})
        except Exception as error:
            logging.exception("A video could not be processed.")
            text = f"Unexpected error: {type(error).__name__}. See the log of the server."
            connection.send({"error": text})


class Worker:
    """A process that answers jobs one by one. It is killed, and replaced, if a job takes longer than its deadline."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Any = None
        self._connection: Any = None

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        """Yield the parts of the answer, then a part with "end" or "error"."""
        seconds = job.limits.job_seconds
        with self._lock:
            is_done = False
            try:
                self._start()
                self._connection.send(job)
                deadline = time.monotonic() + seconds
                while not is_done:
                    if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                        yield {
                            "error": f"This took longer than {spoken(seconds)} and was stopped: try a shorter or "
                            "smaller video, or another model."
                        }
                        return
                    part = self._connection.recv()
                    is_done = "end" in part or "error" in part
                    yield part
            except (EOFError, OSError):
                yield {"error": "The process that read the video has died. It may have run out of memory."}
            finally:
                if not is_done:  # also if the visitor has left before the end
                    self.stop()

    def start(self) -> None:
        """Start the process, unless it runs already. The first job does so, too."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None
