"""Augmentation: the same for every frame of a clip, drawn from the generator that is given, and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from video_files import moving_frames

from vivit_hf.training.augmentation import (
    RAND_AUGMENT_OPERATIONS,
    ClipAugmentation,
    clip_generator,
    jitter_colours,
    names_with_sides,
    rand_augment,
)
from vivit_hf.training.recipes import RECIPES
from vivit_hf.video_frames import resize_frames


@pytest.fixture(scope="module")
def clip():
    return moving_frames(num_frames=4, height=64, width=80)


def still(clip, num_frames=3):
    return np.repeat(clip[:1], num_frames, axis=0)


EVERYTHING = ClipAugmentation(
    crop_size=(48, 56),
    flip_probability=0.5,
    scale_jitter=(0.9, 1.33),
    colour_jitter_probability=0.8,
    colour_drop_probability=0.1,
    rand_augment_layers=2,
    rand_augment_magnitude=15,
)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), magnitude=st.floats(0, 20))
def test_all_frames_are_treated_alike(clip, seed, magnitude):
    augmentation = ClipAugmentation(**{**EVERYTHING.to_dict(), "rand_augment_magnitude": magnitude})
    result = augmentation(still(clip), np.random.default_rng(seed))
    assert result.shape == (3, 48, 56, 3) and result.dtype == np.uint8
    assert np.array_equal(result[0], result[1]) and np.array_equal(result[0], result[2])


@pytest.mark.parametrize("name", RAND_AUGMENT_OPERATIONS)
def test_every_operation_does_something_to_every_frame_and_the_same(name, clip):
    operation = RAND_AUGMENT_OPERATIONS[name]
    # A step in grey levels that is not at the ends, so that there is contrast to stretch.
    moving = (clip.astype(int) // 2 + 40).astype(np.uint8)
    result = operation(moving, 1.3, np.random.default_rng(0))
    assert result.shape == moving.shape and result.dtype == np.uint8
    assert all(np.any(after != before) for after, before in zip(result, moving, strict=True))
    alike = operation(still(moving), 1.3, np.random.default_rng(0))
    assert np.array_equal(alike[0], alike[2])
    assert np.array_equal(operation(moving, 1.3, np.random.default_rng(0)), result)


def test_operations_are_what_their_names_say(clip):
    run = {
        name: lambda x, share, f=f: f(x, share, np.random.default_rng(0)) for name, f in RAND_AUGMENT_OPERATIONS.items()
    }
    assert np.array_equal(run["invert"](clip, 1.0), 255 - clip)
    assert np.array_equal(run["posterise"](clip, 1.0), clip & 0xF0)
    assert np.array_equal(run["solarise"](clip, 0.5), np.where(clip < 128, clip, 255 - clip))
    added = np.where(clip < 128, np.minimum(clip.astype(int) + 55, 255), clip)
    assert np.array_equal(run["solarise_add"](clip, 0.5), added)
    assert np.abs(run["brightness"](clip, 0.5).astype(int) - clip).max() <= 1  # 0.1 + 0.9: as it was
    assert run["contrast"](clip, 0.0).std() < 0.2 * clip.std()
    grey = run["colour"](clip, -0.1 / 1.8)
    assert np.ptp(grey.astype(int), axis=-1).max() <= 1
    bounds = run["auto_contrast"](clip // 4 + 60, 1.0)
    assert (bounds.min(), bounds.max()) == (0, 255)
    hole = run["cutout"](np.zeros_like(clip), 0.25)
    assert set(np.unique(hole)) == {0, 128} and (hole == 128).all(axis=-1).sum(axis=(1, 2)).max() <= 400
    moved = run["translate_x"](clip, 0.1)
    shifts = [np.array_equal(moved[:, :, :-10], clip[:, :, 10:]), np.array_equal(moved[:, :, 10:], clip[:, :, :-10])]
    assert any(shifts)
    turned = run["rotate"](clip, 1.0)[0]
    assert any(
        np.array_equal(turned, np.asarray(Image.fromarray(clip[0]).rotate(d, fillcolor=(128,) * 3))) for d in (30, -30)
    )


def test_statistics_of_a_picture_are_those_of_the_clip(clip):
    """A dark and a bright frame keep their difference, where each by itself would be stretched to the same range."""
    pair = np.stack([clip[0] // 4, clip[0] // 4 + 100])
    stretched = RAND_AUGMENT_OPERATIONS["auto_contrast"](pair, 1.0, np.random.default_rng(0))
    assert stretched[0].mean() + 50 < stretched[1].mean()


@pytest.mark.parametrize("crop", [(48, 56), (64, 80), (100, 120)])
def test_crops_have_the_size_that_was_asked_for(crop, clip):
    result = ClipAugmentation(crop_size=crop)(clip, np.random.default_rng(0))
    assert result.shape == (4, *crop, 3)
    if crop[0] <= 64:
        places = [
            np.array_equal(result, clip[:, top : top + crop[0], left : left + crop[1]])
            for top in range(64 - crop[0] + 1)
            for left in range(80 - crop[1] + 1)
        ]
        assert any(places)


def test_crops_come_from_everywhere(clip):
    rows = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None], (64, 80, 3))[None]
    augmentation = ClipAugmentation(crop_size=(48, 56))
    tops = [int(augmentation(rows, np.random.default_rng(seed))[0, 0, 0, 0]) for seed in range(300)]
    assert set(tops) == set(range(17))


def test_a_flip_is_the_mirror_image(clip):
    same = {"crop_size": clip.shape[1:3]}
    flipped = ClipAugmentation(**same, flip_probability=1.0)(clip, np.random.default_rng(0))
    assert np.array_equal(flipped, clip[:, :, ::-1])
    half = ClipAugmentation(**same, flip_probability=0.5)
    share = np.mean([not np.array_equal(half(clip, np.random.default_rng(seed)), clip) for seed in range(400)])
    assert 0.4 < share < 0.6


def test_a_clip_that_is_too_narrow_for_the_crop_keeps_its_shape():
    clip = moving_frames(num_frames=2, height=47, width=27)
    cropped = ClipAugmentation(crop_size=(24, 40))(clip, np.random.default_rng(0))
    whole = resize_frames(clip, (70, 40), Image.Resampling.BILINEAR)
    assert any(np.array_equal(cropped, whole[:, top : top + 24]) for top in range(70 - 24 + 1))


def test_scale_jitter_draws_height_and_width_apart():
    # A ramp from 0 to 1 over the width: its slope in the crop tells the factor.
    ramp = np.broadcast_to(np.linspace(0, 255, 200).astype(np.uint8)[None, None, :, None], (1, 200, 200, 3))
    both = np.stack([ramp[0, ..., 0], ramp[0, ..., 0].T, ramp[0, ..., 0]], axis=-1)[None]
    augmentation = ClipAugmentation(crop_size=(150, 150), scale_jitter=(0.9, 1.33))
    factors = []
    for seed in range(200):
        crop = augmentation(both, np.random.default_rng(seed))[0].astype(float)
        slopes = [np.polyfit(np.arange(150), crop[75, :, 0], 1)[0], np.polyfit(np.arange(150), crop[:, 75, 1], 1)[0]]
        factors.append([(255 / 199) / slope for slope in slopes])
    factors = np.array(factors)
    assert factors.min() > 0.87 and factors.max() < 1.37 and factors.min() < 0.93 and factors.max() > 1.28
    assert np.abs(np.corrcoef(factors.T)[0, 1]) < 0.3


def test_colours_are_jittered_within_their_ranges(clip):
    grey = np.full((2, 8, 8, 3), 100, dtype=np.uint8)
    means = [float(jitter_colours(grey, np.random.default_rng(seed)).mean()) for seed in range(200)]
    assert min(means) >= 68 and max(means) <= 132 and max(means) - min(means) > 50
    results = [jitter_colours(clip, np.random.default_rng(seed)) for seed in range(3)]
    assert not np.array_equal(results[0], results[1]) and not np.array_equal(results[1], results[2])
    dropped = ClipAugmentation(crop_size=clip.shape[1:3], colour_drop_probability=1.0)(clip, np.random.default_rng(0))
    assert np.array_equal(dropped[..., 0], dropped[..., 2]) and dropped.std() > 10


def test_colours_are_jittered_as_by_hand(clip):
    """Brightness, then saturation, then contrast about the mean of each channel; where no value is cut off."""
    middle = (clip.astype(int) // 4 + 96).astype(np.uint8)
    generator = np.random.default_rng(5)
    brightness, (saturation, contrast) = generator.uniform(-32, 32), generator.uniform(0.6, 1.4, size=2)
    values = middle + brightness
    grey = (values @ [0.299, 0.587, 0.114])[..., None]
    values = grey + saturation * (values - grey)
    mean = values.mean(axis=(0, 1, 2))
    values = mean + contrast * (values - mean)

    class WithoutHue:
        def __init__(self):
            self.draws = iter([brightness, (saturation, contrast), 0.0])

        def uniform(self, *_, **__):
            return next(self.draws)

    assert np.abs(jitter_colours(middle, WithoutHue()) - values).max() <= 3  # of which HSV rounds away two


def test_hue_turns_red_to_other_colours():
    red = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    red[..., 0] = 200
    others = [jitter_colours(red, np.random.default_rng(seed))[0, 0, 0] for seed in range(60)]
    assert any(colour[1] > 100 for colour in others) and any(colour[2] > 100 for colour in others)


def test_an_example_of_an_epoch_is_always_the_same_and_no_other(clip):
    first = EVERYTHING(clip, clip_generator(1, 2, 3))
    assert np.array_equal(first, EVERYTHING(clip, clip_generator(1, 2, 3)))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not np.array_equal(first, EVERYTHING(clip, clip_generator(*other)))


def test_layers_are_drawn_evenly(clip, monkeypatch):
    counts = dict.fromkeys(RAND_AUGMENT_OPERATIONS, 0)

    def counted(name):
        def operation(frames, *_):
            counts[name] += 1
            return frames

        return operation

    for name in counts:
        monkeypatch.setitem(RAND_AUGMENT_OPERATIONS, name, counted(name))
    generator = np.random.default_rng(0)
    for _ in range(800):
        rand_augment(clip[:1, :8, :8], 2, 10, generator)
    assert sum(counts.values()) == 1600 and min(counts.values()) > 60 and max(counts.values()) < 140


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flip_probability": 1.5}, "`flip_probability=1.5` is not a probability"),
        ({"crop_size": (0, 5)}, "crop_size"),
        ({"scale_jitter": (1.3, 0.9)}, "scale_jitter"),
        ({"rand_augment_layers": -1}, "must not be negative"),
    ],
)
def test_values_out_of_range_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        ClipAugmentation(**{"crop_size": (8, 8), **fields})


def test_what_is_no_clip_is_an_error(clip):
    with pytest.raises(ValueError, match="uint8"):
        EVERYTHING(clip.astype(np.float32), np.random.default_rng(0))


def test_names_with_sides_are_found():
    sided = ["turn left", "Right_hand", "moving-clockwise", "anticlockwise", "counter-clockwise", "up_left", "TurnLeft"]
    assert names_with_sides([*sided, "bright light", "copyright", "leftover", "upright", "wrighting"]) == sided


def test_small_data_leaves_clips_recognisable():
    """Never is more than a third of a clip the grey that fills what comes from outside of it."""
    arguments = RECIPES["small-data"].arguments
    layers, magnitude = arguments["rand_augment_layers"], arguments["rand_augment_magnitude"]
    clip = np.full((2, 64, 64, 3), (200, 30, 90), np.uint8)
    clips = [rand_augment(clip, layers, magnitude, np.random.default_rng(seed)) for seed in range(100)]
    shares = [(one == 128).all(axis=-1).mean() for one in clips]
    assert 0.1 < max(shares) < 1 / 3
