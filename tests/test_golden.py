"""The official JAX implementation's numbers, from its parameters: logits, features and tokens of all variants."""

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_scenic_checkpoint import config_from_scenic, state_dict_from_scenic

from vivit_hf import ViViTForVideoClassification


FOLDER = Path(__file__).parent / "fixtures" / "scenic"
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
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


def test_all_fifteen_cases_are_here():
    assert sorted(path.stem for path in FOLDER.glob("[01]*.npz")) == CASES


@functools.cache
def load_case(case):
    """(model in float32, clips, expected outputs in float64) of a golden file."""
    with np.load(FOLDER / f"{case}.npz") as arrays:
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


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_official_implementation(case, implementation, dtype):
    float32_model, clips, expected = load_case(case)
    model = copy.deepcopy(float32_model).to(dtype)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation

    with torch.no_grad():
        features = model.vivit(clips.to(dtype))
        logits = model(clips.to(dtype)).logits

    actual = {"logits": logits, "prelogits": features.pooler_output, "encoded": features.last_hidden_state}
    assert ("encoded" in expected) == (model.config.attention_type != "factorised_encoder")
    assert {"logits", "prelogits"} <= set(expected) <= set(actual)
    for name, array in expected.items():
        assert array.dtype == np.float64 and actual[name].dtype == dtype
        torch.testing.assert_close(
            actual[name].double(),
            torch.from_numpy(array),
            atol=TOLERANCES[dtype],
            rtol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )
