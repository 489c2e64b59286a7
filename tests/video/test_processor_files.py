"""Files of processors: those that transformers 5 writes and reads, and those of its own Vivit processors."""

import json

import numpy as np
import pytest
import torch
from tiny_models import make_model, tiny_config
from transformers import AutoImageProcessor, VivitConfig, VivitImageProcessor, pipeline
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from vivit_hf import ViViTVideoProcessor


SMALL = {"num_frames": 8, "frame_stride": 1, "size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
# What `VivitVideoProcessor.save_pretrained` of transformers 5.23 writes.
NATIVE = {
    "crop_size": {"height": 24, "width": 24},
    "data_format": "channels_first",
    "default_to_square": False,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_sample_frames": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 1 / 127.5,
    "return_metadata": False,
    "size": {"shortest_edge": 24},
    "video_processor_type": "VivitVideoProcessor",
}
# A file that an earlier version of this package wrote.
EARLIER = {
    "auto_map": {"AutoImageProcessor": "video_processing_vivit.ViViTVideoProcessor"},
    "clip_start": "centre",
    "crop_position": "random",
    "crop_size": {"height": 24, "width": 20},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_sample_frames": None,
    "frame_sampling": "clip",
    "frame_stride": 3,
    "frames_per_second": 12.5,
    "image_mean": [0.4],
    "image_processor_type": "ViViTVideoProcessor",
    "image_std": [0.2, 0.3, 0.4],
    "num_clips": 1,
    "num_crops": 1,
    "num_frames": 6,
    "num_threads": 0,
    "offset": True,
    "on_error": "repeat_last",
    "resample": 3,
    "rescale_factor": 1 / 127.5,
    "short_video_policy": "loop",
    "size": {"shortest_edge": 28},
    "video_limits": {"max_frames": 900},
}
IMAGE, VIDEO, NESTED = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"


def write(folder, **files):
    for name, settings in files.items():
        (folder / {"image": IMAGE, "video": VIDEO, "nested": NESTED}[name]).write_text(json.dumps(settings))


def clip(frames=8):
    return np.random.default_rng(0).integers(0, 256, (frames, 24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("layout", ["image", "video", "nested video", "nested image"])
def test_settings_are_read_from_every_file_that_transformers_writes(tmp_path, layout):
    settings = {**SMALL, "frame_stride": 3}
    *nested, kind = layout.split()
    write(tmp_path, **({"nested": {f"{kind}_processor": settings}} if nested else {kind: settings}))
    assert ViViTVideoProcessor.from_pretrained(tmp_path).frame_stride == 3


def test_files_of_earlier_versions_keep_every_setting(tmp_path):
    write(tmp_path, image=EARLIER)
    assert ViViTVideoProcessor.from_pretrained(tmp_path).to_dict() == EARLIER


@pytest.mark.parametrize("layout", ["image", "video", "nested"])
def test_a_native_video_processor_keeps_its_offset_and_warns(tmp_path, layout, monkeypatch):
    monkeypatch.setattr("vivit_hf.processor_settings.logger.warning", lambda text: messages.append(text))
    messages = []
    write(tmp_path, **{layout: {"video_processor": NATIVE} if layout == "nested" else NATIVE})
    processor = ViViTVideoProcessor.from_pretrained(tmp_path, num_frames=8)
    assert len(messages) == 1 and "configuration of transformers' VivitVideoProcessor" in messages[0]
    found = processor(clip())["pixel_values"]
    # The same steps in transformers' image processor, which needs no torchvision.
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    native = VivitImageProcessor(**sizes, offset=True, rescale_factor=1 / 127.5)
    expected = native(list(clip()), return_tensors="pt")["pixel_values"]
    assert expected.min() < -2.5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_native_video_processor_samples_files_as_its_pipeline_does(tmp_path):
    write(tmp_path, video=NATIVE)
    assert ViViTVideoProcessor.from_pretrained(tmp_path).do_sample_frames is None
    write(tmp_path, video={**NATIVE, "num_frames": 8, "do_sample_frames": True, "fps": 5})
    processor = ViViTVideoProcessor.from_pretrained(tmp_path)
    assert (processor.num_frames, processor.frames_per_second) == (8, 5)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_native_processor_without_num_frames_takes_those_of_its_model(tmp_path, kind):
    VivitConfig(num_frames=16).save_pretrained(tmp_path)
    settings = VivitImageProcessor().to_dict() if kind == "image" else NATIVE
    write(tmp_path, **{kind: {**settings, "num_frames": None}})
    assert ViViTVideoProcessor.from_pretrained(tmp_path).num_frames == 16
    assert ViViTVideoProcessor.from_pretrained(tmp_path, num_frames=4).num_frames == 4
    write(tmp_path, **{kind: {**settings, "num_frames": 8}})
    assert ViViTVideoProcessor.from_pretrained(tmp_path).num_frames == 8


@pytest.fixture
def folder(tmp_path):
    make_model(tiny_config("factorised_encoder", image_size=24, tubelet_size=(2, 8, 8))).save_pretrained(tmp_path)
    ViViTVideoProcessor(**SMALL).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("files", [{IMAGE, VIDEO}, {IMAGE}, {VIDEO}], ids=["now", "older", "video alone"])
def test_auto_classes_and_pipelines_find_saved_processors(folder, files, tmp_path):
    from video_files import write_video

    assert {path.name for path in folder.glob("*processor_config.json")} == {IMAGE, VIDEO}
    for name in {IMAGE, VIDEO} - files:
        (folder / name).unlink()
    found = [AutoVideoProcessor.from_pretrained(folder), ViViTVideoProcessor.from_pretrained(folder)]
    if IMAGE in files:
        found.append(AutoImageProcessor.from_pretrained(folder))
    assert all(type(one) is ViViTVideoProcessor and one.num_frames == 8 for one in found)
    path = write_video(tmp_path / "video.mp4", np.repeat(clip(16).repeat(2, axis=1), 2, axis=2))
    assert len(pipeline("video-classification", model=str(folder))(str(path), top_k=2)) == 2


def test_saving_replaces_every_older_file(folder):
    write(folder, nested={"video_processor": NATIVE}, video=NATIVE)
    ViViTVideoProcessor(**SMALL, short_video_policy="loop").save_pretrained(folder)
    assert not (folder / NESTED).exists()
    for load in (ViViTVideoProcessor, AutoImageProcessor, AutoVideoProcessor):
        processor = load.from_pretrained(folder)
        assert type(processor) is ViViTVideoProcessor and processor.short_video_policy == "loop"


def test_files_that_disagree_warn_and_the_image_processor_wins(folder, monkeypatch):
    messages = []
    monkeypatch.setattr("vivit_hf.processor_settings.logger.warning", lambda text: messages.append(text))
    settings = json.loads((folder / IMAGE).read_text())
    write(folder, image={**settings, "frame_stride": 5})
    assert ViViTVideoProcessor.from_pretrained(folder).frame_stride == 5
    assert len(messages) == 1 and f"its {VIDEO} has other values of frame_stride" in messages[0]


def test_a_folder_without_processor_names_the_missing_file(tmp_path):
    with pytest.raises(OSError, match=IMAGE):
        ViViTVideoProcessor.from_pretrained(tmp_path)
