"""Masked pretraining: what the encoders see, what they learn from, the masks, the loss, and the checkpoints."""

import logging
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import CASES, case_config, checkpoint_activations, make_clips, make_model, tiny_config
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForVideoClassification
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from vivit_hf import ViViTConfig, ViViTForPreTraining, ViViTForVideoClassification, ViViTModel
from vivit_hf.modeling_vivit import VISIBLE_ENCODERS, random_tube_masks, sine_cosine_positions


PRETRAINED = [case for case, fields in CASES.items() if fields["attention_type"] in VISIBLE_ENCODERS]
OTHERS = ["factorised_self_attention", "factorised_dot_product_attention"]


def make_masks(config, batch=2, seed=0):
    _, height, width = config.grid_size
    return random_tube_masks(batch, height * width, 0.6, torch.Generator().manual_seed(seed))


def masked_pixels(config, masks):
    """Whether each pixel of the clips lies under a mask, bool (batch, 1, 1, height, width)."""
    _, rows, columns = config.grid_size
    _, patch_height, patch_width = config.tubelet_size
    pixels = masks.reshape(-1, rows, columns).repeat_interleave(patch_height, 1).repeat_interleave(patch_width, 2)
    return pixels[:, None, None]


def normalised_patches(clips, config, masks):
    """The targets by numpy, one patch after another: (batch, time, masked places, values)."""
    (kt, kh, kw), (steps, _, columns) = config.tubelet_size, config.grid_size
    clips = clips.numpy().astype(np.float64)
    if config.embedding_type == "uniform_frame_sampling":
        step = config.num_frames / (config.num_sampled_frames + 1)
        clips = clips[:, np.clip(np.round(np.arange(step, config.num_frames, step)).astype(int), 0, len(clips[0]) - 1)]
    targets = []
    for clip, mask in zip(clips, masks.numpy(), strict=True):
        for t in range(steps):
            for place in np.flatnonzero(mask):
                row, column = divmod(place, columns)
                patch = clip[t * kt : (t + 1) * kt, :, row * kh : (row + 1) * kh, column * kw : (column + 1) * kw]
                values = np.stack(
                    [(one - one.mean()) / (one.std(ddof=1) + 1e-6) for one in patch.swapaxes(0, 1)], axis=-1
                )
                targets.append(values.reshape(-1))  # (time, height, width, channels)
    return np.reshape(targets, (len(clips), steps, -1, kt * kh * kw * config.num_channels))


# What the encoders see and learn


@pytest.mark.parametrize("case", PRETRAINED)
def test_masked_pixels_have_no_influence_on_the_encoder(case):
    config = case_config(case)
    model = make_model(config, ViViTForPreTraining)
    masks = make_masks(config)
    clips = make_clips(config).requires_grad_()
    entered = []
    model.decoder.embedding.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(clips, masks)
    (entered[0] * torch.randn_like(entered[0])).sum().backward()
    gradient, masked = clips.grad, masked_pixels(config, masks).expand_as(clips)
    assert (gradient[masked] == 0).all()
    if case not in ("max_pooling_pre_logits",) and "uniform" not in case:
        assert (gradient[~masked] != 0).float().mean() > 0.99


@pytest.mark.parametrize("case", PRETRAINED)
def test_all_parameters_of_both_encoders_get_a_gradient(case):
    model = make_model(case_config(case), ViViTForPreTraining)
    model(make_clips(model.config), make_masks(model.config)).loss.backward()
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    # Softmax cancels the bias of the keys.
    without = [name for name, one in trained.items() if one is None or (not one.any() and "k_proj.bias" not in name)]
    assert not without
    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "pre_logits" in name or "temporal_pooler" in name}


