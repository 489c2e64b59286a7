"""The video processor: every kind of video, exact `pixel_values`, and stored settings."""

import json
import logging
import pickle

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoImageProcessor, VivitConfig, VivitForVideoClassification, VivitImageProcessor, pipeline
from video_files import damage_packet, moving_frames, plain_decode, write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.frame_sampling import sample_clips
from vivit_hf.video_sources import VideoDecodingError


SMALL = {"num_frames": 8, "size": 40, "crop_size": 32}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """60 frames of 96 x 128."""
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", moving_frames(60, 96, 128), gop=12)


@pytest.fixture
def processor():
    return ViViTVideoProcessor(**SMALL)


def grey_levels(pixel_values):
    return (pixel_values.double() + 1) * 127.5


def test_the_defaults_are_the_official_kinetics_recipe(tmp_path):
    path = write_video(tmp_path / "wide.mp4", moving_frames(80, 60, 100))
    features = ViViTVideoProcessor()(path)
    pixel_values = features["pixel_values"]
    assert pixel_values.shape == (1, 32, 3, 224, 224)
    assert pixel_values.dtype == torch.float32 and pixel_values.is_contiguous()
    assert features.num_views == 1 and features.kept == [0]
    # 32 frames, every second one, from (80 - 64) // 2; short side 256, which makes 256 x 426; central crop.
    frames = plain_decode(path)[8:72:2]
    expected = np.stack([np.asarray(PIL.Image.fromarray(f).resize((426, 256), PIL.Image.BILINEAR)) for f in frames])
    expected = torch.from_numpy(expected[:, 16:240, 101:325]).permute(0, 3, 1, 2).double()
    difference = (grey_levels(pixel_values[0]) - expected).abs()
    assert difference.mean() <= 1


def test_values_are_zero_centred_as_in_the_official_code():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    processor = ViViTVideoProcessor(num_frames=1, do_resize=False, crop_size=16)
    values = processor(ramp)["pixel_values"][0, 0, 0].flatten()
    official = torch.arange(256, dtype=torch.float32) * (2.0 / 255.0) - 1.0
    assert (values - official).abs().max() <= 1.2e-7
    assert (values - (torch.arange(256) / 127.5 - 1)).abs().max() <= 2.4e-7
    assert values[0] == -1 and values[255] == 1


@pytest.mark.parametrize("shape", [(96, 128), (500, 320), (41, 41), (40, 90)])
def test_files_and_arrays_of_their_frames_agree(shape, tmp_path, processor):
    path = write_video(tmp_path / "video.mkv", moving_frames(20, *shape), pix_fmt="yuv444p")
    frames = plain_decode(path)
    from_file, from_array = (processor(video, do_sample_frames=True)["pixel_values"] for video in (path, frames))
    assert from_file.shape == from_array.shape == (1, 8, 3, 32, 32)
    assert (from_file - from_array).abs().mean() * 127.5 <= 1


@pytest.mark.parametrize("resample", ["nearest", "bicubic", "lanczos"])
def test_other_filters_match_pil_for_files(resample, video, processor):
    frames = plain_decode(video)
    values = processor(video, resample=resample)["pixel_values"]
    assert torch.equal(values, processor(frames, resample=resample)["pixel_values"])
    assert not torch.equal(values, processor(frames)["pixel_values"])


def test_every_kind_of_video_in_memory_gives_equal_values(processor):
    frames = moving_frames(8, 48, 64)
    expected = processor(frames)["pixel_values"]
    assert expected.shape == (1, 8, 3, 32, 32)
    as_float = (frames / 255).astype(np.float32)
    kinds = {
        "list of arrays": list(frames),
        "tuple of tensors": tuple(torch.from_numpy(frames)),
        "list of PIL images": [PIL.Image.fromarray(frame) for frame in frames],
        "channels first": frames.transpose(0, 3, 1, 2),
        "list of channels first": list(frames.transpose(0, 3, 1, 2)),
        "tensor": torch.from_numpy(frames),
        "batch of one": frames[None],
        "tensor batch of one": torch.from_numpy(frames)[None],
        "list of one video": [frames],
        "integers": frames.astype(np.int64),
    }
    for name, video in kinds.items():
        assert torch.equal(processor(video)["pixel_values"], expected), name
    for video in (as_float, as_float.astype(np.float64), torch.from_numpy(as_float), list(as_float)):
        assert (processor(video)["pixel_values"] - expected).abs().max() <= 1.5 / 127.5
    unresized = {"do_resize": False, "do_center_crop": False}
    exact = processor(frames, **unresized)["pixel_values"]
    assert (processor(as_float, **unresized)["pixel_values"] - exact).abs().max() < 1e-6
    already_scaled = processor(as_float, do_rescale=False, **unresized)["pixel_values"]
    assert (already_scaled - exact).abs().max() < 1e-6


