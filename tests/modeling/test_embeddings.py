"""Tokens, and position embeddings on other grids than the trained one: at forward, for good, and while loading."""

import numpy as np
import pytest
import torch
from tiny_models import CASES, case_config, make_clips, make_model, tiny_config

from vivit_hf import ViViTForVideoClassification, sample_frames_uniformly
from vivit_hf.modeling_vivit import ViViTPatchProjection, ViViTTubeletProjection, resample_position_embeddings


# Patches


@pytest.mark.parametrize("patch", [(2, 8, 8), (1, 8, 4), (4, 8, 16)])
def test_tubelets_are_a_strided_convolution_that_drops_the_remainder(patch):
    projection = ViViTTubeletProjection(3, 6, patch, stride=patch).double()
    clips = torch.randn(2, 3, 9, 30, 37, dtype=torch.float64)
    expected = torch.nn.functional.conv3d(clips, projection.weight, projection.bias, stride=patch)
    torch.testing.assert_close(projection(clips), expected)


@pytest.mark.parametrize("patch", [(8, 8), (4, 16)])
def test_patches_are_a_strided_convolution_that_drops_the_remainder(patch):
    projection = ViViTPatchProjection(3, 6, patch, stride=patch).double()
    frames = torch.randn(2, 3, 30, 37, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(frames, projection.weight, projection.bias, stride=patch)
    torch.testing.assert_close(projection(frames), expected)


def test_tokens_come_in_the_order_time_height_width():
    config = tiny_config("factorised_self_attention")
    embeddings = make_model(config).vivit.embeddings
    clips = make_clips(config)
    before, _ = embeddings(clips)
    assert before.shape == (2, 4, 15, 32)
    for time, row, column in ((0, 0, 0), (1, 2, 4), (3, 1, 2)):
        other = clips.clone()
        other[1, 2 * time, 0, 8 * row, 8 * column] += 1  # a corner of that tubelet
        after, _ = embeddings(other)
        touched = (after != before).any(dim=-1).nonzero().tolist()
        assert touched == [[1, time, 5 * row + column]]


# The pure function


def grid_of(time, height, width, channel, prefix=0):
    """Position embeddings whose first hidden numbers are a function of time, of height and of width alone."""
    axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in (time, height, width)), indexing="ij")
    grid = torch.stack([(axis + 1) ** 2 / (channel + 1) for axis in axes], dim=-1).reshape(1, -1, 3)
    return torch.cat([torch.full((1, prefix, 3), -7.0, dtype=torch.float64), grid], dim=1)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("new", [(6, 3, 5), (2, 3, 5), (4, 5, 3), (4, 3, 8), (1, 6, 2), (8, 6, 10)], ids=str)
def test_resampling_is_true_to_each_axis(new, prefix):
    old = (4, 3, 5)
    embeddings = grid_of(*old, channel=0, prefix=prefix)
    resampled = resample_position_embeddings(embeddings, new, old, num_prefix_tokens=prefix)
    assert resampled.shape == (1, prefix + np.prod(new), 3)
    assert torch.equal(resampled[:, :prefix], embeddings[:, :prefix])
    grid = resampled[0, prefix:].reshape(*new, 3)

    time = (torch.arange(old[0], dtype=torch.float64) + 1) ** 2  # linear between the middles of steps, flat outside
    middles = (np.arange(new[0]) + 0.5) * old[0] / new[0] - 0.5
    expected = torch.from_numpy(np.interp(middles, np.arange(old[0]), time.numpy()))
    torch.testing.assert_close(grid[..., 0], expected[:, None, None].expand(new))
    for axis, channel in ((1, 1), (2, 2)):
        line = (torch.arange(old[axis], dtype=torch.float64) + 1) ** 2
        image = line[None, None, :, None].expand(1, 1, -1, 2)
        line = torch.nn.functional.interpolate(image, size=(new[axis], 2), mode="bicubic")[0, 0, :, 0]
        shape = [1, 1, 1]
        shape[axis] = -1
        torch.testing.assert_close(grid[..., channel], line.reshape(shape).expand(new))


