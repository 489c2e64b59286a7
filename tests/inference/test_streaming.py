"""A stream gives the logits of the whole model on every window, and does no more than it says for them."""

import math

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import ATTENTION_TYPES, make_model, tiny_config
from video_files import write_video

from vivit_hf import StreamingClassifier, ViViTVideoProcessor
from vivit_hf.inference.timeline import file_windows


SIZE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 40}}


def make_frames(count, height=30, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def make_stream(hop=None, frame_stride=1, **changes):
    model = make_model(tiny_config(**{"attention_type": "factorised_encoder", **changes}))
    processor = ViViTVideoProcessor(num_frames=model.config.num_frames, frame_stride=frame_stride, **SIZE)
    return StreamingClassifier(model, processor, hop=hop)


def expected_logits(stream, frames, start):
    """The whole model on the window that begins with sampled frame `start`."""
    stride = stream.processor.frame_stride
    window = frames[::stride][start : start + stream.model.config.num_frames]
    pixel_values = stream.processor(window, do_sample_frames=False)["pixel_values"]
    with torch.no_grad():
        return stream.model(pixel_values).logits[0]


def check_windows(stream, frames, windows):
    sampled = len(frames[:: stream.processor.frame_stride])
    starts = list(range(0, sampled - stream.model.config.num_frames + 1, stream.hop))
    assert [window.first_frame for window in windows] == starts
    for window in windows:
        expected = expected_logits(stream, frames, window.first_frame)
        torch.testing.assert_close(window.logits, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40)
@given(
    hop=st.integers(1, 21),
    tubelet=st.integers(1, 4),
    stride=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_every_window_has_the_logits_of_the_whole_model(hop, tubelet, stride, chunks):
    """Hops of whole tubelets and others, beyond the window too; frames that come one by one and many at a time."""
    stream = make_stream(hop, stride, tubelet_size=(tubelet, 8, 8), num_frames=9)
    frames = make_frames(60)
    windows, done = [], 0
    for size in [*chunks, 60]:
        windows += stream.push(frames[done : done + size]) if done < 60 else []
        done += size
    check_windows(stream, frames, windows)
    assert stream.num_windows == len(windows) and stream.num_frames_seen == 60


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_temporal_layers": 0},
        {"pooling": "mean"},
        {"representation_size": 12},
        {"temporal_pooling": "attention"},
        {"temporal_pooling": "concatenate"},
    ],
)
def test_every_kind_of_factorised_encoder_streams(changes):
    stream = make_stream(3, **changes)
    frames = make_frames(40)
    check_windows(stream, frames, stream.push(frames))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("embedding_type", ["tubelet", "uniform_frame_sampling"])
def test_every_variant_streams_behind_the_same_interface(attention_type, embedding_type):
    stream = make_stream(None, attention_type=attention_type, embedding_type=embedding_type)
    is_reused = attention_type == "factorised_encoder"
    is_tubelet = is_reused and embedding_type == "tubelet"
    assert stream.reuses_tubelets == is_reused and stream.hop == (2 if is_tubelet else 4)
    frames = make_frames(30)
    check_windows(stream, frames, [window for frame in frames for window in stream.push(frame)])
    assert (stream.num_tubelets_encoded > 0) == is_reused


