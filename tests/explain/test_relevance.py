"""Where the model looked: promises of the maps, a plain computation to compare with, and clips with known answers."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from moving_shapes import MOTIONS, Scene
from tiny_models import case_config, make_clips, make_model, num_temporal_class_tokens, tiny_config, token_counts

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTModel, ViViTVideoProcessor, demo_model_path
from vivit_hf.configuration_vivit import ATTENTION_TYPES
from vivit_hf.explain.relevance import Relevance, attention_rollout, gradient_relevance


TWINS = {"image_size": (24, 32), "num_hidden_layers": 3}
METHODS = {"rollout": attention_rollout, "gradient": gradient_relevance}


@pytest.fixture(params=METHODS)
def explain(request):
    return METHODS[request.param]


def check_promises(relevance: Relevance, config: ViViTConfig, batch: int) -> None:
    assert relevance.space.shape == (batch, *config.grid_size) and relevance.time.shape == (batch, config.grid_size[0])
    assert relevance.space.dtype == relevance.time.dtype == torch.float32
    assert relevance.space.min() >= 0
    torch.testing.assert_close(relevance.space.sum(dim=(1, 2, 3)), torch.ones(batch))
    torch.testing.assert_close(relevance.time, relevance.space.sum(dim=(2, 3)))


def test_a_map_holds_shares_of_every_token(case, explain):
    config = case_config(case)
    model, clips = make_model(config), make_clips(config)
    relevance = explain(model, clips)
    check_promises(relevance, config, len(clips))
    assert relevance.space.std() > 1e-4 * relevance.space.mean()  # the same for all would promise as much
    one_by_one = [explain(model, clip[None]).space for clip in clips]
    torch.testing.assert_close(relevance.space, torch.cat(one_by_one))
    assert not torch.allclose(relevance.space[0], relevance.space[1], rtol=1e-3)


# The plain computation: one matrix of all tokens of a clip per sub-layer, and matrix products.


def dense_attentions(config: ViViTConfig, attentions: list[np.ndarray], encoder: str = "") -> list[np.ndarray]:
    """Per sub-layer one (tokens, tokens) matrix of a single clip, from (sequences, tokens, tokens), heads averaged."""
    time, space, _ = token_counts(config)
    if config.attention_type == "spatio_temporal" or encoder == "temporal":
        return [one for (one,) in attentions]
    if config.attention_type == "factorised_encoder":
        return attentions
    same_step = np.kron(np.eye(time), np.ones((space, space)))
    dense = []
    for number, one in enumerate(attentions):
        time_first = config.attention_type.endswith("dot_product_attention") or config.attention_order == "time_space"
        if (number % 2 == 0) == time_first:
            assert one.shape == (space, time, time)
            matrix = np.zeros((time, space, time, space))
            for place in range(space):
                matrix[:, place, :, place] = one[place]
            dense.append(matrix.reshape(time * space, time * space))
        else:
            assert one.shape == (time, space, space)
            dense.append(np.tile(one.reshape(time * space, space), (1, time)) * same_step)
    if config.attention_type == "factorised_dot_product_attention":
        dense = [(over_time + over_space) / 2 for over_time, over_space in zip(dense[::2], dense[1::2], strict=True)]
    return dense


def product(matrices: list[np.ndarray], kept: float, passed: float) -> np.ndarray:
    result = np.eye(len(matrices[0]))
    for matrix in matrices:
        result = (kept * np.eye(len(matrix)) + passed * matrix) @ result
    return result


def pooled_row(config: ViViTConfig, matrix: np.ndarray, num_registers: int) -> np.ndarray:
    return matrix[0] if config.pooling == "cls" else matrix[num_registers:].mean(axis=0)


def row_over_time(config: ViViTConfig, matrix: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The shares of the time steps: the class token's row, or the rows weighted as tokens are in the pooling."""
    if weights is not None:
        return weights @ matrix
    return matrix[0][1:] if num_temporal_class_tokens(config) else matrix.mean(axis=0)


