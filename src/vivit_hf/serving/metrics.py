"""What a server counts and measures, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """
    The counters of one server, in a registry of their own.

    `requests`: answers by HTTP status, "gone" for clients that left before the answer; `seconds` and `stage_seconds`:
    how long requests took, as a whole and by stage; `in_progress`: requests without an answer yet; `batch_videos`:
    videos that went through the model together.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("vivit_requests", "Requests by HTTP status.", ["status"], registry=self.registry)
        self.seconds = Histogram(
            "vivit_request_seconds", "From the first byte to the answer.", buckets=_SECONDS, registry=self.registry
        )
        self.stage_seconds = Histogram(
            "vivit_stage_seconds",
            "By stage: receive (upload or download), wait, decode, model (with the wait for it).",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_progress = Gauge("vivit_requests_in_progress", "Requests without an answer.", registry=self.registry)
        self.batch_videos = Histogram(
            "vivit_batch_videos",
            "Videos that go through the model together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
