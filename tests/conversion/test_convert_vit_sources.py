"""DINOv2, ViTs of timm and original JAX ViTs become ViViTs that compute the same; other models are refused."""

import json

import numpy as np
import pytest
import torch
from image_conversion import EXECUTED, Attack, assert_refused, converter, difference, jax_arrays
from safetensors.torch import save_file
from transformers import ViTModel
from vit_models import make_dinov2, make_vit, timm_arrays, timm_weights

from vivit_hf import ViViTConfig, ViViTVideoProcessor
from vivit_hf.conversion.scenic_reference import _Weights, attend, embed, transformer
from vivit_hf.initialisation.image_sources import read_image_source


@pytest.fixture
def convert(tmp_path, capfd):
    return converter(tmp_path, capfd)


# DINOv2


def test_a_folder_of_dinov2_computes_the_same(tmp_path, convert):
    dinov2 = make_dinov2()
    dinov2.save_pretrained(tmp_path / "dinov2")
    source = read_image_source(str(tmp_path / "dinov2"))
    image = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = dinov2(image).last_hidden_state
        torch.testing.assert_close(source.vit(image).last_hidden_state, expected, atol=1e-5, rtol=0)
    code, printed, errors, _ = convert(tmp_path / "dinov2", "--attention-type", "factorised_encoder")
    assert code == 0, errors
    total = len(dinov2.state_dict())
    assert difference(printed) < 1e-5 and f"arrays mapped {total - 1} of {total} " in printed
    assert "embeddings.mask_token (mask token)" in printed and "transformers (dinov2, safetensors)" in printed


def test_a_dinov2_with_swiglu_is_refused(tmp_path, convert):
    make_dinov2(use_swiglu_ffn=True).save_pretrained(tmp_path / "dinov2")
    assert_refused(convert(tmp_path / "dinov2"), tmp_path, "SwiGLU layers (use_swiglu_ffn)")


# timm


