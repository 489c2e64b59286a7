"""The video that several files read."""

import pytest
from video_files import write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def video(folder):
    """H.264 with B-frames, 120 frames, a keyframe every 20."""
    options = {"bf": "3", "x264-params": "scenecut=0"}
    return write_video(folder / "video.mp4", num_frames=120, gop=20, options=options)