def test_grey_and_alpha_become_three_channels(processor):
    frames = moving_frames(8, 48, 64)
    grey, alpha = frames[..., :1], np.concatenate([frames, frames[..., :1]], axis=-1)
    expected = processor(frames)["pixel_values"]
    from_grey = processor(grey)["pixel_values"]
    assert from_grey.shape == (1, 8, 3, 32, 32)
    assert torch.equal(from_grey[:, :, 0], expected[:, :, 0]) and torch.equal(from_grey[:, :, 2], expected[:, :, 0])
    assert torch.equal(processor(list(grey[..., 0]))["pixel_values"], from_grey)
    assert torch.equal(processor(alpha)["pixel_values"], expected)
    as_images = [PIL.Image.fromarray(frame, mode="RGBA") for frame in alpha]
    assert torch.equal(processor(as_images)["pixel_values"], expected)
    mixed = [image.convert(mode) for image, mode in zip(as_images, ["RGB", "RGBA"] * 4, strict=True)]
    assert torch.equal(processor(mixed)["pixel_values"], expected)
    raw = processor(alpha, do_convert_rgb=False, image_mean=0.5, image_std=0.5)["pixel_values"]
    assert raw.shape == (1, 8, 4, 32, 32)
    assert torch.equal(raw[:, :, :3], expected) and torch.equal(raw[:, :, 3], expected[:, :, 0])
    with pytest.raises(ValueError, match="for 3 channels, the frames have 4"):
        processor(alpha, do_convert_rgb=False)


def test_images_with_more_than_8_bits_keep_their_values(processor):
    """PIL would clip them at 255, so that floats in [0, 1] are black and 16-bit images white."""
    grey = moving_frames(8, 48, 64)[..., 0]
    expected = processor(list(grey))["pixel_values"]
    as_float = [PIL.Image.fromarray(frame.astype(np.float32) / 255) for frame in grey]
    assert (processor(as_float)["pixel_values"] - expected).abs().max() < 0.02  # not rounded after the resize
    as_integers = [PIL.Image.fromarray(frame.astype(np.int32)) for frame in grey]
    assert torch.equal(processor(as_integers)["pixel_values"], expected)
    with pytest.raises(ValueError, match=r"uint16 must be in \[0, 255\]"):
        processor([PIL.Image.fromarray(frame.astype(np.uint16) * 257) for frame in grey])


