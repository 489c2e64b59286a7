"""From an image ViT: the official results, transformers' own ViT run beside ours, and a report that is complete."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from golden import GOLDEN
from tiny_models import ATTENTION_TYPES, make_clips, randomise
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from vit_models import make_vit

from vivit_hf import ViViTForVideoClassification, ViViTModel
from vivit_hf.conversion.scenic_weights import config_from_scenic, state_dict_from_scenic
from vivit_hf.embeddings_vivit import resample_position_embeddings
from vivit_hf.initialisation.from_image import (
    TEMPORAL_ATTENTION_INITS,
    TUBELET_INITS,
    config_from_vit,
    image_to_video_position_embeddings,
    initialise_from_vit,
)


def npz(name):
    file = np.load(GOLDEN / name)
    return file, json.loads(str(file["config"]))


def make_vivit(vit, attention_type, cls=ViViTModel, **overrides):
    temporal = {"num_temporal_layers": 2} if attention_type == "factorised_encoder" else {}
    torch.manual_seed(0)
    config = config_from_vit(vit.config, attention_type=attention_type, num_frames=8, **temporal, **overrides)
    return randomise(cls(config), seed=6).eval()


# The official results


OFFICIAL_KERNELS = {
    "central_frame": "central_frame_initializer",
    "filter_inflation": "average_frame_initializer",
    "approximate_rank_pooling": "average_arp_frame_initializer",
}


@pytest.mark.parametrize("frames", [2, 4])
@pytest.mark.parametrize("init", TUBELET_INITS)
def test_tubelet_kernels_are_the_official_ones(init, frames):
    file, _ = npz("init_embedding.npz")
    kernel = torch.from_numpy(file["inputs/restored_kernel_2d"]).permute(3, 2, 0, 1)
    official = torch.from_numpy(file[f"outputs/{OFFICIAL_KERNELS[init]}/t{frames}/kernel"]).permute(4, 3, 0, 1, 2)
    ours = TUBELET_INITS[init](kernel, frames)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, official.float(), atol=1e-7, rtol=1e-6)


_, POSITION_CASES = npz("init_posemb.npz")
RESTORED = [case for case in POSITION_CASES if case != "not_restored"]


@pytest.mark.parametrize("case", RESTORED)
def test_position_embeddings_are_the_official_ones(case):
    file, configs = npz("init_posemb.npz")
    old, target, official = (
        torch.from_numpy(file[f"{case}/{part}"])
        for part in ("inputs/restored", "inputs/target", "outputs/pos_embedding")
    )
    old_prefix = int(configs[case]["restored_classifier"] == "token")
    new_prefix = int(configs[case]["target_classifier"] == "token")
    if old.shape == target.shape:  # official: taken over whole, whatever the first token is
        assert torch.equal(official, old)
        if old_prefix == new_prefix:
            side = int((old.shape[1] - old_prefix) ** 0.5)
            grid = (1, side, side)
            assert torch.equal(resample_position_embeddings(old, grid, grid, old_prefix), official)
        return
    if configs[case]["is_temporal"]:
        old_grid, new_grid = ((len_ - old_prefix, 1, 1) for len_ in (old.shape[1], target.shape[1]))
        ours = resample_position_embeddings(old, new_grid, old_grid, old_prefix, mode="align_corners_linear")
    else:
        side = int((old.shape[1] - old_prefix) ** 0.5)
        tokens = target.shape[1] - new_prefix
        time = {"tile": tokens // side**2, "resize": 1, "resize_tile": 4}[configs[case]["mode"]]
        new_side = int((tokens // time) ** 0.5)
        class_position = (old if old_prefix else target)[:, :1] if new_prefix else None
        ours = image_to_video_position_embeddings(
            old,
            (time, new_side, new_side),
            (side, side),
            old_prefix_tokens=old_prefix,
            class_position=class_position,
            mode="align_corners_linear",
        )
    torch.testing.assert_close(ours, official, atol=1e-6, rtol=0)


def vit_from_official(params):
    """transformers' ViT with the weights of an official image ViT."""
    layers = len({name.split("/")[1] for name in params if "encoderblock" in name})
    kernel, mlp = params["embedding/kernel"], params["Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"]
    heads = params["Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"].shape[1]
    positions = params["Transformer/posembed_input/pos_embedding"].shape[1] - 1
    config = ViTConfig(
        hidden_size=kernel.shape[-1],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp.shape[1],
        image_size=int(positions**0.5) * kernel.shape[0],
        patch_size=kernel.shape[0],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    vit = ViTModel(config, add_pooling_layer=False)
    state = {}
    for name, array in params.items():
        tensor = torch.from_numpy(array)
        name = name.removeprefix("Transformer/").replace("/", ".")
        if name.startswith("output_projection"):
            continue
        if name == "embedding.kernel":
            state["embeddings.patch_embeddings.projection.weight"] = tensor.permute(3, 2, 0, 1)
            continue
        is_out = ".out." in name
        for pattern, target in (
            (r"^embedding\.bias", "embeddings.patch_embeddings.projection.bias"),
            (r"^cls$", "embeddings.cls_token"),
            (r"^posembed_input\.pos_embedding", "embeddings.position_embeddings"),
            (r"^encoder_norm", "layernorm"),
            (r"^encoderblock_(\d+)", r"layers.\1"),
            (r"LayerNorm_0", "layernorm_before"),
            (r"LayerNorm_1", "layernorm_after"),
            (r"MultiHeadDotProductAttention_0\.(query|key|value|out)", lambda m: f"attention.{m[1][0]}_proj"),
            (r"MlpBlock_0\.Dense_0", "mlp.fc1"),
            (r"MlpBlock_0\.Dense_1", "mlp.fc2"),
            (r"(kernel|scale)$", "weight"),
        ):
            name = re.sub(pattern, target, name)
        if tensor.ndim == 3 and "attention" in name:
            tensor = tensor.flatten(0, 1).T if is_out else tensor.flatten(1).T
        elif tensor.ndim == 2:
            tensor = tensor.flatten() if "attention" in name and name.endswith("bias") else tensor.T
        state[name] = tensor
    vit.load_state_dict(state, strict=True)
    return vit.eval()


def params_of(file, prefix):
    return {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}


@pytest.mark.parametrize("case", ["spacetime", "fe", "fsa", "fdpa"])
def test_a_whole_image_vit_goes_over_as_officially(case):
    """Official: temporal attention of Model 3 copied. The target's own weights stay where the ViT has nothing."""
    file, configs = npz("init_full_model.npz")
    video = torch.from_numpy(file[f"{case}/inputs/video"]).permute(0, 1, 4, 2, 3)
    config = config_from_scenic(configs[case]["model"], num_frames=8, image_size=24, num_labels=7)
    vivit = ViViTForVideoClassification(config).eval()
    vivit.load_state_dict(state_dict_from_scenic(params_of(file, f"{case}/inputs/target/"), config))
    report = initialise_from_vit(
        vivit, vit_from_official(params_of(file, "inputs/restored/")), temporal_attention_init="copy"
    )

    official = state_dict_from_scenic(params_of(file, f"{case}/outputs/"), config)
    ours = vivit.state_dict()
    if case == "fe":
        # The official code looks for "cls" and finds only "cls_SpatialTransformer", and so leaves the class token as it
        # is. On purpose not here: the spatial encoder would start without the token that it was trained with.
        name = "vivit.embeddings.cls_token"
        assert torch.equal(ours[name], torch.from_numpy(file["inputs/restored/cls"]))
        assert not torch.equal(official[name], ours[name])
        ours[name].copy_(official[name])
    for name, expected in official.items():
        torch.testing.assert_close(ours[name], expected.float(), atol=1e-6, rtol=0, msg=name)
    with torch.no_grad():
        logits = vivit(video).logits
    torch.testing.assert_close(logits, torch.from_numpy(file[f"{case}/outputs_logits"]), atol=1e-5, rtol=0)
    unchanged = state_dict_from_scenic(params_of(file, f"{case}/inputs/target/"), config)
    for name in report.newly_initialised():
        assert torch.equal(ours[name], unchanged[name]), name


@pytest.mark.parametrize("init", ["copy", "random"])
def test_an_encoder_block_goes_over_as_officially(init):
    """`init_temporal_transformer` true and false; the other switches of the official code have no user here."""
    file, _ = npz("init_encoderblock.npz")
    case = {"copy": "vit_to_fsa_temporal_true", "random": "vit_to_fsa_temporal_false"}[init]
    full, configs = npz("init_full_model.npz")
    block, config_json = "Transformer/encoderblock_0/", configs["fsa"]["model"]
    config = config_from_scenic({**config_json, "num_layers": 1}, num_frames=8, image_size=24, num_labels=7)

    def one_layer(params, new_block):
        rest = {name: array for name, array in params.items() if "encoderblock" not in name}
        return {**rest, **{block + name: array for name, array in new_block.items()}}

    target = one_layer(params_of(full, "fsa/inputs/target/"), params_of(file, "inputs/target/"))
    vivit = ViViTForVideoClassification(config).eval()
    vivit.load_state_dict(state_dict_from_scenic(target, config))
    vit = vit_from_official(one_layer(params_of(full, "inputs/restored/"), params_of(file, "inputs/vit/")))
    initialise_from_vit(vivit, vit, temporal_attention_init=init)
    official = one_layer(params_of(full, "fsa/outputs/"), params_of(file, f"{case}/outputs/"))
    for name, expected in state_dict_from_scenic(official, config).items():
        torch.testing.assert_close(vivit.state_dict()[name], expected.float(), atol=1e-6, rtol=0, msg=name)


# transformers' own ViT, run beside ours


def compare_spatial_tokens(vit, num_frames):
    """Model 2: the spatial class token of each tubelet is the ViT's class token for its central frame."""
    config = config_from_vit(
        vit.config, attention_type="factorised_encoder", num_frames=num_frames, num_temporal_layers=1
    )
    vivit = ViViTModel(config).eval()
    initialise_from_vit(vivit, vit)
    clips = make_clips(config, batch=1)
    with torch.no_grad():
        ours = vivit.encode_space(*vivit.embeddings(clips))
        frames = [vit(clips[:, index]).last_hidden_state[:, 0] for index in range(1, num_frames, 2)]
    torch.testing.assert_close(ours, torch.stack(frames, dim=1), atol=1e-5, rtol=0)


def compare_single_tubelet(vit):
    """Model 1 on one tubelet: all tokens are the ViT's for its central frame."""
    vivit = ViViTModel(config_from_vit(vit.config, num_frames=2)).eval()
    initialise_from_vit(vivit, vit)
    clips = make_clips(vivit.config, batch=1)
    with torch.no_grad():
        ours, theirs = vivit(clips).last_hidden_state, vit(clips[:, 1]).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_equals_transformers_vit_on_the_central_frame():
    compare_spatial_tokens(make_vit(), num_frames=8)
    compare_single_tubelet(make_vit())


def test_layer_scale_is_folded_exactly():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
    vit = randomise(Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2, intermediate_size=48)), seed=5).eval()
    assert vit.state_dict()["encoder.layer.0.layer_scale1.lambda1"].std() > 0.1
    compare_spatial_tokens(vit, num_frames=8)
    compare_single_tubelet(vit)
    report = initialise_from_vit(ViViTModel(config_from_vit(vit.config, num_frames=2)), vit)
    assert report.counts()["scaled"] == 2 * 4 and report.vit_keys["encoder.layer.1.layer_scale2.lambda1"] == "used"


