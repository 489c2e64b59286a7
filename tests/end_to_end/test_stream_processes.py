"""Streams on two processes: whatever their number of videos and whichever are damaged, and as on one process."""

import json
import sys
from itertools import zip_longest

import pytest
import stream_runs
import torch
from finetune_runs import start
from stream_runs import run, write_videos

from vivit_hf.data.labels import IGNORED


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("streams") / "videos")


JOBS = {
    "5": {"count": 5, "per_device_train_batch_size": 2, "eval_damaged": []},
    "7": {"count": 7, "damaged": [6], "eval_damaged": [6]},
    "17": {"count": 17, "damaged": [0, 3, 16], "eval_damaged": [0, 3, 16], "dataloader_num_workers": 2},
    "17, one share damaged": {"count": 17, "damaged": list(range(1, 17)), "eval_damaged": list(range(1, 17))},
    "whole": {"count": 7, "max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 5}
    | {"per_device_train_batch_size": 1},
}
EVALUATED = ("5", "7", "17")


@pytest.fixture(scope="module")
def two_processes(folder):
    jobs = dict(JOBS)
    jobs["resumed"] = {**JOBS["whole"], "resume": str(folder.parent / "whole" / "checkpoint-5")}
    jobs |= {f"{name} evaluated": {**JOBS[name], "do_train": False} for name in EVALUATED}
    jobs["alike"] = {"count": 7, "mixup": 0, "drop_path": 0, "per_device_train_batch_size": 2}
    (folder.parent / "jobs.json").write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--master_port=0"]
    process = start([*torchrun, stream_runs.__file__, folder.parent])
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads((folder.parent / f"results{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("job", JOBS)
def test_no_number_of_videos_and_no_damage_stops_two_processes(two_processes, job):
    one, other = (results[job] for results in two_processes)
    settings = JOBS[job]
    assert one["world_size"] == 2 and len(one["losses"]) == settings.get("max_steps", 4)
    assert len(one["batches"]) == len(other["batches"]) > 0
    seen = [sum(clip) for clip, _ in one["batches"]], [sum(clip) for clip, _ in other["batches"]]
    if len(settings.get("damaged", ())) < 4:
        assert not set(seen[0]) & set(seen[1]), "the processes see the same clips"
    names = one["damaged"]["eval"], other["damaged"]["eval"]
    assert names[0] == names[1] and len(names[0]) == len(settings.get("eval_damaged", ()))
    assert len(one["logits"]) == settings["count"]
    assert one["labels"] == [
        IGNORED if index in settings.get("eval_damaged", ()) else index % 3 for index in range(settings["count"])
    ]


@pytest.mark.parametrize("job", EVALUATED)
def test_two_processes_evaluate_like_one(two_processes, folder, tmp_path, job):
    alone = run(folder, tmp_path, do_train=False, **JOBS[job])
    for results in two_processes:
        found = results[f"{job} evaluated"]
        assert found["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)
        assert found["labels"] == alone["labels"] and found["damaged"] == alone["damaged"]
        assert torch.allclose(torch.tensor(found["logits"]), torch.tensor(alone["logits"]), atol=1e-5)


def test_two_processes_train_on_a_stream_like_one(two_processes, folder, tmp_path):
    alone = run(folder, tmp_path, count=7, mixup=0, drop_path=0, per_device_train_batch_size=4)
    one, other = (results["alike"] for results in two_processes)
    for first, second, (clips, labels) in zip_longest(one["batches"], other["batches"], alone["batches"]):
        assert first[0] + second[0] == clips and first[1] + second[1] == labels
    assert one["losses"] == pytest.approx(alone["losses"], abs=2e-4)
    for found, expected in zip(one["weights"], alone["weights"], strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-4)


def test_two_processes_resume_to_the_bit(two_processes):
    for results in two_processes:
        whole, resumed = results["whole"], results["resumed"]
        assert len(whole["batches"]) == 12 and resumed["batches"] == whole["batches"][10:]
        assert resumed["losses"] == whole["losses"] and resumed["weights"] == whole["weights"]
