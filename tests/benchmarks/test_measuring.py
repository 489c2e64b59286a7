"""The measuring code of the benchmarks: peers, targets, turns and peaks of memory."""

import sys

import pytest
import torch
from paths import ROOT

from vivit_hf import ViViTConfig, ViViTForVideoClassification
from vivit_hf.inference.tensor_memory import peak_of_tensors


sys.path.append(str(ROOT / "benchmarks"))

import bench
import measuring
import peers


def test_the_peak_of_tensors_is_what_is_there_at_once():
    def job():
        kept = torch.empty(1_000_000)
        for _ in range(3):
            torch.empty(500_000).zero_()
        return kept

    assert peak_of_tensors(torch.device("cpu"), job) == pytest.approx(6.0, abs=0.01)


def test_peers_and_plain_copies_compute_what_our_models_do():
    for preset in bench.VARIANTS.values():
        torch.manual_seed(0)
        config = ViViTConfig.from_preset(preset, **bench.SMOKE, num_labels=5, initializer_range=0.2)
        model = ViViTForVideoClassification(config).eval()
        clips = torch.randn(2, config.num_frames, 3, *config.frame_size)
        with torch.no_grad():
            expected = model(clips).logits
            torch.testing.assert_close(peers.PlainViViT(model)(clips), expected, atol=2e-5, rtol=1e-4)
            if config.attention_type == "spatio_temporal":
                torch.testing.assert_close(
                    peers.transformers_vivit(model)(clips).logits, expected, atol=2e-5, rtol=1e-4
                )


def test_figures_know_whether_they_reach_their_target():
    assert measuring.at_most("time", 1.8, "x", 1.8).passed and not measuring.at_most("time", 1.9, "x", 1.8).passed
    assert measuring.at_least("speed", 1.7, "x", 1.7).passed and not measuring.at_least("speed", 1.6, "x", 1.7).passed
    assert measuring.at_least("speed", 1.6, "x", None).passed is None
    assert measuring.median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 1.0]) == 4.0


def test_jobs_take_turns():
    calls = []
    seconds = measuring.interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3 and {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
