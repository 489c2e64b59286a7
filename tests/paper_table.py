"""Sizes and costs of the models that the paper reports (Tables 1 and 2)."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from vivit_hf import ViViTConfig, ViViTForVideoClassification


# Preset, parameters in millions, and multiply-adds in thousands of millions, which the paper calls FLOPs.
PAPER = [
    ("vivit-b-16x2", 88.9, 455.2),
    ("vivit-b-16x2-fe", 115.1, 284.4),
    ("vivit-b-16x2-fsa", 117.3, 372.3),
    ("vivit-b-16x2-fdpa", 88.9, 277.1),
    ("vivit-b-16x2-fe-average-pool", 86.7, 283.9),
]


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
