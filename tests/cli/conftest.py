"""Models and videos that the tests of several commands use."""

import pytest
from tiny_models import make_model, tiny_config
from video_files import damage_packet, write_video

from vivit_hf import ViViTVideoProcessor


@pytest.fixture(scope="session")
def grouped(tmp_path_factory):
    """A random model with two groups of labels, of another variant than the demo model."""
    folder = tmp_path_factory.mktemp("grouped")
    labels = {0: "cup", 1: "door", 2: "take", 3: "open", 4: "close"}
    config = tiny_config("factorised_self_attention", id2label=labels, label_groups={"noun": 2, "verb": 3})
    make_model(config).save_pretrained(folder)
    processor = ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"height": 24, "width": 40}, do_center_crop=False
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def one_frame_lost(tmp_path_factory):
    path = write_video(tmp_path_factory.mktemp("lost") / "corrupted.mp4", num_frames=24, options={"bf": "0"})
    damage_packet(path, 11)
    return path
