"""What every test file shares: no network, one thread, and the scripts outside of the package within reach."""

import os
import sys

import paths


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Also in the processes that tests start. The models are tiny: threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(paths.EXAMPLES))

import pytest
import torch
from hypothesis import settings
from tiny_models import CASES, case_config, make_clips, make_model, tiny_config
from video_files import damage_packet, write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.configuration_vivit import ATTENTION_TYPES


# The same examples in every run, and as much time as a busy machine takes for them.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ATTENTION_TYPES)
def variant(request):
    """One of the four variants, by its `attention_type`."""
    return request.param


@pytest.fixture(params=CASES)
def case(request):
    """One of the variants, or one of the ways in which a variant computes differently."""
    return request.param


@pytest.fixture(params=[name for name, fields in CASES.items() if "merge_tokens" not in fields])
def unmerged_case(request):
    """A case whose layers all see all tokens."""
    return request.param


@pytest.fixture
def config(variant):
    return case_config(variant)


@pytest.fixture
def model(config):
    return make_model(config)


@pytest.fixture
def clips(config):
    return make_clips(config)


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