def timm_forward(weights, image, heads, activation=torch.nn.functional.gelu, eps=1e-6):
    """Compute `VisionTransformer.forward_features` of timm from timm's weights."""
    f = torch.nn.functional

    def norm(tokens, name):
        return f.layer_norm(tokens, tokens.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def linear(tokens, name):
        return f.linear(tokens, weights[f"{name}.weight"], weights[f"{name}.bias"])

    kernel = weights["patch_embed.proj.weight"]
    tokens = f.conv2d(image, kernel, weights.get("patch_embed.proj.bias"), stride=kernel.shape[-1]).flatten(2).mT
    prefix = [weights[name].expand(len(image), -1, -1) for name in ("cls_token", "reg_token") if name in weights]
    no_embed_class = weights["pos_embed"].shape[1] == tokens.shape[1]
    tokens = tokens + weights["pos_embed"] if no_embed_class else tokens
    tokens = torch.cat([*prefix, tokens], dim=1)
    tokens = tokens if no_embed_class else tokens + weights["pos_embed"]
    tokens = norm(tokens, "norm_pre") if "norm_pre.weight" in weights else tokens
    for index in range(sum(name.endswith("qkv.weight") for name in weights)):
        block = f"blocks.{index}"
        batch, length, width = tokens.shape
        qkv = linear(norm(tokens, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * (width // heads) ** -0.5).softmax(dim=-1)
        context = (scores @ v).transpose(1, 2).reshape(batch, length, width)
        tokens = tokens + linear(context, f"{block}.attn.proj") * weights.get(f"{block}.ls1.gamma", 1)
        hidden = activation(linear(norm(tokens, f"{block}.norm2"), f"{block}.mlp.fc1"))
        tokens = tokens + linear(hidden, f"{block}.mlp.fc2") * weights.get(f"{block}.ls2.gamma", 1)
    return norm(tokens, "norm")


@pytest.fixture
def timm(tmp_path):
    """Return a function that writes a folder in timm's layout, with changes to its weights and configuration."""

    def write(changes=None, **config):
        weights = timm_weights(make_vit(lambda config: ViTModel(config, add_pooling_layer=False)))
        weights |= {"head.weight": torch.ones(5, 24), "head.bias": torch.ones(5), **(changes or {})}
        folder = tmp_path / "timm"
        folder.mkdir()
        weights = {name: tensor.contiguous() for name, tensor in weights.items() if tensor is not None}
        save_file(weights, folder / "model.safetensors")
        stored = {
            "architecture": "vit_tiny_patch8_24",
            "model_args": {"num_heads": 4},
            "pretrained_cfg": {
                "input_size": [3, 24, 24],
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
                "interpolation": "bicubic",
                "crop_pct": 0.75,
            },
            **config,
        }
        (folder / "config.json").write_text(json.dumps(stored))
        return folder, weights

    return write


def test_timm_weights_compute_the_same_as_in_timm(timm, convert):
    folder, weights = timm()
    source = read_image_source(str(folder))
    image = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(
            source.vit(image).last_hidden_state, timm_forward(weights, image, heads=4), atol=1e-5, rtol=0
        )
    code, printed, errors, output = convert(folder)
    assert code == 0, errors
    assert difference(printed) < 1e-5
    assert "head.weight (classification head)" in printed and "timm (safetensors)" in printed
    assert f"arrays mapped {len(weights) - 2} of {len(weights)} " in printed
    processor = ViViTVideoProcessor.from_pretrained(output)
    assert processor.image_mean == [0.485, 0.456, 0.406] and processor.image_std == [0.229, 0.224, 0.225]
    assert processor.resample == 3 and processor.size == {"shortest_edge": 32}
    assert processor.crop_size == {"height": 24, "width": 24} and processor.do_center_crop


def test_layer_scale_of_timm_is_folded_exactly(timm, convert):
    gammas = {f"blocks.{block}.ls{branch}.gamma": torch.randn(24) for block in (0, 1) for branch in (1, 2)}
    folder, weights = timm(gammas)
    image = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        tokens = read_image_source(str(folder)).vit(image).last_hidden_state
        unscaled = timm_forward(
            {name: tensor for name, tensor in weights.items() if name not in gammas}, image, heads=4
        )
        torch.testing.assert_close(tokens, timm_forward(weights, image, heads=4), atol=1e-5, rtol=0)
    assert (tokens - unscaled).abs().max() > 0.1
    code, printed, errors, _ = convert(folder, "--attention-type", "factorised_encoder")
    assert code == 0, errors
    assert difference(printed) < 1e-5
    assert f"arrays mapped {len(weights) - 2} of {len(weights)} " in printed
    assert "4 arrays of LayerScale folded into the projections before them" in printed


def quick_gelu(tokens):
    return tokens * torch.sigmoid(1.702 * tokens)


def tanh_gelu(tokens):
    return torch.nn.functional.gelu(tokens, approximate="tanh")


# timm's architecture, its arrays, and the activation and epsilon that timm gives it
TIMM_MODELS = {
    "DINOv2 with registers": (
        "vit_small_patch14_reg4_dinov2",
        {"registers": 4, "class_position": False, "layer_scale": True},
        torch.nn.functional.gelu,
        1e-6,
    ),
    "CLIP": ("vit_base_patch16_clip_224", {"pre_norm": True}, torch.nn.functional.gelu, 1e-5),
    "OpenAI's CLIP": ("vit_base_patch16_clip_quickgelu_224", {"pre_norm": True}, quick_gelu, 1e-5),
    "SigLIP": (
        "vit_base_patch16_siglip_224",
        {"class_token": False, "pooling": True},
        torch.nn.functional.gelu,
        1e-6,
    ),
    "SigLIP so400m": ("vit_so400m_patch16_siglip_256", {"class_token": False, "pooling": True}, tanh_gelu, 1e-6),
    "DeiT III": (
        "deit3_small_patch16_224",
        {"class_position": False, "layer_scale": True},
        torch.nn.functional.gelu,
        1e-6,
    ),
    "FlexiViT": ("flexivit_base", {"class_position": False}, torch.nn.functional.gelu, 1e-6),
}


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_later_models_of_timm_compute_the_same_as_in_timm(name, tmp_path, convert):
    architecture, parts, activation, eps = TIMM_MODELS[name]
    weights = timm_arrays(**parts)
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    pretrained = {"input_size": [3, 24, 24], "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    stored = {"architecture": architecture, "model_args": {"num_heads": 4}, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(stored))
    vit = read_image_source(str(folder)).vit.double()
    image = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = timm_forward({n: t.double() for n, t in weights.items()}, image, 4, activation, eps)
        actual = vit(image).last_hidden_state
        actual = vit.post_layernorm(actual) if "CLIP" in name else actual  # which timm applies to all tokens
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)  # LayerScale is folded in float32

    code, printed, errors, output = convert(folder, "--attention-type", "factorised_encoder")
    assert code == 0, errors
    unused = {"attn_pool.latent", "attn_pool.q.weight"} & weights.keys()
    assert difference(printed) < 1e-5 and f"arrays mapped {len(weights) - len(unused)} of {len(weights)} " in printed
    assert all(f"{name} (attention-pooling head)" in printed for name in unused)
    config = ViViTConfig.from_pretrained(output)
    assert config.num_register_tokens == parts.get("registers", 0) and config.layer_norm_eps == eps
    assert config.pre_layernorm == parts.get("pre_norm", False) and config.patch_bias == ("pre_norm" not in parts)
    assert config.pooling == ("cls" if parts.get("class_token", True) else "mean")


def test_an_activation_that_no_configuration_tells_is_named(tmp_path, convert):
    save_file(timm_arrays(pre_norm=True), tmp_path / "clip.safetensors")
    code, printed, errors, _ = convert(tmp_path / "clip.safetensors", "--num-heads", 4)
    assert code == 0, errors
    assert "exact GELU is assumed: only timm's config.json tells" in printed


def test_a_single_file_of_timm_is_converted(timm, convert, tmp_path):
    folder, _ = timm()
    file = folder / "model.safetensors"
    assert_refused(convert(file), tmp_path, "24 wide", "--num-heads")
    code, printed, errors, _ = convert(file, "--num-heads", 4)
    assert code == 0, errors
    assert "no timm config.json" in printed and "values in [-1, 1]" in printed
    wrong, _, _, _ = convert(file, "--num-heads", 5)
    assert wrong == 1


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)]
)
def test_the_width_of_a_timm_model_determines_its_heads(tmp_path, width, heads):
    from vivit_hf.initialisation.timm_images import _heads

    found, notes = _heads(tmp_path, width, {}, None)
    assert found == heads and f"{heads} heads" in notes[0]
    assert _heads(tmp_path, 768, {"architecture": "vit_base_patch16_gap_224"}, None) == (16, [])  # others have 12


@pytest.mark.parametrize(
    ("changes", "config", "expected"),
    [
        ({"blocks.0.ls1.gamma": torch.ones(7)}, {}, ["blocks.0.ls1.gamma has the shape (7,)", "attn.proj.weight"]),
        ({"blocks.0.gamma_1": torch.ones(24)}, {}, ["LayerScale", "blocks.0.gamma_1"]),
        ({"reg_token": torch.ones(1, 4, 24)}, {}, ["register tokens", "reg_token", "multiple of 24, got 40"]),
        ({"dist_token": torch.ones(1, 1, 24)}, {}, ["distilled DeiT", "dist_token"]),
        ({"fc_norm.weight": torch.ones(24)}, {}, ["fc_norm.weight"]),
        ({"norm_pre.weight": torch.ones(24)}, {}, ["missing: the source of pre_layrnorm.bias"]),
        ({"blocks.0.mlp.fc1.weight": torch.ones(80, 24)}, {}, ["SwiGLU layers"]),
        ({"rope.periods": torch.ones(4)}, {}, ["rotary position embeddings", "rope.periods"]),
        ({"blocks.0.attn.q_norm.weight": torch.ones(6)}, {}, ["query-key normalisation"]),
        ({"blocks.0.adapter.weight": torch.ones(3)}, {}, ["no place for: blocks.0.adapter.weight"]),
        ({"blocks.1.mlp.fc2.bias": None}, {}, ["missing: the source of layers.1.mlp.fc2.bias"]),
        ({"norm.weight": torch.ones(7)}, {}, ["wrong shape: norm.weight gives (7,)"]),
        ({"cls_token": None}, {}, ["10 position embeddings"]),
        ({"pos_embed": torch.ones(1, 8, 24)}, {"pretrained_cfg": {}}, ["8 position embeddings"]),
        ({}, {"architecture": "vit_small_patch16_rope_ape_224"}, ["rotary position embeddings"]),
        ({}, {"architecture": "vit_small_patch16_dinov3"}, ["vit_small_patch16_dinov3", "rotary position embeddings"]),
        (
            {},
            {"architecture": "naflexvit_base_patch16_siglip"},
            ["naflexvit_base_patch16_siglip", "any shape (NaFlex)"],
        ),
        ({}, {"architecture": "swin_base_patch4_window7_224"}, ["swin_base_patch4_window7_224"]),
        (
            {},
            {"model_args": {"num_heads": 4, "act_layer": "silu"}},
            ["act_layer='silu' is not one of gelu"],
        ),
        ({}, {"model_args": {"block_fn": "ResPostBlock"}}, ["block_fn"]),
    ],
)
def test_other_models_of_timm_are_refused_by_name(timm, convert, tmp_path, changes, config, expected):
    folder, _ = timm(changes, **config)
    assert_refused(convert(folder), tmp_path, "timm", *expected)


# The original JAX files


def augreg(name):
    """Rename an array of scenic as in google-research/vision_transformer."""
    for theirs, ours in (("LayerNorm_1", "LayerNorm_2"), ("ProductAttention_0", "ProductAttention_1")):
        name = name.replace(theirs, ours)
    return name.replace("MlpBlock_0", "MlpBlock_3")


def big_vision(name):
    return "params/" + name.replace("Transformer/posembed_input/", "")


JAX_NAMINGS = {"vision_transformer": augreg, "big_vision": big_vision, "scenic": str}


@pytest.mark.parametrize("naming", JAX_NAMINGS)
def test_jax_weights_compute_the_same_as_in_flax(tmp_path, convert, naming):
    arrays = jax_arrays()
    file = tmp_path / "vit.npz"
    pre_logits = {"pre_logits/kernel": np.ones((24, 24), np.float32), "pre_logits/bias": np.ones(24, np.float32)}
    np.savez(file, **{JAX_NAMINGS[naming](name): array for name, array in {**arrays, **pre_logits}.items()})
    vit = read_image_source(str(file)).vit
    assert vit.config.hidden_act == "gelu_pytorch_tanh" and vit.config.layer_norm_eps == 1e-6

    images = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 1, 24, 24, 3)))
    weights = _Weights(arrays, torch.float64)
    one_frame = {"temporal_encoding_config": {"method": "temporal_sampling", "n_sampled_frames": 1}}
    tokens = embed(weights, one_frame, images)[:, 0]
    tokens = torch.cat([weights("cls").expand(2, 1, 24), tokens], dim=1)
    tokens = tokens + weights("Transformer/posembed_input/pos_embedding")
    expected = transformer(weights, "Transformer", tokens, attend)
    with torch.no_grad():
        actual = vit.double()(images[:, 0].permute(0, 3, 1, 2)).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)

    code, printed, errors, _ = convert(file, "--attention-type", "factorised_self_attention")
    assert code == 0, errors
    assert difference(printed) < 1e-5 and "JAX (.npz)" in printed and "values in [-1, 1]" in printed
    assert f"arrays mapped {len(arrays) - 3} of {len(arrays) + 2} " in printed  # without head, pre-logits, class token
    assert "head/kernel (classification head)" in printed and "pre_logits/bias (representation layer)" in printed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"MAPHead_0/probe": np.ones((1, 1, 24))}, ["attention pooling (MAPHead)", "MAPHead_0/probe"]),
        ({"img/embedding/kernel": np.ones((8, 8, 3, 24))}, ["two towers"]),
        ({"cls": None}, ["missing: cls"]),
        (
            {"Transformer/encoderblock_1/LayerNorm_2/bias": None},
            ["missing: the source of layers.1.layernorm_after.bias"],
        ),
        ({"Transformer/encoder_norm/bias": np.ones(3)}, ["wrong shape: Transformer/encoder_norm/bias gives (3,)"]),
        ({"stem/kernel": np.ones(3)}, ["no place for: stem/kernel"]),
        ({"embedding/kernel": None}, ["has no embedding/kernel"]),
        ({"head/bias": np.array([Attack()], dtype=object)}, ["not a complete .npz of plain arrays"]),
    ],
)
def test_other_npz_files_are_refused_by_name(tmp_path, convert, changes, expected):
    arrays = {augreg(name): array for name, array in jax_arrays().items()} | changes
    file = tmp_path / "other.npz"
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    assert_refused(convert(file), tmp_path, "other.npz", *expected)
    assert not EXECUTED


def test_bfloat16_arrays_of_an_npz_are_widened(tmp_path):
    """numpy has no bfloat16 and reads the bfloat16 arrays of big_vision as two untyped bytes."""
    arrays = jax_arrays()
    halves = {name: (array.view(np.uint32) >> 16).astype(np.uint16).view("V2") for name, array in arrays.items()}
    np.savez(tmp_path / "halves.npz", **halves)
    cls_token = read_image_source(str(tmp_path / "halves.npz")).vit.embeddings.cls_token
    torch.testing.assert_close(cls_token, torch.from_numpy(arrays["cls"]), atol=0, rtol=2**-7)