def attention_pooling_weights(model, clips) -> np.ndarray | None:
    """The softmax over the time steps of one clip, (time,), float64; None without a learned query."""
    if model.vivit.temporal_pooler is None:
        return None
    with torch.no_grad():
        tokens = model.vivit(clips).last_hidden_state[0].double().numpy()
    scores = tokens @ model.vivit.temporal_pooler.query.detach().double().numpy() / np.sqrt(tokens.shape[1])
    return np.exp(scores) / np.exp(scores).sum()


def plain_relevance(
    config: ViViTConfig, attentions: list[np.ndarray], is_rollout: bool, weights: np.ndarray | None = None
) -> np.ndarray:
    """
    (time, height, width) of one clip; `attentions` as the model gives them, heads averaged, and the `weights` of
    attention pooling.
    """
    (time, space, prefix), registers = token_counts(config), config.num_register_tokens
    kept, passed = (0.5, 0.5) if is_rollout else (1.0, 1.0)
    if config.attention_type != "factorised_encoder":
        matrix = product(dense_attentions(config, attentions), kept, passed)
        row = pooled_row(config, matrix if is_rollout else matrix - np.eye(len(matrix)), registers)[prefix:]
        return (row / row.sum()).reshape(config.grid_size)
    spatial, temporal = attentions[: config.num_hidden_layers], attentions[config.num_hidden_layers :]
    steps = np.full(time, 1 / time)
    if temporal:
        matrix = product(dense_attentions(config, temporal, "temporal"), kept, passed)
        steps = row_over_time(config, matrix, weights)
    result = np.empty((time, space))
    for step in range(time):
        matrix = product([one[step] for one in spatial], kept, passed)
        row = pooled_row(config, matrix if is_rollout else matrix - np.eye(len(matrix)), registers)[prefix:]
        result[step] = steps[step] * (row / row.sum() if is_rollout else row)
    return (result / result.sum()).reshape(config.grid_size)


def test_rollout_is_the_product_of_whole_matrices(unmerged_case):
    config = case_config(unmerged_case)
    model, clips = make_model(config), make_clips(config, batch=1)
    with torch.no_grad():
        attentions = model(clips, output_attentions=True).attentions
    means = [one.double().mean(dim=1).numpy() for one in attentions]
    expected = plain_relevance(config, means, True, attention_pooling_weights(model, clips))
    relevance = attention_rollout(model, clips)
    np.testing.assert_allclose(relevance.space[0].numpy(), expected, rtol=1e-4)


def test_gradient_relevance_is_the_product_of_whole_matrices(unmerged_case):
    config = case_config(unmerged_case)
    model, clips = make_model(config), make_clips(config, batch=1)
    outputs = model(clips, output_attentions=True)
    gradients = torch.autograd.grad(outputs.logits[0, 3], outputs.attentions)
    weighed = [
        (gradient * attention).clamp(min=0).mean(dim=1).detach().double().numpy()
        for gradient, attention in zip(gradients, outputs.attentions, strict=True)
    ]
    expected = plain_relevance(config, weighed, False, attention_pooling_weights(model, clips))
    relevance = gradient_relevance(model, clips, class_index=3)
    np.testing.assert_allclose(relevance.space[0].numpy(), expected, rtol=1e-3, atol=1e-7)


def test_the_baseline_without_temporal_encoder_rolls_out_to_equal_moments():
    config = case_config("average_pool_baseline")
    relevance = attention_rollout(make_model(config), make_clips(config))
    torch.testing.assert_close(relevance.time, torch.full((2, 4), 0.25))


def test_attention_pooling_without_temporal_encoder_rolls_out_to_its_weights():
    config = case_config("average_pool_baseline", temporal_pooling="attention")
    model, clips = make_model(config), make_clips(config, batch=1)
    relevance, expected = attention_rollout(model, clips), attention_pooling_weights(model, clips)
    np.testing.assert_allclose(relevance.time[0].numpy(), expected, rtol=1e-4)
    assert expected.std() > 1e-3


