"""`short_video_policy="mask"`: the processor says which frames of a clip a short video has."""

import json
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import ATTENTION_TYPES, make_model, tiny_config
from video_files import damage_packet, moving_frames, write_video

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.frame_sampling import (
    NO_FRAME,
    apply_short_video_policy,
    mask_missing_frames,
    sample_clips,
    sample_clips_at_rate,
    sample_uniform_clip,
)


SMALL = {"num_frames": 8, "frame_stride": 1, "size": 24, "crop_size": 16}
SHORT = moving_frames(5, 32, 40)
lengths = st.integers(1, 200)
counts = st.integers(1, 32)


@pytest.fixture
def processor():
    return ViViTVideoProcessor(**SMALL, short_video_policy="mask")


@pytest.fixture(scope="module")
def short_file(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "short.mp4", SHORT)


# Sampling


def test_places_past_the_end_have_no_frame_and_show_the_last_visible_one():
    indices = apply_short_video_policy(np.array([[0, 3, 6, 9, 12], [0, 1, 2, 3, 4]]), 8, "mask")
    assert indices.tolist() == [[0, 3, 6, NO_FRAME, NO_FRAME], [0, 1, 2, 3, 4]]
    shown, mask = mask_missing_frames(indices)
    assert shown.tolist() == [[0, 3, 6, 6, 6], [0, 1, 2, 3, 4]] and shown.dtype == np.int64
    assert mask.tolist() == [[True, True, True, False, False], [True] * 5]


