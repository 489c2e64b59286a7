"""Tiny image ViTs, and their weights in the layouts that others publish."""

import re

import torch
from safetensors.torch import load_file, save_file
from tiny_models import randomise
from transformers import ViTConfig, ViTModel


def make_vit(cls=ViTModel, seed=5, **overrides):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config = ViTConfig(**{**sizes, "image_size": 24, "patch_size": 8, **overrides})
    return randomise(cls(config), seed).eval()


def timm_weights(vit):
    """The weights of transformers' ViT under timm's names."""
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
