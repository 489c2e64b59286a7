"""
Converts a ViViT checkpoint of google-research/scenic (flax msgpack) into a `save_pretrained` folder.

    python conversion/convert_scenic_checkpoint.py --checkpoint FILE --model vivit-b-16x2-kinetics400 --output DIR
    python conversion/convert_scenic_checkpoint.py --checkpoint FILE --model-config config.json --output DIR

The first form is for the released models, whose configurations are built in. Needs neither JAX nor flax:
`pip install "vivit-hf[conversion]"` brings msgpack. Every array of the checkpoint's model is mapped, or the conversion
stops and names it. What was written is loaded again and run against `scenic_reference.py`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from conversion_tools import (
    Result,
    add_size_argument,
    beside_and_renamed,
    count_parameters,
    describe_processor,
    make_parser,
    one_or_pair,
    progress,
    run,
    save,
    set_labels,
)
from parity import chosen_steps, compare, frozen, random_clip, tokens_and_logits
from scenic_reference import official_forward
from scenic_releases import RELEASES, find_labels

from vivit_hf import ViViTConfig, ViViTForVideoClassification
from vivit_hf.conversion.weight_files import ConversionError, read_json
from vivit_hf.initialisation.model_processor import processor_for


# Layouts of the released files: flax's older optimiser state, and the newer train state.
WEIGHT_LOCATIONS = (("optimizer", "target"), ("params",))


# The configuration


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


# How an official array becomes a tensor of ours. Dense kernels are (in, out), projections to heads are (in, heads,
# head_dim) and from heads (heads, head_dim, out), convolutions (time, height, width, in, out).
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
    problems += [f"not mapped: {name}" for name in sorted(set(expected) - {ours for _, ours, _ in mapping})]
    problems += _head_problems(params, config)
    if problems:
        listing = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise ConversionError(f"The checkpoint does not fit the configuration in {len(problems)} places:\n  {listing}")
    return state_dict


def _head_problems(params: Mapping[str, np.ndarray], config: ViViTConfig) -> Iterator[str]:
    """Heads are a side of the official kernels, (in, heads, head_dim), that disappears in ours."""
    for name, array in params.items():
        if not name.endswith("/query/kernel") or np.ndim(array) != 3:
            continue
        is_temporal = name.startswith("TemporalTransformer/")
        heads = (is_temporal and config.temporal_num_attention_heads) or config.num_attention_heads
        if array.shape[1] != heads:
            yield f"another number of heads: {name} has {array.shape[1]}, the configuration {heads}"


# The checkpoint


def read_scenic_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """
    The model's arrays in a flax msgpack checkpoint, by `/`-joined names; the optimiser's state is left out.

    Raises:
        ValueError: if the file is not such a checkpoint.
    """
    try:
        with open(path, "rb") as file:
            # One value at a time: the optimiser's state, as large as the model, is skipped without being decoded.
            unpacker = msgpack.Unpacker(
                file, ext_hook=_decode_array, raw=False, strict_map_key=False, max_buffer_size=0
            )
            weights, found = _find_weights(unpacker, WEIGHT_LOCATIONS)
    except (ValueError, msgpack.UnpackException, UnicodeDecodeError) as error:
        what = str(error) or "it ends in the middle"
        raise ConversionError(f"{path} is not a whole flax msgpack checkpoint: {what}") from error
    if isinstance(weights, dict):
        return dict(_flatten(weights))
    expected = " or ".join("/".join(location) for location in WEIGHT_LOCATIONS)
    raise ConversionError(f"{path} has no weights under {expected}; at the top it has {found}.")


def _find_weights(unpacker: msgpack.Unpacker, locations: Sequence[tuple[str, ...]]) -> tuple[Any, list[str]]:
    """What is at one of the locations in the map that comes next, None if there is nothing, and the map's keys."""
    weights, keys = None, []
    for _ in range(unpacker.read_map_header()):
        keys.append(unpacker.unpack())
        below = [location[1:] for location in locations if location[0] == keys[-1]]
        if weights is not None or not below:
            unpacker.skip()
        elif () in below:
            weights = unpacker.unpack()
        else:
            weights, _ = _find_weights(unpacker, below)
    return weights, keys


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


# The conversion


