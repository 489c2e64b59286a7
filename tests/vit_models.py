"""Tiny image ViTs, ViViTs to initialise from them, and their weights in the layouts of other projects."""

import re

import torch
from safetensors.torch import load_file, save_file
from tiny_models import randomise
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from vivit_hf import ViViTModel
from vivit_hf.initialisation.from_image import config_from_vit


def make_vit(cls=ViTModel, seed=5, **overrides):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config = ViTConfig(**{**sizes, "image_size": 24, "patch_size": 8, **overrides})
    return randomise(cls(config), seed).eval()


def make_dinov2(seed=5, **overrides):
    """Return a DINOv2, whose layers have LayerScale."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
    return randomise(Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2, **overrides)), seed).eval()


def make_vivit(vit, attention_type, cls=ViViTModel, **overrides):
    """Return a ViViT of the ViT's sizes with random weights."""
    temporal = {"num_temporal_layers": 2} if attention_type == "factorised_encoder" else {}
    torch.manual_seed(0)
    config = config_from_vit(vit.config, attention_type=attention_type, num_frames=8, **temporal, **overrides)
    return randomise(cls(config), seed=6).eval()


def timm_weights(vit):
    """Return the weights of transformers' ViT under timm's names."""
    weights = {}
    for name, tensor in vit.state_dict().items():
        for pattern, target in (
            (r"^embeddings\.cls_token", "cls_token"),
            (r"^embeddings\.position_embeddings", "pos_embed"),
            (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
            (r"^layers", "blocks"),
            (r"layernorm_before", "norm1"),
            (r"layernorm_after", "norm2"),
            (r"attention\.o_proj", "attn.proj"),
            (r"attention", "attn"),
            (r"^layernorm", "norm"),
        ):
            name = re.sub(pattern, target, name)
        weights[name] = tensor
    for index in range(vit.config.num_hidden_layers):
        for part in ("weight", "bias"):
            qkv = [weights.pop(f"blocks.{index}.attn.{kind}_proj.{part}") for kind in "qkv"]
            weights[f"blocks.{index}.attn.qkv.{part}"] = torch.cat(qkv)
    return weights


def write_layout(vit, folder, layout):
    """Save a model in one of the layouts "names in files", "names in memory", "torch file" and "sharded"."""
    vit.save_pretrained(folder)
    file = folder / "model.safetensors"
    if layout == "names in memory":
        save_file({name: tensor.contiguous() for name, tensor in vit.state_dict().items()}, file)
    elif layout == "torch file":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    elif layout == "sharded":
        file.unlink()
        vit.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1


def perturb(tensor):
    with torch.no_grad():
        tensor.view(-1)[-1] += 1e-2
