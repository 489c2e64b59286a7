"""The arguments of `vivit-hf convert` and `vivit-hf export`, parsed before torch is imported, which takes seconds."""

import argparse
from collections.abc import Sequence
from typing import Any

from .scenic_releases import RELEASES


DEFAULT_OPSET = 20  # of ONNX, the first with a GELU operator


def main(command: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """
    Parse the arguments, convert, and print the result; return 0, or 1 after one line on standard error.

    Args:
        command: "vit", "scenic", "transformers" or "export".
        argv: the arguments, by default those of the process.
        prog: the name of the program in its help, by default that of the script.
    """
    module, add_arguments, description = _COMMANDS[command]
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=_DefaultsFormatter)
    output = parser.add_argument_group("output")
    output.add_argument("--output", required=True, metavar="DIR", help="folder to write; must be new or empty")
    if command != "export":
        output.add_argument("--push-to-hub", metavar="REPO", help="also upload the result to this Hub repository")
        output.add_argument("--private", action="store_true", help="make the repository private if it is created")
        output.add_argument("--endpoint", action="store_true", help="with --push-to-hub: also for Inference Endpoints")
        output.add_argument("--skip-parity", action="store_true", help="do not compare outputs of source and result")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if vars(args).get("endpoint") and not args.push_to_hub:
        parser.error("--endpoint uploads a handler for Inference Endpoints: give --push-to-hub as well")

    from .results import run

    return run(module, args)


class _DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Append an option's default to its help, except where there is none to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _OneOrMore(argparse.Action):
    """Store one number as it is, and several as a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class _OneOrTwo(argparse.Action):
    """Store one number as it is and two as a pair (height, width)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"takes one number or two (height width), not {len(values)}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))


_SIZE: dict[str, Any] = {"type": int, "nargs": "+", "action": _OneOrTwo, "metavar": "PIXELS"}


def _add_vit(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("source")
    source.add_argument("--source", required=True, help="Hub id or folder, timm's .safetensors, or .npz of a JAX ViT")
    source.add_argument("--num-heads", type=int, help="attention heads, if timm's weights do not determine them")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--attention-type",
        default="spatio_temporal",
        help="the variant: spatio_temporal, factorised_encoder, factorised_self_attention or "
        "factorised_dot_product_attention",
    )
    model.add_argument(
        "--attention-order", choices=("space_time", "time_space"), help="Model 3: which attention comes first"
    )
    model.add_argument("--num-frames", type=int, default=32, help="frames in a clip")
    model.add_argument(
        "--tubelet-size", type=int, nargs=3, metavar=("T", "H", "W"), help="default: 2 and the ViT's patch"
    )
    model.add_argument("--image-size", **_SIZE, help="one side, or height and width (default: the ViT's)")
    model.add_argument(
        "--embedding-type",
        choices=("tubelet", "uniform_frame_sampling"),
        help="tokens of tubelets or of sampled frames",
    )
    model.add_argument("--num-sampled-frames", type=int, help="number of frames for uniform frame sampling")
    model.add_argument("--num-temporal-layers", type=int, help="Model 2: layers of the temporal encoder")
    model.add_argument(
        "--pooling", choices=("cls", "mean", "max", "sum"), help="how to pool tokens (default: depends on the variant)"
    )
    model.add_argument(
        *("--temporal-pooling", "--temporal_pooling"),
        choices=("cls", "mean", "max", "sum", "concatenate", "attention"),
        help="Model 2: how to pool time steps (default: as --pooling)",
    )
    model.add_argument("--labels", metavar="FILE", help="class names: JSON list or map, or one per line")
    model.add_argument("--num-labels", type=int, help="number of classes without names; with neither, no classifier")

    inits = parser.add_argument_group("initialisation (section 3.4 of the paper)")
    for name, help, *choices in (
        ("--tubelet-init", "tubelet kernels", "central_frame", "filter_inflation", "approximate_rank_pooling"),
        ("--temporal-attention-init", "Model 3", "zero_output", "zero", "copy", "random"),
        ("--position-init", "position embeddings", "tile", "tile_linear"),
    ):
        inits.add_argument(name, choices=choices, default=choices[0], help=help)
    inits.add_argument(
        "--temporal-encoder-init",
        choices=("random", "zero_output", "copy_last"),
        help="Model 2 (default: zero_output with a --temporal-pooling other than cls, else random)",
    )
    inits.add_argument("--seed", type=int, default=0, help="seed for newly initialised weights")

    processor = parser.add_argument_group("processor (mean, standard deviation and resampling are the image model's)")
    processor.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="short side before the crop (default: in the image model's ratio if it crops, else 256 for 224)",
    )


def _add_scenic(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("source")
    source.add_argument("--checkpoint", required=True, metavar="FILE", help="flax msgpack file of an official release")
    which = source.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", choices=RELEASES, help="the released model in the checkpoint")
    which.add_argument(
        "--model-config", metavar="FILE", help="for other models: JSON of the official `config.model` or `config`"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--num-frames", type=int, help="frames in a clip (default: the released model's, else 32)")
    model.add_argument(
        "--image-size", **_SIZE, help="one side, or height and width (default: the released model's, else 224)"
    )
    model.add_argument("--resize", type=int, metavar="PIXELS", help="short side before the crop (default: 256 for 224)")
    model.add_argument(
        "--labels",
        metavar="FILE",
        help="class names: JSON list, JSON map of index to name, or one per line (default: those in the Hub's "
        "huggingface/label-files)",
    )


def _add_transformers(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("source")
    source.add_argument("--source", required=True, help="Hub id or folder of transformers' Vivit, or of ours")
    source.add_argument("--to", choices=("vivit_hf", "transformers"), default="vivit_hf", help="which model to write")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hub id or folder of a classifier, ours or transformers' Vivit")
    parser.add_argument("--int8", action="store_true", help="also write an int8 model, and measure its agreement")
    parser.add_argument(
        "--calibration",
        metavar="FOLDER",
        help="fix the scales of int8 activations on clips of these videos: faster than scales at run time",
    )
    parser.add_argument(
        "--merge-tokens",
        type=int,
        nargs="+",
        action=_OneOrMore,
        metavar="N",
        help="Models 1 and 2: tokens that each layer merges into similar ones, or one number per layer",
    )
    parser.add_argument(
        "--videos", metavar="FOLDER", help="check with clips of these videos (default: of --calibration, else random)"
    )
    parser.add_argument("--num-clips-checked", type=int, default=16, metavar="N", help="clips to check with")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="version of the ONNX operators")


# By command: the module whose `convert` takes the arguments, the function that declares them, and a description.
_COMMANDS = {
    "vit": (
        "convert_vit",
        _add_vit,
        "Make a ViViT of any variant from an image model (ViT, DeiT, MAE, MSN, DINOv2, CLIP or SigLIP): a Hub id or "
        "file of timm, or a JAX .npz.",
    ),
    "scenic": (
        "convert_scenic",
        _add_scenic,
        "Convert a ViViT checkpoint of google-research/scenic (flax msgpack) into a `save_pretrained` folder.",
    ),
    "transformers": (
        "convert_transformers",
        _add_transformers,
        "Convert transformers' own Vivit (Model 1) to ours, and ours back to transformers'.",
    ),
    "export": (
        "export_onnx",
        _add_export,
        "Export a classifier to ONNX, in float32 and on request in int8, and measure how far each differs from "
        "PyTorch. The batch size is free; frames and size are the model's.",
    ),
}