@pytest.mark.parametrize(("hop", "cost"), [(1, 1), (2, 1), (3, 3), (4, 2), (5, 4), (6, 3), (8, 4), (11, 4), (20, 4)])
def test_a_hop_costs_what_it_says(hop, cost):
    """Windows of 4 tubelets of 2 frames."""
    stream = make_stream(hop)
    assert stream.tubelets_per_window == cost == min(4, hop // math.gcd(hop, 2))
    count = len(stream.push(make_frames(400)))
    assert count == (400 - 8) // hop + 1
    assert stream.num_tubelets_encoded <= cost * count + 2 * 4, "what the first windows cannot share comes on top"
    assert stream.num_tubelets_encoded >= cost * (count - 1)
    other = make_stream(hop, attention_type="spatio_temporal")
    assert other.tubelets_per_window == 4 == other.model.config.grid_size[0], "the whole window is one piece"


def test_frames_are_sampled_by_their_times_as_the_processor_samples_a_file(tmp_path):
    times = np.cumsum(np.random.default_rng(1).uniform(0.01, 0.09, 200))
    stream = make_stream(3)
    stream.processor.frames_per_second = 17.0
    frames = make_frames(200)
    windows = [window for frame, time in zip(frames, times, strict=True) for window in stream.push(frame, time)]
    windows += stream.flush()
    moments = np.arange(0, times[-1] - times[0] + 1e-9, 1 / 17.0)
    shown = np.searchsorted(times - times[0], moments + 1e-9, side="right") - 1
    assert len(windows) == (len(shown) - 8) // 3 + 1
    for window in windows:
        indices = shown[window.first_frame : window.first_frame + 8]
        assert (window.start, window.end) == (times[indices[0]], times[indices[-1]])
        pixel_values = stream.processor(frames[indices], do_sample_frames=False)["pixel_values"]
        with torch.no_grad():
            torch.testing.assert_close(window.logits, stream.model(pixel_values).logits[0], atol=1e-5, rtol=1e-5)


def test_a_stream_sampled_by_rate_goes_on_after_a_flush():
    streams = [make_stream(8), make_stream(8)]
    frames, windows = make_frames(64), ([], [])
    for stream, found, pause in zip(streams, windows, (True, False), strict=True):
        stream.processor.frames_per_second = 10.0
        for index, frame in enumerate(frames):
            found += stream.push(frame, index / 20)
            if pause and index % 7 == 0:
                found += stream.flush()
        found += stream.flush()
        assert stream.flush() == []
    assert [(one.first_frame, one.start, one.end) for one in windows[0]] == [
        (one.first_frame, one.start, one.end) for one in windows[1]
    ]
    assert len(windows[0]) == 4


@pytest.mark.parametrize("hop", [2, 5, 7, 16])
def test_the_windows_of_a_file_of_300_frames(tmp_path, hop):
    """Decoded as a stream, the frames are those of `frames_at`, to the bit, B-frames included."""
    path = write_video(tmp_path / "video.mp4", make_frames(300, 48, 80), options={"bf": "2"}, gop=50)
    stream = make_stream(hop, frame_stride=2)
    found = list(file_windows(stream.model, stream.processor, path, hop=hop))
    assert len(found) == math.ceil((150 - 8) / hop) + 1  # the last one ends with the file
    for window in found:
        first = window.first_frame * 2
        clip = stream.processor(path, do_sample_frames=False)["pixel_values"][:, first : first + 16 : 2]
        with torch.no_grad():
            torch.testing.assert_close(window.logits, stream.model(clip).logits[0], atol=1e-5, rtol=1e-5)


def test_memory_is_flat_over_10000_frames():
    stream = make_stream(3, num_frames=16)
    frames = make_frames(100)
    process, held = psutil.Process(), []
    for _ in range(100):
        stream.push(frames)
        held.append(process.memory_info().rss)
        assert len(stream._frames) < 16 + 3 and len(stream._steps) < 2 * 16
    assert stream.num_frames_seen == 10_000 and stream.num_windows == (10_000 - 16) // 3 + 1
    assert max(held[50:]) - min(held[10:50]) < 5e6, "bytes; the first rounds fill the allocator's pools"


def test_a_stream_can_begin_again():
    stream, frames = make_stream(2), make_frames(20)
    first = stream.push(frames)
    stream.reset()
    again = stream.push(frames)
    assert [window.start for window in again] == [window.start for window in first]
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (lambda: make_stream(0), "`hop` must be a whole number of sampled frames, at least 1, got 0"),
        (lambda: make_stream(1.5), r"`hop` must be .* got 1\.5"),
        (lambda: make_stream(True), "`hop` must be .* got True"),
        (lambda: make_stream(2).push(make_frames(3), [0.0, 1.0]), "3 frames came with 2 times"),
        (lambda: make_stream(2).push(make_frames(3), [0.0, 2.0, 1.9]), r"must not decrease, got 1\.9 s after 2 s"),
        (lambda: make_stream(2).push(make_frames(2), [0.0, math.nan]), "must not decrease, got nan s after 0 s"),
        (lambda: make_stream(2).push(np.zeros((1, 2, 3, 4, 5))), r"Frames are \(height, width, channels\)"),
    ],
)
def test_what_cannot_stream_is_said(problem, message):
    with pytest.raises(ValueError, match=message):
        problem()


