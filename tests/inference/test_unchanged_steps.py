"""Time steps that look like the last encoded one take its token: what is encoded, the answers, and the error shown."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import ATTENTION_TYPES, make_model, tiny_config
from video_files import write_video

from vivit_hf import StreamingClassifier, ViViTVideoProcessor
from vivit_hf.inference.timeline import file_windows, live_windows, stream_file, video_timeline, watch_video
from vivit_hf.inference.unchanged_steps import REUSED_PER_CHECKED, StepReuse, level_size, step_change


SIZE = {"do_resize": False, "crop_size": {"height": 24, "width": 40}}


def make_frames(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 40, 3), dtype=np.uint8)


def make_stream(threshold=0.0, hop=None, dtype=torch.float32, **changes):
    model = make_model(tiny_config(**{"attention_type": "factorised_encoder", **changes})).to(dtype)
    processor = ViViTVideoProcessor(num_frames=model.config.num_frames, frame_stride=1, **SIZE)
    return StreamingClassifier(model, processor, hop=hop, unchanged_threshold=threshold)


def count_encoded(model):
    """How many time steps each call of the spatial encoder gets, in a list."""
    calls = []
    model.vivit.embeddings.register_forward_hook(lambda *call: calls.append(math.prod(call[2][0].shape[:2])))
    return calls


def all_logits(windows):
    return torch.stack([window.logits for window in windows])


def check_equal(windows, expected, tolerance=1e-5):
    assert [(one.start, one.end, one.cut) for one in windows] == [(one.start, one.end, one.cut) for one in expected]
    torch.testing.assert_close(all_logits(windows), all_logits(expected), atol=tolerance, rtol=tolerance)


def num_changes(frames, starts, length):
    """Steps that differ from the one before them."""
    steps = [frames[start : start + length] for start in starts]
    return sum(not np.array_equal(*pair) for pair in zip(steps[1:], steps[:-1], strict=True)) + 1


@settings(max_examples=40, deadline=None)
@given(
    picks=st.lists(st.integers(0, 2), min_size=20, max_size=60),
    hop=st.integers(1, 11),
    tubelet=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=10),
)
def test_random_repeats_give_the_logits_of_encoding_every_step(picks, hop, tubelet, chunks):
    """Frames in any order from a pool of three, at every hop, pushed in any portions."""
    sizes = {"tubelet_size": (tubelet, 8, 8), "num_frames": 9}
    frames = make_frames(3)[picks]
    expected = make_stream(None, hop, **sizes).push(frames)
    stream = make_stream(0.0, hop, **sizes)
    encoded, windows, done = count_encoded(stream.model), [], 0
    for size in [*chunks, 60]:
        windows += stream.push(frames[done : done + size]) if done < len(frames) else []
        done += size
    check_equal(windows, expected)
    starts = {
        start + place for start in range(0, len(frames), hop) for place in range(0, 9 // tubelet * tubelet, tubelet)
    }
    starts = sorted(start for start in starts if start + tubelet <= len(frames))
    assert sum(encoded) == stream.reuse.num_encoded == num_changes(frames, starts, tubelet)
    assert stream.reuse.num_encoded + stream.reuse.num_reused == len(starts)


def test_equal_batches_give_equal_logits():
    """Bit for bit: nothing is repeated, so the same batches are encoded."""
    frames = make_frames(40)
    assert torch.equal(all_logits(make_stream(0.0).push(frames)), all_logits(make_stream(None).push(frames)))


# Frames, and how many of their 20 steps are encoded.
VIDEOS = {
    "static": (np.repeat(make_frames(1), 40, axis=0), 1),
    "duplicates": (np.repeat(make_frames(10), 4, axis=0), 10),
    "noise": (make_frames(40), 20),
    "cut": (np.repeat(make_frames(2), 20, axis=0), 2),
    "flicker": (np.tile(np.repeat(make_frames(2), 2, axis=0), (10, 1, 1, 1)), 20),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("video", VIDEOS)
def test_repeats_in_a_file_are_encoded_once(tmp_path, video, dtype):
    frames, count = VIDEOS[video]
    path = write_video(tmp_path / "video.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    stream, plain = make_stream(0.0, dtype=dtype), make_stream(None, dtype=dtype)
    encoded = count_encoded(stream.model)
    windows = list(stream_file(stream, path))
    check_equal(windows, list(stream_file(plain, path)), 1e-5 if dtype == torch.float32 else 0.05)
    assert sum(encoded) == stream.reuse.num_encoded == count and stream.reuse.num_reused == 20 - count
    assert plain.reuse.num_encoded == 20 and plain.reuse.num_reused == 0


def test_frames_that_a_higher_rate_repeats_are_encoded_once(tmp_path):
    """A file of variable rate, sampled more often than it has frames."""
    path = write_video(
        tmp_path / "video.mkv", make_frames(5), codec="ffv1", pix_fmt="bgr0", pts=[0, 400, 800, 900, 2000]
    )
    stream = make_stream()
    stream.processor.frames_per_second = 10.0
    list(stream_file(stream, path))
    # Frames are shown at samples 0 to 3, 4 to 7, 8, 9 to 19 and 20, and a step has two samples.
    assert stream.reuse.num_encoded == 4 and stream.reuse.num_reused == 6


def test_a_window_with_the_tokens_of_the_one_before_is_not_classified_again():
    stream = make_stream()
    classified = []
    stream.model.vivit.temporal_encoder.register_forward_hook(lambda *call: classified.append(len(call[1][0])))
    windows = [window for frame in np.repeat(make_frames(1), 100, axis=0) for window in stream.push(frame)]
    assert len(windows) == 47 and sum(classified) == 1


def test_uniform_frame_sampling_encodes_each_frame_once():
    """4 of 8 frames: those at 2, 3, 5 and 6."""
    changes = {"embedding_type": "uniform_frame_sampling", "num_sampled_frames": 4}
    frames = make_frames(40)
    stream, plain = make_stream(0.0, 1, **changes), make_stream(None, 1, **changes)
    for one in (stream, plain):
        assert one.tubelets_per_window == 1
        pixel_values = one.processor(frames[5:13], do_sample_frames=False)["pixel_values"]
        with torch.no_grad():
            expected = one.model(pixel_values).logits[0]
        windows = one.push(frames)
        torch.testing.assert_close(windows[5].logits, expected, atol=1e-5, rtol=1e-5)
        assert one.reuse.num_encoded == 38, "of 40 frames, the first two are in no place"
    encoded = count_encoded(stream.model)
    stream.push(np.repeat(frames[-1:], 40, axis=0))
    assert sum(encoded) == 0 and make_stream(hop=3, **changes).tubelets_per_window == 2


def test_steps_are_compared_with_the_last_encoded_one():
    """Each step is one grey level brighter than the one before, so that every third is more than 2.5 away."""
    frames = np.repeat(np.arange(30, dtype=np.uint8), 2)[:, None, None, None] + np.zeros((60, 24, 40, 3), np.uint8)
    stream = make_stream(2.5)
    stream.push(frames)
    assert stream.reuse.num_encoded == 10 and stream.reuse.num_reused == 20


def test_a_change_of_one_patch_is_not_lost_in_the_picture():
    """By 8 grey levels in 8 x 8 of 24 x 40 pixels: half a level on average over the picture."""
    frames = np.repeat(make_frames(1) // 2, 40, axis=0)
    frames[20:, 8:16, 8:16] += 8
    for threshold, count in ((7.9, 2), (8.1, 1)):
        stream = make_stream(threshold)
        stream.push(frames)
        assert stream.reuse.num_encoded == count


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225), "rescale_factor": 1 / 255},
        {"rescale_factor": 1 / 127.5, "offset": True, "image_mean": 0.5, "image_std": 0.5},
        {"do_rescale": False, "image_mean": 127.5, "image_std": 127.5},
    ],
)
def test_a_change_is_the_mean_over_the_patch_that_changes_the_most(values):
    """In grey levels, whatever the processor's scale; computed by numpy from the frames."""
    processor = ViViTVideoProcessor(num_frames=2, frame_stride=1, **SIZE, **{"do_normalize": True, **values})
    before, after = make_frames(2), make_frames(2, seed=1)
    pixels = [processor(frames, do_sample_frames=False)["pixel_values"][0] for frames in (before, after)]
    difference = np.abs(after.astype(float) - before)[:, :, :32]  # the last 8 columns fit no patch of 8 x 16
    patches = difference.reshape(2, 3, 8, 2, 16, 3).mean(axis=(0, 2, 4, 5))
    assert step_change(*pixels, (8, 16), level_size(processor, 3)) == pytest.approx(patches.max(), rel=1e-4)
    assert step_change(pixels[0], pixels[0], (8, 16), level_size(processor, 3)) == 0


