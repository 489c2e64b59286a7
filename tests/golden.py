"""Golden files: inputs and outputs of the official JAX implementation."""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from paths import FIXTURES

from vivit_hf import ViViTForVideoClassification
from vivit_hf.conversion.scenic_weights import config_from_scenic, state_dict_from_scenic


GOLDEN = FIXTURES / "scenic"
CASES = [
    "01_spacetime_token",
    "02_spacetime_gap",
    "03_fe_token",
    "04_fe_gap",
    "05_fe_spatial_only_token",
    "06_fsa_time_space_gap",
    "07_fsa_space_time_gap",
    "08_fdpa_gap",
    "09_spacetime_token_sampling",
    "10_fe_token_sampling",
    "11_spacetime_token_prelogits",
    "12_spacetime_token_nonsquare",
    "13_fe_gap_patch_8x16x4",
    "14_fsa_time_space_remainder",
    "15_fe_token_sampling_nonsquare",
]


@functools.cache
def load_case(case):
    """Return (model in float32, clips, expected outputs in float64) of a golden file."""
    with np.load(GOLDEN / f"{case}.npz") as arrays:
        facts = json.loads(str(arrays["config"]))
        params = {name.removeprefix("params/"): arrays[name] for name in arrays.files if name.startswith("params/")}
        expected = {Path(name).name: arrays[name] for name in arrays.files if name.startswith("outputs_f64/")}
        clips = torch.from_numpy(arrays["inputs/video"]).permute(0, 1, 4, 2, 3)  # channels before height and width
    _, frames, height, width, _ = facts["input_shape"]
    config = config_from_scenic(
        facts["model"], num_frames=frames, image_size=(height, width), num_labels=facts["num_classes"]
    )
    model = ViViTForVideoClassification(config).eval()
    model.load_state_dict(state_dict_from_scenic(params, config), strict=True)
    return model, clips, expected
