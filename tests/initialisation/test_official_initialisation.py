"""Initialisation from an image ViT gives the results of the official code."""

import json
import re

import numpy as np
import pytest
import torch
from golden import GOLDEN
from transformers import ViTConfig, ViTModel

from vivit_hf import ViViTForVideoClassification
from vivit_hf.conversion.scenic_weights import config_from_scenic, state_dict_from_scenic
from vivit_hf.initialisation.from_image import TUBELET_INITS, image_to_video_position_embeddings, initialise_from_vit
from vivit_hf.modeling_vivit import resample_position_embeddings


def npz(name):
    file = np.load(GOLDEN / name)
    return file, json.loads(str(file["config"]))


OFFICIAL_KERNELS = {
    "central_frame": "central_frame_initializer",
    "filter_inflation": "average_frame_initializer",
    "approximate_rank_pooling": "average_arp_frame_initializer",
}


@pytest.mark.parametrize("frames", [2, 4])
@pytest.mark.parametrize("init", TUBELET_INITS)
def test_tubelet_kernels_equal_the_official_ones(init, frames):
    file, _ = npz("init_embedding.npz")
    kernel = torch.from_numpy(file["inputs/restored_kernel_2d"]).permute(3, 2, 0, 1)
    official = torch.from_numpy(file[f"outputs/{OFFICIAL_KERNELS[init]}/t{frames}/kernel"]).permute(4, 3, 0, 1, 2)
    ours = TUBELET_INITS[init](kernel, frames)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, official.float(), atol=1e-7, rtol=1e-6)


_, POSITION_CASES = npz("init_posemb.npz")
RESTORED = [case for case in POSITION_CASES if case != "not_restored"]


@pytest.mark.parametrize("case", RESTORED)
def test_position_embeddings_equal_the_official_ones(case):
    file, configs = npz("init_posemb.npz")
    old, target, official = (
        torch.from_numpy(file[f"{case}/{part}"])
        for part in ("inputs/restored", "inputs/target", "outputs/pos_embedding")
    )
    old_prefix = int(configs[case]["restored_classifier"] == "token")
    new_prefix = int(configs[case]["target_classifier"] == "token")
    if old.shape == target.shape:  # the official code copies them, whatever the first token is
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
    """Return transformers' ViT with the weights of an official image ViT."""
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
def test_a_whole_image_vit_is_converted_as_in_the_official_code(case):
    """The official code copies Model 3's temporal attention, and keeps weights that the ViT does not have."""
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
        # The official code looks for "cls", but the model has "cls_SpatialTransformer"; the class token stays random.
        # We copy it on purpose: the spatial encoder was trained with that token.
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
def test_an_encoder_block_is_converted_as_in_the_official_code(init):
    """Both values of `init_temporal_transformer`; we have no counterpart of the official code's other switches."""
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
