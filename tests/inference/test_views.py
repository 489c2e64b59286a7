"""The average of a video's views, against its definition."""

import pytest
import torch

from vivit_hf import ViViTConfig
from vivit_hf.data.labels import LabelMap, to_probabilities
from vivit_hf.inference.views import average_views


ONE = LabelMap({"": tuple("abcdefg")})
SEVERAL = LabelMap({"": tuple("abc")}, True)
VALUES = LabelMap({"": ("angle", "speed")}, is_regression=True)
GROUPED = LabelMap({"noun": ("pan", "lid", "tap"), "verb": ("open", "wash")})


@pytest.mark.parametrize("label_map", [ONE, GROUPED, SEVERAL, VALUES])
def test_averages_of_views(label_map):
    logits = torch.randn(5, 4, len(label_map.names), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = to_probabilities(logits, label_map).mean(dim=1)
    averaged = to_probabilities(average_views(logits, label_map, "probabilities"), label_map)
    assert torch.allclose(averaged, mean, atol=1e-12)
    assert torch.allclose(average_views(logits, label_map, "logits"), logits.mean(dim=1))
    one = average_views(logits[:, :1], label_map)
    assert torch.allclose(to_probabilities(one, label_map), to_probabilities(logits[:, 0], label_map))
    with pytest.raises(ValueError, match="Expected one of 'probabilities', 'logits'"):
        average_views(logits, label_map, "votes")


def test_a_regression_has_its_values():
    for options in ({"num_labels": 1}, {"num_labels": 2, "problem_type": "regression"}):
        label_map = LabelMap.from_config(ViViTConfig.from_preset("vivit-tiny", **options))
        values = torch.tensor([[[-3.0, 7.0], [5.0, 8.0]]])[..., : options["num_labels"]]
        assert torch.equal(to_probabilities(values, label_map), values)
        expected = torch.tensor([[1.0, 7.5]])[:, : options["num_labels"]]
        assert torch.equal(average_views(values, label_map), expected)


def test_averages_stay_finite_for_extreme_logits():
    extreme = torch.tensor([[[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]]])
    for label_map in (SEVERAL, LabelMap({"": tuple("abc")})):
        assert average_views(extreme, label_map).isfinite().all()
