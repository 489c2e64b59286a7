"""
Masked pretraining on unlabelled videos: fine-tuning from random weights, and from `vivit-hf pretrain`.

    python benchmarks/masked_pretraining.py --output runs                            moving shapes, written first
    python benchmarks/masked_pretraining.py --output runs --data FOLDER --task NAME  your own videos
    python benchmarks/masked_pretraining.py --output runs --smoke                    a minute: tiny, for the tests

FOLDER has NAME_train_all.csv and NAME_test.csv with the columns path, label, and one that groups the clips of a person,
scene or tape. A small Model 2 is pretrained on all training clips without labels for several numbers of epochs. It is
then fine-tuned end to end on several numbers of labelled clips. Each arm takes the learning rate with the best accuracy
on a fifth of the training groups, which are left out of fine-tuning. The clips of the test are scored once per run.

A finished run is kept in the output folder and not repeated, so a killed benchmark goes on. The folder also gets the
table and a figure. There is no target.
"""

import argparse
import csv
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from figures import COLOURS  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from measuring import Row, file_to_write, report  # noqa: E402
from moving_shapes import write_moving_shapes  # noqa: E402

import vivit_hf.training.finetuning  # noqa: E402, F401  (its import is no part of a run's minutes)
from vivit_hf.cli import finetune, pretrain  # noqa: E402


EPOCHS = (0, 25, 100)  # of pretraining; 0: random weights
LABELS: dict[int | None, int] = {5: 1000, 20: 1500, None: 2500}  # labelled clips a class (None: all) -> steps
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
MODEL = {"model_name_or_path": "vivit-tiny", "tubelet_size": "2,8,8", "num_frames": 8, "image_size": 56}
RUN = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),
}
PRETRAINING = {
    **RUN,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "horizontal_flip": "no",
    "scale_jitter": "",
    "picture_steps": 200,
    "seed": 0,
}
FINE_TUNING = {**RUN, "per_device_train_batch_size": 8, "eval_strategy": "no"}
SMOKE_EPOCHS, SMOKE_LABELS, SMOKE_RATES = (0, 1), {1: 2, None: 3}, (1e-3, 2e-3)

Clips = list[dict[str, str]]  # with the keys path, label, group


@dataclass(frozen=True)
class Task:
    """A data set. `labelled` and `validation` share no group with each other, and together are the training clips."""

    name: str
    frame_stride: int
    labelled: Clips
    validation: Clips
    test: Clips

    def draw(self, per_class: int | None, seed: int) -> Clips:
        """Return this many random clips of each class, or all; fewer are a part of more."""
        clips = random.Random(seed).sample(self.labelled, len(self.labelled))
        counts: Counter[str] = Counter()
        drawn = []
        for clip in clips:
            counts[clip["label"]] += 1
            if per_class is None or counts[clip["label"]] <= per_class:
                drawn.append(clip)
        return drawn

    def majority(self) -> float:
        """Return the accuracy of the answer that is most frequent in the test."""
        counts = Counter(clip["label"] for clip in self.test)
        return max(counts.values()) / len(self.test)


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run."""

    per_class: int | None
    epochs: int
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        labels = "all" if self.per_class is None else str(self.per_class)
        return f"{labels} labels, {self.epochs} epochs, rate {self.learning_rate:g}, seed {self.seed}"


def read_clips(path: Path) -> Clips:
    """Read a CSV of the columns path, label, and a third one, which is the group."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        others = set(rows.fieldnames or ()) - {"path", "label"}
        if len(others) != 1 or len(rows.fieldnames or ()) != 3:
            raise SystemExit(f"{path} has the columns {rows.fieldnames}; expected path, label and one of groups.")
        group = others.pop()
        return [{"path": str(path.parent / row["path"]), "label": row["label"], "group": row[group]} for row in rows]


def write_clips(clips: Iterable[dict[str, str]], path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["path", "label", "group"])
        writer.writeheader()
        writer.writerows(clips)
    return path


