"""Run `vivit-hf convert vit`, and check what all its refusals have in common."""

import re

import numpy as np

from vivit_hf.conversion.command import main


# Filled by the attack below if a pickle is executed, which must not happen.
EXECUTED = []


class Attack:
    def __reduce__(self):
        return EXECUTED.append, (1,)


def converter(tmp_path, capfd):
    """Return a function that runs the command: (exit code, printed text without line breaks, errors, output folder)."""

    def run(source, *arguments):
        capfd.readouterr()  # what was printed before
        output = tmp_path / "converted"
        command = ["--source", source, "--output", output, "--num-frames", "4", *arguments]
        code = main("vit", list(map(str, command)))
        printed, errors = capfd.readouterr()
        return code, re.sub(r"[\s│]+", " ", printed), errors, output

    return run


def difference(printed):
    return float(re.search(r"max abs difference (\S+):", printed)[1])


def assert_refused(result, tmp_path, *expected):
    """Check for exit code 1, one line with the expected texts, and no files left behind."""
    code, _, errors, output = result
    assert code == 1, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    for text in expected:
        assert str(text) in errors
    assert not output.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def jax_arrays(seed=0, layers=2, width=24, heads=4, mlp=40):
    """Return random arrays of an image ViT with class token and head, under scenic's names."""
    random = np.random.default_rng(seed)
    block = {
        "LayerNorm_0/scale": (width,),
        "LayerNorm_0/bias": (width,),
        "LayerNorm_1/scale": (width,),
        "LayerNorm_1/bias": (width,),
        **{
            f"MultiHeadDotProductAttention_0/{name}/{part}": shape
            for name in ("query", "key", "value")
            for part, shape in {"kernel": (width, heads, width // heads), "bias": (heads, width // heads)}.items()
        },
        "MultiHeadDotProductAttention_0/out/kernel": (heads, width // heads, width),
        "MultiHeadDotProductAttention_0/out/bias": (width,),
        "MlpBlock_0/Dense_0/kernel": (width, mlp),
        "MlpBlock_0/Dense_0/bias": (mlp,),
        "MlpBlock_0/Dense_1/kernel": (mlp, width),
        "MlpBlock_0/Dense_1/bias": (width,),
    }
    shapes = {
        "embedding/kernel": (8, 8, 3, width),
        "embedding/bias": (width,),
        "cls": (1, 1, width),
        "Transformer/posembed_input/pos_embedding": (1, 10, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, 7),
        "head/bias": (7,),
        **{f"Transformer/encoderblock_{i}/{name}": shape for i in range(layers) for name, shape in block.items()},
    }
    return {name: random.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}