@pytest.mark.parametrize("case", ["factorised_encoder", "mean_pooling", "other_temporal_widths"])
def test_a_step_reaches_the_prediction_of_another_step_through_the_temporal_encoder(case):
    model = make_model(case_config(case), ViViTForPreTraining)
    clips, masks = make_clips(model.config).requires_grad_(), make_masks(model.config)
    model(clips, masks).logits[:, -1].square().sum().backward()
    assert clips.grad[:, 0].any()
    vivit = model.vivit
    for layer in vivit.temporal_encoder.layer:
        torch.nn.init.zeros_(layer.attention.o_proj.weight)
    clips.grad = None
    model(clips, masks).logits[:, -1].square().sum().backward()
    assert not clips.grad[:, 0].any()


def test_each_prediction_depends_on_its_own_place():
    model = make_model(tiny_config("spatio_temporal"), ViViTForPreTraining)
    masks = make_masks(model.config)
    logits = model(make_clips(model.config), masks).logits.flatten(1, 2)
    distances = torch.cdist(logits, logits) + torch.eye(logits.shape[1])
    assert distances.min() > 1e-3


# Masks


@settings(max_examples=60)
@given(
    batch=st.integers(1, 4),
    space=st.integers(2, 300),
    ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_masks_have_the_exact_count_and_follow_the_seed(batch, space, ratio, seed):
    masks = [random_tube_masks(batch, space, ratio, torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert masks[0].shape == (batch, space) and masks[0].dtype == torch.bool
    assert masks[0].sum(dim=1).tolist() == [min(max(int(ratio * space), 1), space - 1)] * batch
    assert torch.equal(*masks)


def test_masks_are_uniform_over_places_and_differ_between_clips():
    masks = random_tube_masks(4000, 20, 0.9, torch.Generator().manual_seed(0)).float()
    assert (masks.mean(dim=0) - 0.9).abs().max() < 0.03  # six standard deviations
    assert len(torch.unique(masks, dim=0)) > 180  # of the 190 masks


def test_a_single_place_cannot_be_masked():
    with pytest.raises(ValueError, match="smaller tubelets"):
        random_tube_masks(2, 1, 0.9)


@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_encoder"])
def test_the_model_masks_the_same_places_in_all_steps(case):
    """The predictions and the visible tokens are those of one mask for all steps."""
    model = make_model(case_config(case, mask_ratio=0.8), ViViTForPreTraining)
    outputs = model(make_clips(model.config))
    time, height, width = model.config.grid_size
    assert outputs.bool_masked_pos.sum(dim=1).tolist() == [int(0.8 * height * width)] * 2
    values = 2 * 8 * 8 * 3
    assert outputs.logits.shape == (2, time, int(0.8 * height * width), values)
    again = model(make_clips(model.config), outputs.bool_masked_pos)
    assert torch.equal(again.loss, outputs.loss) and torch.equal(again.logits, outputs.logits)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(2, 14, dtype=torch.bool), r"\(batch, space\) = \(2, 15\)"),
        (torch.zeros(2, 15), "float32"),
        (torch.zeros(2, 15, dtype=torch.bool), r"masks \[0\] of 15"),
        (torch.ones(2, 15, dtype=torch.bool), r"masks \[15\] of 15"),
        (torch.arange(30).reshape(2, 15) < 5, r"masks \[0, 5\] of 15"),
    ],
)
def test_unusable_masks_are_errors(masks, message):
    model = ViViTForPreTraining(tiny_config("spatio_temporal"))
    with pytest.raises(ValueError, match=message):
        model(make_clips(model.config), masks)


# The loss


@pytest.mark.parametrize("case", PRETRAINED)
def test_the_loss_equals_its_definition_in_numpy(case):
    config = case_config(case)
    model = make_model(config, ViViTForPreTraining)
    clips, masks = make_clips(config), make_masks(config)
    with torch.no_grad():
        outputs = model(clips, masks)
    targets = normalised_patches(clips, config, masks)
    assert outputs.logits.shape == targets.shape
    expected = np.square(outputs.logits.double().numpy() - targets).mean()
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_constant_patch_has_zero_targets():
    config = tiny_config("factorised_encoder")
    model = make_model(config, ViViTForPreTraining)
    with torch.no_grad():
        outputs = model(torch.full((1, 8, 3, 24, 40), 0.25))
    assert outputs.loss.item() == pytest.approx(outputs.logits.square().mean().item())