def read_task(folder: Path, name: str, frame_stride: int) -> Task:
    """Read a data set, and set a fifth of the training groups apart for validation."""
    train, test = (read_clips(folder / f"{name}_{part}.csv") for part in ("train_all", "test"))
    groups = sorted({clip["group"] for clip in train})
    if not {clip["group"] for clip in test}.isdisjoint(groups):
        raise SystemExit(f"{folder}: training and test of {name!r} have groups in common.")
    kept_back = set(random.Random(0).sample(groups, max(1, len(groups) // 5)))
    labelled, validation = (
        [clip for clip in train if (clip["group"] in kept_back) == is_back] for is_back in (False, True)
    )
    return Task(name, frame_stride, labelled, validation, test)


def write_shapes(folder: Path, is_smoke: bool) -> None:
    """Write moving shapes and their lists; the clips of a scene, which differ in their motion alone, are a group."""
    counts = (5, 1) if is_smoke else (150, 50)
    write_moving_shapes(folder, counts[0], test_clips_per_class=counts[1], num_frames=16, height=64, width=64)
    for part, listed in (("train", "train_all"), ("test", "test")):
        clips = [
            {"path": str(path.relative_to(folder)), "label": path.parent.name, "group": f"{part}_{path.stem}"}
            for path in sorted((folder / part).rglob("*.mp4"))
        ]
        write_clips(clips, folder / f"shapes_{listed}.csv")


def run_command(main: Callable[[Sequence[str]], None], settings: dict[str, Any], videos: Sequence[Path] = ()) -> float:
    """Run a command with its output in a log beside its results, and return its CPU minutes."""
    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    start = time.process_time()
    with (folder / "log.txt").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        main([*map(str, videos), *arguments])
    return (time.process_time() - start) / 60


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Benchmark:
    """The runs of a data set, in a folder."""

    task: Task
    folder: Path
    steps: dict[int | None, int]  # of fine-tuning, by the number of labelled clips a class
    logging_steps: int

    def pretrained(self, epochs: int) -> tuple[Path, dict[str, float]]:
        """Return a pretrained model with its CPU minutes, its first and its last loss; train it if it is missing."""
        folder = self.folder / f"pretrained-{epochs}"
        result = folder / "result.json"
        if not result.exists():
            videos = write_clips([*self.task.labelled, *self.task.validation], self.folder / "unlabelled.csv")
            own = {"num_train_epochs": epochs, "frame_stride": self.task.frame_stride, "output_dir": folder}
            own["logging_steps"] = self.logging_steps
            minutes = run_command(pretrain.main, {**MODEL, **PRETRAINING, **own}, [videos])
            first, *_, last = losses(folder)
            result.write_text(json.dumps({"minutes": minutes, "first_loss": first, "last_loss": last}))
            print(f"pretrained for {epochs} epochs: loss {first:.3f} to {last:.3f}, {minutes:.1f} min", flush=True)
        return folder, read_json(result)

    def folder_of(self, cell: Cell) -> Path:
        return self.folder / str(cell).replace(" ", "_").replace(",", "")

    def finetuned(self, cell: Cell) -> dict[str, float]:
        """Return the accuracy on validation, the last training loss and the CPU minutes of a run, new or finished."""
        folder = self.folder_of(cell)
        result = folder / "result.json"
        if not result.exists():
            start = MODEL if cell.epochs == 0 else {"model_name_or_path": self.pretrained(cell.epochs)[0]}
            folder.mkdir(parents=True, exist_ok=True)
            settings = {**start, **FINE_TUNING, "learning_rate": cell.learning_rate, "seed": cell.seed}
            settings |= {
                "max_steps": self.steps[cell.per_class],
                "frame_stride": self.task.frame_stride,
                "output_dir": folder,
            }
            settings["logging_steps"] = self.logging_steps
            settings["train_file"] = write_clips(self.task.draw(cell.per_class, cell.seed), folder / "train.csv")
            settings["validation_file"] = write_clips(self.task.validation, self.folder / "validation.csv")
            minutes = run_command(finetune.main, settings)
            accuracy = read_json(folder / "all_results.json")["eval_top1"]
            result.write_text(json.dumps({"validation": accuracy, "loss": losses(folder)[-1], "minutes": minutes}))
            print(f"{cell}: {read_json(result)}", flush=True)
        return read_json(result)

    def tested(self, cell: Cell) -> float:
        """Return the accuracy of a run on the test clips; score it if that is missing."""
        folder = self.folder_of(cell)
        result = folder / "test" / "all_results.json"
        if not result.exists():
            test = {"model_name_or_path": folder, "do_eval": True, "output_dir": folder / "test", "report_to": "none"}
            test |= {"validation_file": write_clips(self.task.test, self.folder / "test.csv")}
            run_command(finetune.main, {**test, "use_cpu": RUN["use_cpu"], "dataloader_num_workers": 0})
            print(f"{cell}: test {read_json(result)['eval_top1']:.3f}", flush=True)
        return float(read_json(result)["eval_top1"])

    def arm(self, per_class: int | None, epochs: int, rates: Sequence[float], seeds: int) -> dict[str, Any]:
        """Return a row of the table: the runs of all seeds with the learning rate that is best on validation."""
        tried = {rate: self.finetuned(Cell(per_class, epochs, rate, 0))["validation"] for rate in rates}
        best = max(tried, key=lambda rate: tried[rate])
        cells = [Cell(per_class, epochs, best, seed) for seed in range(seeds)]
        runs = [self.finetuned(cell) for cell in cells]
        return {
            "per_class": per_class,
            "epochs": epochs,
            "learning_rate": best,
            "pretraining_minutes": self.pretrained(epochs)[1]["minutes"] if epochs else 0.0,
            "minutes": statistics.mean(run["minutes"] for run in runs),
            "loss": max(run["loss"] for run in runs),
            "top1": [self.tested(cell) for cell in cells],
            "validation": tried,
        }


def losses(folder: Path) -> list[float]:
    """Return the logged training losses of a run, each a mean over the steps since the one before."""
    return [entry["loss"] for entry in read_json(folder / "trainer_state.json")["log_history"] if "loss" in entry]


def label_text(per_class: int | None) -> str:
    return "all" if per_class is None else str(per_class)


def table(arms: Sequence[dict[str, Any]], task: Task) -> str:
    """Markdown: a row per number of labels and of epochs."""
    heads = ["labelled clips a class", "epochs of pretraining", "CPU minutes: pretraining, fine-tuning"]
    heads += ["learning rate", "training loss at the end", "top-1 (lowest to highest)", "gain"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    without = {arm["per_class"]: statistics.mean(arm["top1"]) for arm in arms if arm["epochs"] == 0}
    for arm in arms:
        mean = statistics.mean(arm["top1"])
        cells = [
            label_text(arm["per_class"]),
            str(arm["epochs"]),
            f"{arm['pretraining_minutes']:.1f}, {arm['minutes']:.1f}",
            f"{arm['learning_rate']:g}",
            f"{arm['loss']:.3f}",
            f"{mean:.3f} ({min(arm['top1']):.3f} to {max(arm['top1']):.3f})",
            f"{mean - without[arm['per_class']]:+.3f}" if arm["epochs"] and arm["per_class"] in without else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Majority class: {task.majority():.3f}. Test clips: {len(task.test)}."]
    return "\n".join(lines)


def draw(arms: Sequence[dict[str, Any]], task: Task, path: Path) -> None:
    """Draw the accuracy over the epochs of pretraining: a line per number of labels, a point per seed."""
    figure = Figure(figsize=(5.8, 4.2), layout="constrained")
    ax = figure.subplots()
    epochs = sorted({arm["epochs"] for arm in arms})
    for colour, per_class in zip(COLOURS, dict.fromkeys(arm["per_class"] for arm in arms), strict=False):
        own = [arm for arm in arms if arm["per_class"] == per_class]
        places = [epochs.index(arm["epochs"]) for arm in own]
        means = [statistics.mean(arm["top1"]) for arm in own]
        ax.plot(places, means, "-", color=colour, label=f"{label_text(per_class)} labelled clips a class")
        for place, arm in zip(places, own, strict=True):
            ax.plot([place] * len(arm["top1"]), arm["top1"], "o", color=colour, markersize=4, alpha=0.6)
    ax.axhline(task.majority(), color="grey", linestyle=":", linewidth=1, label="majority class")
    ax.set(xticks=range(len(epochs)), xticklabels=epochs, ylim=(0, 1.02))
    ax.set(xlabel="epochs of masked pretraining", ylabel="top-1 on test clips")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--data", type=Path, help="folder of CSVs (default: moving shapes, written to the output)")
    parser.add_argument("--task", default="shapes", help="first part of the names of the CSVs")
    parser.add_argument("--frame-stride", type=int, default=1, help="distance between the frames of a clip")
    parser.add_argument("--seeds", type=int, default=3, help="draws of labelled clips")
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS, help="of pretraining; 0: random weights")
    parser.add_argument("--labels", nargs="+", default=[*map(label_text, LABELS)], choices=[*map(label_text, LABELS)])
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="write the rows into this file")
    parser.add_argument("--smoke", action="store_true", help="one seed, a few steps")
    args = parser.parse_args()

    folder, data = args.output / args.task, args.data
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = args.output / "videos"
        if not (data / f"{args.task}_test.csv").exists():
            write_shapes(data, args.smoke)
    task = read_task(data, args.task, args.frame_stride)
    budgets, rates, seeds = (SMOKE_EPOCHS, SMOKE_RATES, 1) if args.smoke else (args.epochs, LEARNING_RATES, args.seeds)
    steps = SMOKE_LABELS if args.smoke else {one: LABELS[one] for one in LABELS if label_text(one) in args.labels}
    benchmark = Benchmark(task, folder, steps, logging_steps=1 if args.smoke else 10)
    arms = [benchmark.arm(per_class, epochs, rates, seeds) for per_class in steps for epochs in budgets]

    (folder / "arms.json").write_text(json.dumps(arms, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(arms, task) + "\n", encoding="utf-8")
    draw(arms, task, folder / "figure.png")
    print(f"\n{table(arms, task)}\n")
    rows = [Row(f"{task.name}: majority class", round(task.majority(), 3), "")]
    for arm in arms:
        name = f"{task.name}, {label_text(arm['per_class'])} labelled clips a class, {arm['epochs']} epochs"
        rows.append(Row(f"{name}: top-1", round(statistics.mean(arm["top1"]), 3), ""))
    sys.exit(report(rows, args.json))


if __name__ == "__main__":
    main()
