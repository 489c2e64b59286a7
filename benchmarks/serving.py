"""
`vivit-hf serve` under load, against `vivit-hf classify` on the same files.

    python benchmarks/serving.py                    the demo model on its samples; about four minutes
    python benchmarks/serving.py --videos FOLDER --model MODEL
    python benchmarks/serving.py --smoke            a few seconds, to see that it runs

First, rounds in which both classify the same files in turns: files per second, and CPU seconds per file, which count
where other jobs share the machine (those of `classify` are without its start, which is measured on one file). Then
`--clients` clients at once for `--seconds`: every request must get the answer of its own file, and memory must not
grow. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from measuring import Row, at_least, at_most, file_to_write, median_ratio, report

from vivit_hf import demo_model_path
from vivit_hf.data import find_videos


PROGRAM = [sys.executable, "-m", "vivit_hf"]
# Scores are rounded to 4 digits after sums whose order depends on the batch.
SAME_SCORE = 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, default=demo_model_path() / "samples", help="folder of videos")
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--files", type=int, default=120, help="files per round, the videos over and over")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60, help="of the load")
    parser.add_argument("--smoke", action="store_true", help="few files and seconds, without targets")
    parser.add_argument("--json", metavar="FILE", type=file_to_write, help="write the rows into this file")
    args = parser.parse_args()
    if args.smoke:
        args.files, args.rounds, args.seconds = 10, 1, 3.0
    videos = [Path(path) for path in find_videos(args.videos)]
    options = ["--model", args.model] if args.model else []
    with running_server(*options, "--max-requests", args.clients * 2) as server:
        rows = measure_throughput(server, list(itertools.islice(itertools.cycle(videos), args.files)), options, args)
        rows += measure_load(server, videos, options, args)
    sys.exit(report(rows, args.json))


@dataclass
class Server:
    address: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


@contextmanager
def running_server(*options: Any) -> Any:
    command = [*PROGRAM, "serve", "--port", "0", *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"(http://[^/]+)/classify", line):
                break
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
        while True:
            try:
                httpx.get(f"{found[1]}/health/ready", timeout=60).raise_for_status()
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield Server(found[1], psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def classified(videos: list[Path], *options: Any) -> tuple[float, float]:
    """Run `classify` on videos; return the seconds that it says it took, and the CPU seconds of the process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [*PROGRAM, "classify", *map(str, videos), *map(str, options)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(r"in ([\d.]+) s, ([\d.]+) per second", printed)
    if found is None:
        raise SystemExit(f"unexpected output: {printed[-300:]}")
    return len(videos) / float(found[2]), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def served(server: Server, videos: list[Path], num_clients: int) -> tuple[float, float]:
    """Send videos with several clients; return the seconds until the last answer, and the server's CPU seconds."""
    with httpx.Client(base_url=server.address, timeout=120) as client, ThreadPoolExecutor(num_clients) as clients:

        def send(video: Path) -> None:
            client.post("/classify", files={"video": (video.name, video.read_bytes())}).raise_for_status()

        begin, cpu = time.perf_counter(), server.cpu_seconds()
        list(clients.map(send, videos))
        return time.perf_counter() - begin, server.cpu_seconds() - cpu


def measure_throughput(server: Server, videos: list[Path], options: list[str], args: argparse.Namespace) -> list[Row]:
    seconds: dict[str, list[float]] = {"classify": [], "serve": []}
    cpu: dict[str, list[float]] = {"classify": [], "serve": []}
    served(server, videos[:20], args.clients)  # to warm up
    for _ in range(args.rounds):
        _, start = classified(videos[:1], *options)
        taken, used = classified(videos, *options)
        seconds["classify"].append(taken)
        cpu["classify"].append((used - start) / (len(videos) - 1))
        taken, used = served(server, videos, args.clients)
        seconds["serve"].append(taken)
        cpu["serve"].append(used / len(videos))
    target = None if args.smoke else 0.9
    rates = {name: len(videos) / median(values) for name, values in seconds.items()}
    rows = [Row(f"{name}: files per second", round(rate, 1), "") for name, rate in rates.items()]
    rows += [Row(f"{name}: CPU seconds per file", round(median(values), 4), "s") for name, values in cpu.items()]
    ratio = median_ratio(seconds["classify"], seconds["serve"])
    rows.append(at_least("serve: files per second over classify's", ratio, "x", target))
    ratio = median_ratio(cpu["classify"], cpu["serve"])
    rows.append(at_least("serve: files per CPU second over classify's", ratio, "x", target))
    return rows


@dataclass
class Load:
    """What clients saw."""

    answers: int = 0
    lost: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def measure_load(server: Server, videos: list[Path], options: list[str], args: argparse.Namespace) -> list[Row]:
    command = [*PROGRAM, "classify", *map(str, videos), "--json", *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = [json.loads(line)["predictions"] for line in printed.splitlines()]
    load, end, lock = Load(), time.monotonic() + args.seconds, threading.Lock()

    def ask(number: int) -> None:
        with httpx.Client(base_url=server.address, timeout=120) as client:
            for turn in itertools.count(number):
                if time.monotonic() > end:
                    return
                place, begin = turn % len(videos), time.perf_counter()
                name = f"client_{number}_turn_{turn}.mp4"
                answer = client.post("/classify", files={"video": (name, videos[place].read_bytes())})
                with lock:
                    load.seconds.append(time.perf_counter() - begin)
                    if answer.status_code != 200:
                        load.lost.append(answer.text)
                    elif answer.json()["file"] != name or not is_same(answer.json()["predictions"], expected[place]):
                        load.mixed.append(f"{videos[place].name}: {answer.text}")
                    load.answers += 1

    held: list[float] = []
    with ThreadPoolExecutor(args.clients) as clients:
        running = [clients.submit(ask, number) for number in range(args.clients)]
        while time.monotonic() < end:
            held.append(server.process.memory_info().rss / 1e6)
            time.sleep(min(1.0, args.seconds / 10))
        for one in running:
            one.result()
    for problem in (load.lost + load.mixed)[:5]:
        print(problem, file=sys.stderr)
    half, what = len(held) // 2, f"{args.clients} clients for {args.seconds:g} s"
    return [
        Row(f"{what}: answers", load.answers, ""),
        Row(f"{what}: median seconds to an answer", round(median(load.seconds), 3), "s"),
        at_most(f"{what}: requests without labels", len(load.lost), "", 0),
        at_most(f"{what}: answers of other files", len(load.mixed), "", 0),
        at_most(
            f"{what}: growth of memory in the second half",
            max(held[half:]) - max(held[:half]),
            "MB",
            None if args.smoke else 20.0,
        ),
    ]


def is_same(predictions: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Return whether the scores of all labels are the same; labels with equal scores may change places."""
    scores = {(one.get("group"), one["label"]): one["score"] for one in predictions}
    others = {(one.get("group"), one["label"]): one["score"] for one in expected}
    return scores.keys() == others.keys() and all(abs(scores[key] - others[key]) < SAME_SCORE for key in scores)


if __name__ == "__main__":
    main()
