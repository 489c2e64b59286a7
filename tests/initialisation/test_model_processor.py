"""The video processor of a model: clips of the model's size from every image processor and every video."""

import numpy as np
import pytest
from tiny_models import tiny_config

from vivit_hf import ViViTVideoProcessor
from vivit_hf.initialisation.model_processor import check_processor, processor_for


HALF, IMAGENET = {"image_mean": [0.5] * 3}, {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# As published beside image models, for images of 224 pixels.
IMAGE_PROCESSORS = {
    "resize only": {**HALF, "do_resize": True, "size": {"height": 224, "width": 224}, "resample": 2},
    "an old file": {
        **HALF,
        "do_resize": True,
        "size": 224,
        "feature_extractor_type": "ViTFeatureExtractor",
    },
    "resize and crop": {
        **IMAGENET,
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_processor_type": "DeiTImageProcessor",
    },
    "shortest edge and crop": {
        **IMAGENET,
        "size": {"shortest_edge": 248},
        "do_center_crop": True,
        "crop_size": 224,
        "do_convert_rgb": None,
    },
    "shortest edge": {**HALF, "size": {"shortest_edge": 224}, "do_rescale": True},
    "longest edge": {**HALF, "size": {"longest_edge": 512}},
    "no resize": {**HALF, "do_resize": False, "size": {"height": 224, "width": 224}},
    "none": None,
}
RATIOS = {"shortest edge and crop": 248 / 224}  # 256 / 224 for the others
FRAMES = {"landscape": (54, 96), "portrait": (96, 54), "square": (60, 60), "small": (9, 12), "panorama": (20, 300)}


@pytest.mark.parametrize("image_size", [32, (24, 40), (40, 24)])
@pytest.mark.parametrize("source", IMAGE_PROCESSORS)
def test_every_video_becomes_clips_of_the_models_size(source, image_size):
    config = tiny_config("spatio_temporal", image_size=image_size)
    processor = processor_for(config, IMAGE_PROCESSORS[source])
    for height, width in FRAMES.values():
        video = np.random.default_rng(0).integers(0, 256, (20, height, width, 3), dtype=np.uint8)
        for num_crops in (1, 3):
            pixel_values = processor(video, num_clips=2, num_crops=num_crops)["pixel_values"]
            assert pixel_values.shape == (2 * num_crops, 8, 3, *config.frame_size)


@pytest.mark.parametrize("source", IMAGE_PROCESSORS)
def test_pixel_settings_and_resize_ratio_of_the_image_model_are_kept(source):
    stored = IMAGE_PROCESSORS[source] or {}
    processor = processor_for(tiny_config("spatio_temporal", image_size=64), stored)
    assert processor.image_mean == stored.get("image_mean", [0.5] * 3)
    assert processor.image_std == stored.get("image_std", [0.5] * 3)
    assert processor.resample == stored.get("resample", 2)
    assert processor.size == {"shortest_edge": round(64 * RATIOS.get(source, 256 / 224))}
    assert (processor.num_frames, processor.frame_stride) == (8, 2)


def test_official_sizes():
    config = tiny_config("spatio_temporal", image_size=224)
    assert processor_for(config).size == {"shortest_edge": 256}
    config = tiny_config("spatio_temporal", image_size=256)
    assert processor_for(config, resize_ratio=288 / 256).size == {"shortest_edge": 288}
    assert processor_for(config, IMAGE_PROCESSORS["none"], resize=300).size == {"shortest_edge": 300}


def test_settings_of_a_video_processor_are_kept():
    own = ViViTVideoProcessor(
        num_frames=16,
        frames_per_second=5.0,
        size={"height": 80, "width": 100},
        crop_size=64,
        on_error="repeat_last",
        do_sample_frames=False,
        image_mean=0.4,
        video_limits={"max_frames": 900},
    )
    processor = processor_for(tiny_config("spatio_temporal", image_size=32), own)
    kept = ("frames_per_second", "on_error", "image_mean", "video_limits")
    assert [getattr(processor, name) for name in kept] == [getattr(own, name) for name in kept]
    assert processor.num_frames == 8 and processor.do_sample_frames is None
    assert processor.size == {"shortest_edge": 40} and processor.crop_size == {"height": 32, "width": 32}
    assert own.num_frames == 16 and own.size == {"height": 80, "width": 100}
    changed = processor_for(tiny_config("spatio_temporal"), own, frame_stride=3)
    assert (changed.frame_stride, changed.frames_per_second) == (3, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": 31}, "resize=31 makes frames smaller than the model's crop of 32 x 32"),
        ({"resize_ratio": 0.9}, "resize=29 makes frames smaller"),
        ({"resize_ratio": 0}, "`resize_ratio=0` must be a number above 0"),
        ({"resize": 40, "resize_ratio": 1.1}, "not both"),
        ({"frame_stride": 2, "frames_per_second": 5.0}, "not both"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        processor_for(tiny_config("spatio_temporal", image_size=32), **settings)


def test_a_stride_is_refused_if_the_source_samples_uniformly():
    uniform = ViViTVideoProcessor(frame_sampling="uniform")
    assert processor_for(tiny_config("spatio_temporal"), uniform).frame_sampling == "uniform"
    with pytest.raises(ValueError, match="`frame_stride=3` has no effect with frame_sampling='uniform'"):
        processor_for(tiny_config("spatio_temporal"), uniform, frame_stride=3)


def test_a_model_of_grey_frames_is_refused():
    with pytest.raises(ValueError, match="Videos have 3 channels, but the model expects 1"):
        processor_for(tiny_config("spatio_temporal", num_channels=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_frames": 4},
        {"crop_size": 24},
        {"do_center_crop": False},
        {"size": 16},
        {"do_resize": False},
        {"do_resize": False, "do_center_crop": False},
    ],
)
def test_a_processor_that_does_not_fit_the_model_is_refused(settings):
    config = tiny_config("spatio_temporal", image_size=32)
    fitting = {"num_frames": 8, "size": 36, "crop_size": 32}
    check_processor(ViViTVideoProcessor(**fitting), config)
    check_processor(ViViTVideoProcessor(num_frames=8, size=(32, 32), do_center_crop=False), config)
    with pytest.raises(ValueError, match="size"):
        check_processor(ViViTVideoProcessor(**{**fitting, **settings}), config)
