"""The picture of a batch."""

import numpy as np
import torch

from vivit_hf import ViViTVideoProcessor
from vivit_hf.data.labels import LabelMap
from vivit_hf.explain.batch_picture import draw_batch


def test_file_names_stand_above_the_frames():
    processor, label_map = ViViTVideoProcessor(), LabelMap({"": ("jump", "run")})
    batch = torch.zeros(2, 4, 3, 16, 16), torch.tensor([0, 1]), processor, label_map
    plain, named = (np.asarray(draw_batch(*batch, files)) for files in (None, ["x/one.mp4", "x/two.mp4 + y/a.mp4"]))
    assert plain.shape == named.shape
    differing = np.flatnonzero((plain != named).any(axis=(1, 2)))
    row = len(plain) // 2
    assert set(differing // row) == {0, 1}, "both rows"
    assert (differing % row).max() < 18, "above the frames"


def test_file_names_that_are_no_unicode_are_drawn():
    processor, label_map = ViViTVideoProcessor(), LabelMap({"": ("jump", "run")})
    draw_batch(torch.zeros(1, 1, 3, 16, 16), torch.tensor([0]), processor, label_map, ["\udcff.mp4"])
