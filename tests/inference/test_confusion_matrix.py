"""Confusion matrices, the accuracy of each class, and their picture."""

import math

import numpy as np
import pytest
from PIL import Image

from vivit_hf.inference.evaluation_files import draw_confusion_matrix
from vivit_hf.inference.metrics import class_accuracies, confusion_matrix


def test_confusion_matrix():
    logits = np.eye(3)[[0, 1, 1, 2]]
    assert confusion_matrix(logits, np.array([0, 1, 2, -100])).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_each_class_has_its_accuracy_and_its_most_frequent_mistake():
    matrix = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    first, second, third = class_accuracies(matrix, ["run", "jump", "sit"])
    assert first == ("run", 4, 0.75, "jump") and second == ("jump", 2, 1.0, "")
    assert third[:2] == ("sit", 0) and math.isnan(third.accuracy) and third.mistaken_for == ""


@pytest.mark.parametrize("num_classes", [2, 25, 101])
def test_a_matrix_of_any_size_is_drawn(tmp_path, num_classes):
    names = [f"class {index}" for index in range(num_classes)]
    matrix = np.eye(num_classes, dtype=int)
    draw_confusion_matrix(matrix, names, tmp_path / "matrix.png", "top-1 100 %")
    with Image.open(tmp_path / "matrix.png") as picture:
        assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
