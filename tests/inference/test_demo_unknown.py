"""The demo model calls videos without a moving shape "none of these", from every entry point."""

import sys

import numpy as np
import pytest
from command_line import SAMPLES, invoke, rows
from moving_shapes import Scene, write_moving_shapes, write_video
from paths import ROOT


sys.path.append(str(ROOT / "benchmarks"))

from strange_videos import STRANGE, write_strange_videos

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.inference import video_timeline
from vivit_hf.inference.timeline import file_windows
from vivit_hf.inference.unknown import UNKNOWN


@pytest.fixture(scope="module")
def demo():
    folder = demo_model_path()
    return ViViTForVideoClassification.from_pretrained(folder).eval(), ViViTVideoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    return write_strange_videos(tmp_path_factory.mktemp("strange"), 10)


def called(demo, videos):
    """Whether each window is "none of these"."""
    return [bool(window.unknown) for video in videos for window in file_windows(*demo, video)]


def test_windows_of_strange_videos_are_none_of_these(demo, strange):
    found = called(demo, strange)
    assert len(found) == 5 * 10 * len(STRANGE) and sum(found) >= 0.95 * len(found)


def test_windows_of_new_moving_shapes_are_rarely_so(demo, tmp_path):
    """The threshold is for 5 % of files on average over calibrations, each on 50 scenes; 100 new scenes had 5.4 %."""
    write_moving_shapes(tmp_path, 1, 4000, test_clips_per_class=25)
    found = called(demo, sorted((tmp_path / "test").glob("*/*.mp4")))
    assert len(found) == 5 * 100 and sum(found) <= 0.1 * len(found)


def test_commands_say_none_of_these_without_a_model_of_ones_own(strange):
    files = [strange[0], strange[-1], SAMPLES / "up_left.mp4"]
    found = rows(invoke("classify", *files, "--json").stdout)
    assert [row["unknown"] for row in found] == [True, True, False]
    table = invoke("classify", *files).stdout
    assert f"none of these (otherwise {found[0]['predictions'][0]['label']})" in table and "up_left" in table
    segments = rows(invoke("timeline", strange[0], "--json").stdout)
    assert [one["label"] for one in segments] == [UNKNOWN]


def test_a_strange_part_of_a_video_has_a_segment(demo, strange, tmp_path):
    """A known scene of 5 s, noise of 5 s, and another known scene, with cuts between them."""
    first, last = (
        Scene.draw(np.random.default_rng([9, number]), 24, 80, 96).render(motion, 60)
        for number, motion in enumerate(("up_left", "down_right"))
    )
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 96, 3), np.uint8)
    write_video(tmp_path / "video.mp4", np.concatenate([first, noise, last]))
    segments = video_timeline(*demo, tmp_path / "video.mp4")
    assert [one.label for one in segments] == ["up_left", UNKNOWN, "down_right"]
    assert [one.start for one in segments] == pytest.approx([0, 5, 10], abs=0.34)
