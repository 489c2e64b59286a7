"""Clips of different lengths in a batch: `frame_mask`."""

import peft
import pytest
import torch
from masked_clips import MASKED_CASES, STEPS, cut, frame_mask_of, kept_frames, masked_config, sampled, with_nan_pixels
from tiny_models import (
    ATTENTION_TYPES,
    MODEL_CLASSES,
    case_config,
    checkpoint_activations,
    make_clips,
    make_model,
    tiny_config,
    token_counts,
)
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vivit_hf import ViViTForPreTraining, ViViTModel
from vivit_hf.inference import blockwise_attention, optimize, restore
from vivit_hf.modeling_vivit import (
    BIASED_ATTENTION,
    eager_attention_forward,
    mask_frames,
    pool_tokens,
)


@pytest.fixture(params=MASKED_CASES)
def masked_case(request):
    """A variant, or a way in which a variant computes or pools differently."""
    return request.param


# The same as the shorter clip


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_logits_are_those_of_a_model_cut_to_the_visible_steps(masked_case, implementation):
    """Each clip of the batch has a length of its own, and masked pixels are NaN: nothing reads them."""
    model = make_model(masked_config(masked_case, attn_implementation=implementation))
    clips, mask = make_clips(model.config, len(STEPS)), frame_mask_of(model.config, STEPS)
    logits = model(with_nan_pixels(clips, mask), frame_mask=mask).logits
    for index, steps in enumerate(STEPS):
        kept = steps.nonzero().flatten()
        expected = cut(model, kept)(kept_frames(model, clips[index], kept)).logits[0]
        torch.testing.assert_close(logits[index], expected, atol=1e-5, rtol=1e-5)
        alone = model(clips[index : index + 1], frame_mask=mask[index : index + 1]).logits[0]
        torch.testing.assert_close(alone, logits[index], atol=1e-5, rtol=1e-5)
    assert (logits[:-1] - model(clips).logits[:-1]).abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_are_those_of_the_cut_model_and_zero_at_masked_pixels(masked_case, implementation):
    model = make_model(masked_config(masked_case, attn_implementation=implementation)).double().train()
    clips = make_clips(model.config, 1).double().requires_grad_()
    mask, kept = frame_mask_of(model.config, STEPS[:1]), STEPS[0].nonzero().flatten()
    model(clips, frame_mask=mask, labels=torch.tensor([2])).loss.backward()
    short = cut(model, kept).train()
    frames = kept_frames(model, clips[0].detach(), kept).requires_grad_()
    short(frames, labels=torch.tensor([2])).loss.backward()
    gradients = kept_frames(model, clips.grad[0], kept)
    torch.testing.assert_close(gradients, frames.grad, atol=1e-10, rtol=1e-8)
    assert gradients.abs().max() > 1e-6 and not clips.grad[~mask].any()
    expected = dict(short.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.shape == expected[name].shape:
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-10, rtol=1e-8, msg=name)


