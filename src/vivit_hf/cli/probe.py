"""`vivit-hf probe`: classifiers on stored features, in seconds."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..data.escaping import counted
from .evaluate import SplitColumn, VideoColumn, VideoRoot
from .options import FeaturesModel, load_encoder
from .output import as_cell, echo, fail, output_console, quiet_libraries


FeaturesFiles = Annotated[
    list[Path], typer.Option("--features", "-f", help="File of `vivit-hf embed`; repeat it for several.")
]
Labels = Annotated[str, typer.Option("--labels", "-l", help="Folder of class folders, or a CSV or JSON file.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="New folder for the best head as a model, and for probe.json.")
]
Groups = Annotated[
    str | None, typer.Option("--groups", help="Column of what must stay on one side: patients, tapes, speakers.")
]
LabelColumn = Annotated[
    str | None, typer.Option(help="Column of the labels.", show_default="label, class ...", rich_help_panel="Videos")
]
Folds = Annotated[int, typer.Option(min=2, help="Parts of the videos, each held out once.")]
Repeats = Annotated[
    int | None,
    typer.Option(min=1, help="Divisions into folds, with different seeds.", show_default="3, or 1 from 500 videos on"),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the folds.")]
_MAX_SHOWN = 5


def probe(
    features: FeaturesFiles,
    labels: Labels,
    output: Output = None,
    groups: Groups = None,
    video_root: VideoRoot = None,
    video_column_name: VideoColumn = None,
    label_column_name: LabelColumn = None,
    split_column: SplitColumn = "auto",
    folds: Folds = 5,
    repeats: Repeats = None,
    seed: Seed = 0,
    model: FeaturesModel = None,
) -> None:
    """
    Train small classifiers on features of `vivit-hf embed`, and score them on videos that they have not seen.

    With features per step, the heads are logistic regression and nearest neighbours, each on the mean of the steps and
    on the steps in order, and a learned query that weights the steps. All are scored by cross-validation in which parts
    of one file, and with --groups all clips of one patient or tape, stay together. With a column of splits they are
    trained on its training videos and scored on its validation videos, or else its test videos.

    With --output, the most accurate head that can be part of a model becomes one, for `classify` and all other
    commands: trained on all videos, or on the training videos of a split. Exit code 0, or 2 for wrong usage, data or
    models.

    Example: vivit-hf probe --features features.parquet --labels labels.csv --groups patient --output my_probe
    """
    quiet_libraries()
    from ..conversion.results import whole_folder
    from ..inference.feature_files import read_features

    try:
        from ..training.probe_checkpoint import possible_heads, save_probe
        from ..training.probe_data import match_labels, read_labels
        from ..training.probes import score_probes

        found = read_features(features)
        videos = read_labels(
            labels,
            video_root=video_root,
            video_column=video_column_name,
            label_columns=None if label_column_name is None else [label_column_name],
            split_column=split_column,
            group_column=groups,
        )
        data = match_labels(found, videos)
        if output is None:
            _print_report(score_probes(data, num_folds=folds, num_repeats=repeats, seed=seed), data)
            return
        with whole_folder(output) as folder:
            encoder, processor = load_encoder(found.settings, model, "cpu", needs_gradients=True)
            possible_heads(found.settings, encoder.config)  # what is wrong with the model is known before the scores
            report = score_probes(data, num_folds=folds, num_repeats=repeats, seed=seed)
            _print_report(report, data)
            written = save_probe(folder, output.name, encoder.float(), processor, found.settings, data, report, seed)
        _print_checkpoint(output, written, report, found.settings["views"])
    except (OSError, ValueError, ModuleNotFoundError) as error:
        fail(str(error), code=2)


def _print_report(report: Any, data: Any) -> None:
    from ..inference.metrics import is_near_chance

    right: dict[str, Any] = {"justify": "right"}
    table = Table("head", Column("accuracy", **right), Column("balanced accuracy", **right), Column("seconds", **right))
    for score in report.scores:
        spread = "" if score.spread is None else f" ± {score.spread:.3f}"
        table.add_row(
            score.head, f"{score.accuracy:.3f}{spread}", f"{score.balanced_accuracy:.3f}", f"{score.seconds:.1f}"
        )
    majority = as_cell(f"majority class: {report.majority_class}")
    table.add_row(majority, f"{report.majority_class_accuracy:.3f}", f"{1 / len(data.names):.3f}", "")
    output_console().print(table)
    echo(f"{report.protocol}." + (" ± is the standard deviation over the folds." if report.num_folds > 1 else ""))
    if is_near_chance(report.best().accuracy, report.majority_class_accuracy, report.num_scored):
        echo("Near chance: no head is reliably more accurate than always answering the most frequent class.")
    for note in report.notes:
        echo(f"note: {note}")
    for what, names in (("features", data.without_features), ("a label", data.without_label)):
        if names:
            more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
            echo(f"{counted(len(names), 'video')} left out, without {what}: {', '.join(names[:_MAX_SHOWN])}{more}")


def _print_checkpoint(output: Path, written: str, report: Any, views: dict[str, Any]) -> None:
    best = report.best().head
    if best != written:
        echo(f"{best} cannot be part of a model: the most accurate head that can is written.")
    options = f"--num-clips {views['num_clips']} --num-crops {views['num_crops']}"
    echo(f"{output}: {written}. With the views of the features: vivit-hf classify VIDEO --model {output} {options}")