def test_the_error_is_that_of_windows_computed_both_ways():
    """A still picture with noise of a few grey levels: every window is that of the first step."""
    noise = np.random.default_rng(1).integers(-3, 4, (200, 24, 40, 3))
    frames = (make_frames(1) // 2 + 50 + noise).astype(np.uint8)
    stream, plain = make_stream(6.0), make_stream(None)
    found, exact = all_logits(stream.push(frames)).softmax(-1), all_logits(plain.push(frames)).softmax(-1)
    reuse = stream.reuse
    assert reuse.num_encoded == 1 and reuse.num_reused == 99
    assert 2 <= reuse.num_checked_windows <= 99 / REUSED_PER_CHECKED / 3 + 2
    assert reuse.num_checked_steps == 3 + 4 * (reuse.num_checked_windows - 1), "the first window has the encoded step"
    changes = (found - exact).abs().amax(dim=1)
    assert 1e-4 < reuse.largest_change <= changes.max() + 1e-6
    assert float((changes - reuse.largest_change).abs().min()) < 1e-6
    checked = f"{reuse.num_checked_windows} windows computed both ways"
    assert str(reuse).startswith(
        "99 of 100 time steps took the token of the last encoded one, from which they differ by"
    )
    assert (
        "at most 6 grey levels" in str(reuse) and checked in str(reuse) and f"{reuse.largest_change:.2g}" in str(reuse)
    )


def test_equal_steps_need_no_check():
    stream = make_stream(0.0)
    stream.push(np.repeat(make_frames(1), 100, axis=0))
    assert stream.reuse == StepReuse(0.0, num_encoded=1, num_reused=49)
    assert str(stream.reuse) == "49 of 50 time steps took the token of the last encoded one, which has equal pixels."


def test_a_new_stream_encodes_its_first_step():
    stream, frames = make_stream(), np.repeat(make_frames(1), 20, axis=0)
    stream.push(frames)
    stream.reset()
    stream.push(frames)
    assert stream.reuse.num_encoded == 1 and stream.reuse.num_reused == 9


def test_steps_are_encoded_after_the_model_has_failed(monkeypatch):
    stream, frames = make_stream(), np.repeat(make_frames(4), 10, axis=0)
    expected = make_stream(None).push(frames)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    found = stream.push(frames[:15])
    with monkeypatch.context() as patch:
        patch.setattr(stream.model.vivit.embeddings, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            stream.push(frames[15:25])
    check_equal(found + stream.push(frames[25:]), expected)
    assert stream.reuse.num_encoded == 4 and stream.reuse.num_reused == 16


@pytest.mark.parametrize("attention_type", [one for one in ATTENTION_TYPES if one != "factorised_encoder"])
def test_other_variants_reuse_nothing(attention_type):
    stream, frames = make_stream(attention_type=attention_type), np.repeat(make_frames(1), 20, axis=0)
    assert len(stream.push(frames)) == 4 and stream.reuse == StepReuse(0.0)
    with pytest.raises(ValueError, match=rf"`unchanged_threshold=0\.5` needs a factorised encoder.*{attention_type}"):
        make_stream(0.5, attention_type=attention_type)


@pytest.mark.parametrize("threshold", [-1, 255.5, math.nan, math.inf, True, "1"])
def test_thresholds_are_grey_levels(threshold):
    with pytest.raises(ValueError, match=r"`unchanged_threshold=.*must be a number of grey levels from 0 to 255"):
        make_stream(threshold)


@pytest.mark.parametrize("classify", [file_windows, video_timeline, live_windows, watch_video])
def test_files_and_live_sources_take_a_threshold(tmp_path, classify):
    stream = make_stream()
    source = write_video(tmp_path / "video.mp4", VIDEOS["cut"][0])
    if classify in (live_windows, watch_video):
        source = [(index / 10, frame) for index, frame in enumerate(VIDEOS["noise"][0])]
    encoded = count_encoded(stream.model)
    counts = []
    for threshold in (None, 255.0):
        assert list(classify(stream.model, stream.processor, source, unchanged_threshold=threshold))
        counts.append(sum(encoded))
        encoded.clear()
    assert counts[0] == 20 and counts[1] < 10
