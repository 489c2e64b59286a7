"""Soft labels, mixup and cutmix."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from vivit_hf.data.labels import LabelMap
from vivit_hf.training.mixing import ClipCollator, cutmix, cutmix_box, mixup, soft_labels


LABELS = LabelMap({"": tuple("abcd")})


def items(batch=4, views=0, labels=(0, 1, 2, 3), **more):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 8, 10) if not views else (views, 2, 3, 8, 10)
    return [
        {
            "pixel_values": torch.randn(shape, generator=generator),
            "labels": torch.tensor(labels[index]),
            "index": index,
            "epoch": 0,
            "damaged_files": [],
            **more,
        }
        for index in range(batch)
    ]


def test_soft_labels_are_those_of_the_definition():
    assert soft_labels(torch.tensor([1]), [4], 0.2).tolist() == [pytest.approx([0.05, 0.85, 0.05, 0.05])]
    grouped = soft_labels(torch.tensor([[2, 0]]), [3, 2], 0.3)
    assert grouped.tolist() == [pytest.approx([0.1, 0.1, 0.8, 0.85, 0.15])]


def test_mixup_is_with_the_reversed_batch():
    clips, labels = torch.arange(3.0).view(3, 1), torch.eye(3)
    mixed, soft = mixup(clips, labels, 0.75)
    assert mixed.flatten().tolist() == [0.5, 1.0, 1.5]
    assert soft.tolist() == [[0.75, 0, 0.25], [0, 1, 0], [0.25, 0, 0.75]]


@given(weight=st.floats(0, 1), seed=st.integers(0, 20))
def test_cutmix_is_one_box_in_all_frames_and_labels_go_by_its_area(weight, seed):
    box = cutmix_box(8, 10, weight, np.random.default_rng(seed))
    top, bottom, left, right = box
    assert 0 <= top <= bottom <= 8 and 0 <= left <= right <= 10
    assert (bottom - top) * (right - left) <= (1 - weight) * 80 + 1e-6
    clips = torch.stack([torch.zeros(3, 1, 8, 10), torch.ones(3, 1, 8, 10)])
    mixed, labels = cutmix(clips, torch.eye(2), box)
    area = (bottom - top) * (right - left) / 80
    assert mixed[0].mean(dim=(1, 2, 3)).tolist() == pytest.approx([area] * 3)
    assert mixed[0, :, :, top:bottom, left:right].eq(1).all()
    assert labels.tolist() == [pytest.approx([1 - area, area]), pytest.approx([area, 1 - area])]
    assert clips[0].eq(0).all(), "the input is left alone"


def test_without_mixing_labels_stay_numbers_and_views_are_never_mixed():
    batch = ClipCollator(LABELS)(items())
    assert batch["labels"].tolist() == [0, 1, 2, 3] and batch["pixel_values"].shape == (4, 2, 3, 8, 10)
    batch = ClipCollator(LABELS, mixup_alpha=1.0, label_smoothing=0.1)(items(views=3))
    assert batch["labels"].tolist() == [0, 1, 2, 3] and batch["pixel_values"].shape == (4, 3, 2, 3, 8, 10)
    assert torch.equal(batch["pixel_values"][1], items(views=3)[1]["pixel_values"])


def test_mixing_depends_on_the_epoch_and_the_examples_alone():
    collator = ClipCollator(LABELS, mixup_alpha=0.3, cutmix_alpha=1.0, label_smoothing=0.1, seed=3)
    first = collator(items())
    torch.manual_seed(7)
    again = collator(items())
    assert torch.equal(first["pixel_values"], again["pixel_values"]) and torch.equal(first["labels"], again["labels"])
    other = collator(items(epoch=1))
    assert not torch.equal(first["labels"], other["labels"])


def test_both_kinds_are_drawn_and_mixup_keeps_the_heavier_half():
    collator = ClipCollator(LABELS, mixup_alpha=0.5, cutmix_alpha=0.5)
    plain = torch.stack([item["pixel_values"] for item in items()])
    kinds = set()
    for epoch in range(40):
        batch = collator(items(epoch=epoch))
        assert torch.allclose(batch["labels"].sum(dim=1), torch.ones(4))
        untouched = (batch["pixel_values"] == plain).float().mean().item()
        kinds.add("mixup" if untouched < 0.001 else "cutmix")
        if untouched < 0.001:
            assert batch["labels"][0, 0] >= 0.5
    assert kinds == {"mixup", "cutmix"}
    labels = ClipCollator(LABELS, mixup_alpha=0.5, label_smoothing=0.2)(items())["labels"]
    assert labels.min() >= 0.05 - 1e-6, "smoothed, and then mixed"


def test_class_weights_go_into_the_labels():
    weights = torch.tensor([2.0, 1.0, 0.5, 1.0])
    labels = ClipCollator(LABELS, class_weights=weights)(items())["labels"]
    assert labels.tolist() == torch.diag(weights).tolist()
    logits = torch.randn(4, 4)
    from vivit_hf.modeling_vivit import video_classification_loss

    ours = video_classification_loss(logits, labels, "single_label_classification")
    losses = torch.nn.functional.cross_entropy(logits, torch.arange(4), reduction="none")
    assert torch.allclose(ours, (losses * weights).mean())


def test_several_labels_are_smoothed_between_yes_and_no():
    several = LabelMap({"": tuple("ab")}, True)
    labels = ClipCollator(several, label_smoothing=0.2)(items(2, labels=([1.0, 0.0], [1.0, 1.0])))["labels"]
    assert labels.tolist() == [pytest.approx([0.9, 0.1]), pytest.approx([0.9, 0.9])]


def test_a_batch_names_what_its_clips_are_from():
    named = [{**item, "file": f"{index}.mp4"} for index, item in enumerate(items(3))]
    assert ClipCollator(LABELS)(named)["files"] == ["0.mp4", "1.mp4", "2.mp4"]
    mixed = ClipCollator(LABELS, mixup_alpha=0.3)(named)["files"]
    assert mixed == ["0.mp4 + 2.mp4", "1.mp4 + 1.mp4", "2.mp4 + 0.mp4"]


def test_damaged_files_are_gathered():
    batch = ClipCollator(LABELS)(items(2, damaged_files=[("a.mp4", "cut off")]))
    assert batch["damaged_files"] == [("a.mp4", "cut off")] * 2


def test_wrong_settings_are_named():
    for name, value in {"label_smoothing": 1.0, "mixup_alpha": -1.0, "cutmix_alpha": -0.1}.items():
        with pytest.raises(ValueError, match=name):
            ClipCollator(LABELS, **{name: value})
