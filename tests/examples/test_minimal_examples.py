"""The minimal examples stay minimal, and run."""

import json

import minimal_finetune
import pytest
from finetune_runs import write_data
from paths import EXAMPLES
from transformers import AutoImageProcessor, AutoModelForVideoClassification


@pytest.mark.parametrize(("name", "most"), [("minimal_finetune.py", 80)])
def test_a_minimal_example_is_short(name, most):
    assert len((EXAMPLES / name).read_text().splitlines()) <= most


def test_minimal_finetuning_leaves_a_model_that_classifies(tmp_path, monkeypatch):
    data = write_data(tmp_path)
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (data / "vit" / "preprocessor_config.json").write_text(json.dumps({"size": 32, **pixels}))
    argv = [data / "videos" / "train", tmp_path / "out", "--source", data / "vit", "--frames", 4, "--epochs", 1]
    monkeypatch.setattr("sys.argv", ["minimal_finetune.py", *map(str, argv)])
    minimal_finetune.main()
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert {name: getattr(processor, name) for name in pixels} == pixels
    logits = model(**processor(str(data / "videos" / "test" / "up_left" / "000.mp4"))).logits
    assert logits.shape == (1, 4) and model.config.id2label[0] == "down_left"
