"""The video processor: wrong settings and videos are errors that name the value and the way out."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from video_files import moving_frames

from vivit_hf import ViViTVideoProcessor


FRAMES = moving_frames(8, 48, 64)


@pytest.fixture
def processor():
    return ViViTVideoProcessor(num_frames=8, size=40, crop_size=32)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"num_frame": 8}, TypeError, "`num_frame` is not a parameter.*Did you mean `num_frames`"),
        ({"num_frames": 0}, ValueError, "`num_frames=0` must be a whole number of at least 1"),
        ({"frame_sampling": "linear"}, ValueError, "`frame_sampling='linear'` is not known.*'clip', 'uniform'"),
        ({"frame_sampling": "uniform", "num_clips": 2}, ValueError, "num_clips=2"),
        ({"num_crops": 2}, ValueError, "`num_crops=2` must be 1 or 3"),
        ({"num_crops": 3, "do_center_crop": False}, ValueError, "do_center_crop=True"),
        ({"size": {"longest_edge": 256}}, ValueError, r"`size=.*longest_edge"),
        ({"size": {"shortest_edge": -1}}, ValueError, r"size\['shortest_edge'\].*-1"),
        ({"crop_size": {"height": 224}}, ValueError, "`crop_size={'height': 224}`"),
        ({"resample": "cubic"}, ValueError, "`resample='cubic'`.*bicubic"),
        ({"image_std": [0.5, 0.0, 0.5]}, ValueError, "`image_std=.*above 0"),
        ({"image_mean": [0.5, 0.5]}, ValueError, "`image_mean=.*"),
        ({"image_mean": math.nan}, ValueError, "`image_mean=nan`"),
        (
            {"on_error": "ignore"},
            ValueError,
            "`on_error='ignore'` is not known. Expected one of 'raise', 'skip', 'repeat_last'",
        ),
        ({"video_limits": {"frames": 9}}, ValueError, "frames"),
        ({"do_resize": "yes"}, ValueError, "`do_resize='yes'` must be True or False"),
        ({"size": 30}, ValueError, "32 x 32.*30 x 40.*`crop_size`"),
    ],
)
def test_wrong_settings_are_named(parameters, error, message, processor):
    with pytest.raises(error, match=message):
        processor(FRAMES, **parameters)
    if "size" not in parameters or not isinstance(parameters["size"], int):
        with pytest.raises(error, match=message):
            ViViTVideoProcessor(**parameters)


@pytest.mark.parametrize("name", ["num_frame", "frame_rate", "pixel_values"])
def test_unknown_arguments_are_named(name, processor):
    calls = [
        ViViTVideoProcessor,
        lambda **given: processor(FRAMES, **given),
        lambda **given: processor.settings.updated(given),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"`{name}` is not a parameter of ViViTVideoProcessor"):
            call(**{name: 1})


def test_the_settings_of_a_call_are_frozen(processor):
    settings = processor.settings.updated({"num_clips": 4, "num_crops": None})
    assert (settings.num_clips, settings.num_crops, settings.num_frames) == (4, 1, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.num_clips = 2


def test_attributes_are_checked_in_the_next_call(processor):
    processor.frames_per_second = 3e7
    with pytest.raises(
        ValueError, match=r"`frames_per_second=30000000\.0` must be a number of at least 1e-06 and at most 1000"
    ):
        processor(FRAMES, video_fps=25)


def test_a_frame_stride_takes_the_place_of_a_stored_rate():
    settings = ViViTVideoProcessor(frames_per_second=5).settings
    assert settings.updated({"frame_stride": 3}).frames_per_second is None
    assert settings.updated({"frame_stride": 3, "frames_per_second": 2}).frames_per_second == 2
    assert settings.updated({"frame_stride": None}).frames_per_second == 5


@pytest.mark.parametrize(
    ("videos", "error", "message"),
    [
        (FRAMES.astype(np.float32), ValueError, r"float32 must be in \[0, 1\], got values from 0 to 2.*x / 255"),
        (FRAMES / 127.5 - 1, ValueError, r"from -1 to.*\(x \+ 1\) / 2"),
        (np.full((8, 48, 64, 3), np.nan), ValueError, "nan"),
        (FRAMES.astype(np.int64) * 2, ValueError, r"must be in \[0, 255\]"),
        (FRAMES > 3, TypeError, "uint8 from 0 to 255 or float"),
        (FRAMES[0], ValueError, r"3 axes \(48, 64, 3\) is not a video"),
        (FRAMES[:0], ValueError, "without frames"),
        ([], ValueError, "empty list"),
        ([*FRAMES[:7], FRAMES[0, :20]], ValueError, "must have one size"),
        (np.zeros((8, 3, 40, 3), np.uint8), ValueError, "can be read both ways.*input_data_format"),
        (np.zeros((8, 48, 64, 2), np.uint8), ValueError, "1, 3 or 4 channels"),
        ({"file": "a.mp4"}, TypeError, "dict"),
        (7, TypeError, "int"),
        ([7], TypeError, "int"),
        ([[["a"]]], TypeError, "list"),
    ],
    ids=range(15),
)
def test_wrong_videos_are_named(videos, error, message, processor):
    with pytest.raises(error, match=message):
        processor(videos)


@pytest.mark.parametrize("rate", [0, -1, math.nan, "30"])
def test_video_fps_must_be_a_positive_number(rate, processor):
    with pytest.raises(ValueError, match=f"`video_fps={rate!r}` must be a number above 0"):
        processor(FRAMES, video_fps=rate)


def test_bfloat16_arrays_are_refused(processor):
    for kind in ("np", None):
        with pytest.raises(ValueError, match=r"numpy has no .*bfloat16: use return_tensors='pt'"):
            processor(FRAMES, return_tensors=kind, dtype=torch.bfloat16)


def test_input_data_format_settles_ambiguous_shapes(processor):
    both = np.zeros((8, 3, 40, 3), np.uint8)
    plain = {"do_resize": False, "do_center_crop": False}
    assert processor(both, input_data_format="channels_last", **plain)["pixel_values"].shape == (1, 8, 3, 3, 40)
    assert processor(both, input_data_format="channels_first", **plain)["pixel_values"].shape == (1, 8, 3, 40, 3)
    with pytest.raises(
        ValueError, match=r"`input_data_format='last'` is not known\. .*'channels_last', 'channels_first'"
    ):
        processor(both, input_data_format="last")
