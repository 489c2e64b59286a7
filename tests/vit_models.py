"""Tiny image ViTs, ViViTs to initialise from them, and their weights in the layouts of other projects."""

import re

import torch
from safetensors.torch import load_file, save_file
from tiny_models import randomise
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from vivit_hf import ViViTModel
from vivit_hf.initialisation.from_image import config_from_vit


def make_vit(cls=ViTModel, seed=5, **overrides):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config = ViTConfig(**{**sizes, "image_size": 24, "patch_size": 8, **overrides})
    return randomise(cls(config), seed).eval()


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 50}


def make_dinov2(seed=5, **overrides):
    """Return a DINOv2, whose layers have LayerScale."""
    return randomise(Dinov2Model(Dinov2Config(**{**SIZES, "mlp_ratio": 2, **overrides})), seed).eval()


def make_dinov2_with_registers(seed=5, **overrides):
    config = Dinov2WithRegistersConfig(**{**SIZES, "mlp_ratio": 2, "num_register_tokens": 3, **overrides})
    return randomise(Dinov2WithRegistersModel(config), seed).eval()


def make_clip(seed=5, **overrides):
    """Return the image tower of a CLIP."""
    config = CLIPVisionConfig(**{**SIZES, "intermediate_size": 40, **overrides})
    return randomise(CLIPVisionModel(config), seed).eval()


def make_siglip(seed=5, **overrides):
    """Return the image tower of a SigLIP, with its attention-pooling head."""
    config = SiglipVisionConfig(**{**SIZES, "intermediate_size": 40, **overrides})
    return randomise(SiglipVisionModel(config), seed).eval()


def make_whole_clip(seed=5):
    """Return a CLIP with both towers."""
    config = CLIPConfig(vision_config={**SIZES, "intermediate_size": 40}, text_config=TEXT, projection_dim=12)
    return randomise(CLIPModel(config), seed).eval()


def make_whole_siglip(seed=5):
    """Return a SigLIP with both towers."""
    config = SiglipConfig(vision_config={**SIZES, "intermediate_size": 40}, text_config=TEXT)
    return randomise(SiglipModel(config), seed).eval()


IMAGE_MODELS = {
    "dinov2": make_dinov2,
    "dinov2_with_registers": make_dinov2_with_registers,
    "clip": make_whole_clip,
    "clip_vision_model": make_clip,
    "siglip": make_whole_siglip,
    "siglip_vision_model": make_siglip,
}


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


def timm_arrays(
    *, class_token=True, class_position=True, registers=0, layer_scale=False, pre_norm=False, pooling=False
):
    """Return random arrays of timm's `VisionTransformer` for 24 pixels in patches of 8: 2 layers, 24 wide, 4 heads."""
    generator = torch.Generator().manual_seed(0)
    width, inner = 24, 48
    linear = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    shapes = {"pos_embed": (1, 9 + int(class_token and class_position), width)}
    shapes["patch_embed.proj.weight"] = (width, 3, 8, 8)
    shapes |= {} if pre_norm else {"patch_embed.proj.bias": (width,)}
    shapes |= {"cls_token": (1, 1, width)} if class_token else {}
    shapes |= {"reg_token": (1, registers, width)} if registers else {}
    for block in ("blocks.0", "blocks.1"):
        for name, shape in linear.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        shapes |= {f"{block}.norm{n}.{part}": (width,) for n in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"{block}.ls{n}.gamma": (width,) for n in (1, 2)} if layer_scale else {}
    for name in ("norm", "norm_pre") if pre_norm else ("norm",):
        shapes |= {f"{name}.{part}": (width,) for part in ("weight", "bias")}
    shapes |= {"attn_pool.latent": (1, 1, width), "attn_pool.q.weight": (width, width)} if pooling else {}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


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
