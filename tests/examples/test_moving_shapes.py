"""The moving shapes are video files, the same for the same seed, and their class is in the order of frames alone."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from paths import EXAMPLES


pytestmark = pytest.mark.slow


SCRIPT = EXAMPLES / "moving_shapes.py"
NUM_FRAMES, HEIGHT, WIDTH, CLIPS_PER_CLASS = 24, 80, 96, 40


def _load_script():
    spec = importlib.util.spec_from_file_location("moving_shapes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["moving_shapes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


moving_shapes = _load_script()
CLASSES = sorted(moving_shapes.MOTIONS)


def decode(path: Path) -> np.ndarray:
    """uint8 (frames, height, width, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "shapes"
    return moving_shapes.write_moving_shapes(path, CLIPS_PER_CLASS, seed=3, test_clips_per_class=CLIPS_PER_CLASS)


@dataclasses.dataclass
class Split:
    clips: np.ndarray  # uint8 (clips, frames, height, width, 3)
    labels: np.ndarray  # (clips,)
    shape_mass: np.ndarray  # how much each pixel differs from the still background: (clips, frames, height, width)


@pytest.fixture(scope="module")
def splits(folder) -> dict[str, Split]:
    found = {}
    for name in ("train", "test"):
        paths = sorted(folder.glob(f"{name}/*/*.mp4"))
        clips = np.stack([decode(path) for path in paths])
        background = np.stack([np.median(clip[::3], axis=0) for clip in clips])
        mass = np.abs(clips - background[:, None].astype(np.float32)).sum(axis=-1)
        labels = np.array([CLASSES.index(path.parent.name) for path in paths])
        found[name] = Split(clips, labels, np.where(mass > 60, mass, 0))
    return found


def test_files_are_h264_of_the_stated_form_and_classes_are_balanced(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["test", "train"]
    for split in ("train", "test"):
        assert sorted(path.name for path in (folder / split).iterdir()) == CLASSES
        for name in CLASSES:
            files = sorted((folder / split / name).iterdir())
            assert [path.name for path in files] == [f"{number:03d}.mp4" for number in range(CLIPS_PER_CLASS)]
            with av.open(str(files[0])) as container:
                stream = container.streams.video[0]
                assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
                assert (stream.frames, stream.average_rate) == (NUM_FRAMES, 12)
            assert decode(files[0]).shape == (NUM_FRAMES, HEIGHT, WIDTH, 3)


def test_decoded_frames_are_the_drawn_ones(folder):
    scene = moving_shapes.Scene.draw(np.random.default_rng([3, 0, 0]), NUM_FRAMES, HEIGHT, WIDTH)
    drawn = scene.render("up_left", NUM_FRAMES).astype(float)
    assert np.abs(drawn - decode(folder / "train" / "up_left" / "000.mp4")).mean() < 4  # of 255


def test_same_seed_gives_the_same_bytes_and_another_seed_other_clips(folder, tmp_path):
    again = moving_shapes.write_moving_shapes(tmp_path / "again", 2, seed=3, test_clips_per_class=1)
    other = moving_shapes.write_moving_shapes(tmp_path / "other", 2, seed=4, test_clips_per_class=1)
    for path in sorted(again.glob("*/*/*.mp4")):
        relative = path.relative_to(again)
        assert path.read_bytes() == (folder / relative).read_bytes()
        assert path.read_bytes() != (other / relative).read_bytes()


def test_scenes_of_the_two_splits_differ(splits):
    first_frames = {name: {clip[0].tobytes() for clip in split.clips} for name, split in splits.items()}
    assert len(first_frames["train"]) == len(first_frames["test"]) == CLIPS_PER_CLASS
    assert not first_frames["train"] & first_frames["test"]


def test_clips_of_one_number_begin_with_the_same_frame(folder):
    first, *others = [decode(folder / "train" / name / "007.mp4")[0] for name in CLASSES]
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize(("motion", "opposite"), [("up_left", "down_right"), ("down_left", "up_right")])
def test_a_clip_played_backwards_is_one_of_the_opposite_class(motion, opposite):
    for seed in range(10):
        scene = moving_shapes.Scene.draw(np.random.default_rng(seed), NUM_FRAMES, HEIGHT, WIDTH)
        end = scene.start + (NUM_FRAMES - 1) * scene.speed * moving_shapes.MOTIONS[motion]
        backwards = dataclasses.replace(scene, start=end).render(opposite, NUM_FRAMES)[::-1]
        difference = np.abs(scene.render(motion, NUM_FRAMES).astype(int) - backwards)
        assert difference.max() <= 1  # rounding


def _single_frame_features(split: Split, time: int) -> np.ndarray:
    """One frame of each clip in 8x8 blocks: where the shape is, and what the frame looks like: (clips, features)."""
    count = len(split.clips)
    mass = split.shape_mass[:, time].reshape(count, HEIGHT // 8, 8, WIDTH // 8, 8).sum(axis=(2, 4))
    pixels = split.clips[:, time].reshape(count, HEIGHT // 8, 8, WIDTH // 8, 8, 3).mean(axis=(2, 4))
    features = [mass.reshape(count, -1), pixels.reshape(count, -1)]
    return np.concatenate([each / np.linalg.norm(each, axis=1, keepdims=True) for each in features], axis=1)


def _motion_features(split: Split) -> np.ndarray:
    """Whether the shape moves down and right (1) or up and left (-1), by the phase of its outline: (clips, 2)."""
    directions = []
    for summed in (3, 2):
        profile = split.shape_mass.sum(axis=summed)  # (clips, frames, side)
        phase = profile @ np.exp(2j * np.pi * np.arange(profile.shape[-1]) / profile.shape[-1])
        directions.append(np.sign(np.angle(phase[:, 1:] * phase[:, :-1].conj()).sum(axis=1)))
    return np.stack(directions, axis=1)


def _nearest_mean_accuracy(features: dict[str, np.ndarray], splits: dict[str, Split]) -> float:
    """Held-out accuracy of the classifier that takes the class with the nearest mean."""
    labels = splits["train"].labels
    means = np.stack([features["train"][labels == label].mean(axis=0) for label in range(len(CLASSES))])
    nearest = np.linalg.norm(features["test"][:, None] - means, axis=-1).argmin(axis=1)
    return float((nearest == splits["test"].labels).mean())


@pytest.mark.parametrize("time", [0, 8, 15, 23])
def test_a_single_frame_does_not_tell_the_class(splits, time):
    features = {name: _single_frame_features(split, time) for name, split in splits.items()}
    deviation = np.sqrt(1 / 4 * 3 / 4 / len(features["test"]))
    assert abs(_nearest_mean_accuracy(features, splits) - 1 / 4) < 4 * deviation


def test_the_same_classifier_on_motion_tells_the_class(splits):
    features = {name: _motion_features(split) for name, split in splits.items()}
    assert _nearest_mean_accuracy(features, splits) > 0.9


@pytest.mark.parametrize("time", [8, 23])
def test_the_shape_is_equally_likely_in_every_quarter_of_the_frame_in_every_class(splits, time):
    mass = np.concatenate([split.shape_mass[:, time] for split in splits.values()])
    labels = np.concatenate([split.labels for split in splits.values()])
    quarters = mass.reshape(len(mass), 2, HEIGHT // 2, 2, WIDTH // 2).sum(axis=(2, 4)).reshape(len(mass), 4)
    counts = np.stack([np.bincount(quarters[labels == label].argmax(axis=1), minlength=4) for label in range(4)])
    expected = counts.sum() / counts.size
    # 3 degrees of freedom per class; 16.3 is the 0.999 quantile.
    assert ((counts - expected) ** 2 / expected).sum(axis=1).max() < 16.3


def test_command_line_writes_the_data_set_and_reports_it(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--clips-per-class", "2", "--num-frames", "4"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "12 files" in result.stdout
    assert len(list((tmp_path / "out").glob("train/*/*.mp4"))) == 8
    assert len(list((tmp_path / "out").glob("test/*/*.mp4"))) == 4
    assert decode(tmp_path / "out" / "test" / "up_right" / "000.mp4").shape == (4, HEIGHT, WIDTH, 3)