@given(total=lengths, num_frames=counts, stride=st.integers(1, 9), num_clips=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=300)
@pytest.mark.parametrize("start", ["centre", "random"])
def test_a_clip_shows_the_frames_that_there_are_at_the_stride(start, total, num_frames, stride, num_clips, seed):
    arguments = {"num_clips": num_clips, "start": start}
    generators = [np.random.default_rng(seed) for _ in range(2)]
    masked = sample_clips(total, num_frames, stride, short_video_policy="mask", generator=generators[0], **arguments)
    shown, mask = mask_missing_frames(masked)
    available = min(num_frames, -(-total // stride))
    assert mask.sum(axis=1).tolist() == [available] * num_clips
    assert mask[:, :available].all()
    repeated = sample_clips(total, num_frames, stride, generator=generators[1], **arguments)
    assert np.array_equal(shown[mask], repeated[mask])
    assert np.array_equal(shown[~mask], np.repeat(shown[:, available - 1], num_frames - available))


@given(
    total=st.integers(2, 200),
    num_frames=counts,
    every=st.integers(1, 6),
    fps=st.sampled_from([24.0, 25.0, 30.0, 30000 / 1001, 1 / 3]),
)
@settings(max_examples=300)
def test_a_rate_masks_what_the_stride_masks(total, num_frames, every, fps):
    times = np.arange(total) / fps
    _, mask = mask_missing_frames(sample_clips_at_rate(times, num_frames, fps / every, short_video_policy="mask"))
    assert mask.sum() == min(num_frames, -(-total // every))


@given(total=lengths, num_frames=counts, rate=st.floats(0.5, 60), num_clips=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=300)
@pytest.mark.parametrize("start", ["centre", "random"])
def test_a_rate_masks_the_moments_after_the_video(start, total, num_frames, rate, num_clips, seed):
    """The "error" policy refuses the videos that "mask" masks."""
    times = np.cumsum(np.random.default_rng(seed).uniform(0.01, 0.1, total))
    drawn = {"num_clips": num_clips, "start": start}
    masked = sample_clips_at_rate(
        times, num_frames, rate, short_video_policy="mask", generator=np.random.default_rng(seed), **drawn
    )
    shown, mask = mask_missing_frames(masked)
    kept = {"generator": np.random.default_rng(seed), **drawn}
    repeated = sample_clips_at_rate(times, num_frames, rate, **kept)
    assert np.array_equal(shown[mask], repeated[mask]) and mask[:, 0].all()
    if mask.all():
        return
    with pytest.raises(ValueError, match="or 'mask'"):
        sample_clips_at_rate(times, num_frames, rate, short_video_policy="error", **drawn)
    assert (repeated[~mask] == total - 1).all()


@given(total=lengths, num_frames=counts)
def test_uniform_sampling_masks_only_where_the_video_has_fewer_frames(total, num_frames):
    masked = sample_uniform_clip(total, num_frames, short_video_policy="mask")
    if total >= num_frames:
        assert np.array_equal(masked, sample_uniform_clip(total, num_frames))
    else:
        assert masked.tolist() == [*range(total), *[NO_FRAME] * (num_frames - total)]


# Every entry


def as_kinds(frames, path):
    """The same video in every kind that the processor takes."""
    return {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "dictionary": {"path": str(path), "bytes": None},
        "array": frames,
        "channels first": frames.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(frames),
        "list of arrays": list(frames),
        "list of images": [PIL.Image.fromarray(frame) for frame in frames],
        "list of tensors": list(torch.from_numpy(frames)),
        "batch": frames[None],
    }


def test_every_kind_of_video_has_a_mask(processor, short_file):
    for kind, video in as_kinds(SHORT, short_file).items():
        features = processor(video)
        assert features["frame_mask"].dtype == torch.bool, kind
        assert features["frame_mask"].tolist() == [[True] * 5 + [False] * 3], kind
        assert features["pixel_values"].shape == (1, 8, 3, 16, 16)
        assert torch.equal(features["pixel_values"][0, 5:], features["pixel_values"][0, 4:5].expand(3, -1, -1, -1))
        assert features.frame_ids.tolist() == [[0, 1, 2, 3, 4, 4, 4, 4]]


def test_views_repeat_the_mask_of_their_video(processor, tmp_path):
    long = write_video(tmp_path / "long.mp4", moving_frames(30, 48, 32))
    features = processor([SHORT, long], num_clips=2, num_crops=3)
    assert features["frame_mask"].shape == features["pixel_values"].shape[:2] == (12, 8)
    assert features["frame_mask"].sum(dim=1).tolist() == [5] * 6 + [8] * 6
    assert pickle.loads(pickle.dumps(features))["frame_mask"].equal(features["frame_mask"])


def test_masks_come_in_the_kind_of_pixel_values(processor):
    assert isinstance(processor(SHORT, return_tensors="np")["frame_mask"], np.ndarray)
    rows = processor([SHORT, SHORT], return_tensors=None)
    assert [len(rows[name]) for name in ("pixel_values", "frame_mask")] == [2, 2]
    assert rows["frame_mask"][0].tolist() == [True] * 5 + [False] * 3
    half = processor(SHORT, device="cpu").to(torch.float16)
    assert half["pixel_values"].dtype == torch.float16 and half["frame_mask"].dtype == torch.bool


def test_a_part_of_a_file_is_a_video_of_its_length(processor, tmp_path):
    """Frames 25 to 27 of 60, at 25 per second: not those after the part."""
    path = write_video(tmp_path / "long.mp4", moving_frames(60, 32, 40))
    part = processor({"path": str(path), "start": 1.0, "end": 1.12})
    assert part["frame_mask"].sum() == 3 and part.frame_ids.tolist() == [[25, 26, 27, 27, 27, 27, 27, 27]]
    whole = processor(path, num_clips=3)
    assert whole["frame_mask"].all()


@given(total=st.integers(1, 40), stride=st.integers(1, 4), num_clips=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("policy", ["repeat_last", "loop"])
def test_only_videos_that_are_too_short_differ_from_other_policies(policy, total, stride, num_clips):
    processor = ViViTVideoProcessor(**{**SMALL, "frame_stride": stride}, num_clips=num_clips, do_sample_frames=True)
    frames = moving_frames(total, 24, 24)
    masked = processor(frames, short_video_policy="mask")
    plain = processor(frames, short_video_policy=policy)
    assert "frame_mask" not in plain
    assert masked["frame_mask"].all() == (total > 7 * stride)
    if masked["frame_mask"].all():
        assert masked["pixel_values"].equal(plain["pixel_values"])
    visible = masked["frame_mask"]
    assert masked["pixel_values"][visible].equal(plain["pixel_values"][visible])


def test_a_video_of_one_frame_has_one_visible_frame(processor):
    assert processor(SHORT[:1])["frame_mask"].tolist() == [[True] + [False] * 7]
    assert processor(SHORT[:1], frames_per_second=5.0, video_fps=10)["frame_mask"].sum() == 1


def test_nothing_is_masked_without_sampling(processor):
    assert processor(SHORT, do_sample_frames=False)["frame_mask"].tolist() == [[True] * 5]
    assert processor(moving_frames(8, 32, 40), frame_stride=4)["frame_mask"].all()  # exactly `num_frames` frames


def test_lost_frames_are_visible_and_a_file_that_ends_early_is_short(processor, tmp_path):
    path = write_video(tmp_path / "damaged.mp4", moving_frames(6, 32, 40), gop=6)
    damage_packet(path, 3)
    features = processor([path, SHORT], on_error="repeat_last")
    report = features.reports[0]
    assert report.num_frames == 6 and report.num_lost_frames + report.num_damaged_frames > 0
    assert features["frame_mask"].sum(dim=1).tolist() == [6, 5]
    skipped = processor([b"no video", SHORT], on_error="skip")
    assert skipped["frame_mask"].shape == (1, 8) and skipped.kept == [1]


def test_the_policy_is_stored(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert json.loads((tmp_path / name).read_text())["short_video_policy"] == "mask"
    assert "frame_mask" in ViViTVideoProcessor.from_pretrained(tmp_path)(SHORT)


# With models


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@torch.no_grad()
def test_a_masked_clip_is_a_clip_of_the_shorter_model(attention_type, short_file):
    """5 frames of 8: the step of frames 4 and 5 is visible and shows frame 4 twice, the last step is masked."""
    config = tiny_config(attention_type)
    processor = ViViTVideoProcessor(num_frames=8, frame_stride=1, size=48, crop_size=config.frame_size)
    model = make_model(config)
    features = processor(short_file, short_video_policy="mask")
    repeated = processor(short_file)["pixel_values"]
    steps = torch.tensor([[True] * 6 + [False] * 2])
    torch.testing.assert_close(model(**features).logits, model(repeated, frame_mask=steps).logits)
    assert (model(**features).logits - model(repeated).logits).abs().max() > 1e-3


def test_the_processor_gives_what_models_take(processor):
    assert isinstance(make_model(tiny_config("spatio_temporal")), ViViTForVideoClassification)
    assert {*processor(SHORT)} == {*processor.model_input_names}
