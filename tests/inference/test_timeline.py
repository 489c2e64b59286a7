"""When things happen in a long video: known boundaries are found, and every window is the model's on these frames."""

import numpy as np
import pytest
import torch
from moving_shapes import MOTIONS, Scene, write_video
from video_files import damage_packet, write_video as write_test_video

from vivit_hf import (
    VideoDecodingError,
    VideoReader,
    ViViTForVideoClassification,
    ViViTVideoProcessor,
    demo_model_path,
)
from vivit_hf.inference.live_video import LiveVideo
from vivit_hf.inference.segments import merge_windows
from vivit_hf.inference.timeline import file_windows, live_windows, video_timeline


@pytest.fixture(scope="module")
def demo():
    folder = demo_model_path()
    model = ViViTForVideoClassification.from_pretrained(folder).eval()
    return model, ViViTVideoProcessor.from_pretrained(folder)


def join_motions(path, seed):
    """Five parts of 3 to 6 seconds, each a motion in a scene of its own; the motions, and when they end."""
    rng = np.random.default_rng(seed)
    motions = [str(rng.choice(list(MOTIONS)))]
    while len(motions) < 5:
        motions.append(str(rng.choice([motion for motion in MOTIONS if motion != motions[-1]])))
    parts = []
    for number, motion in enumerate(motions):
        scene = Scene.draw(np.random.default_rng([7, seed, number]), 24, 80, 96)
        parts.append(scene.render(motion, int(rng.integers(36, 72))))
    write_video(path, np.concatenate(parts), fps=12)
    return motions, np.cumsum([len(part) for part in parts]) / 12


@pytest.mark.parametrize("hop", [None, 3, 8])
def test_boundaries_of_joined_motions_are_found_within_a_hop(demo, tmp_path, hop):
    """A hop is a tubelet (0.17 s), 0.25 s or half a window (0.67 s)."""
    model, processor = demo
    for seed in range(8):
        motions, ends = join_motions(tmp_path / "joined.mp4", seed)
        segments = video_timeline(model, processor, tmp_path / "joined.mp4", hop=hop)
        assert [segment.label for segment in segments] == motions
        assert segments[0].start == 0 and segments[-1].end == pytest.approx(ends[-1] - 1 / 12)
        for segment, following, end in zip(segments, segments[1:], ends, strict=False):
            assert segment.end == following.start == pytest.approx(end, abs=(hop or 2) / 12)
            assert segment.score > 0.5


@pytest.mark.parametrize("hop", [2, 8])
def test_boundaries_within_one_take_are_found_by_the_windows_alone(demo, tmp_path, hop):
    """The shape turns round where it is: no cut tells, and a window of 1.33 s can be wrong by half of itself."""
    model, processor = demo
    for seed in range(4):
        scene = Scene.draw(np.random.default_rng([8, seed]), 24, 80, 96)
        there = scene.render("up_left", 48)
        write_video(tmp_path / "turn.mp4", np.concatenate([there, there[::-1]]), fps=12)
        windows = list(file_windows(model, processor, tmp_path / "turn.mp4", hop=hop))
        first, second = merge_windows(windows, model.config)
        assert (first.label, second.label) == ("up_left", "down_right")
        assert first.end == second.start == pytest.approx(4.0, abs=0.67)
        assert all(window.cut is None for window in windows)


def test_the_last_window_ends_with_the_last_frame(demo, tmp_path):
    model, processor = demo
    path = write_test_video(tmp_path / "video.mp4", num_frames=90)
    windows = list(file_windows(model, processor, path, hop=10))
    assert [window.first_frame for window in windows] == [*range(0, 80, 10), 90 - 16]
    with torch.no_grad():
        clip = processor(path, do_sample_frames=False)["pixel_values"][:, -16:]
        torch.testing.assert_close(windows[-1].logits, model(clip).logits[0], atol=1e-5, rtol=1e-5)
    assert len(list(file_windows(model, processor, path, hop=37))) == 3  # 0, 37 and 74, which is the last one


@pytest.mark.parametrize("policy", ["repeat_last", "loop"])
@pytest.mark.parametrize("source", ["file", "pipe", "live"])
def test_a_video_shorter_than_a_window_has_one(demo, tmp_path, policy, source):
    model, processor = demo
    processor = ViViTVideoProcessor.from_dict({**processor.to_dict(), "short_video_policy": policy})
    path = write_test_video(tmp_path / "short.mkv", num_frames=7)
    with open(path, "rb") as file:
        if source == "live":
            (window,) = live_windows(model, processor, LiveVideo(file, policy="wait"))
        else:
            (window,) = file_windows(model, processor, {"file": path, "pipe": file}[source])
    with torch.no_grad():
        expected = model(processor(path)["pixel_values"]).logits[0]
    # A live source hands over frames that the processor resizes; from a file they are resized as they are decoded.
    close = {"atol": 0.2, "rtol": 0.05} if source == "live" else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(window.logits, expected, **close)
    assert (window.first_frame, window.start) == (0, 0.0) and window.end == pytest.approx(6 / 25, abs=0.01)
    assert len(video_timeline(model, processor, path)) == 1