def test_saving_several_views_warns(tmp_path, caplog, monkeypatch):
    """Pipelines score only the first row of a batch, and would assign the second to another video."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ViViTVideoProcessor(num_clips=1).save_pretrained(tmp_path)
    assert "views of every video" not in caplog.text
    ViViTVideoProcessor(num_clips=4, num_crops=3).save_pretrained(tmp_path)
    assert "num_clips=4 x num_crops=3 views of every video" in caplog.text


def test_frames_are_sampled_when_their_number_differs(processor):
    for total in (1, 3, 8, 9, 40):
        frames = moving_frames(total, 48, 64)
        assert processor(frames)["pixel_values"].shape == (1, 8, 3, 32, 32)
        assert processor(frames, do_sample_frames=False)["pixel_values"].shape == (1, total, 3, 32, 32)
    frames = moving_frames(40, 48, 64)
    chosen = frames[sample_clips(40, 8, 2)[0]]
    assert torch.equal(processor(frames)["pixel_values"], processor(chosen)["pixel_values"])
    uniform = processor(frames, frame_sampling="uniform")["pixel_values"]
    # 40 / 9, rounded half to even
    assert torch.equal(uniform, processor(frames[[4, 9, 13, 18, 22, 27, 31, 36]])["pixel_values"])
    slow = processor(frames, frames_per_second=5, video_fps=20)["pixel_values"]
    assert torch.equal(slow, processor(frames, frame_stride=4)["pixel_values"])
    with pytest.raises(ValueError, match="`video_fps`"):
        processor(frames, frames_per_second=5)
    with pytest.raises(ValueError, match="needs 15 frames and the video has 9"):
        processor(frames[:9], short_video_policy="error")


def test_files_are_sampled_by_their_timestamps(video, processor):
    frames = plain_decode(video)
    at_rate = processor(video, frames_per_second=5)["pixel_values"]  # the file has 25 per second
    assert torch.equal(at_rate, processor(video, frame_stride=5)["pixel_values"])
    stored = ViViTVideoProcessor(**SMALL, frames_per_second=5)
    assert torch.equal(stored(video)["pixel_values"], at_rate)
    assert torch.equal(stored(video, frame_stride=2)["pixel_values"], processor(video)["pixel_values"])
    everything = processor(video, do_sample_frames=False, num_clips=4)
    assert everything["pixel_values"].shape[:2] == (1, len(frames)) and everything.num_views == 1


def test_one_call_returns_all_views(video, processor):
    frames = plain_decode(video)
    for source in (str(video), frames):
        features = processor(source, num_clips=4, num_crops=3)
        assert features.num_views == 12
        views = features["pixel_values"].unflatten(0, (1, 4, 3))
        starts = sample_clips(60, 8, 2, num_clips=4)
        for clip in range(4):
            crops = processor(frames[starts[clip]], do_center_crop=False)["pixel_values"][0]
            for crop, left in enumerate((0, 10, 21)):  # 40 x 53 after the resize
                expected = crops[:, :, 4:36, left : left + 32]
                assert (views[0, clip, crop] - expected).abs().mean() * 127.5 <= 1
    two = processor([str(video), frames], num_clips=2, num_crops=3)
    assert two["pixel_values"].shape == (12, 8, 3, 32, 32) and two.num_views == 6
    assert torch.equal(two["pixel_values"][:6], processor(video, num_clips=2, num_crops=3)["pixel_values"])


def test_batches_mix_kinds_sizes_and_lengths(video, processor):
    videos = [video, video.read_bytes(), {"path": str(video), "bytes": None}, moving_frames(5, 70, 41)]
    videos.append((moving_frames(30, 41, 80) / 255).astype(np.float32))
    pixel_values = processor(videos)["pixel_values"]
    assert pixel_values.shape == (5, 8, 3, 32, 32)
    for row, one in zip(pixel_values, videos, strict=True):
        assert torch.equal(row, processor(one)["pixel_values"][0])
    with open(video, "rb") as file:
        assert torch.equal(processor(file)["pixel_values"][0], pixel_values[0])
    with pytest.raises(ValueError, match="must have one shape"):
        processor(videos, do_center_crop=False)
    uneven = processor(videos, do_center_crop=False, return_tensors=None)["pixel_values"]
    assert [view.shape[2:] for view in uneven] == [(40, 53)] * 3 + [(68, 40), (40, 78)]


def test_tensor_types_and_devices(video, processor):
    expected = processor(video)["pixel_values"]
    assert np.array_equal(processor(video, return_tensors="np")["pixel_values"], expected.numpy())
    assert processor(video, dtype=torch.bfloat16)["pixel_values"].dtype == torch.bfloat16
    assert processor(video, dtype="float64", device="cpu")["pixel_values"].dtype == torch.float64
    raw = processor(video, do_rescale=False, do_normalize=False)["pixel_values"]
    assert raw.dtype == torch.uint8
    assert torch.equal(processor.rescale_and_normalize(raw), expected)
    assert raw.dtype == torch.uint8 and raw.float().std() > 1
    assert processor(video).to(torch.float16)["pixel_values"].dtype == torch.float16


def test_random_clips_and_crops_follow_their_seed(video, processor):
    choices = {"clip_start": "random", "crop_position": "random"}
    draws = [processor(video, generator=seed, **choices)["pixel_values"] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(3)
    first = processor(video, **choices)["pixel_values"]
    second = processor(video, **choices)["pixel_values"]
    torch.manual_seed(3)
    assert torch.equal(first, processor(video, **choices)["pixel_values"]) and not torch.equal(first, second)


def test_every_setting_is_saved_and_loaded(tmp_path, video):
    processor = ViViTVideoProcessor(
        **SMALL, frame_stride=3, clip_start="center", num_clips=2, num_crops=3, short_video_policy="loop",
        resample="bicubic", image_mean=0.4, image_std=[0.2, 0.3, 0.4], on_error="skip",
        video_limits={"max_frames": 99},
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "ViViTVideoProcessor"
    assert stored["size"] == {"shortest_edge": 40} and stored["crop_size"] == {"height": 32, "width": 32}
    assert stored["clip_start"] == "centre" and stored["resample"] == 3 and "frames_per_second" in stored
    for loaded in (ViViTVideoProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is ViViTVideoProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert torch.equal(loaded(video)["pixel_values"], processor(video)["pixel_values"])
    assert ViViTVideoProcessor.from_pretrained(tmp_path, num_frames=5).num_frames == 5
    _, unused = ViViTVideoProcessor.from_pretrained(tmp_path, foo=1, return_unused_kwargs=True)
    assert unused == {"foo": 1}


def test_every_setting_can_be_overridden_in_a_call(video):
    stored = ViViTVideoProcessor()
    others = {**SMALL, "num_clips": 2, "num_crops": 3, "offset": True, "rescale_factor": 1 / 127.5, "image_std": 0.25}
    assert torch.equal(stored(video, **others)["pixel_values"], ViViTVideoProcessor(**others)(video)["pixel_values"])
    assert stored.to_dict() == ViViTVideoProcessor().to_dict()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"do_normalize": False},
        {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "resample": 3},
        {"size": {"height": 50, "width": 70}, "crop_size": {"height": 40, "width": 64}},
        {"do_center_crop": False, "size": {"shortest_edge": 33}},
    ],
    ids=str,
)
def test_settings_of_transformers_vivit_reproduce_its_output(parameters, tmp_path):
    native = VivitImageProcessor(**parameters)
    native.save_pretrained(tmp_path)
    ours = ViViTVideoProcessor.from_pretrained(tmp_path)
    frames = list(moving_frames(32, 60, 90))
    expected = native(frames, return_tensors="pt")["pixel_values"]
    assert torch.equal(ours(frames)["pixel_values"], expected)
    saved = tmp_path / "ours"
    ours.save_pretrained(saved)
    assert torch.equal(AutoImageProcessor.from_pretrained(saved)(frames)["pixel_values"], expected)


@pytest.mark.parametrize("role", ["image_processor", "video_processor"])
def test_the_video_classification_pipeline_accepts_it(role, video, processor):
    config = VivitConfig(
        image_size=32, num_frames=8, tubelet_size=[2, 16, 16], hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    model = VivitForVideoClassification(config).eval()
    classify = pipeline("video-classification", model=model, **{role: processor})
    scores = {entry["label"]: entry["score"] for entry in classify(str(video), top_k=2)}
    expected = model(**processor(video)).logits.softmax(-1)[0]
    assert scores["LABEL_0"] == pytest.approx(expected[0].item(), abs=1e-2)


def test_datasets_of_undecoded_videos(video, processor):
    rows = {"video": [str(video)] * 4, "label": [0, 1, 0, 1]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("video", datasets.Video(decode=False))
    expected = processor(video)["pixel_values"][0]
    mapped = dataset.map(lambda batch: processor(batch["video"]), batched=True, batch_size=2, remove_columns="video")
    assert torch.equal(mapped.with_format("torch")[3]["pixel_values"], expected)
    live = dataset.with_transform(lambda batch: {**processor(batch["video"]), "label": batch["label"]})
    assert torch.equal(live[1]["pixel_values"], expected)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """A good file, one that is no video, one with a damaged packet in its clip, and the good file again."""
    folder = tmp_path_factory.mktemp("damaged")
    broken = folder / "broken.mp4"
    broken.write_text("not a video")
    # Without B-frames damage shows only in later frames.
    video = write_video(folder / "sound.mp4", moving_frames(60, 96, 128), gop=60, options={"bf": "0"})
    damaged = folder / "damaged.mp4"
    damaged.write_bytes(video.read_bytes())
    damage_packet(damaged, sample_clips(60, 8, 2)[0][3])
    return [video, broken, damaged, video]


@pytest.mark.parametrize(("place", "message"), [(1, r"broken\.mp4"), (2, r"damaged\.mp4.*lost")])
def test_files_that_cannot_be_read_raise(place, message, batch, processor):
    with pytest.raises(VideoDecodingError, match=message):
        processor(batch[place:])


def test_files_that_cannot_be_read_are_skipped_and_reported(batch, processor):
    skipped = processor(batch, on_error="skip")
    assert skipped["pixel_values"].shape[0] == 2 and skipped.kept == [0, 3]
    assert [report.error is None for report in skipped.reports] == [True, False, False, True]
    assert skipped.reports[1].source == str(batch[1]) and "Invalid data" in skipped.reports[1].error
    clone = pickle.loads(pickle.dumps(skipped))
    assert clone.kept == [0, 3] and clone.reports == skipped.reports
    assert torch.equal(clone["pixel_values"], skipped["pixel_values"])


def test_a_batch_without_any_readable_file_raises(batch, processor):
    with pytest.raises(VideoDecodingError, match=r"None of the videos.*broken\.mp4"):
        processor([batch[1]], on_error="skip")


def test_lost_frames_are_replaced_by_the_frame_before(batch, processor):
    mended = processor([batch[0], batch[2]], on_error="repeat_last")
    good, repeated = mended["pixel_values"]
    assert torch.equal(repeated[:3], good[:3]) and not torch.equal(repeated[3], good[3])
    report = mended.reports[1]
    assert report.num_repeated_frames == 1 and report.num_damaged_frames >= 4
    with pytest.raises(VideoDecodingError, match=r"broken\.mp4"):
        processor(batch, on_error="repeat_last")


@pytest.mark.parametrize(("name", "value"), [("frame_stride", 3), ("frames_per_second", 5.0)])
def test_a_distance_between_frames_is_refused_with_uniform_sampling(name, value, video):
    processor = ViViTVideoProcessor(**SMALL, frame_sampling="uniform")
    with pytest.raises(ValueError, match=f"`{name}={value}` has no effect with frame_sampling='uniform'"):
        processor(video, **{name: value})
    assert processor(video, frame_sampling="clip", **{name: value})["pixel_values"].shape[1] == 8


@given(
    total=st.integers(1, 20),
    height=st.integers(5, 90),
    width=st.integers(5, 90),
    num_frames=st.integers(1, 12),
    edge=st.integers(8, 60),
    num_clips=st.integers(1, 3),
    num_crops=st.sampled_from([1, 3]),
)
@settings(max_examples=60)
def test_shapes_are_as_requested(total, height, width, num_frames, edge, num_clips, num_crops):
    processor = ViViTVideoProcessor(
        num_frames=num_frames, size=edge, crop_size=8, num_clips=num_clips, num_crops=num_crops
    )
    video = np.full((total, height, width, 3), 200, np.uint8)
    pixel_values = processor(video)["pixel_values"]
    assert pixel_values.shape == (num_clips * num_crops, num_frames, 3, 8, 8)
    assert (pixel_values - (200 / 127.5 - 1)).abs().max() < 1e-6


def test_the_times_of_frames_are_those_of_the_file(processor, video):
    """60 frames at 25 per second; a clip of 8 frames at stride 2 begins at frame 0 or 44."""
    features = processor(video, num_clips=2, num_crops=3)
    assert features.frame_times.shape == features.frame_ids.shape == (6, 8)
    np.testing.assert_allclose(features.frame_times, features.frame_ids // 3 / 25, atol=1e-6)
    part = processor({"path": str(video), "start": 1.0, "end": 1.6}, frame_stride=1)
    np.testing.assert_allclose(part.frame_times[0], np.arange(28, 36) / 25, atol=1e-6)
    assert np.array_equal(pickle.loads(pickle.dumps(part)).frame_times, part.frame_times)


def test_frames_in_memory_have_times_if_their_rate_is_given(processor):
    frames = moving_frames(8)
    np.testing.assert_allclose(processor(frames, video_fps=10).frame_times, [np.arange(8) / 10])
    assert np.isnan(processor(frames).frame_times).all()