@pytest.mark.parametrize("order", ["space_time", "time_space"])
def test_model_3_with_zero_output_equals_the_stack_without_temporal_attention(order):
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_self_attention", attention_order=order)
    initialise_from_vit(vivit, vit)
    compare_with_spatial_stack(vivit, vit, make_clips(vivit.config))


def compare_with_spatial_stack(vivit, vit, clips):
    with torch.no_grad():
        ours = vivit(clips).last_hidden_state
        # the plain spatial stack: transformers' layers on the tokens of each time step
        tokens, _ = vivit.embeddings(clips)
        grid = tokens.flatten(0, 1)
        for layer in vit.layers:
            grid = layer(grid)
        theirs = vit.layernorm(grid).unflatten(0, tokens.shape[:2]).flatten(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def in21k_layout(folder):
    """A B/16 of random weights in the exact file layout of google/vit-base-patch16-224-in21k."""
    config = ViTConfig()
    assert (config.hidden_size, config.hidden_act, config.layer_norm_eps) == (768, "gelu", 1e-12)
    torch.manual_seed(0)
    vit = ViTModel(config).eval()
    for name, parameter in vit.named_parameters():
        if "position" in name or "cls_token" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    vit.save_pretrained(folder)
    return vit


def test_full_size_base_model_equals_transformers_vit(tmp_path):
    from safetensors.torch import load_file

    in21k_layout(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight", "pooler.dense.weight"} <= names
    vit = ViTModel.from_pretrained(tmp_path).eval()
    compare_spatial_tokens(vit, num_frames=4)
    compare_single_tubelet(vit)
    vivit = ViViTModel(config_from_vit(vit.config, attention_type="factorised_self_attention", num_frames=4)).eval()
    initialise_from_vit(vivit, vit)
    compare_with_spatial_stack(vivit, vit, make_clips(vivit.config, batch=1))


# What learns


def train_ten_steps(vivit, weight_decay=0.0):
    before = {name: parameter.detach().clone() for name, parameter in vivit.named_parameters()}
    optimiser = torch.optim.AdamW(vivit.parameters(), lr=1e-3, weight_decay=weight_decay)
    clips, labels = make_clips(vivit.config, batch=4), torch.tensor([0, 1, 0, 1])
    vivit.train()
    for _ in range(10):
        optimiser.zero_grad()
        vivit(clips, labels=labels).loss.backward()
        optimiser.step()
    return {name for name, parameter in vivit.named_parameters() if not torch.equal(parameter, before[name])}


def temporal_names(vivit):
    return {name for name, _ in vivit.named_parameters() if "attention_time." in name}


@pytest.mark.parametrize("order", ["space_time", "time_space"])
def test_zero_output_learns_everywhere(order):
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_self_attention", ViViTForVideoClassification, attention_order=order)
    initialise_from_vit(vivit, vit)
    moved = train_ten_steps(vivit)
    still = {name for name in temporal_names(vivit) - moved if "k_proj.bias" not in name}
    assert not still and temporal_names(vivit)


def test_zero_is_a_dead_point_and_says_so():
    """The paper's initialisation to the letter: this is what the warning is for, not a defect to be mended."""
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_self_attention", ViViTForVideoClassification)
    with pytest.warns(UserWarning, match="only the output bias will ever learn"):
        initialise_from_vit(vivit, vit, temporal_attention_init="zero")
    moved = train_ten_steps(vivit) & temporal_names(vivit)
    assert moved == {f"vivit.encoder.layer.{index}.attention_time.o_proj.bias" for index in range(2)}


@pytest.mark.parametrize("init", ["zero_output", "zero"])
def test_both_zeros_start_from_the_same_function(init):
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_self_attention")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialise_from_vit(vivit, vit, temporal_attention_init=init)
    clips = make_clips(vivit.config)
    with torch.no_grad():
        whole = vivit(clips).last_hidden_state
        for layer in vivit.encoder.layer:
            randomise(layer.layernorm_time)  # without effect as long as nothing comes out of the temporal attention
        assert torch.equal(vivit(clips).last_hidden_state, whole)


# The temporal encoder


def test_copy_last_starts_as_an_average_over_time():
    vit = make_vit()
    vivit = make_vivit(vit, "factorised_encoder", pooling="mean")
    torch.nn.init.ones_(vivit.temporal_layernorm.weight)
    torch.nn.init.zeros_(vivit.temporal_layernorm.bias)
    report = initialise_from_vit(vivit, vit, temporal_encoder_init="copy_last")
    clips = make_clips(vivit.config)
    with torch.no_grad():
        steps = vivit.encode_space(*vivit.embeddings(clips))
        expected = torch.nn.functional.layer_norm(steps, steps.shape[-1:], eps=vivit.config.layer_norm_eps).mean(dim=1)
        pooled = vivit(clips).pooler_output
        torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=0)
    name = "temporal_encoder.layer.1.attention.q_proj.weight"
    assert report.parameters[name] == "copied"
    assert torch.equal(vivit.state_dict()[name], vit.state_dict()["layers.1.attention.q_proj.weight"])


def test_copy_last_is_refused_with_a_class_token():
    vit = make_vit()
    with pytest.raises(ValueError, match="same logits for every video; use `pooling='mean'`"):
        initialise_from_vit(make_vivit(vit, "factorised_encoder"), vit, temporal_encoder_init="copy_last")


# The report and the settings


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("embedding_type", ["tubelet", "uniform_frame_sampling"])
@pytest.mark.parametrize("vit_class", [ViTModel, ViTForImageClassification, ViTForMaskedImageModeling])
def test_report_accounts_for_everything(attention_type, embedding_type, vit_class):
    vit = make_vit(vit_class, image_size=32)
    vivit = make_vivit(
        vit, attention_type, ViViTForVideoClassification, embedding_type=embedding_type, image_size=(24, 40)
    )
    before = {name: parameter.detach().clone() for name, parameter in vivit.named_parameters()}
    report = initialise_from_vit(vivit, vit)

    assert set(report.parameters) == set(before)
    assert set(report.vit_keys) == set(vit.state_dict())
    now = dict(vivit.named_parameters())
    allowed = {"copied", "inflated", "resized", "tiled", "resized, tiled", "zeroed", "newly initialised"}
    for name, status in report.parameters.items():
        assert status in allowed
        assert torch.equal(now[name], before[name]) == (status == "newly initialised"), (name, status)
        assert (status == "zeroed") == bool(now[name].abs().max() == 0) or status == "newly initialised", name
    positions = report.parameters["vivit.embeddings.position_embeddings"]
    assert positions == ("resized" if attention_type == "factorised_encoder" else "resized, tiled")
    kernel = report.parameters["vivit.embeddings.patch_embeddings.projection.weight"]
    assert kernel == ("inflated" if embedding_type == "tubelet" else "copied")
    unused = {name for name, status in report.vit_keys.items() if status != "used"}
    assert all("deliberately unused (" in report.vit_keys[name] for name in unused)
    assert not any("layer" in name or "position" in name for name in unused - {"vit.layernorm.weight"})
    assert "| copied |" in report.to_markdown() and "newly initialised" in str(report)


def test_a_stray_weight_is_an_error():
    vit = make_vit()
    vit.layers[0].attention.register_parameter("relative_bias", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="relative_bias"):
        initialise_from_vit(make_vivit(make_vit(), "spatio_temporal"), vit)


def test_a_vivit_is_as_it_was_after_an_error():
    vit = make_vit(hidden_act="relu", layer_norm_eps=1e-3)
    vit.stray = torch.nn.Parameter(torch.zeros(3))
    vivit = ViViTModel(config_from_vit(vit.config, hidden_act="gelu", layer_norm_eps=1e-6))
    before = {name: value.clone() for name, value in vivit.state_dict().items()}
    with pytest.raises(ValueError, match="no place in a ViViT"):
        initialise_from_vit(vivit, vit)
    assert all(torch.equal(value, before[name]) for name, value in vivit.state_dict().items())
    assert (vivit.config.hidden_act, vivit.config.layer_norm_eps, vivit.layernorm.eps) == ("gelu", 1e-6, 1e-6)


def test_what_is_no_vit_is_refused():
    vit = make_vit()
    for config in (Dinov2Config(), ResNetConfig(), vit, "google/vit"):
        with pytest.raises(ValueError, match="A ViViT starts from a plain ViT or DeiT"):
            config_from_vit(config)
    vivit = ViViTModel(config_from_vit(vit.config))
    for arguments in ((vit, vivit), (vivit, "google/vit")):
        with pytest.raises(TypeError, match="Expected a ViViT and then a loaded image ViT"):
            initialise_from_vit(*arguments)


def test_settings_go_over():
    vit = make_vit(hidden_act="relu", layer_norm_eps=1e-3, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.125)
    config = config_from_vit(vit.config, num_frames=2)
    assert (config.hidden_act, config.layer_norm_eps, config.hidden_dropout_prob) == ("relu", 1e-3, 0.25)

    config = config_from_vit(make_vit().config, num_frames=2, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
    vivit = ViViTModel(config).eval()
    report = initialise_from_vit(vivit, vit)
    assert report.settings["hidden_act"] == ("gelu_pytorch_tanh", "relu")
    assert vivit.config.attention_probs_dropout_prob == 0.125 and vivit.layernorm.eps == 1e-3
    assert {m.p for m in vivit.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    clips = make_clips(vivit.config)
    with torch.no_grad():
        torch.testing.assert_close(
            vivit(clips).last_hidden_state, vit(clips[:, 1]).last_hidden_state, atol=1e-5, rtol=0
        )


def test_a_vit_without_qkv_bias():
    vit = make_vit(qkv_bias=False)
    assert config_from_vit(vit.config).qkv_bias is False
    vivit = ViViTModel(config_from_vit(vit.config, num_frames=2, qkv_bias=True)).eval()
    report = initialise_from_vit(vivit, vit)
    assert report.parameters["encoder.layer.0.attention.q_proj.bias"] == "zeroed"
    clips = make_clips(vivit.config)
    with torch.no_grad():
        torch.testing.assert_close(
            vivit(clips).last_hidden_state, vit(clips[:, 1]).last_hidden_state, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    "option", ["tubelet_init", "temporal_attention_init", "temporal_encoder_init", "position_init"]
)
def test_unknown_options_name_the_known_ones(option):
    vit = make_vit()
    with pytest.raises(ValueError, match=rf"`{option}='nonsense'` is not known; expected one of '"):
        initialise_from_vit(make_vivit(vit, "spatio_temporal"), vit, **{option: "nonsense"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, "`hidden_size` is 24 in the ViViT and 48 in the ViT"),
        ({"num_hidden_layers": 3}, "`num_hidden_layers` is 2 in the ViViT and 3 in the ViT"),
        ({"patch_size": 4}, r"patches are \(8, 8\) .* and the ViT's \(4, 4\)"),
    ],
)
def test_other_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        initialise_from_vit(make_vivit(make_vit(), "spatio_temporal"), make_vit(**changes))


def test_every_temporal_attention_init_is_tried():
    vit = make_vit()
    seen = set()
    for init in TEMPORAL_ATTENTION_INITS:
        vivit = make_vivit(vit, "factorised_self_attention")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = initialise_from_vit(vivit, vit, temporal_attention_init=init)
        query, output = (
            report.parameters[f"encoder.layer.0.attention_time.{name}.weight"] for name in ("q_proj", "o_proj")
        )
        seen.add((query, output))
    assert seen == {
        ("copied", "zeroed"),
        ("zeroed", "zeroed"),
        ("copied", "copied"),
        ("newly initialised", "newly initialised"),
    }