def test_masked_pixels_are_nothing_to_dropout_and_stochastic_depth(variant):
    config = tiny_config(
        variant,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
        drop_path_rate=0.3,
        label_groups={"noun": 3, "verb": 2},
    )
    model, clips, mask = make_model(config).train(), make_clips(config, 5), frame_mask_of(config, STEPS)
    losses, labels = [], torch.tensor([[0, 1], [1, 0], [2, 1], [0, 0], [1, 1]])
    for given in (clips, with_nan_pixels(clips, mask), clips):
        torch.manual_seed(3 + len(losses) // 2)
        losses.append(model(given, frame_mask=mask, labels=labels).loss)
    assert losses[0] == losses[1] != losses[2] and losses[0].isfinite()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cls", MODEL_CLASSES)
@torch.no_grad()
def test_all_visible_is_no_mask_bit_for_bit(case, cls, implementation):
    model = make_model(case_config(case, attn_implementation=implementation), cls)
    clips = make_clips(model.config)
    outputs, expected = model(clips, frame_mask=torch.ones(2, 8).bool()), model(clips)
    assert all(torch.equal(one, other) for one, other in zip(outputs.to_tuple(), expected.to_tuple(), strict=True))


# Frames and steps


DRAWN = [
    # (embedding, frame mask, frames shown, visible steps); the first and the fourth are those of the docstring
    ("tubelet", "01 10 01 00", "bbcccfff", "1110"),
    ("tubelet", "00 01 11 11", "ddddefgh", "0111"),
    ("tubelet", "11 10 00 01", "abccccch", "1101"),
    ("uniform_frame_sampling", "11111000", "abcdeeee", "1100"),
    ("uniform_frame_sampling", "01010001", "bbbddddh", "0100"),
]


@pytest.mark.parametrize(("embedding", "mask", "shown", "steps"), DRAWN)
def test_frames_and_steps_are_as_drawn(embedding, mask, shown, steps):
    config = tiny_config("spatio_temporal", embedding_type=embedding)
    clip = make_clips(config, 1)
    frame_mask = torch.tensor([[letter == "1" for letter in mask.replace(" ", "")]])
    pixel_values, visible = mask_frames(clip, frame_mask, config)
    assert torch.equal(pixel_values, clip[:, ["abcdefgh".index(letter) for letter in shown]])
    assert "".join(str(int(step)) for step in visible[0]) == steps


@torch.no_grad()
def test_a_masked_frame_of_a_visible_step_shows_the_one_before(variant):
    model = make_model(tiny_config(variant))
    clips, mask = make_clips(model.config), torch.ones(2, 8).bool()
    mask[0, 3], mask[1, 4] = False, False
    filled = clips.clone()
    filled[0, 3], filled[1, 4] = clips[0, 2], clips[1, 3]
    assert torch.equal(model(with_nan_pixels(clips, mask), frame_mask=mask).logits, model(filled).logits)


@torch.no_grad()
def test_longer_clips_have_masks_of_their_length(variant):
    """The 13th frame fills no tubelet: it is left out, whether visible or not."""
    model = make_model(tiny_config(variant))
    clips, mask = make_clips(model.config, num_frames=13), torch.zeros(2, 13).bool()
    mask[:, :6], mask[1, 12] = True, True
    logits = model(clips, interpolate_pos_encoding=True, frame_mask=mask).logits
    mask[:, 12] = ~mask[:, 12]
    assert torch.equal(model(clips, interpolate_pos_encoding=True, frame_mask=mask).logits, logits)
    assert (model(clips, interpolate_pos_encoding=True).logits - logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"no visible time step in the clips \[0, 1\]"):
        model(clips, interpolate_pos_encoding=True, frame_mask=torch.arange(13).expand(2, -1) == 12)


def test_pooling_leaves_masked_tokens_out():
    tokens = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [9.0, 9.0]]])
    visible = torch.tensor([[True, True, False]])
    expected = {"mean": [2, -3], "max": [3, -2], "sum": [4, -6], "concatenate": [1, -4, 3, -2, 0, 0], "cls": [1, -4]}
    for pooling, numbers in expected.items():
        assert pool_tokens(tokens, pooling, visible).tolist() == [numbers]
        assert pool_tokens(tokens.bfloat16(), pooling, visible).tolist() == [numbers]


# What is computed


@torch.no_grad()
def test_model_2_does_not_encode_masked_steps():
    model = make_model(tiny_config("factorised_encoder", attn_implementation="eager"))
    clips, mask, sequences = make_clips(model.config, len(STEPS)), frame_mask_of(model.config, STEPS), []
    for layer in model.vivit.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: sequences.append(len(args[0])))
    logits = model(clips, frame_mask=mask).logits
    assert sequences == [int(STEPS.sum())] * 2 == [13] * 2
    outputs = model(clips, frame_mask=mask, output_hidden_states=True)
    assert sequences[2:] == [20] * 2  # so that hidden states have the documented shapes
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_hidden_states_and_attentions_keep_their_shapes_and_masked_keys_weigh_nothing(variant, implementation):
    model = make_model(tiny_config(variant, attn_implementation=implementation))
    clips, mask = make_clips(model.config, len(STEPS)), frame_mask_of(model.config, STEPS)
    flags = {"output_hidden_states": True, "output_attentions": True}
    plain, outputs = model(clips, **flags), model(clips, frame_mask=mask, **flags)
    for what in ("hidden_states", "attentions"):
        assert [tensor.shape for tensor in outputs[what]] == [tensor.shape for tensor in plain[what]]
        assert all(tensor.isfinite().all() for tensor in outputs[what])
    time, space, prefix = token_counts(model.config)
    checked = 0
    for weights in outputs.attentions:
        visible = STEPS
        if weights.shape[-1] == prefix + time * space:
            visible = torch.cat([STEPS.new_ones(5, prefix), STEPS.repeat_interleave(space, dim=1)], dim=1)
        elif weights.shape[-1] == time + 1:
            visible = torch.cat([STEPS.new_ones(5, 1), STEPS], dim=1)
        elif weights.shape[-1] != time:
            continue  # over space
        visible = visible.repeat_interleave(len(weights) // 5, dim=0)
        masked = weights.masked_select(~visible[:, None, None])
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert len(masked) and not masked.any()
        checked += 1
    assert checked == 2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=str)