def test_a_processor_that_cannot_stream_is_refused():
    model = make_model(tiny_config("factorised_encoder"))
    for other in (model.vivit, make_model(tiny_config("factorised_encoder", num_labels=0))):
        with pytest.raises(TypeError, match="must be a ViViTForVideoClassification with labels, got ViViT"):
            StreamingClassifier(other, ViViTVideoProcessor(num_frames=8, **SIZE))
    for rate in (None, 5.0):
        processor = ViViTVideoProcessor(num_frames=8, frame_sampling="uniform", frames_per_second=rate, **SIZE)
        with pytest.raises(ValueError, match=r"spreads its frames over a whole video.*use frame_sampling='clip'"):
            StreamingClassifier(model, processor)
    for name in ("frame_stride", "frames_per_second"):  # the way out that the message names
        StreamingClassifier(model, ViViTVideoProcessor(num_frames=8, frame_sampling="clip", **{name: 2}, **SIZE))
    stream = StreamingClassifier(model, ViViTVideoProcessor(num_frames=8, frames_per_second=5, **SIZE))
    with pytest.raises(ValueError, match="needs the `times` of the frames"):
        stream.push(make_frames(1))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_frames_of_another_size_are_refused_as_the_model_refuses_them(attention_type):
    stream = make_stream(None, attention_type=attention_type)
    stream.processor.do_center_crop = stream.processor.do_resize = False
    with pytest.raises(ValueError, match=r"The model expects .*24, 40\).*got .*30, 50\)"):
        stream.push(make_frames(10))


@pytest.mark.parametrize("attention_type", ["factorised_encoder", "spatio_temporal"])
def test_a_stream_goes_on_after_the_model_has_failed(attention_type, monkeypatch):
    """Say, for want of memory: nothing is lost, and the next frames bring the windows that are due."""
    stream, frames = make_stream(np.int64(2), attention_type=attention_type), make_frames(24)
    expected = stream.push(frames)
    stream.reset()
    found = stream.push(frames[:9])

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(stream.model.vivit.embeddings, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            stream.push(frames[9:14])
    found += stream.push(frames[14:])
    assert [window.first_frame for window in found] == [window.first_frame for window in expected]
    for window, other in zip(found, expected, strict=True):
        torch.testing.assert_close(window.logits, other.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"frame_stride": 2}, {"frames_per_second": 10.0}])
def test_frames_that_are_refused_were_never_pushed(settings):
    stream, frames = make_stream(2), make_frames(60)
    for name, value in settings.items():
        setattr(stream.processor, name, value)
    times = np.arange(60) / 20
    expected = [
        window for start in range(0, 60, 5) for window in stream.push(frames[start : start + 5], times[start:][:5])
    ]
    stream.reset()
    found = []
    for start in range(0, 60, 5):
        with pytest.raises(TypeError, match="None"):
            stream.push([None] * 5, times[start:][:5])
        found += stream.push(frames[start : start + 5], times[start:][:5])
    assert [(window.start, window.end) for window in found] == [(window.start, window.end) for window in expected]
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(found, expected, strict=True))


def test_frames_that_the_processor_leaves_raw_are_refused():
    stream = make_stream(2)
    stream.processor.do_rescale = stream.processor.do_normalize = False
    with pytest.raises(ValueError, match="look like raw frames"):
        stream.push(make_frames(10))


def test_models_that_return_tuples_stream_too():
    for attention_type in ATTENTION_TYPES:
        stream, frames = make_stream(2, attention_type=attention_type), make_frames(20)
        expected = stream.push(frames)
        stream.reset()
        stream.model.config.return_dict = False
        found = stream.push(frames) + stream.last_window()
        assert all(torch.equal(a.logits, b.logits) for a, b in zip(found, expected, strict=True))
