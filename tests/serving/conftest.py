"""Servers that several tests ask: one with the usual limits, and one with small ones."""

import pytest
from running_server import RunningServer


@pytest.fixture(scope="session")
def server():
    with RunningServer("--workers", 2) as running:
        yield running


@pytest.fixture(scope="session")
def strict():
    limits = {
        "max-bytes": 500_000,
        "max-duration": 20,
        "max-frames": 500,
        "max-pixels": 200_000,
        "max-decoded-pixels": 10_000_000_000,
        "max-requests": 2,
        "max-requests-per-client": 1,
        "deadline": 4,
        "min-upload-rate": 50_000,
    }
    options = [word for name, value in limits.items() for word in (f"--{name}", value)]
    with RunningServer(*options, "--workers", 1, "--num-clips", 1, "--allow-private-addresses") as running:
        yield running