def convert(args: argparse.Namespace) -> Result:
    release = RELEASES.get(args.model)
    with progress(steps=5) as begin, beside_and_renamed(args.output) as folder:
        begin(f"reading {args.checkpoint}")
        model_config = release.model_config if release else _model_config(args.model_config)
        params = read_scenic_checkpoint(args.checkpoint)
        config = _config(args, model_config, params)
        num_arrays = len(params)

        begin("mapping")
        with torch.device("meta"):
            model = ViViTForVideoClassification(config)
        model.load_state_dict(state_dict_from_scenic(params, config), strict=True, assign=True)
        frame_stride = release.frame_stride if release else 2
        processor = processor_for(config, resize=args.resize, frame_stride=frame_stride)

        begin("writing")
        origin = f"Converted from the official checkpoint `{Path(args.checkpoint).name}` of google-research/scenic."
        name = args.push_to_hub or Path(args.output).name
        save(model, processor, folder, name, report=origin, datasets=release and list(release.datasets))
        result = Result(
            output=args.output,
            model=f"{config.attention_type}, {config.num_labels} labels" + (f", {args.model}" if args.model else ""),
            mapped=num_arrays,
            num_parameters=count_parameters(model),
            processor=describe_processor(processor),
        )
        del model
        if not args.skip_parity:
            begin("running the reference")
            clip = random_clip(config)
            steps = chosen_steps(config)
            expected = _reference_outputs(params, model_config, clip, steps)
            del params
            begin("loading what was written, and running it")
            model = frozen(ViViTForVideoClassification.from_pretrained(folder))
            what = f"all tokens' embeddings, and logits from time steps {steps} = numpy version of the official code"
            result.parity = compare(tokens_and_logits(model, clip), expected, what)
            del model
    return result


def _model_config(path: str) -> Mapping[str, Any]:
    model_config = read_json(path)
    if not isinstance(model_config, dict):
        raise ConversionError(f"{path} does not hold an official configuration, but a {type(model_config).__name__}.")
    return model_config.get("model", model_config)


def _config(args: argparse.Namespace, model_config: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> ViViTConfig:
    release = RELEASES.get(args.model)
    if "output_projection/bias" not in params:
        raise ConversionError(
            f"{args.checkpoint} has no output_projection/bias, and so no classifier; it has {sorted(params)[:5]}."
        )
    num_labels = len(params["output_projection/bias"])
    if release and num_labels != release.num_labels:
        raise ConversionError(f"{args.checkpoint} has {num_labels} outputs, but {args.model} has {release.num_labels}.")
    num_frames = args.num_frames or (release.num_frames if release else 32)
    image_size = one_or_pair(args.image_size) if args.image_size else (release.image_size if release else 224)
    try:
        config = config_from_scenic(model_config, num_frames=num_frames, image_size=image_size, num_labels=num_labels)
    except KeyError as error:
        raise ConversionError(f"{args.model_config}: the model configuration has no entry {error}.") from error
    if (labels := find_labels(args.labels, release, num_labels)) is not None:
        set_labels(config, labels)
    if release and release.label_groups:
        config.label_groups = dict(release.label_groups)
    return config


def _reference_outputs(
    params: Mapping[str, np.ndarray], model_config: Mapping[str, Any], clip: torch.Tensor, steps: list[int]
) -> dict[str, torch.Tensor]:
    video = clip.permute(0, 1, 3, 4, 2).numpy()  # channels last
    tokens, logits = official_forward(params, model_config, video, steps, np.float32)
    return {"tokens": torch.from_numpy(tokens), "logits": torch.from_numpy(logits)}


def parse_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    source = parser.add_argument_group("source")
    source.add_argument("--checkpoint", required=True, metavar="FILE", help="flax msgpack file of an official release")
    which = source.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", choices=RELEASES, help="the released model that it is")
    which.add_argument(
        "--model-config", metavar="FILE", help="else JSON of the official `config.model` (or with a `model` entry)"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--num-frames", type=int, help="frames in a clip (default: the released model's, else 32)")
    add_size_argument(model, "--image-size", "one side, or height and width (default: the released model's, else 224)")
    model.add_argument("--resize", type=int, metavar="PIXELS", help="short side before the crop (default: 256 for 224)")
    model.add_argument(
        "--labels",
        metavar="FILE",
        help="class names: JSON list, JSON map of index to name, or one per line; "
        "by default those of the Hub's huggingface/label-files",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    return run(convert, parse_options(make_parser(__doc__)), argv)


if __name__ == "__main__":
    sys.exit(main())
