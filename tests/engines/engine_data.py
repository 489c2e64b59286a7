"""What the tests of engines and stores share: the arguments of a run, and how rows are compared."""

import pytest


def arguments(data, output):
    named = ["--model", data / "model", "--videos", data / "list.txt", "--output_dir", output]
    return [*named, "--shard_size", 3, "--num_workers", 0, "--use_cpu"]


def check_rows(found, expected):
    """Every row once, in any order, with the same answers up to rounding."""
    assert len(found) == len(expected)
    by_name = [sorted(rows, key=lambda row: row["video"]) for rows in (found, expected)]
    for row, other in zip(*by_name, strict=True):
        for name in ("video", "labels", "unknown", "error"):
            assert row[name] == other[name]
        assert row["scores"] == (other["scores"] and pytest.approx(other["scores"], abs=1e-6))