MERGED = ["spatio_temporal", "factorised_encoder", "registers_mean_pooling", "registers_as_in_dinov2", "mean_pooling"]


@pytest.mark.parametrize("case", MERGED)
def test_a_map_of_merged_tokens_holds_shares_of_every_patch(case, explain):
    config = case_config(case, merge_tokens=[6, 4], num_hidden_layers=2)
    model, clips = make_model(config), make_clips(config)
    check_promises(explain(model, clips), config, len(clips))
    assert not model.vivit.encoder.layer[0].merging._forward_hooks


@pytest.mark.parametrize("case", MERGED)
def test_patches_that_merge_have_the_relevance_of_the_plain_model(case):
    """Equal patches without position embeddings: merged or not, they have equal shares in the output."""
    config = case_config(case, **TWINS)
    half = 24 if case in ("spatio_temporal", "registers_mean_pooling") else 6
    plain, merging = make_model(config), make_model(case_config(case, **{**TWINS, "merge_tokens": [half, 0, 0]}))
    clips = make_clips(config).unflatten(-1, (-1, 2, 8))  # (..., pairs of patches, 2, patch width)
    clips = clips[..., :1, :].expand_as(clips).flatten(-3)
    for model in (plain, merging):
        torch.nn.init.zeros_(model.vivit.embeddings.position_embeddings)
    expected = attention_rollout(plain, clips)
    torch.testing.assert_close(attention_rollout(merging, clips).space, expected.space, rtol=1e-4, atol=1e-7)
    assert expected.space.std() > 1e-4 * expected.space.mean()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_rollout_of_merged_tokens_is_the_product_of_whole_matrices(pooling):
    """Merging is a matrix as well: the mean of tokens, weighted by their sizes."""
    config = tiny_config("spatio_temporal", num_hidden_layers=3, merge_tokens=[20, 9, 5], pooling=pooling)
    model, clips = make_model(config), make_clips(config, batch=1)
    merges = []
    for layer in model.vivit.encoder.layer:
        layer.merging.register_forward_hook(lambda module, inputs, output: merges.append((inputs[2], *output[1:])))
    with torch.no_grad():
        attentions = model(clips, output_attentions=True).attentions
    count = attentions[0].shape[-1]
    product, copies = np.eye(count), np.arange(count)
    for attention, (sizes, merged_sizes, successors) in zip(attentions, merges, strict=True):
        places = successors[0].numpy()
        matrix = np.zeros((merged_sizes.shape[1], len(places)))
        own = np.ones(len(places)) if sizes is None else sizes[0].numpy()
        matrix[places, np.arange(len(places))] = own / merged_sizes[0].numpy()[places]
        product = matrix @ (0.5 * np.eye(len(places)) + 0.5 * attention[0].double().mean(dim=0).numpy()) @ product
        copies = places[copies]
    product = product[copies]  # the output has every token again
    prefix = config.num_prefix_tokens
    row = product[0, prefix:] if pooling == "cls" else product.mean(axis=0)
    expected = (row / row.sum()).reshape(config.grid_size)
    np.testing.assert_allclose(attention_rollout(model, clips).space[0].numpy(), expected, rtol=1e-4)


def test_maps_do_not_depend_on_the_attention_implementation(config, explain):
    clips = make_clips(config)
    maps = []
    for name in ("eager", "sdpa"):
        model = make_model(config)
        model.set_attn_implementation(name)
        maps.append(explain(model, clips).space)
        assert model.config._attn_implementation == name
    torch.testing.assert_close(maps[0], maps[1])


def test_a_model_without_classifier_has_a_rollout(config):
    model, clips = make_model(config), make_clips(config)
    torch.testing.assert_close(attention_rollout(model.vivit, clips).space, attention_rollout(model, clips).space)


