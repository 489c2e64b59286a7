"""
Converts a ViViT checkpoint of google-research/scenic (flax msgpack) into a `save_pretrained` folder.

    python conversion/convert_scenic_checkpoint.py --checkpoint CHECKPOINT --model-config config.json --output DIR

Needs neither JAX nor flax: `pip install "vivit-hf[conversion]"` brings msgpack. Every array of the checkpoint's model is
accounted for: it is mapped, or the conversion stops and names it.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor


# Layouts of the released files: flax's older optimiser state, and the newer train state.
WEIGHT_LOCATIONS = (("optimizer", "target"), ("params",))


def config_from_scenic(
    model_config: Mapping[str, Any],
    *,
    num_frames: int,
    image_size: int | tuple[int, int],
    num_labels: int,
    **overrides: Any,
) -> ViViTConfig:
    """
    The configuration for the `model` entry of an official configuration.

    Args:
        model_config: `config.model` of google-research/scenic `projects/vivit/configs/`, as nested mappings.
        num_frames: frames in a clip.
        image_size: pixels of a frame, one number or (height, width).
        num_labels: outputs of the classifier.
        overrides: any other field of `ViViTConfig`.

    Raises:
        ValueError: for a configuration that the official model itself does not know.
    """
    attention = dict(model_config.get("attention_config") or {})
    encoding = dict(model_config["temporal_encoding_config"])
    attention_type = attention.get("type", "spacetime")
    factorised_encoder = attention_type == "factorized_encoder"
    encoder = model_config["spatial_transformer"] if factorised_encoder else model_config
    height, width, *time = model_config["patches"]["size"]  # (height, width) or (height, width, time)
    fields: dict[str, Any] = {
        "num_frames": num_frames,
        "image_size": image_size,
        "num_labels": num_labels,
        "attention_type": attention_type,
        "embedding_type": encoding["method"],
        "num_sampled_frames": encoding.get("n_sampled_frames"),
        "tubelet_size": (*(time or [1]), height, width),
        "hidden_size": model_config["hidden_size"],
        "num_hidden_layers": encoder["num_layers"],
        "num_attention_heads": encoder["num_heads"],
        "intermediate_size": encoder["mlp_dim"],
        "pooling": model_config.get("classifier", "gap"),
        "representation_size": model_config.get("representation_size"),
        "hidden_dropout_prob": model_config.get("dropout_rate", 0.1),
        "attention_probs_dropout_prob": model_config.get("attention_dropout_rate", 0.1),
        "drop_path_rate": model_config.get("stochastic_droplayer_rate") or 0.0,
    }
    if attention_type == "factorized_self_attention_block":
        fields["attention_order"] = attention.get("attention_order", "time_space")
    if factorised_encoder:
        temporal = model_config.get("temporal_transformer") or {}
        fields["num_temporal_layers"] = 0 if attention.get("spatial_only_baseline") else temporal["num_layers"]
        if fields["num_temporal_layers"]:
            fields["temporal_num_attention_heads"] = temporal["num_heads"]
            fields["temporal_intermediate_size"] = temporal["mlp_dim"]
    return ViViTConfig(**{**fields, **overrides})


# How an official array becomes a tensor of ours. Dense kernels are (in, out), projections to heads (in, heads, head_dim)
# and from heads (heads, head_dim, out), convolutions (time, height, width, in, out).
def _keep(array: np.ndarray) -> np.ndarray:
    return array


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)


def _dense(array: np.ndarray) -> np.ndarray:
    return array.T


def _to_heads(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1).T


def _from_heads(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1]).T


def _convolution(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (-1, -2), (0, 1))


Mapped = tuple[str, str, Callable[[np.ndarray], np.ndarray]]


def _linear(official: str, ours: str, bias: bool = True) -> Iterator[Mapped]:
    yield f"{official}/kernel", f"{ours}.weight", _dense
    if bias:
        yield f"{official}/bias", f"{ours}.bias", _keep


def _layernorm(official: str, ours: str) -> Iterator[Mapped]:
    yield f"{official}/scale", f"{ours}.weight", _keep
    yield f"{official}/bias", f"{ours}.bias", _keep


def _attention(official: str, ours: str, bias: bool) -> Iterator[Mapped]:
    for name, projection in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield f"{official}/{name}/kernel", f"{ours}.{projection}.weight", _to_heads
        if bias:
            yield f"{official}/{name}/bias", f"{ours}.{projection}.bias", _flat
    yield f"{official}/out/kernel", f"{ours}.o_proj.weight", _from_heads
    yield f"{official}/out/bias", f"{ours}.o_proj.bias", _keep


def _mlp(official: str, ours: str) -> Iterator[Mapped]:
    yield from _linear(f"{official}/Dense_0", f"{ours}.fc1")
    yield from _linear(f"{official}/Dense_1", f"{ours}.fc2")


def _encoder(official: str, ours: str, norm: str, num_layers: int, config: ViViTConfig) -> Iterator[Mapped]:
    for index in range(num_layers):
        block, layer = f"{official}/encoderblock_{index}", f"{ours}.layer.{index}"
        if config.attention_type == "factorised_self_attention":
            for axis in ("space", "time"):
                yield from _layernorm(f"{block}/LayerNorm_{axis}", f"{layer}.layernorm_{axis}")
                names = f"{block}/MultiHeadDotProductAttention_{axis}", f"{layer}.attention_{axis}"
                yield from _attention(*names, config.qkv_bias)
            yield from _layernorm(f"{block}/LayerNorm_mlp", f"{layer}.layernorm_after")
            yield from _mlp(f"{block}/MlpBlock", f"{layer}.mlp")
        else:
            yield from _layernorm(f"{block}/LayerNorm_0", f"{layer}.layernorm_before")
            yield from _attention(f"{block}/MultiHeadDotProductAttention_0", f"{layer}.attention", config.qkv_bias)
            yield from _layernorm(f"{block}/LayerNorm_1", f"{layer}.layernorm_after")
            yield from _mlp(f"{block}/MlpBlock_0", f"{layer}.mlp")
    yield from _layernorm(f"{official}/encoder_norm", norm)


def name_map(config: ViViTConfig) -> list[Mapped]:
    """(official name, our name, what turns the array into the tensor) for every parameter of a model of `config`."""

    def pairs() -> Iterator[Mapped]:
        two_encoders = config.attention_type == "factorised_encoder"
        encoder = "SpatialTransformer" if two_encoders else "Transformer"
        yield "embedding/kernel", "vivit.embeddings.patch_embeddings.projection.weight", _convolution
        yield "embedding/bias", "vivit.embeddings.patch_embeddings.projection.bias", _keep
        if config.pooling == "cls":
            yield f"cls_{encoder}" if two_encoders else "cls", "vivit.embeddings.cls_token", _keep
        yield f"{encoder}/posembed_input/pos_embedding", "vivit.embeddings.position_embeddings", _keep
        yield from _encoder(encoder, "vivit.encoder", "vivit.layernorm", config.num_hidden_layers, config)
        if two_encoders and config.num_temporal_layers:
            encoder, ours = "TemporalTransformer", "vivit.temporal_embeddings"
            if config.pooling == "cls":
                yield f"cls_{encoder}", f"{ours}.cls_token", _keep
            yield f"{encoder}/posembed_input/pos_embedding", f"{ours}.position_embeddings", _keep
            norm, layers = "vivit.temporal_layernorm", config.num_temporal_layers
            yield from _encoder(encoder, "vivit.temporal_encoder", norm, layers, config)
        if config.representation_size is not None:
            yield from _linear("pre_logits", "vivit.pre_logits")
        if config.num_labels:
            yield from _linear("output_projection", "classifier")

    return list(pairs())


def state_dict_from_scenic(params: Mapping[str, np.ndarray], config: ViViTConfig) -> dict[str, torch.Tensor]:
    """
    The weights of `ViViTForVideoClassification(config)` from official parameters.

    Args:
        params: arrays by their `/`-joined names, as in `SpatialTransformer/encoderblock_0/LayerNorm_0/scale`.
        config: of the model that they are for, see `config_from_scenic`.

    Raises:
        ValueError: naming every array that is missing, left over, or of a shape that does not fit.
    """
    with torch.device("meta"):
        expected = ViViTForVideoClassification(config).state_dict()
    mapping = name_map(config)
    problems = [f"missing: {official} (for {ours})" for official, ours, _ in mapping if official not in params]
    known = {official for official, _, _ in mapping}
    problems += [f"no place for: {name} {np.shape(params[name])}" for name in sorted(set(params) - known)]
    state_dict = {}
    for official, ours, convert in mapping:
        if official not in params:
            continue
        tensor = torch.from_numpy(np.array(convert(np.asarray(params[official])), order="C"))
        if tensor.shape != expected[ours].shape:
            shapes = f"{tuple(tensor.shape)}, the model's {ours} is {tuple(expected[ours].shape)}"
            problems.append(f"another shape: {official} gives {shapes}")
        state_dict[ours] = tensor
    problems += [f"not mapped: {name} of the model" for name in sorted(set(expected) - set(state_dict) - set(m[1] for m in mapping))]
    if problems:
        listing = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise ValueError(f"The checkpoint does not fit the configuration in {len(problems)} places:\n  {listing}")
    return state_dict


def read_scenic_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """
    The model's arrays in a flax msgpack checkpoint, by `/`-joined names; the optimiser's state is left out.

    Raises:
        ValueError: if the file is not such a checkpoint.
    """
    data = Path(path).read_bytes()
    try:
        tree = msgpack.unpackb(data, ext_hook=_decode_array, raw=False, strict_map_key=False)
    except (ValueError, msgpack.UnpackException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a whole flax msgpack checkpoint: {error}") from error
    for location in WEIGHT_LOCATIONS:
        weights = tree
        for key in location:
            weights = weights.get(key) if isinstance(weights, dict) else None
        if isinstance(weights, dict):
            return dict(_flatten(weights))
    found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
    expected = " or ".join("/".join(location) for location in WEIGHT_LOCATIONS)
    raise ValueError(f"{path} has no weights under {expected}; at the top it has {found}.")


def _decode_array(code: int, data: bytes) -> Any:
    """flax's msgpack extension types: 1 an array and 3 a numpy scalar as (shape, dtype, bytes), 2 a complex number."""
    if code in (1, 3):
        shape, dtype, buffer = msgpack.unpackb(data, raw=False)
        if dtype == "bfloat16":
            wide = np.frombuffer(buffer, np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(shape)
        return np.frombuffer(buffer, np.dtype(dtype)).reshape(shape)
    if code == 2:
        return complex(*msgpack.unpackb(data, raw=False))
    raise ValueError(f"unknown msgpack extension type {code}")


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
            chunks = value["chunks"]
            parts = [chunks[str(index)] for index in range(len(chunks))]
            shape = [value["shape"][str(index)] for index in range(len(value["shape"]))]
            yield prefix + name, np.concatenate(parts).reshape(shape)
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value)


