"""
Draw which tokens a token attends to in the four variants, as gradients through the attention of tiny models show it.

A clip runs through a model with random weights. For each attention of its first layer, the context of one token is
differentiated with respect to all tokens: where the gradient is zero, the token cannot look.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Rectangle
from PIL import Image

from vivit_hf import ViViTConfig, ViViTModel
from vivit_hf.configuration_vivit import ATTENTION_TYPES


TIME, ROWS, COLUMNS, PATCH = 4, 3, 4, 8
QUERY = (1, 1, 2)  # time, row and column of the token that attends
QUERY_COLOUR, SEEN, UNSEEN = "#ee7733", "#004488", "#dddddd"  # told apart in grey, and by the colour-blind
HEADS = 4


def make_model(attention_type: str) -> Any:
    torch.manual_seed(0)
    temporal = {"num_temporal_layers": 1} if attention_type == "factorised_encoder" else {}
    config = ViViTConfig(
        attention_type=attention_type,
        num_frames=TIME,
        image_size=(ROWS * PATCH, COLUMNS * PATCH),
        tubelet_size=(1, PATCH, PATCH),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=16,
        **temporal,
    )
    return ViViTModel(config).eval()


def reach(model: Any, attention: Any, query: tuple[int, ...], heads: slice = slice(None)) -> torch.Tensor:
    """Return which of the tokens that reach an attention in a forward pass its query can see, bool, of their shape."""
    seen: list[torch.Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.randn(1, TIME, 3, ROWS * PATCH, COLUMNS * PATCH))
    handle.remove()
    tokens = seen[0].clone().requires_grad_()  # (..., hidden)
    context = attention.attend(*attention.project(tokens))  # (..., heads, head_dim)
    context[query][heads].sum().backward()
    return tokens.grad.abs().sum(-1) > 0


def patterns() -> list[tuple[str, list[tuple[str, torch.Tensor]]]]:
    """Return each variant with its attentions: when each comes, and what the query sees in it."""
    time, row, column = QUERY
    space = row * COLUMNS + column
    whole, encoder, own, product = map(make_model, ATTENTION_TYPES)
    spatial, temporal = encoder.encoder.layer[0].attention, encoder.temporal_encoder.layer[0].attention
    layer, dot_product, half = own.encoder.layer[0], product.encoder.layer[0].attention, HEADS // 2
    place = (0, time, space)
    every = reach(whole, whole.encoder.layer[0].attention, (0, 1 + time * ROWS * COLUMNS + space))
    frame, steps = reach(encoder, spatial, (time, 1 + space)), reach(encoder, temporal, (0, 1 + time))
    over_space, over_time = reach(own, layer.attention_space, place), reach(own, layer.attention_time, place)
    first, second = (
        reach(product, dot_product, place, slice(half)),
        reach(product, dot_product, place, slice(half, None)),
    )
    return [
        ("Model 1: spatio-temporal attention", [("every token of the clip", every)]),
        (
            "Model 2: factorised encoder",
            [("first: the tokens of its frame", frame), ("in the end: one token per frame", steps)],
        ),
        (
            "Model 3: factorised self-attention",
            [("in each layer: first space", over_space), ("then time", over_time)],
        ),
        (
            "Model 4: factorised dot-product attention",
            [("in each layer: half of the heads, time", first), ("at once, the other half: space", second)],
        ),
    ]


def draw_tokens(axes: Any, seen: torch.Tensor) -> None:
    """Draw the tokens of a clip, frame by frame, in front of them the class tokens, and what the query sees."""
    size, space = 0.86, ROWS * COLUMNS
    flat = seen.flatten().tolist()
    is_step = len(flat) == 1 + TIME
    class_tokens = {1 + TIME * space: 1, TIME * (1 + space): TIME, 1 + TIME: 1}.get(len(flat), 0)
    for time in range(TIME):
        left = time * (COLUMNS + 1.6)
        if class_tokens == TIME or (class_tokens and time == 0):
            draw_token(axes, left - 1.1, 1, flat.pop(0), False, size, is_class=True)
        if is_step:
            draw_token(axes, left + 1.5, 1, flat.pop(0), time == QUERY[0], size)
            continue
        for place in range(space):
            row, column = divmod(place, COLUMNS)
            draw_token(axes, left + column, row, flat.pop(0), (time, row, column) == QUERY, size)
    axes.set(xlim=(-1.6, TIME * (COLUMNS + 1.6) - 1), ylim=(ROWS, -0.3), aspect="equal")
    axes.axis("off")


def draw_token(
    axes: Any, x: float, y: float, is_seen: bool, is_query: bool, size: float, is_class: bool = False
) -> None:
    shape = Circle((x + size / 2, y + size / 2), size / 2) if is_class else Rectangle((x, y), size, size)
    shape.set(facecolor=SEEN if is_seen else UNSEEN, linewidth=0)
    axes.add_patch(shape)
    if is_query:
        shape.set(facecolor=QUERY_COLOUR, edgecolor="black", linewidth=1.6, zorder=3)


def main(folder: Path) -> Path:
    """Write attention.png to the folder."""
    figure = Figure(figsize=(7.4, 5.2), dpi=140)
    FigureCanvasAgg(figure)
    rows = patterns()
    for number, (title, attentions) in enumerate(rows):
        top = 0.985 - number * 0.236
        figure.text(0.02, top, title, fontsize=12, fontweight="bold", va="top")
        for column, (words, seen) in enumerate(attentions):
            left = 0.02 + 0.49 * column
            figure.text(left, top - 0.05, words, fontsize=11, va="top")
            draw_tokens(figure.add_axes((left, top - 0.205, 0.47, 0.115), anchor="SW"), seen)
    key = figure.add_axes((0, 0, 1, 0.06))
    key.axis("off")
    handles = [Patch(facecolor=QUERY_COLOUR, edgecolor="black", label="a token")]
    handles += [Patch(facecolor=SEEN, label="it attends to"), Patch(facecolor=UNSEEN, label="it does not attend to")]
    handles += [Line2D([], [], linestyle="", marker="o", markersize=9, color=SEEN, label="class token")]
    key.legend(handles=handles, loc="center", ncols=4, frameon=False, fontsize=11, handlelength=1.2, columnspacing=1.4)
    path = folder / "attention.png"
    with BytesIO() as drawn:
        figure.savefig(drawn, format="png")
        Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)
    return path