def state_of(model: torch.nn.Module) -> list[Any]:
    modes = [module.training for module in model.modules()]
    # Those of transformers' recorder stay, asleep.
    hooks = [
        hook
        for module in model.modules()
        for hook in module._forward_hooks.values()
        if hook.__module__ != "transformers.utils.output_capturing"
    ]
    return [modes, hooks, [(parameter.grad, parameter.requires_grad) for parameter in model.parameters()]]


def test_the_model_is_left_as_it_was(config, explain):
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.5
    model, clips = make_model(config), make_clips(config)
    expected = explain(model, clips).space
    model.train()
    model.vivit.encoder.layer[0].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    model.classifier.weight.grad = gradient = torch.ones_like(model.classifier.weight)
    before, values = state_of(model), [parameter.clone() for parameter in model.parameters()]
    torch.testing.assert_close(explain(model, clips).space, expected)  # and so without dropout
    assert state_of(model) == before
    assert model.classifier.weight.grad is gradient and bool((gradient == 1).all())
    assert all(torch.equal(*pair) for pair in zip(values, model.parameters(), strict=True))
    assert clips.grad is None and not clips.requires_grad


def test_the_model_is_left_as_it_was_by_an_exception(config, explain):
    model, clips = make_model(config).train(), make_clips(config)
    before = state_of(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.vivit.layernorm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        explain(model, clips)
    handle.remove()
    assert state_of(model) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_found_where_the_caller_wants_none(config, context):
    model, clips = make_model(config), make_clips(config)
    expected = gradient_relevance(model, clips).space
    with context():
        given = clips.clone()
        found = gradient_relevance(model.requires_grad_(False), given).space
    torch.testing.assert_close(found, expected)


def test_heads_and_layers_are_not_all_kept(config):
    """The recorder of transformers has run before, and must not keep the attention of every head now."""
    model, clips = make_model(config), make_clips(config, batch=1)
    expected = attention_rollout(model, clips).space
    assert all(one is not None for one in model(clips, output_attentions=True).attentions)
    kept = []
    handle = model.vivit.register_forward_hook(lambda module, inputs, output: kept.append(output.attentions))
    torch.testing.assert_close(attention_rollout(model, clips).space, expected)
    handle.remove()
    assert kept == [()]
    assert len(model(clips, output_attentions=True).attentions) > 0


def test_none_is_the_predicted_class(model, clips):
    with torch.no_grad():
        predicted = model(clips).logits.argmax(dim=-1)
    by_default = gradient_relevance(model, clips).space
    torch.testing.assert_close(by_default, gradient_relevance(model, clips, predicted).space)
    torch.testing.assert_close(by_default, gradient_relevance(model, clips, predicted.tolist()).space)
    other = gradient_relevance(model, clips, (predicted + 1) % 5).space
    assert (other - by_default).abs().sum() > 0.05


def test_one_class_counts_for_all_clips(model, clips):
    expected = gradient_relevance(model, clips, torch.tensor([2, 2])).space
    torch.testing.assert_close(gradient_relevance(model, clips, 2).space, expected)
    torch.testing.assert_close(gradient_relevance(model, clips, np.int64(2)).space, expected)


def test_groups_of_labels_are_explained_by_their_place_in_all_logits():
    config = tiny_config("factorised_encoder", num_labels=5, label_groups={"noun": 3, "verb": 2})
    model, clips = make_model(config), make_clips(config)
    maps = [gradient_relevance(model, clips, index).space for index in range(5)]
    for one in maps:
        torch.testing.assert_close(one.sum(dim=(1, 2, 3)), torch.ones(2))
    assert (maps[1] - maps[4]).abs().sum() > 0.05
    with torch.no_grad():
        logits = model(clips).logits
    likeliest = torch.cat([logits[:, :3].softmax(-1), logits[:, 3:].softmax(-1)], dim=-1).argmax(dim=-1)
    torch.testing.assert_close(
        gradient_relevance(model, clips).space, gradient_relevance(model, clips, likeliest).space
    )


def test_a_class_that_nothing_speaks_for_has_equal_shares(model, clips):
    torch.nn.init.zeros_(model.classifier.weight)
    space = gradient_relevance(model, clips, 0).space
    torch.testing.assert_close(space, torch.full_like(space, 1 / space[0].numel()))


def test_an_empty_batch_is_refused(config, explain):
    with pytest.raises(ValueError, match="hold no clip"):
        explain(make_model(config), make_clips(config, batch=0))


def test_bfloat16_models_have_float32_maps(config, explain):
    model, clips = make_model(config), make_clips(config)
    expected = explain(model, clips).space
    relevance = explain(model.bfloat16(), clips)
    check_promises(relevance, config, 2)
    assert (relevance.space - expected).abs().sum(dim=(1, 2, 3)).max() < 0.3


def test_errors_name_the_value_and_what_was_expected(model, clips, explain):
    with pytest.raises(ValueError, match=r"expects clips of \(8, 24, 40\).*but got \(8, 24, 24\)"):
        explain(model, clips[..., :24])
    with pytest.raises(ValueError, match=r"must be \(batch, frames, channels, height, width\).*\(8, 3, 24, 40\)"):
        explain(model, clips[0])
    with pytest.raises(ValueError, match=r"torch\.uint8 look like raw frames"):
        explain(model, torch.zeros(clips.shape, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"Expected a ViViTModel or ViViTForVideoClassification.*Linear"):
        explain(torch.nn.Linear(2, 2), clips)
    with pytest.raises(ValueError, match=r"NaN or infinite numbers\. So do its `pixel_values`"):
        explain(model, torch.stack([clips[0], torch.full_like(clips[1], torch.nan)]))


@pytest.mark.parametrize("index", [5, -1, 1.0, True, [0, 1, 2], [0, 9], torch.tensor([0.0, 1.0]), "walk"])
def test_classes_that_do_not_exist_are_refused(model, clips, index):
    with pytest.raises(ValueError, match=r"`class_index=.*` must be one whole number from 0 to 4, or one for each of"):
        gradient_relevance(model, clips, index)


def test_without_classes_there_is_no_gradient_relevance(config, clips):
    for model in (make_model(config, ViViTModel), make_model(case_config(config.attention_type, num_labels=0))):
        with pytest.raises(TypeError, match=rf"There are no classes to explain.*got {type(model).__name__}"):
            gradient_relevance(model, clips)


# Known answers: the colour of a small moving shape on coloured noise is the class, so only the shape's tokens tell it.

COLOURS = np.array([(230, 60, 60), (60, 230, 60), (70, 70, 240)])
FRAMES, SIDE, PATCH = 8, 48, 8


def draw_clips(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`pixel_values`, classes, and whether the shape is in a token: (count, time, height, width)."""
    clips, labels, masks = [], rng.integers(0, len(COLOURS), count), []
    for label in labels:
        scene = Scene(
            background=rng.uniform(0, 255, (SIDE, SIDE, 3)),
            shape=str(rng.choice(["square", "disc", "hexagon"])),
            colour=COLOURS[label],
            radius=rng.uniform(3, 5),
            angle=rng.uniform(0, 2 * np.pi),
            start=rng.uniform(0, SIDE, 2),
            speed=rng.uniform(0.5, 1.5, 2) * SIDE / FRAMES,
        )
        motion = str(rng.choice(list(MOTIONS)))
        clips.append(scene.render(motion, FRAMES))
        stencil = dataclasses.replace(scene, background=np.zeros((SIDE, SIDE, 3)), colour=np.full(3, 255.0))
        masks.append(stencil.render(motion, FRAMES)[..., 0])
    pixel_values = torch.from_numpy(np.stack(clips)).float().movedim(-1, 2) / 127.5 - 1
    cells = np.stack(masks).reshape(count, FRAMES // 2, 2, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
    is_there = cells.mean(axis=(2, 4, 6)) > 0.05 * 255
    return pixel_values, torch.from_numpy(labels), torch.from_numpy(is_there)


def known_config(attention_type: str) -> ViViTConfig:
    return tiny_config(
        attention_type,
        num_frames=FRAMES,
        image_size=SIDE,
        tubelet_size=(2, PATCH, PATCH),
        intermediate_size=64,
        num_labels=len(COLOURS),
        initializer_range=0.15,
        **({"num_temporal_layers": 1} if attention_type == "factorised_encoder" else {}),
    )


@pytest.fixture(scope="module")
def training_clips():
    return draw_clips(np.random.default_rng(0), 512)


@pytest.fixture(scope="module", params=ATTENTION_TYPES)
def trained(request, training_clips):
    """A model of each variant that has learned the colours, in 4 to 8 seconds on one thread."""
    pixel_values, labels, _ = training_clips
    torch.manual_seed(0)
    model, steps, rate = ViViTForVideoClassification(known_config(request.param)), 120, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (32,))
        loss = model(pixel_values[chosen], labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def concentration(relevance: Relevance, is_there: torch.Tensor) -> float:
    """The share of the map on the shape over the share of the tokens that it covers, mean over clips; 1 is chance."""
    mass, area = (relevance.space * is_there).sum(dim=(1, 2, 3)), is_there.float().mean(dim=(1, 2, 3))
    return float((mass / area).mean())


def test_maps_find_what_tells_the_class(trained):
    clips, labels, is_there = draw_clips(np.random.default_rng(99), 32)
    with torch.no_grad():
        accuracy = (trained(clips).logits.argmax(dim=-1) == labels).float().mean()
    assert accuracy > 0.8
    by_gradient, by_rollout = gradient_relevance(trained, clips), attention_rollout(trained, clips)
    assert concentration(by_gradient, is_there) > 1.5
    # Rollout knows no class, and half of every layer is its residual connection: it is blunter by nature.
    assert concentration(by_rollout, is_there) > 1.1
    for relevance in (by_gradient, by_rollout):  # the shapes of other clips are elsewhere
        assert 0.8 < concentration(relevance, is_there.roll(1, dims=0)) < 1.1


def test_maps_of_untrained_models_find_nothing(variant):
    torch.manual_seed(0)
    model = ViViTForVideoClassification(known_config(variant)).eval()
    clips, _, is_there = draw_clips(np.random.default_rng(99), 32)
    assert 0.8 < concentration(attention_rollout(model, clips), is_there) < 1.1


def test_maps_of_the_demo_model_find_the_moving_shape():
    """The direction is the class, on backgrounds of all kinds: only the shape tells it."""
    folder = demo_model_path()
    model = ViViTForVideoClassification.from_pretrained(folder).eval()
    processor = ViViTVideoProcessor.from_pretrained(folder)
    videos, masks, labels = [], [], []
    for number in range(24):
        scene = Scene.draw(np.random.default_rng([12345, number]), num_frames=24, height=80, width=96)
        labels.append(list(MOTIONS)[number % 4])
        stencil = dataclasses.replace(scene, background=np.zeros((80, 96, 3)), colour=np.full(3, 255.0))
        videos.append(scene.render(labels[-1], 24))
        masks.append(stencil.render(labels[-1], 24))
    clips = processor(videos)["pixel_values"]
    coverage = processor(masks, do_normalize=False)["pixel_values"][:, :, :1]
    is_there = torch.nn.functional.avg_pool3d(coverage.transpose(1, 2), tuple(model.config.tubelet_size))[:, 0] > 0.02
    assert is_there.shape[1:] == model.config.grid_size
    with torch.no_grad():
        predicted = [model.config.id2label[index] for index in model(clips).logits.argmax(dim=-1).tolist()]
    assert np.mean([one == label for one, label in zip(predicted, labels, strict=True)]) > 0.9
    for explain, margin in ((gradient_relevance, 2.5), (attention_rollout, 2.0)):
        relevance = explain(model, clips)
        assert concentration(relevance, is_there) > margin
        assert 0.8 < concentration(relevance, is_there.roll(4, dims=0)) < 1.3  # where another clip has its shape