@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_encoder"])
def test_the_loss_falls(case):
    torch.manual_seed(0)
    config = case_config(case, initializer_range=0.1)
    model = ViViTForPreTraining(config)
    clips, masks = make_clips(config, batch=2), make_masks(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        losses.append(model(clips, masks).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_bfloat16_weights_give_a_float32_loss():
    config = tiny_config("factorised_encoder")
    model = make_model(config, ViViTForPreTraining)
    clips, masks = make_clips(config), make_masks(config)
    with torch.no_grad():
        exact = model(clips, masks).loss
        rounded = model.bfloat16()(clips, masks).loss
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_encoder"])
def test_gradient_checkpointing_changes_no_gradient(case):
    gradients = []
    for is_checkpointed in (False, True):
        model = make_model(case_config(case), ViViTForPreTraining).train()
        if is_checkpointed:
            checkpoint_activations(model)
        model(make_clips(model.config), make_masks(model.config)).loss.backward()
        gradients.append([one.grad for one in model.parameters() if one.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


# The decoder and the configuration


def test_the_positions_of_the_decoder_are_those_of_videomae():
    found = sine_cosine_positions(40, 22, like=torch.zeros(()))
    torch.testing.assert_close(found, get_sinusoid_encoding_table(40, 22)[0])


def test_the_default_decoder_has_half_of_the_heads_and_a_quarter_of_the_layers():
    assert ViViTConfig().decoder_sizes == (384, 3, 6)
    assert tiny_config("spatio_temporal", num_attention_heads=1).decoder_sizes == (32, 1, 1)
    config = tiny_config(
        "factorised_encoder",
        decoder_hidden_size=24,
        decoder_num_hidden_layers=3,
        decoder_num_attention_heads=2,
    )
    decoder = ViViTForPreTraining(config).decoder
    assert (decoder.mask_token.shape[-1], len(decoder.layer), decoder.layer[0].attention.num_heads) == (24, 3, 2)


def test_a_width_that_the_heads_of_the_decoder_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"`decoder_hidden_size=25` .* `decoder_num_attention_heads=2`"):
        tiny_config("spatio_temporal", decoder_hidden_size=25)


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5])
def test_a_mask_ratio_outside_0_and_1_is_an_error(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        tiny_config("spatio_temporal", mask_ratio=ratio)


@pytest.mark.parametrize("attention_type", OTHERS)
def test_models_3_and_4_are_refused(attention_type):
    with pytest.raises(ValueError, match=r"at one place.*'spatio_temporal', 'factorised_encoder'"):
        ViViTForPreTraining(tiny_config(attention_type))


def test_other_clip_sizes_can_be_pretrained_on():
    model = make_model(tiny_config("factorised_encoder"), ViViTForPreTraining)
    clips = make_clips(model.config, num_frames=12, image_size=(32, 32))
    outputs = model(clips, interpolate_pos_encoding=True)
    assert outputs.logits.shape[:3] == (2, 6, int(0.9 * 16))


def test_clips_of_another_size_are_errors_that_name_the_sizes():
    model = make_model(tiny_config("factorised_encoder"), ViViTForPreTraining)
    with pytest.raises(ValueError, match=r"expects clips of \(8, 24, 40\) .*, but got \(8, 8, 8\)"):
        model(make_clips(model.config, image_size=(8, 8)))
    with pytest.raises(ValueError, match=r"\(8, 7, 40\) .* has no whole patch of \(2, 8, 8\)"):
        model(make_clips(model.config, image_size=(7, 40)), interpolate_pos_encoding=True)


def test_hidden_states_and_attentions_end_with_those_of_the_decoder():
    model = make_model(tiny_config("factorised_encoder"), ViViTForPreTraining)
    outputs = model(
        make_clips(model.config), make_masks(model.config), output_hidden_states=True, output_attentions=True
    )
    assert len(outputs.attentions) == 2 + 2 + 1
    assert outputs.attentions[0].shape == (2 * 4, 4, 7, 7)  # 6 of 15 places are visible
    assert outputs.attentions[2].shape == (2, 4, 5, 5)
    assert outputs.attentions[-1].shape == (2 * 4, 2, 16, 16)
    assert outputs.hidden_states[-1].shape == (2 * 4, 16, 16)


# Checkpoints


@pytest.fixture
def pretrained(tmp_path):
    model = make_model(tiny_config("factorised_encoder"), ViViTForPreTraining)
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("vivit_hf"), "propagate", True)
    return caplog


def test_a_checkpoint_keeps_its_predictions(pretrained):
    model, folder = pretrained
    loaded = AutoModelForPreTraining.from_pretrained(folder)
    assert type(loaded) is ViViTForPreTraining
    clips, masks = make_clips(model.config), make_masks(model.config)
    with torch.no_grad():
        assert torch.equal(loaded(clips, masks).logits, model(clips, masks).logits)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForVideoClassification])
