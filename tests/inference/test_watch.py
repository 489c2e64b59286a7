"""Watching a live source gives the segments of the file, each once it has ended."""

import pytest

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.inference.live_video import LiveVideo
from vivit_hf.inference.timeline import video_timeline, watch_video
from vivit_hf.video_processing_vivit import reader_size


VIDEO = demo_model_path() / "samples" / "all.mp4"


@pytest.fixture(scope="module")
def demo():
    folder = demo_model_path()
    model = ViViTForVideoClassification.from_pretrained(folder).eval()
    return model, ViViTVideoProcessor.from_pretrained(folder)


@pytest.fixture
def live(demo):
    with LiveVideo(VIDEO, policy="wait", queue_size=4, size=reader_size(demo[1])) as source:
        yield source


def test_the_segments_are_those_of_the_file(demo, live):
    watched = list(watch_video(*demo, live, hop=8))
    expected = video_timeline(*demo, VIDEO, hop=8)
    assert [segment.label for segment in watched] == [segment.label for segment in expected]
    for segment, other in zip(watched, expected, strict=True):
        assert (segment.start, segment.end) == pytest.approx((other.start, other.end), abs=0.01)


def test_a_segment_is_known_before_the_source_ends(demo, live):
    first = next(watch_video(*demo, live, hop=8))
    assert first.label == "down_left" and live.num_received < 192 - 16


def test_segments_below_the_least_score_are_left_out(demo, live):
    assert list(watch_video(*demo, live, hop=8, min_score=1.0)) == []
