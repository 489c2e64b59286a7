"""`vivit-hf search`: the videos most like a video, and near-duplicates, by stored features."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..data.escaping import counted
from . import options
from .output import as_cell, echo, echo_json, fail, output_console


Query = Annotated[
    str | None, typer.Argument(metavar="QUERY", help="A video file, an http(s) address, or - for standard input.")
]
Index = Annotated[
    list[Path], typer.Option("--index", metavar="FILE", help="Features of `vivit-hf embed`; can be repeated.")
]
Duplicates = Annotated[
    bool, typer.Option("--duplicates", help="Find groups of near-duplicates in the features; without a QUERY.")
]
Threshold = Annotated[
    float | None, typer.Option(min=-1, max=1, help="Lowest score of a near-duplicate.", show_default="0.99")
]


def search(
    index: Index,
    query: Query = None,
    top_k: Annotated[int, typer.Option(min=1, help="Videos to show.")] = 5,
    duplicates: Duplicates = False,
    threshold: Threshold = None,
    model: options.FeaturesModel = None,
    allow_private_addresses: options.PrivateAddresses = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """
    Find the videos most like a video by their features, or near-duplicates. Scores are cosine similarities, up to 1.

    The query is embedded by the model that the features come from. In features per time step, each result is the
    moment most like the query. Above 100,000 vectors the search is approximate and keeps a graph beside the first
    file, which needs `pip install 'vivit-hf[search]'`.
    Exit code 0, 1 if the query cannot be read, or 2 for wrong usage.

    With --json, print one line per video: {"file", "score"}, with "start" and "end" of a part and the "time" of a
    moment; with --duplicates, one line per group: {"videos": [{"file", "score"}]}.

    Example: vivit-hf search goal.mp4 --index features.parquet --top-k 10
    """
    if duplicates == (query is not None):
        raise typer.BadParameter("expected a video, or --duplicates without one", param_hint="QUERY")
    if threshold is not None and not duplicates:
        raise typer.BadParameter("it is the lowest score of --duplicates", param_hint="--threshold")
    from ..inference.feature_files import read_features

    try:
        features = read_features(index)
    except (OSError, ValueError) as error:
        fail(str(error), code=2)
    if not features.files:
        fail(f"{index[0]} holds no features: none of its videos could be read.", code=2)
    if query is None:
        _print_groups(_duplicates(features, threshold, index[0]), features, as_json)
    else:
        source: Any = {"bytes": options.standard_input(), "path": "-"} if query == "-" else query
        limits = {"allow_private_addresses": allow_private_addresses}
        vector = _embed(source, features.settings, *options.load_encoder(features.settings, model, device, **limits))
        _print_matches(_matches(features, vector, top_k, index[0]), features, as_json)


def _duplicates(features: Any, threshold: float | None, index: Path) -> list[Any]:
    from ..inference.search import DUPLICATE_SCORE, find_duplicates, neighbour_graph, video_vectors

    graph = neighbour_graph(video_vectors(features), f"{index}.videos.usearch")
    return find_duplicates(features, DUPLICATE_SCORE if threshold is None else threshold, graph)


def _matches(features: Any, vector: Any, top_k: int, index: Path) -> list[Any]:
    from ..inference.search import neighbour_graph, search_features, unit_vectors

    vectors = unit_vectors(features.vectors.reshape(-1, features.vectors.shape[-1]))
    graph = neighbour_graph(vectors, f"{index}.{features.settings['kind']}s.usearch")
    return search_features(features, vector, top_k, graph)


def _embed(source: Any, settings: dict[str, Any], encoder: Any, processor: Any) -> Any:
    """Return the vectors of the query, from the views of the features."""
    from ..inference.features import embed_videos

    processor.on_error = settings["views"]["on_error"]
    views = {name: settings["views"][name] for name in ("num_clips", "num_crops")}
    (found,) = embed_videos(encoder, processor, [source], per_step=settings["kind"] == "step", **views)
    if found.error is not None:
        fail(found.error)
    return found.vectors


def _video(features: Any, index: int) -> dict[str, Any]:
    """Return the file of a video, and its "start" and "end" if it is a part."""
    part = {"start": float(features.starts[index]), "end": float(features.ends[index])}
    return {"file": features.files[index], **{name: value for name, value in part.items() if value == value}}


def _print_matches(matches: list[Any], features: Any, as_json: bool) -> None:
    rows = [{**_video(features, one.index), "time": one.time, "score": round(one.score, 4)} for one in matches]
    if as_json:
        for row in rows:
            echo_json({name: value for name, value in row.items() if value is not None})
        return
    _print_table([rows])


def _print_groups(groups: list[Any], features: Any, as_json: bool) -> None:
    rows = [
        [{**_video(features, i), "score": round(score, 4)} for i, score in zip(one.indices, one.scores, strict=True)]
        for one in groups
    ]
    if as_json:
        for videos in rows:
            echo_json({"videos": videos})
    elif rows:
        _print_table(rows)
    else:
        echo(f"No near-duplicates among {counted(len(features.files), 'video')}.")


def _print_table(groups: list[list[dict[str, Any]]]) -> None:
    """Print the columns that any row has, with a line after each group."""
    names = [
        name for name in ("start", "end", "time") if any(row.get(name) is not None for one in groups for row in one)
    ]
    table = Table("file", *(Column(name, justify="right") for name in (*names, "score")))
    for group in groups:
        for row in group:
            cells = ["" if row.get(name) is None else f"{row[name]:.2f}" for name in names]
            table.add_row(as_cell(row["file"]), *cells, f"{row['score']:.3f}")
        table.add_section()
    output_console().print(table)
