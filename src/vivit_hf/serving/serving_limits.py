"""The most that a request may cost."""

from dataclasses import dataclass
from typing import Any

from ..limits_vivit import check_bool, check_positive_integer, check_positive_number


_NUMBERS = ("max_duration", "deadline")


@dataclass(frozen=True)
class ServingLimits:
    """
    The most that a request may cost, so that no client can exhaust the server.

    `max_bytes` of the body of a request, or of a download; `max_duration` in seconds, `max_frames` and `max_pixels` of
    a frame, of a video; `max_decoded_pixels`, height x width of all frames that are decoded for one answer;
    `max_requests` in progress at a time, from the first byte to the answer (503 above), and `max_requests_per_client`
    of them from one IP address (429 above; None: no limit of its own); `deadline` in seconds from the first byte to the
    answer (504 after that); `min_upload_rate` in bytes per second, on average after 5 seconds (408 below).

    Videos are downloaded from public IP addresses only. `allow_private_addresses` adds those of this machine and of the
    local network, which every client can then make the server ask.

    Raises ValueError for a number that is not above 0.
    """

    max_bytes: int = 100_000_000
    max_duration: float = 600.0
    max_frames: int = 36_000
    max_pixels: int = 4096 * 2304
    max_decoded_pixels: int = 8_000_000_000
    max_requests: int = 64
    max_requests_per_client: int | None = None
    deadline: float = 30.0
    min_upload_rate: int = 10_000
    allow_private_addresses: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "allow_private_addresses":
                check_bool(name, value)
            elif not (name == "max_requests_per_client" and value is None):
                (check_positive_number if name in _NUMBERS else check_positive_integer)(name, value)

    def of_video(self, seconds: float) -> dict[str, Any]:
        """Return the fields of `VideoLimits` for a file that has to be decoded within this time."""
        names = ("max_bytes", "max_duration", "max_frames", "max_pixels", "max_decoded_pixels")
        return {**{name: getattr(self, name) for name in names}, "decoding_timeout": max(seconds, 1e-3)}
