"""What the models are measured against: transformers' Vivit, lucidrains' ViViT, a plain copy of our own variants."""

from __future__ import annotations

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import VivitConfig, VivitForVideoClassification

from vivit_hf import ViViTConfig, ViViTForVideoClassification


# `vivit.py` is loaded from the wheel by itself: its package imports torchvision, which does not load beside the CPU
# build of torch.
_WHEELS = ("vit-pytorch==1.26.11", "einops==0.8.2")


def transformers_vivit(ours: ViViTForVideoClassification) -> VivitForVideoClassification:
    """transformers' Vivit with the weights of our Model 1."""
    config = ours.config
    names = "image_size num_frames tubelet_size num_channels hidden_size num_hidden_layers num_attention_heads"
    names += " intermediate_size layer_norm_eps qkv_bias num_labels"
    native = VivitForVideoClassification(
        VivitConfig(**{name: getattr(config, name) for name in names.split()}, hidden_act="gelu_fast")
    )
    weights = {name.replace(".encoder.layer.", ".layers."): tensor for name, tensor in ours.state_dict().items()}
    native.load_state_dict(weights)
    return native.eval()


def fetch_lucidrains(folder: Path) -> Any:
    """The module `vit_pytorch/vivit.py`, downloaded into `folder` once; None if that cannot be done."""
    if not (folder / "vit_pytorch" / "vivit.py").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *_WHEELS]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
    sys.path.insert(0, str(folder))
    importlib.import_module("einops")
    spec = importlib.util.spec_from_file_location("lucidrains_vivit", folder / "vit_pytorch" / "vivit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lucidrains_vivit(module: Any, config: ViViTConfig) -> nn.Module:
    """lucidrains' model in the sizes of our Model 2 or 3; it takes (batch, channels, frames, height, width)."""
    is_encoder = config.attention_type == "factorised_encoder"
    model = module.ViViT(
        image_size=config.frame_size,
        image_patch_size=tuple(config.tubelet_size[1:]),
        frames=config.num_frames,
        frame_patch_size=config.tubelet_size[0],
        num_classes=config.num_labels,
        dim=config.hidden_size,
        spatial_depth=config.num_hidden_layers,
        temporal_depth=config.num_temporal_layers if is_encoder else config.num_hidden_layers,
        heads=config.num_attention_heads,
        dim_head=config.hidden_size // config.num_attention_heads,
        mlp_dim=config.intermediate_size,
        pool="cls" if is_encoder else "mean",
        variant="factorized_encoder" if is_encoder else "factorized_self_attention",
    )
    return model.eval()


class PlainViViT(nn.Module):
    """Our variants written down in the plainest way, on the weights of one of our models: the naive line.

    Takes (batch, frames, channels, height, width), gives logits (batch, labels). Class tokens in Models 1 and 2, mean
    pooling in 3 and 4, tubelets.
    """

    def __init__(self, ours: ViViTForVideoClassification):
        super().__init__()
        self.config = ours.config
        self.ours = ours

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        vivit, config = self.ours.vivit, self.config
        projection = vivit.embeddings.patch_embeddings.projection
        clips = pixel_values.transpose(1, 2)
        tokens = functional.conv3d(clips, projection.weight, projection.bias, stride=tuple(config.tubelet_size))
        batch, _, time = tokens.shape[:3]
        tokens = tokens.flatten(3).permute(0, 2, 3, 1)  # (batch, time, space, hidden)
        positions, cls = vivit.embeddings.position_embeddings, vivit.embeddings.cls_token
        if config.attention_type == "spatio_temporal":
            tokens = torch.cat([cls.expand(batch, -1, -1), tokens.flatten(1, 2)], dim=1) + positions
            for layer in vivit.encoder.layer:
                tokens = self.layer(layer, tokens)
            pooled = vivit.layernorm(tokens)[:, 0]
        elif config.attention_type == "factorised_encoder":
            tokens = tokens.flatten(0, 1)
            tokens = torch.cat([cls.expand(len(tokens), -1, -1), tokens], dim=1) + positions
            for layer in vivit.encoder.layer:
                tokens = self.layer(layer, tokens)
            tokens = vivit.layernorm(tokens)[:, 0].unflatten(0, (batch, time))
            temporal = vivit.temporal_embeddings
            tokens = torch.cat([temporal.cls_token.expand(batch, -1, -1), tokens], dim=1)
            tokens = tokens + temporal.position_embeddings
            for layer in vivit.temporal_encoder.layer:
                tokens = self.layer(layer, tokens)
            pooled = vivit.temporal_layernorm(tokens)[:, 0]
        else:
            tokens = tokens + positions.unflatten(1, tokens.shape[1:3])
            for layer in vivit.encoder.layer:
                tokens = self.grid_layer(layer, tokens)
            pooled = vivit.layernorm(tokens).flatten(1, 2).mean(dim=1)
        return self.ours.classifier(pooled)

    def layer(self, layer: Any, tokens: torch.Tensor) -> torch.Tensor:
        attention = layer.attention
        query, key, value = self.project(attention, layer.layernorm_before(tokens))
        tokens = tokens + attention.o_proj(self.attend(query, key, value).flatten(2))
        return tokens + self.mlp(layer, tokens)

    def grid_layer(self, layer: Any, tokens: torch.Tensor) -> torch.Tensor:
        if self.config.attention_type == "factorised_self_attention":
            for norm, attention, axis in (
                (layer.layernorm_space, layer.attention_space, 1),
                (layer.layernorm_time, layer.attention_time, 2),
            ):
                parts = self.project(attention, norm(tokens))
                tokens = tokens + attention.o_proj(self.along(parts, axis).flatten(3))
        else:
            parts = self.project(layer.attention, layer.layernorm_before(tokens))
            half = layer.attention.num_heads // 2
            over_time = self.along([part[..., :half, :] for part in parts], 2)
            over_space = self.along([part[..., half:, :] for part in parts], 1)
            tokens = tokens + layer.attention.o_proj(torch.cat([over_time, over_space], dim=3).flatten(3))
        return tokens + self.mlp(layer, tokens)

    def along(self, parts: list[torch.Tensor], axis: int) -> torch.Tensor:
        """Attention over space (axis 1 is folded into the batch) or over time (axis 2 is): a grid in and out."""
        parts = [part.transpose(1, axis) for part in parts]
        grid = parts[0].shape[:2]
        context = self.attend(*(part.flatten(0, 1) for part in parts))
        return context.unflatten(0, grid).transpose(1, axis)

    @staticmethod
    def project(attention: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
        heads = (attention.num_heads, attention.head_dim)
        return [proj(tokens).unflatten(-1, heads) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)]

    @staticmethod
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads, head_dim), all four."""
        parts = (part.transpose(1, 2) for part in (query, key, value))
        return functional.scaled_dot_product_attention(*parts).transpose(1, 2)

    @staticmethod
    def mlp(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(layer.mlp.fc1(layer.layernorm_after(tokens)), approximate="tanh")
        return layer.mlp.fc2(hidden)