def test_a_short_video_can_be_an_error(demo, tmp_path):
    model, processor = demo
    processor = ViViTVideoProcessor.from_dict({**processor.to_dict(), "short_video_policy": "error"})
    with pytest.raises(ValueError, match="needs 16 frames and the video has 7"):
        list(file_windows(model, processor, write_test_video(tmp_path / "short.mp4", num_frames=7)))


def test_a_video_of_one_frame_has_a_segment(demo, tmp_path):
    model, processor = demo
    (segment,) = video_timeline(model, processor, write_test_video(tmp_path / "frame.mp4", num_frames=1))
    assert (segment.start, segment.end) == (0.0, 0.0) and 0 < segment.score <= 1


@pytest.mark.parametrize("rate", [None, 12.5])
def test_a_part_of_a_video(demo, tmp_path, rate):
    """As the processor takes it: seconds from the first frame. Times stay those of the file."""
    model, processor = demo
    processor = ViViTVideoProcessor.from_dict({**processor.to_dict(), "frames_per_second": rate})
    path = write_test_video(tmp_path / "video.mp4", num_frames=150)
    windows = list(file_windows(model, processor, {"path": path, "start": 2.0, "end": 5.0}, hop=8))
    assert windows[0].start == 2.0 and windows[-1].end == pytest.approx(5.0, abs=0.09) and windows[-1].end < 5.0
    with torch.no_grad():
        clip = processor({"path": path, "start": 2.0}, clip_start="centre", do_sample_frames=False)["pixel_values"]
        stride = 1 if rate is None else 2
        torch.testing.assert_close(
            windows[0].logits, model(clip[:, : 16 * stride : stride]).logits[0], atol=1e-5, rtol=1e-5
        )
    with pytest.raises(VideoDecodingError, match=r"no frame from 7 s on; the last one is at 5\.960 s"):
        list(file_windows(model, processor, {"path": path, "start": 7}))


@pytest.mark.parametrize("kind", ["sound", "damaged"])
def test_a_stream_of_frames_is_what_frames_at_gives(tmp_path, kind):
    path = write_test_video(
        tmp_path / "video.mp4", num_frames=70, gop=20, options={"bf": "2" if kind == "sound" else "0"}
    )
    if kind == "damaged":
        damage_packet(path, 30)
    indices = [0, 0, 3, 4, 20, 29, 30, 31, 33, 60, 69, 69]
    with VideoReader(path) as reader:
        expected = reader.frames_at(indices, on_lost="repeat_last")
    with VideoReader(path) as reader:
        found = list(reader.stream(indices))
        assert np.array_equal(np.stack([frame for _, frame in found]), expected)
        assert [seconds for seconds, _ in found] == reader.timestamps[indices].tolist()
        with pytest.raises(IndexError, match="do not decrease"):
            list(reader.stream([3, 2]))
        with pytest.raises(IndexError, match="index 70 is outside"):
            list(reader.stream([70]))


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("do_resize", [True, False])
def test_frames_are_cut_as_the_processor_cuts_them(demo, tmp_path, resample, do_resize):
    """The crop is smaller than the frame, as it is by default, and in the middle of it."""
    model, processor = demo
    changes = {"size": {"shortest_edge": 72}, "resample": resample, "do_resize": do_resize}
    processor = ViViTVideoProcessor.from_dict({**processor.to_dict(), **changes})
    path = tmp_path / "video.mp4"
    write_video(path, Scene.draw(np.random.default_rng(0), 24, 80, 96).render("up_left", 40), fps=12)
    clips = processor(path, do_sample_frames=False)["pixel_values"]
    for window in file_windows(model, processor, path, hop=5):
        with torch.no_grad():
            expected = model(clips[:, window.first_frame : window.first_frame + 16]).logits[0]
        torch.testing.assert_close(window.logits, expected, atol=1e-5, rtol=1e-5)


def test_frames_by_their_rate(demo, tmp_path):
    model, processor = demo
    path = write_test_video(tmp_path / "video.mp4", num_frames=90)
    processor = ViViTVideoProcessor.from_dict({**processor.to_dict(), "frames_per_second": 10.0})
    windows = list(file_windows(model, processor, path, hop=4))
    with VideoReader(path) as reader:
        times = reader.timestamps
        moments = np.arange(0, times[-1] + 1e-6, 0.1)
        shown = np.searchsorted(times, moments + 1e-6, side="right") - 1
        assert len(windows) == (len(shown) - 16) // 4 + 1
        for window in windows:
            indices = shown[window.first_frame : window.first_frame + 16]
            assert window.start == times[indices[0]]
            clip = processor(reader.frames_at(indices), do_sample_frames=False)["pixel_values"]
            with torch.no_grad():
                # Frames here are resized after they are decoded, there with it.
                torch.testing.assert_close(window.logits, model(clip).logits[0], atol=0.2, rtol=0.05)
