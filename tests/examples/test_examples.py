"""The demo as its user starts it, with fewer files (its accuracy is what `make demo` checks)."""

import re
import subprocess
import sys

import demo
import numpy as np
import pytest
from paths import EXAMPLES
from transformers import ViTConfig, ViTForImageClassification
from video_files import write_video

from vivit_hf import ViViTForVideoClassification, demo_model_path


pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the demo in a folder of its own with 2 files per class to train on and 1 to test on; what it printed."""

    def run_demo(*arguments, required_accuracy=0.0):
        few = {"clips_per_class": 2, "test_clips_per_class": 1, "epochs": 1, "required_accuracy": required_accuracy}
        monkeypatch.setattr(demo, "SMALL", few)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("sys.argv", ["demo.py", "--small", "--output", str(tmp_path / "out"), *map(str, arguments)])
        demo.main()
        return capsys.readouterr().out

    return run_demo


def test_demo_from_files_to_labels(run, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (20, 120, 160, 3), dtype=np.uint8)
    video = write_video(tmp_path / "mine.mp4", frames)
    printed = run("--video", video)

    assert "8 files to train on, 4 held out" in printed
    assert re.search(r"Accuracy on 4 held-out files: [01]\.\d{3} \(required: 0\.0, chance: 0\.25\)", printed)
    assert "mine.mp4" in printed and "Your video" in printed
    scores = [float(score) for score in re.findall(r"(?:up|down)_(?:left|right) (0\.\d{3})", printed)]
    assert len(scores) >= 3 * 5
    model = ViViTForVideoClassification.from_pretrained(tmp_path / "out" / "model")
    assert sorted(model.config.label2id) == ["down_left", "down_right", "up_left", "up_right"]


def test_demo_fails_when_the_model_has_learnt_nothing(run):
    with pytest.raises(SystemExit, match=r"accuracy on held-out files is .*; at least 1.1 was expected"):
        run(required_accuracy=1.1)


def test_demo_refuses_a_video_that_is_not_there_before_it_starts(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--video", tmp_path / "nowhere.mp4")
    assert "nowhere.mp4: there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_demo_names_a_video_that_cannot_be_read(run, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    with pytest.raises(SystemExit, match=r"broken\.mp4"):
        run("--video", broken)


def test_demo_starts_from_the_image_vit_that_it_is_given(run, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(tmp_path / "my_vit")
    printed = re.sub(r"\s+", " ", run("--source", tmp_path / "my_vit"))
    assert "my_vit: " in printed and "1 inflated" in printed and "newly initialised" in printed
    config = ViViTForVideoClassification.from_pretrained(tmp_path / "out" / "model").config
    assert (config.hidden_size, config.frame_size, list(config.tubelet_size)) == (32, (32, 32), [2, 8, 8])


def test_minimal_inference_prints_the_labels_of_a_video():
    script = EXAMPLES / "minimal_inference.py"
    assert len(script.read_text().splitlines()) <= 40
    video = demo_model_path() / "samples" / "up_left.mp4"
    process = subprocess.run([sys.executable, script, video], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    first, *others = process.stdout.splitlines()
    assert first.split()[1] == "up_left" and float(first.split()[0]) > 0.5 and len(others) == 3