def test_half_precision_is_finite_and_close(masked_case, dtype, tolerance, implementation):
    model = make_model(masked_config(masked_case, attn_implementation=implementation))
    clips, mask = make_clips(model.config, len(STEPS)), frame_mask_of(model.config, STEPS)
    expected = model(clips, frame_mask=mask).logits.detach()
    outputs = model.to(dtype)(clips, frame_mask=mask, labels=torch.arange(5))
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype
    assert (outputs.logits.float() - expected).abs().max() < tolerance * expected.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(variant, use_reentrant):
    config = tiny_config(variant)
    clips, mask, gradients = make_clips(config, len(STEPS)), frame_mask_of(config, STEPS), []
    for checkpoints in (False, True):
        model = make_model(config).train()
        if checkpoints:
            checkpoint_activations(model, {"use_reentrant": use_reentrant})
        model(clips, frame_mask=mask, labels=torch.arange(5)).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ATTENTION_TYPES, "uniform_frames_factorised_encoder", "concatenated_steps"])
@pytest.mark.parametrize("how", ["compiled", "exported", "traced"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_a_graph_takes_any_mask_and_gives_nan_for_a_clip_with_nothing_visible(case, how):
    torch.compiler.reset()
    model = make_model(masked_config(case))
    clips, mask = make_clips(model.config, 4), frame_mask_of(model.config, STEPS[1:])
    inputs = {"pixel_values": clips, "frame_mask": torch.ones_like(mask)}
    if how == "compiled":
        graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    elif how == "exported":
        graph = torch.export.export(model, (), inputs).module()
    else:
        graph = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
    for given in (mask, mask.flip(0), torch.ones_like(mask)):
        expected = model(clips, frame_mask=given).logits
        logits = graph(pixel_values=with_nan_pixels(clips, given), frame_mask=given)["logits"]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    mask[1] = False
    logits = graph(pixel_values=clips, frame_mask=mask)["logits"]
    assert logits[1].isnan().all() and logits[[0, 2, 3]].isfinite().all()


# Refused by name


@pytest.mark.parametrize("cls", MODEL_CLASSES)
def test_masks_of_another_kind_are_errors(variant, cls):
    model = make_model(tiny_config(variant), cls)
    clips = make_clips(model.config)
    for mask in (torch.ones(2, 8), torch.ones(2, 4).bool(), torch.ones(1, 8).bool(), [[True] * 8] * 2):
        with pytest.raises(ValueError, match=r"`frame_mask` must be a bool tensor \(batch, frames\) = \(2, 8\)"):
            model(clips, frame_mask=mask)
    with pytest.raises(ValueError, match=r"no visible time step in the clips \[1\] of 2"):
        model(clips, frame_mask=torch.tensor([[True], [False]]).expand(2, 8))
    with pytest.raises(ValueError, match="expects clips of"):
        model(clips[:, :6], frame_mask=torch.ones(2, 6).bool())


def test_sampled_frames_that_are_all_masked_are_nothing_visible():
    config = masked_config("uniform_frames")
    mask = torch.ones(1, 8).bool()
    mask[:, sampled(config)] = False
    with pytest.raises(ValueError, match=r"no visible time step in the clips \[0\] of 1"):
        make_model(config)(make_clips(config, 1), frame_mask=mask)


@torch.no_grad()
def test_attention_that_takes_no_mask_is_refused_by_name(variant):
    model = make_model(tiny_config(variant))
    clips, mask = make_clips(model.config), torch.ones(2, 8).bool()
    ALL_ATTENTION_FUNCTIONS.register("no_masks", eager_attention_forward)
    try:
        model.config._attn_implementation = "no_masks"
        expected = model(clips).logits
        assert torch.equal(model(clips, frame_mask=mask).logits, expected)  # nothing is masked
        mask[1, :2] = False
        with pytest.raises(ValueError, match=r"attn_implementation='no_masks'.*masks.*set_attn_implementation"):
            model(clips, frame_mask=mask)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["no_masks"]
    assert not any("flash" in name or "flex" in name for name in BIASED_ATTENTION)


# Steps between the encoders of Model 2

MODEL_2 = [case for case, fields in MASKED_CASES.items() if fields["attention_type"] == "factorised_encoder"]


@pytest.mark.parametrize("case", MODEL_2)
def test_masked_steps_give_the_logits_of_masked_clips(case):
    model = make_model(masked_config(case))
    clips, mask = make_clips(model.config, len(STEPS)), frame_mask_of(model.config, STEPS)
    expected = model(clips, frame_mask=mask).logits
    steps = model.vivit.encode_steps(with_nan_pixels(clips, mask), mask)
    torch.testing.assert_close(model(steps=steps, frame_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)
    unseen = steps.masked_fill(~STEPS[:, :, None], float("nan")).detach().requires_grad_()
    outputs = model(steps=unseen, frame_mask=mask, labels=torch.arange(5))
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)
    outputs.loss.backward()
    assert not unseen.grad[~STEPS].any() and unseen.grad[STEPS].any(dim=1).all()


def test_masked_steps_repeat_the_nearest_visible_one():
    model = make_model(tiny_config("factorised_encoder"))
    clips, mask = make_clips(model.config, len(STEPS)), frame_mask_of(model.config, STEPS)
    steps, whole = model.vivit.encode_steps(clips, mask), model.vivit.encode_steps(clips)
    shown = torch.tensor([[0, 1, 2, 2], [1, 1, 2, 3], [0, 0, 0, 3], [2, 2, 2, 2], [0, 1, 2, 3]])
    torch.testing.assert_close(steps, whole[torch.arange(5)[:, None], shown])
    assert torch.equal(model.vivit.encode_steps(clips, torch.ones_like(mask)), whole)


def test_compiled_and_plain_steps_agree():
    model = make_model(tiny_config("factorised_encoder"))
    clips, mask = make_clips(model.config, len(STEPS)), frame_mask_of(model.config, STEPS)
    steps = model.vivit.encode_steps(clips)
    graph = torch.export.export(model, (), {"steps": steps, "frame_mask": torch.ones_like(mask)}).module()
    logits = graph(steps=steps, frame_mask=mask).logits
    torch.testing.assert_close(logits, model(steps=steps, frame_mask=mask).logits, atol=1e-5, rtol=1e-5)
    mask[1] = False
    logits = graph(steps=steps, frame_mask=mask).logits
    assert logits[1].isnan().all() and logits[[0, 2, 3, 4]].isfinite().all()


def test_wrong_masks_of_steps_are_refused():
    model = make_model(tiny_config("factorised_encoder"))
    steps, mask = torch.zeros(2, 4, 32), torch.ones(2, 8).bool()
    with pytest.raises(ValueError, match=r"frames\) = \(2, frames\).*float32 \(2, 8\)"):
        model(steps=steps, frame_mask=mask.float())
    with pytest.raises(ValueError, match=r"has 3 time steps, but `steps` of shape \(2, 4, 32\) have 4"):
        model(steps=steps, frame_mask=mask[:, :6])
    with pytest.raises(ValueError, match="no visible time step in the clips \\[1\\] of 2"):
        model(steps=steps, frame_mask=torch.tensor([[True], [False]]).expand(2, 8))
    with pytest.raises(ValueError, match="`steps` take no `attention_mask`"):
        model(steps=steps, attention_mask=torch.ones(2, 61))


@pytest.mark.parametrize("case", ["spatio_temporal", "factorised_self_attention", "factorised_dot_product_attention"])
def test_steps_that_no_clip_of_a_batch_shows_are_not_computed(case):
    model, sizes = make_model(tiny_config(case)), []
    clips, mask = make_clips(model.config, 2), frame_mask_of(model.config, STEPS[[0, 3]])
    hook = model.vivit.encoder.layer[0].register_forward_hook(lambda _, inputs, output: sizes.append(inputs[0].shape))
    logits = model(with_nan_pixels(clips, mask), frame_mask=mask).logits
    whole = model(clips, frame_mask=mask, output_hidden_states=True)
    hook.remove()
    short, full = ((2, 46, 32), (2, 61, 32)) if case == "spatio_temporal" else ((2, 3, 15, 32), (2, 4, 15, 32))
    assert sizes == [short, full] and whole.hidden_states[0].shape == full
    torch.testing.assert_close(logits, whole.logits, atol=1e-5, rtol=1e-5)
    assert model.vivit(clips, frame_mask=mask).last_hidden_state.shape[1] == (61 if case == "spatio_temporal" else 60)


@pytest.mark.parametrize("variant", ["spatio_temporal", "factorised_encoder"])
def test_pretraining_refuses_masks(variant):
    config = tiny_config(variant)
    with pytest.raises(ValueError, match="Pretraining takes no `frame_mask`"):
        ViViTForPreTraining(config)(make_clips(config), frame_mask=torch.ones(2, 8).bool())


@torch.no_grad()
def test_merged_tokens_of_model_1_refuse_masks_until_they_are_restored():
    model = make_model(tiny_config("spatio_temporal"))
    clips, mask = make_clips(model.config, len(STEPS)), frame_mask_of(model.config, STEPS)
    expected = model(clips, frame_mask=mask).logits
    optimize(model, merge_tokens=4)
    with pytest.raises(ValueError, match=r"merge_tokens.*vivit_hf\.inference\.restore\(model\)"):
        model(clips, frame_mask=mask)
    restore(model)
    assert torch.equal(model(clips, frame_mask=mask).logits, expected)


# Faster modules


@pytest.mark.parametrize("implementation", ["sdpa", "blockwise"])
@torch.no_grad()
def test_optimised_models_mask_as_plain_ones_do(masked_case, implementation, monkeypatch):
    monkeypatch.setattr(blockwise_attention, "LEAST_SCORES", 0)
    model = make_model(masked_config(masked_case))
    clips, mask = make_clips(model.config, len(STEPS)), frame_mask_of(model.config, STEPS)
    expected = model(clips, frame_mask=mask)
    assert optimize(model).changes
    model.set_attn_implementation(implementation)
    clips = with_nan_pixels(clips, mask)
    torch.testing.assert_close(model(clips, frame_mask=mask).logits, expected.logits, atol=1e-5, rtol=1e-5)


# Training


class MaskedClips(torch.utils.data.Dataset):
    """Items as a data set with a column `frame_mask` has them."""

    def __init__(self, config):
        self.clips, self.mask = make_clips(config, 4), frame_mask_of(config, STEPS[:4])

    def __len__(self):
        return 4

    def __getitem__(self, index):
        clip = self.clips[index].masked_fill(~self.mask[index][:, None, None, None], float("nan"))
        return {"pixel_values": clip, "frame_mask": self.mask[index], "labels": index}


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
def test_trainer_passes_the_column_on(variant, tmp_path, adapted):
    config = tiny_config(variant)
    model, data = make_model(config), MaskedClips(config)
    expected = model(data.clips, frame_mask=data.mask, labels=torch.arange(4)).loss.item()
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    arguments = TrainingArguments(
        tmp_path, max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
        label_names=["labels"], remove_unused_columns=not adapted,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert 0 < trainer.evaluate()["eval_loss"] < expected


def test_the_backbone_alone_takes_masks(variant):
    model = make_model(tiny_config(variant), ViViTModel)
    clips, mask = make_clips(model.config, len(STEPS)), frame_mask_of(model.config, STEPS)
    outputs = model(with_nan_pixels(clips, mask), frame_mask=mask)
    assert outputs.last_hidden_state.isfinite().all() and outputs.pooler_output.isfinite().all()