def test_resampling_to_the_same_grid_gives_the_same_tensor():
    embeddings = torch.randn(1, 1 + 60, 8)
    assert resample_position_embeddings(embeddings, (4, 3, 5), (4, 3, 5), num_prefix_tokens=1) is embeddings


def test_resampling_leaves_an_axis_alone_that_does_not_change():
    embeddings = torch.randn(1, 60, 8)
    longer = resample_position_embeddings(embeddings, (8, 3, 5), (4, 3, 5)).reshape(8, 15, 8)
    each = [resample_position_embeddings(embeddings[:, i::15], (8, 1, 1), (4, 1, 1)) for i in range(15)]
    torch.testing.assert_close(longer, torch.stack([one[0] for one in each], dim=1))
    wider = resample_position_embeddings(embeddings, (4, 6, 7), (4, 3, 5)).reshape(4, 42, 8)
    frames = embeddings.reshape(4, 15, 8)
    each = [resample_position_embeddings(frames[i : i + 1], (1, 6, 7), (1, 3, 5)) for i in range(4)]
    torch.testing.assert_close(wider, torch.cat(each))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_resampling_keeps_the_dtype(dtype):
    embeddings = torch.randn(1, 60, 8, dtype=torch.float64)
    resampled = resample_position_embeddings(embeddings.to(dtype), (6, 6, 4), (4, 3, 5))
    assert resampled.dtype == dtype
    expected = resample_position_embeddings(embeddings, (6, 6, 4), (4, 3, 5))
    assert (resampled.double() - expected).abs().max() < {torch.float16: 4e-3, torch.bfloat16: 4e-2}.get(dtype, 1e-12)


def test_resampling_what_is_not_that_grid_is_an_error_with_both_shapes():
    with pytest.raises(
        ValueError, match=r"shape \(1, 60, 8\) do not hold 1 prefix.*\(4, 3, 5\); expected \(1, 61, hidden\)"
    ):
        resample_position_embeddings(torch.zeros(1, 60, 8), (8, 3, 5), (4, 3, 5), num_prefix_tokens=1)


# The models

SIZES = [
    {"num_frames": 12},
    {"num_frames": 4},
    {"image_size": (40, 24)},
    {"image_size": 48},
    {"num_frames": 10, "image_size": (33, 64)},
]


def of_size(config, sizes, batch=2):
    size = sizes.get("image_size", config.frame_size)
    return make_clips(config, batch, **{**sizes, "image_size": (size, size) if isinstance(size, int) else size})


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Every size for every way to embed clips; all other cases in one size.
RESIZED = [
    (case, sizes)
    for case, fields in CASES.items()
    for sizes in (SIZES if fields.keys() <= {"attention_type", "embedding_type"} else SIZES[-1:])
]


