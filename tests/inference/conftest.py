"""The machines that optimised models are tested on."""

import pytest
from optimized_models import ONEDNN_HAS_BFLOAT16, make_pair

from vivit_hf.inference import optimization


@pytest.fixture(params=["plain CPU", "AVX-512", "laid out"])
def machine(request, monkeypatch):
    """A CPU without special instructions, one with AVX-512, and one whose weights `optimize` lays out for oneDNN."""
    monkeypatch.setattr(optimization, "has_avx512", lambda: request.param != "plain CPU")
    monkeypatch.setattr(optimization, "has_bfloat16_units", lambda: request.param == "laid out" and ONEDNN_HAS_BFLOAT16)
    return request.param


@pytest.fixture
def pair(variant, machine):
    return make_pair(variant, machine)