def read_labels(path: str | Path) -> dict[int, str]:
    """
    Label names from a JSON list, a JSON map of index to name, or a text file with one name per line.

    Raises:
        ValueError: if the indices are not 0, 1, 2, ...
    """
    text = Path(path).read_text(encoding="utf-8")
    if str(path).endswith(".json"):
        labels = json.loads(text)
        labels = dict(enumerate(labels)) if isinstance(labels, list) else {int(k): v for k, v in labels.items()}
    else:
        labels = dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    if sorted(labels) != list(range(len(labels))):
        raise ValueError(f"{path}: the label indices must be 0 to {len(labels) - 1} without a gap.")
    return {index: str(labels[index]) for index in sorted(labels)}


def save_beside_and_rename(output: Path, save: Callable[[Path], None]) -> None:
    """Lets `save` write into a folder beside `output`, and gives it that name only when it is whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; choose another --output or remove it.")
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        save(unfinished)
        unfinished.chmod(0o755)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def convert(args: argparse.Namespace, console: Console) -> None:
    model_config = json.loads(Path(args.model_config).read_text(encoding="utf-8"))
    model_config = model_config.get("model", model_config)
    params = read_scenic_checkpoint(args.checkpoint)
    if "output_projection/bias" not in params:
        raise ValueError(f"{args.checkpoint} has no output_projection/bias, and so no classifier; it has {sorted(params)[:5]}")
    labels = read_labels(args.labels) if args.labels else None
    num_labels = params["output_projection/bias"].shape[0]
    if labels is not None and len(labels) != num_labels:
        raise ValueError(f"{args.labels} names {len(labels)} labels, but the classifier has {num_labels} outputs.")
    image_size = args.image_size[0] if len(args.image_size) == 1 else tuple(args.image_size)
    config = config_from_scenic(
        model_config, num_frames=args.num_frames, image_size=image_size, num_labels=num_labels
    )
    if labels is not None:
        config.id2label, config.label2id = labels, {label: index for index, label in labels.items()}
    model = ViViTForVideoClassification(config)
    model.load_state_dict(state_dict_from_scenic(params, config), strict=True)
    height, width = config.frame_size
    processor = ViViTVideoProcessor(
        num_frames=config.num_frames,
        size={"shortest_edge": args.resize or round(min(height, width) * 256 / 224)},
        crop_size={"height": height, "width": width},
    )

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    save_beside_and_rename(Path(args.output), save)

    table = Table("", "", show_header=False)
    table.add_row("arrays mapped", f"{len(params)} of {len(params)}")
    table.add_row("newly initialised", "none")
    table.add_row("attention", config.attention_type)
    table.add_row("parameters", f"{sum(array.size for array in params.values()):,}")
    table.add_row("labels", f"{num_labels}" + ("" if labels else ", without names (give --labels)"))
    table.add_row("written to", str(args.output))
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=re.split(r"\n\n", __doc__.strip())[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="the flax msgpack file of an official release")
    parser.add_argument("--model-config", required=True, help="JSON of the official `config.model` (or with a `model` entry)")
    parser.add_argument("--output", required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--num-frames", type=int, default=32, help="frames in a clip")
    parser.add_argument("--image-size", type=int, nargs="+", default=[224], help="pixels: one side, or height and width")
    parser.add_argument("--resize", type=int, help="pixels of the short side before the crop (default: 256 for 224)")
    parser.add_argument("--labels", help="label names: JSON list, JSON map of index to name, or one name per line")
    args = parser.parse_args(argv)
    if len(args.image_size) > 2:
        parser.error(f"--image-size takes one number or two (height width), not {len(args.image_size)}")
    try:
        convert(args, Console())
    except (OSError, ValueError, KeyError) as error:
        detail = f"the model configuration has no entry {error}" if isinstance(error, KeyError) else error
        print(f"error: {detail}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