@pytest.mark.parametrize(("case", "sizes"), RESIZED, ids=str)
def test_at_forward_for_good_and_while_loading_are_the_same(case, sizes, tmp_path):
    config = case_config(case)
    model, clips, trained_clips = make_model(config), of_size(config, sizes), make_clips(config)
    model.save_pretrained(tmp_path)
    before = parameters_of(model)
    with pytest.raises(ValueError, match="expects clips of"):
        model(clips)
    at_forward = model(clips, interpolate_pos_encoding=True).logits
    assert at_forward.shape == (2, 5) and at_forward.isfinite().all()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    torch.testing.assert_close(
        model.vivit(clips, interpolate_pos_encoding=True).pooler_output @ model.classifier.weight.T
        + model.classifier.bias,
        at_forward,
    )

    loaded, info = ViViTForVideoClassification.from_pretrained(tmp_path, **sizes, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    model.resize_position_embeddings(**sizes)
    for resized in (model, loaded):
        torch.testing.assert_close(resized(clips).logits, at_forward, atol=1e-5, rtol=1e-5)
        for name, size in sizes.items():
            stored = getattr(resized.config, name)
            assert stored == (list(size) if isinstance(size, tuple) else size)
        with pytest.raises(ValueError, match="expects clips of"):
            resized(trained_clips)
        changed = {name for name, parameter in resized.named_parameters() if not same(parameter, before[name])}
        assert changed <= {n for n in before if n.endswith("position_embeddings")}
        assert all(parameter.requires_grad for parameter in resized.parameters())

    # For good: what is saved now has the new sizes.
    model.save_pretrained(tmp_path / "resized")
    again = ViViTForVideoClassification.from_pretrained(tmp_path / "resized")
    torch.testing.assert_close(again(clips).logits, model(clips).logits)


def same(one, other):
    return one.shape == other.shape and torch.equal(one, other)


def test_what_is_resized_is_what_the_variant_has(variant):
    model = make_model(tiny_config(variant))
    prefix = int(model.config.pooling == "cls")
    model.resize_position_embeddings(num_frames=12, image_size=(40, 32))
    grid = (5 * 4,) if variant == "factorised_encoder" else (6 * 5 * 4,)
    assert model.vivit.embeddings.position_embeddings.shape == (1, prefix + grid[0], 32)
    if variant == "factorised_encoder":
        assert model.vivit.temporal_embeddings.position_embeddings.shape == (1, prefix + 6, 32)


def test_position_embeddings_matter_to_the_result(case):
    """Interpolated ones are not just any: a model without them, or with them in another order, gives other logits."""
    config = case_config(case)
    model, clips = make_model(config), of_size(config, {"num_frames": 12, "image_size": (48, 64)})
    expected = model(clips, interpolate_pos_encoding=True).logits
    for embeddings in (model.vivit.embeddings, model.vivit.temporal_embeddings):
        if embeddings is None:
            continue
        kept = embeddings.position_embeddings.data.clone()
        embeddings.position_embeddings.data[:, embeddings.num_prefix_tokens :] = kept[
            :, embeddings.num_prefix_tokens :
        ].flip(1)
        assert (model(clips, interpolate_pos_encoding=True).logits - expected).abs().max() > 1e-4
        embeddings.position_embeddings.data = kept


def test_nothing_changes_when_nothing_changes(case, tmp_path):
    config = case_config(case)
    model, clips = make_model(config), make_clips(config)
    logits, before = model(clips).logits, parameters_of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(model(clips, interpolate_pos_encoding=True).logits, logits)
    same_sizes = {"num_frames": config.num_frames, "image_size": config.image_size}
    loaded = ViViTForVideoClassification.from_pretrained(tmp_path, **same_sizes)
    for sizes in ({}, same_sizes):
        model.resize_position_embeddings(**sizes)
        for each in (model, loaded):
            assert all(torch.equal(parameter, before[name]) for name, parameter in each.named_parameters())
            torch.testing.assert_close(each(clips).logits, logits)


def test_a_size_with_the_same_grid_keeps_every_weight(variant):
    model = make_model(tiny_config(variant))
    before = parameters_of(model)
    model.resize_position_embeddings(num_frames=9, image_size=(31, 47))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert model(make_clips(model.config)).logits.shape == (2, 5)


def test_there_and_back_is_nearly_the_same(variant):
    """Smooth embeddings survive a finer grid and back."""
    config = tiny_config(variant, num_frames=16, image_size=64)
    model = make_model(config)
    embeddings = model.vivit.embeddings
    time, height, width = embeddings.grid
    smooth = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, n) for n in (time, height, width)), indexing="ij"), -1)
    smooth = smooth.sum(-1).reshape(1, -1, 1).expand(-1, -1, 32)
    embeddings.position_embeddings.data[:, embeddings.num_prefix_tokens :] = smooth
    before = embeddings.position_embeddings.detach().clone()
    model.resize_position_embeddings(num_frames=32, image_size=128)
    assert embeddings.grid != (time, height, width)
    model.resize_position_embeddings(num_frames=16, image_size=64)
    assert (embeddings.position_embeddings - before).abs().max() < 0.1
    assert not torch.equal(embeddings.position_embeddings, before)


