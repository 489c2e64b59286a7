"""
Few labelled clips per class: probes and fine-tuning from an image model, by the commands that a user calls.

    python benchmarks/few_labels.py --data FOLDER --image_model FOLDER --output runs           40 minutes of a core
    python benchmarks/few_labels.py --data FOLDER --image_model FOLDER --output runs --smoke   a minute, for the tests

DATA has, for every task, TASK_test.csv and TASK_train_0.csv, TASK_train_1.csv, ...: draws of a few training videos per
class. All have the columns path, label and group; videos of one group (a person, a tape) are never in both training and
test. The published figures are of two tasks on 64-pixel animations of people, whose groups are the people:

    a    three actions in three directions, 9 classes, 5 clips a class, 8 frames each
    b    two different actions of one person and direction, joined A then B or B then A: 18 classes that single frames
         cannot tell apart, 5 clips a class, 16 frames each

IMAGE_MODEL is an image model in the layout of transformers. What is finished is only read when the script runs again,
so that rows can be measured one by one (--only). Times are CPU minutes, which other jobs of the machine hardly change.
Exits with 1 if a target is missed.
"""

import argparse
import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import Row, at_least, at_most, file_to_write, report
from transformers import AutoConfig, AutoModel, set_seed

from vivit_hf.video_decoding import VideoReader


MOST_FRAMES = 16
HEADS = {"probe, mean": "linear, mean", "probe, ordered": "linear, ordered", "probe, attentive": "attentive"}
FEW, FRAME = "image model, frozen and stored: few-labels", "probe on a single frame"
TRAINED = ("random ViViT", "random image model, the same", "image model, end to end", FEW)
ROWS = (*TRAINED, *HEADS, FRAME)
# End to end costs a hundred times as much: smaller frames, half of them, and few epochs.
END_TO_END: dict[str, Any] = {
    "num_train_epochs": 15,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-4,
    "layer_decay": 0.75,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "scale_jitter": "0.9,1.33",
    "frame_sampling": "uniform",
    "save_strategy": "no",
    "eval_strategy": "no",
}
RANDOM_VIVIT = {**END_TO_END, "model_name_or_path": "vivit-tiny", "learning_rate": 1e-3, "layer_decay": 1.0}


@dataclass(frozen=True)
class Task:
    """A task of the data folder: its test videos, the draws of training videos, and the frames of a clip."""

    name: str
    test: Path
    draws: tuple[Path, ...]
    num_frames: int
    majority: float


@dataclass(frozen=True)
class Result:
    """The score of one draw, as a fraction, and what it cost."""

    top1: float
    minutes: float


