"""The official JAX implementation's numbers, from its parameters: logits, features and tokens of all variants."""

import copy

import numpy as np
import pytest
import torch
from golden import CASES, GOLDEN, load_case


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


def test_all_fifteen_cases_are_here():
    assert sorted(path.stem for path in GOLDEN.glob("[01]*.npz")) == CASES


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