def test_a_frozen_or_half_precision_embedding_stays_so(variant):
    model = make_model(tiny_config(variant)).to(torch.bfloat16)
    model.vivit.embeddings.position_embeddings.requires_grad_(False)
    model.resize_position_embeddings(num_frames=12, image_size=40)
    embeddings = model.vivit.embeddings.position_embeddings
    assert isinstance(embeddings, torch.nn.Parameter)
    assert embeddings.dtype == torch.bfloat16 and not embeddings.requires_grad


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_frames": 1}, r"larger than the clip"),
        ({"num_frames": 0}, r"`num_frames=0`"),
        ({"image_size": (24, 7)}, r"larger than the clip .* in width: 8 > 7"),
        ({"num_frames": 16, "image_size": -1}, r"`image_size=-1`"),
        ({"num_sampled_frames": 4}, r"`num_sampled_frames=4` has no meaning"),
    ],
)
def test_a_size_that_cannot_be_is_an_error_and_changes_nothing(variant, sizes, message):
    model = make_model(tiny_config(variant))
    before, config = parameters_of(model), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.resize_position_embeddings(**sizes)
    assert model.config.to_dict() == config
    assert all(same(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_base_model_resizes_too(variant):
    model = make_model(tiny_config(variant))
    model.vivit.resize_position_embeddings(num_frames=12)
    assert model.config.num_frames == 12
    assert model(make_clips(model.config)).logits.shape == (2, 5)


# Uniform frame sampling

UNIFORM = [name for name in CASES if name.startswith("uniform")]


@pytest.mark.parametrize("case", UNIFORM)
def test_longer_clips_keep_the_number_of_sampled_frames_and_so_every_weight(case):
    model = make_model(case_config(case))
    before = parameters_of(model)
    clips = make_clips(model.config, num_frames=20)
    at_forward = model(clips, interpolate_pos_encoding=True).logits
    model.resize_position_embeddings(num_frames=20)
    assert torch.equal(model(clips).logits, at_forward)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    seen = sample_frames_uniformly(20, 4)
    other = torch.zeros_like(clips)
    other[:, seen] = clips[:, seen]
    assert torch.equal(model(other).logits, at_forward)


@pytest.mark.parametrize("case", UNIFORM)
def test_more_sampled_frames_are_really_sampled(case, tmp_path):
    model = make_model(case_config(case))
    model.save_pretrained(tmp_path)
    sizes = {"num_frames": 16, "num_sampled_frames": 7}
    loaded = ViViTForVideoClassification.from_pretrained(tmp_path, **sizes)
    model.resize_position_embeddings(**sizes)
    clips = make_clips(model.config)
    seen = sample_frames_uniformly(16, 7)
    assert len(seen) == 7
    blank = clips.clone()
    blank[:, np.setdiff1d(np.arange(16), seen)] = 0
    for resized in (model, loaded):
        assert resized.config.num_sampled_frames == 7 and resized.config.grid_size[0] == 7
        assert resized.vivit.embeddings(clips)[0].shape[1] == 7
        assert torch.equal(resized(blank).logits, resized(clips).logits)
        for frame in seen:
            other = clips.clone()
            other[:, frame] += 1
            assert not torch.equal(resized(other).logits, resized(clips).logits), frame
    torch.testing.assert_close(loaded(clips).logits, model(clips).logits)
    model.save_pretrained(tmp_path / "resized")
    again = ViViTForVideoClassification.from_pretrained(tmp_path / "resized")
    torch.testing.assert_close(again(clips).logits, model(clips).logits)


@pytest.mark.parametrize("case", UNIFORM)
def test_where_the_official_rounding_takes_one_frame_more_the_model_has_one_step_more(case):
    num_frames, sampled = next(
        (total, n) for total in range(8, 200) for n in range(2, 12) if len(sample_frames_uniformly(total, n)) == n + 1
    )
    config = case_config(case, num_frames=num_frames, num_sampled_frames=sampled)
    assert config.grid_size[0] == sampled + 1
    model = make_model(config)
    clips = make_clips(config, batch=1)
    assert model.vivit.embeddings(clips)[0].shape[1] == sampled + 1
    assert model(clips).logits.shape == (1, 5)
    # and to a length without that frame
    model.resize_position_embeddings(num_frames=2 * sampled)
    assert model(make_clips(model.config)).logits.shape == (2, 5)


@pytest.mark.parametrize("case", UNIFORM)
def test_a_clip_shorter_than_the_sample_is_taken_whole(case):
    model = make_model(case_config(case))
    clips = make_clips(model.config, num_frames=3)
    assert model.vivit.embeddings(clips, interpolate_pos_encoding=True)[0].shape[1] == 3
    assert model(clips, interpolate_pos_encoding=True).logits.isfinite().all()
