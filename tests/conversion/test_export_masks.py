"""Exported graphs take `frame_mask` if the processor gives one, or the export is refused."""

import json

import numpy as np
import pytest
import torch
from onnx_files import metadata, session
from tiny_models import ATTENTION_TYPES, case_config, make_clips, make_model
from video_files import moving_frames, write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.conversion.command import DEFAULT_OPSET, main
from vivit_hf.conversion.export_onnx import INT8_FILE, MODEL_FILE, REPORT_FILE
from vivit_hf.conversion.onnx_models import write_onnx


LABELS = dict(enumerate("abcde"))
MASKED = [5, 3, 8, 7]  # visible frames


def run(path, **inputs):
    (logits,) = session(path).run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(logits)


@pytest.fixture
def folder(tmp_path):
    def make(case, **settings):
        config = case_config(case, id2label=LABELS)
        make_model(config).save_pretrained(tmp_path / "model")
        sizes = {"num_frames": 8, "frame_stride": 1, "size": 48, "crop_size": config.frame_size}
        ViViTVideoProcessor(**sizes, **{"short_video_policy": "mask", **settings}).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.mark.parametrize("case", [*ATTENTION_TYPES, "uniform_frames", "temporal_attention_pooling", "mean_pooling"])
@torch.no_grad()
def test_masks_give_the_logits_of_pytorch(case, tmp_path):
    model = make_model(case_config(case))
    write_onnx(model, tmp_path / MODEL_FILE, DEFAULT_OPSET, takes_masks=True)
    for counts in ([5], MASKED):
        clips, mask = make_clips(model.config, len(counts)), torch.arange(8) < torch.tensor(counts)[:, None]
        expected = model(clips, frame_mask=mask).logits
        found = run(tmp_path / MODEL_FILE, pixel_values=clips, frame_mask=mask)
        assert (found - expected).abs().max() < 1e-4
        hidden = torch.where(mask[:, :, None, None, None], clips, torch.full_like(clips, 3.0))
        torch.testing.assert_close(run(tmp_path / MODEL_FILE, pixel_values=hidden, frame_mask=mask), found)
    assert (expected - model(clips).logits)[:2].abs().max() > 1e-3


def test_the_command_exports_masks_with_the_processor_that_gives_them(folder, tmp_path, capfd):
    source, videos = folder("factorised_encoder"), tmp_path / "videos"
    videos.mkdir()
    for count in (3, 5, 9, 20, 6):
        write_video(videos / f"{count}.mp4", moving_frames(count, 48, 80))
    arguments = ["--model", str(source), "--output", str(tmp_path / "out"), "--videos", str(videos), "--int8"]
    assert main("export", arguments) == 0
    assert "frame_mask (batch, 8), bool" in capfd.readouterr().out
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["mask"] == {"name": "frame_mask", "dtype": "bool", "shape": ["batch", 8]}
    assert report["float32"]["max_abs_difference_of_logits"] < 1e-4
    said = metadata(tmp_path / "out" / MODEL_FILE)
    assert said["expects_mask"].startswith("frame_mask (batch, 8) of bool")
    features = ViViTVideoProcessor.from_pretrained(tmp_path / "out")(sorted(videos.iterdir()))
    model = make_model(case_config("factorised_encoder", id2label=LABELS))
    with torch.no_grad():
        expected = model(**features).logits
    assert (run(tmp_path / "out" / MODEL_FILE, **features) - expected).abs().max() < 1e-4
    assert np.abs((run(tmp_path / "out" / INT8_FILE, **features) - expected).numpy()).max() < 0.1 * expected.abs().max()


def test_random_clips_for_the_check_have_masks(folder, tmp_path):
    source = folder("uniform_frames")
    assert main("export", ["--model", str(source), "--output", str(tmp_path / "out")]) == 0


def test_a_processor_without_masks_needs_no_input_for_them(folder, tmp_path):
    source = folder("spatio_temporal", short_video_policy="loop")
    assert main("export", ["--model", str(source), "--output", str(tmp_path / "out")]) == 0
    assert [one.name for one in session(tmp_path / "out" / MODEL_FILE).get_inputs()] == ["pixel_values"]
    assert "expects_mask" not in metadata(tmp_path / "out" / MODEL_FILE)


@pytest.mark.parametrize(("case", "options"), [("merged_tokens", ()), ("spatio_temporal", ("--merge-tokens", "2"))])
def test_masks_of_a_model_that_merges_them_are_refused(case, options, folder, tmp_path, capfd):
    source = folder(case)
    assert main("export", ["--model", str(source), "--output", str(tmp_path / "out"), *options]) != 0
    assert "short_video_policy='mask', and the model takes no `frame_mask`" in capfd.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