def test_other_models_start_from_the_encoders_and_name_what_they_leave_behind(pretrained, auto, warnings):
    model, folder = pretrained
    loaded = auto.from_pretrained(folder)
    vivit = loaded if auto is AutoModel else loaded.vivit
    for name, parameter in vivit.named_parameters():
        assert torch.equal(parameter, model.vivit.get_parameter(name)), name
    assert f"Left out the decoder of masked pretraining ({len(model.decoder.state_dict())} tensors)" in warnings.text


def test_unknown_keys_are_still_errors(pretrained):
    _, folder = pretrained
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "vivit.other.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    for cls in (ViViTForPreTraining, ViViTForVideoClassification, ViViTModel):
        with pytest.raises(ValueError, match=r"without a place in the model: (vivit\.)?other\.weight"):
            cls.from_pretrained(folder)


def test_a_part_of_a_decoder_is_an_error(pretrained):
    _, folder = pretrained
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.mask_token"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"not in the checkpoint: decoder\.mask_token"):
        ViViTForPreTraining.from_pretrained(folder)


def test_a_decoder_of_another_size_is_an_error(pretrained):
    _, folder = pretrained
    with pytest.raises(ValueError, match=r"another shape.*decoder"):
        ViViTForPreTraining.from_pretrained(folder, decoder_hidden_size=8)


@pytest.mark.parametrize("cls", [ViViTModel, ViViTForVideoClassification])
def test_pretraining_starts_from_other_models_with_a_new_decoder(cls, tmp_path):
    model = make_model(tiny_config("spatio_temporal"), cls)
    model.save_pretrained(tmp_path)
    loaded = ViViTForPreTraining.from_pretrained(tmp_path)
    for name, parameter in model.base_model.named_parameters():
        assert torch.equal(parameter, loaded.vivit.get_parameter(name)), name
    assert loaded.decoder.mask_token.any() and not loaded.decoder.projection.bias.any()


# Speed


@pytest.mark.slow
@pytest.mark.parametrize("attention_type", sorted(VISIBLE_ENCODERS))
def test_a_step_takes_at_most_a_third_of_a_step_of_the_classifier(attention_type):
    """Forward and backward, from 64 places per time step on; the two take turns."""
    config = ViViTConfig(
        attention_type=attention_type,
        num_frames=16,
        image_size=128,
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        num_labels=10,
    )
    clips, labels = make_clips(config, batch=2), torch.zeros(2, dtype=torch.long)
    pretraining, classifier = ViViTForPreTraining(config), ViViTForVideoClassification(config)

    def seconds(model, **inputs):
        model.zero_grad()
        start = time.process_time()
        model(clips, **inputs).loss.backward()
        return time.process_time() - start

    ratios = [seconds(pretraining) / seconds(classifier, labels=labels) for _ in range(8)]
    assert np.median(ratios[1:]) <= 1 / 3
