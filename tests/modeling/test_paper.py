"""The paper's table (Tables 1 and 2): parameters, and multiply-adds counted from the model as it runs."""

import pytest
import torch
from paper_table import PAPER
from torch.utils.flop_counter import FlopCounterMode

from vivit_hf import ViViTConfig, ViViTForVideoClassification


def count(preset: str) -> tuple[float, float]:
    """Parameters (M) and multiply-adds (G) for one clip of 32 x 224 x 224 and 400 classes; nothing is computed."""
    config = ViViTConfig.from_preset(preset, num_labels=400, attn_implementation="eager")
    with torch.device("meta"):
        model = ViViTForVideoClassification(config)
        clips = torch.empty(1, 32, 3, 224, 224)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:  # asking for hidden states: the paper counts every token of every layer
        assert model(clips, output_hidden_states=True).logits.shape == (1, 400)
    assert counter.get_flop_counts()["Global"][torch.ops.aten.bmm] > 0, "the attention is not counted"
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


@pytest.mark.parametrize(("preset", "parameters", "multiply_adds"), PAPER)
def test_parameters_and_multiply_adds_are_those_of_the_paper(preset, parameters, multiply_adds):
    counted = count(preset)
    assert counted[0] == pytest.approx(parameters, abs=0.06)
    assert counted[1] == pytest.approx(multiply_adds, rel=0.015)