class Bench:
    """Runs commands, and keeps the results of each in `output`."""

    def __init__(self, args: argparse.Namespace):
        self.output, self.model, self.size = args.output, args.image_model, args.image_size
        self.is_smoke, self.bf16 = args.smoke, args.bf16

    def command(self, name: str, *arguments: Any) -> float:
        """Run a command of `vivit-hf`, and return its CPU minutes."""
        command = [sys.executable, "-m", "vivit_hf", name, *map(str, arguments)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{process.stdout[-1000:]}\n{process.stderr[-3000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60

    def finetune(self, row: str, task: Task, settings: Mapping[str, Any]) -> list[Result]:
        """Fine-tune on each draw. All draws share a folder, so that tokens of the test videos are computed once."""
        folder, results = self.folder(row, task), []
        for number, draw in enumerate(task.draws):
            finished = folder / f"draw_{number}.json"
            if not finished.exists():
                given = {
                    "train_file": draw,
                    "validation_file": task.test,
                    "output_dir": folder / "run",
                    "seed": number,
                    "bf16": self.bf16,
                    "report_to": "none",
                    "use_cpu": True,
                    "disable_tqdm": True,
                    "dataloader_num_workers": 0,
                    **settings,
                }
                minutes = self.command("finetune", *(text for one in given.items() for text in (f"--{one[0]}", one[1])))
                top1 = json.loads((folder / "run" / "all_results.json").read_text())["eval_top1"]
                finished.write_text(json.dumps({"top1": top1, "minutes": minutes}))
            results.append(Result(**json.loads(finished.read_text())))
        return results

    def probe(self, row: str, task: Task, num_frames: int) -> list[dict[str, Any]]:
        """Score all heads on each draw: for each, the contents of probe.json and the CPU minutes."""
        folder, found = self.folder(row, task), []
        encoder = folder / "encoder"
        if not encoder.exists():
            patch = AutoConfig.from_pretrained(self.model).patch_size
            structure = ["--attention-type", "factorised_encoder", "--num-temporal-layers", 0]
            sizes = ["--tubelet-size", 1, patch, patch, "--image-size", self.size, "--num-frames", num_frames]
            given = ["--source", self.model, "--output", encoder, "--skip-parity"]
            self.command("convert", "vit", *given, *structure, *sizes)
        test, minutes_of_test = self._embed(folder, encoder, task.test)
        for number, draw in enumerate(task.draws):
            finished = folder / f"draw_{number}.json"
            if not finished.exists():
                train, minutes = self._embed(folder, encoder, draw)
                labels = write_split(folder / f"labels_{number}.csv", draw, task.test)
                shutil.rmtree(folder / "probe", ignore_errors=True)
                files = ["--features", train, "--features", test, "--labels", labels, "--output", folder / "probe"]
                minutes += self.command("probe", *files)
                report_of = json.loads((folder / "probe" / "probe.json").read_text())
                finished.write_text(json.dumps({**report_of, "minutes": minutes + minutes_of_test * (not number)}))
            found.append(json.loads(finished.read_text()))
        return found

    def _embed(self, folder: Path, encoder: Path, videos: Path) -> tuple[Path, float]:
        """Embed the videos of a file, one view each; return the file and the CPU minutes."""
        features, time = folder / f"{videos.stem}.parquet", folder / f"{videos.stem}.json"
        if not time.exists():
            views = ["--per-step", "--num-clips", 1, "--num-crops", 1, "--frame-sampling", "uniform"]
            dtype = ["--dtype", "bfloat16" if self.bf16 else "float32", "--workers", 0]
            minutes = self.command("embed", videos, "--model", encoder, "--output", features, *views, *dtype)
            time.write_text(json.dumps(minutes))
        return features, json.loads(time.read_text())

    def folder(self, row: str, task: Task) -> Path:
        folder = self.output / task.name / "".join(letter if letter.isalnum() else "_" for letter in row)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def measure(self, row: str, task: Task) -> list[Result]:
        """Return the results of a row of the table, one per draw."""
        if row in HEADS or row == FRAME:
            frames = 1 if row == FRAME else task.num_frames
            head = HEADS.get(row, "linear, mean")
            reports = self.probe(FRAME if row == FRAME else "probes", task, frames)
            return [Result(one["scores"][head]["accuracy"], one["minutes"]) for one in reports]
        few = {"recipe": "few-labels", "image_size": self.size, "num_frames": task.num_frames}
        if row == FEW:
            return self.finetune(row, task, {**few, "model_name_or_path": self.model})
        if row.startswith("random image model"):
            return self.finetune(row, task, {**few, "model_name_or_path": self._random_image_model()})
        shortened = {"num_train_epochs": 1} if self.is_smoke else {}
        if row == "random ViViT":
            return self.finetune(row, task, {**RANDOM_VIVIT, "num_frames": task.num_frames, **shortened})
        patch = AutoConfig.from_pretrained(self.model).patch_size
        temporal = {"num_temporal_layers": 2, "temporal_pooling": "mean", "tubelet_size": 1}
        sizes = {"image_size": self.size // 2 // patch * patch, "num_frames": max(2, task.num_frames // 2)}
        given = {**END_TO_END, **temporal, **sizes, **shortened}
        return self.finetune(row, task, {**given, "model_name_or_path": self.model})

    def _random_image_model(self) -> Path:
        """Return a folder with the image model's architecture and random weights."""
        folder: Path = self.output / "random_image_model"
        if not folder.exists():
            set_seed(0)
            shutil.copytree(self.model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
            AutoModel.from_config(AutoConfig.from_pretrained(self.model)).save_pretrained(folder)
        return folder


# Data


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def find_tasks(data: Path) -> list[Task]:
    """Return the tasks in a folder. Exits with a message if there are none, or groups are on both sides."""
    tasks = []
    for test in sorted(data.glob("*_test.csv")):
        name = test.name.removesuffix("_test.csv")
        draws = tuple(sorted(one for one in data.glob(f"{name}_train_*.csv") if one.stem.split("_")[-1].isdigit()))
        rows = read_rows(test)
        if not draws or not rows:
            sys.exit(f"{data}: the task {name} needs test videos and at least {name}_train_0.csv.")
        for draw in draws:
            if shared := {row["group"] for row in rows} & {row["group"] for row in read_rows(draw)}:
                sys.exit(f"{draw}: the group {sorted(shared)[0]} is in {test.name}, too.")
        with VideoReader(rows[0]["path"]) as reader:
            num_frames = min(MOST_FRAMES, len(reader.timestamps))
        majority = max(Counter(row["label"] for row in rows).values()) / len(rows)
        tasks.append(Task(name, test, draws, num_frames, majority))
    if not tasks:
        sys.exit(f"{data}: there is no file TASK_test.csv.")
    return tasks


def write_split(path: Path, train: Path, test: Path) -> Path:
    """Write one file of labels with a column of splits."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["path", "label", "group", "split"], extrasaction="ignore")
        writer.writeheader()
        for split, source in (("train", train), ("test", test)):
            writer.writerows({**row, "split": split} for row in read_rows(source))
    return path


# Tables

Found = dict[tuple[str, str], list[Result]]  # (row, task) -> draws


def table(tasks: Sequence[Task], found: Found) -> str:
    """Markdown: for each row and task mean and standard deviation over the draws, and minutes of the first draw."""
    heads = [f"{task.name}: top-1 | ± | CPU minutes" for task in tasks]
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * 3 * len(tasks)]
    for row in dict.fromkeys(row for row, _ in found):
        cells = [
            f"{mean(found[row, task.name]):.2f} | {spread(found[row, task.name])} | "
            f"{found[row, task.name][0].minutes:.1f}"
            for task in tasks
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    majority = [f"{task.majority:.2f} | | " for task in tasks]
    return "\n".join([*lines, f"| majority class | {' | '.join(majority)} |"])


def mean(results: Sequence[Result]) -> float:
    return statistics.mean(one.top1 for one in results)


def spread(results: Sequence[Result]) -> str:
    return f"{statistics.stdev(one.top1 for one in results):.2f}" if len(results) > 1 else ""


def rows_of(tasks: Sequence[Task], found: Found) -> list[Row]:
    """Return the accuracies, and for few-labels its margins over the probes and its minutes over theirs."""
    rows = [at_least(f"{task}: {row}, top-1", mean(results), "", None) for (row, task), results in found.items()]
    for task in tasks:
        probes = {row: mean(found[row, task.name]) for row in HEADS if (row, task.name) in found}
        if (FEW, task.name) not in found or not probes:
            continue
        best, few = max(probes, key=lambda row: probes[row]), found[FEW, task.name]
        rows.append(at_least(f"{task.name}: few-labels minus {best}", mean(few) - probes[best], "", 0.0))
        minutes = few[0].minutes / found[best, task.name][0].minutes
        rows.append(at_most(f"{task.name}: CPU minutes over those of embed and probe", minutes, "", 1.5))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CSV files, see above")
    parser.add_argument("--image_model", type=Path, required=True, help="folder of an image model")
    parser.add_argument("--output", type=Path, required=True, help="folder for features, models and results")
    parser.add_argument("--image_size", type=int, default=112, help="of frames, in pixels; end to end half of it")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, which is faster on some CPUs")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="some of the rows")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="some of the tasks")
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="write the rows into this file")
    parser.add_argument("--smoke", action="store_true", help="one draw and one epoch end to end, no targets")
    args = parser.parse_args()
    tasks = [task for task in find_tasks(args.data) if args.tasks is None or task.name in args.tasks]
    if args.smoke:
        tasks = [Task(task.name, task.test, task.draws[:1], task.num_frames, task.majority) for task in tasks]
    bench = Bench(args)
    found: Found = {}
    for row in args.only:
        for task in tasks:
            found[row, task.name] = bench.measure(row, task)
            scores = ", ".join(f"{one.top1:.3f}" for one in found[row, task.name])
            print(f"{task.name}, {row}: {scores}, {found[row, task.name][0].minutes:.1f} CPU minutes", flush=True)
    print(f"\n{table(tasks, found)}\n")
    rows = rows_of(tasks, found)
    sys.exit(report([Row(row.name, row.value, row.unit) for row in rows] if args.smoke else rows, args.json))


if __name__ == "__main__":
    main()
