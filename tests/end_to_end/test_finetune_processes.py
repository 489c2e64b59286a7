"""Fine-tuning that is interrupted or killed, and on several processes."""

import json
import shutil
import signal
import socket
import sys

import pytest
import torch
from finetune_runs import EXAMPLES, losses, settings_for, start, to_argv, write_data
from paths import TESTS
from safetensors.torch import load_file


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


# Interruptions

STOCHASTIC = {"drop_path_rate": 0.2, "mixup_alpha": 0.3, "scale_jitter": "0.9,1.33", "colour_jitter": 0.5}


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    settings = settings_for(data, output, max_steps=7, save_strategy="steps", save_steps=2, **STOCHASTIC)
    process = start([sys.executable, EXAMPLES / "finetune.py", *to_argv(settings)])
    assert process.returncode == 0, process.stderr[-3000:]
    return settings, output


@pytest.mark.parametrize(("moment", "passed_over"), [("step:6", None), ("optimizer.pt:2", "checkpoint-4")])
def test_kill_9_and_resume_give_the_same_loss_curve_to_the_bit(uninterrupted, tmp_path, moment, passed_over):
    settings, whole = uninterrupted
    settings = {**settings, "output_dir": tmp_path, "save_total_limit": 2, "dataloader_num_workers": 1}
    process = start([sys.executable, TESTS / "killed_finetune.py", moment, *to_argv(settings)])
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    assert not (tmp_path / "model.safetensors").exists()

    process = start([sys.executable, EXAMPLES / "finetune.py", *to_argv(settings)])
    assert process.returncode == 0, process.stderr[-3000:]
    last = 2 if passed_over else 4
    assert f"Resuming from {tmp_path / f'checkpoint-{last}'}" in process.stdout
    assert (f"{passed_over} is not whole" in process.stderr) == bool(passed_over)
    assert losses(tmp_path) == losses(whole) and len(losses(whole)) == 7
    ours, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_ctrl_c_waits_for_the_checkpoint_and_the_run_resumes_from_it(uninterrupted, tmp_path):
    settings, whole = uninterrupted
    settings = {**settings, "output_dir": tmp_path}
    process = start([sys.executable, TESTS / "killed_finetune.py", "Ctrl-C:2", *to_argv(settings)])
    assert process.returncode == 130, process.stderr[-3000:]
    assert f"Interrupted: run again to continue from {tmp_path / 'checkpoint-4'}." in process.stderr
    assert "Traceback" not in process.stderr and not (tmp_path / "model.safetensors").exists()

    process = start([sys.executable, "-m", "vivit_hf", "finetune", *to_argv(settings)])
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"Resuming from {tmp_path / 'checkpoint-4'}" in process.stdout and losses(tmp_path) == losses(whole)


# Several processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--master_port=0"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
# The threads of a process group would go on while Python ends, which now and then aborts the process.
ENDED = """
import sys
from pathlib import Path
from vivit_hf.cli import finetune
finetune.main()
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in names), names
"""


@pytest.mark.parametrize(
    "extra", [{}, {"lora_rank": 2}, {"ema_decay": 0.9}], ids=["all weights", "LoRA", "moving average"]
)
def test_two_processes_train_like_one_with_the_same_batch(data, tmp_path, extra):
    plain = {**extra, "max_steps": 3, "lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.1}
    # The processes see examples 0, 1 and 2, 3 of each batch of 4; crops are random per (seed, epoch, index), and so is
    # what stands in for the damaged files.
    videos = tmp_path / "videos"
    shutil.copytree(data / "videos", videos)
    broken = [videos / "train" / "up_left" / "000.mp4", videos / "train" / "up_right" / "001.mp4"]
    for file in (*broken, videos / "test" / "up_left" / "000.mp4"):
        file.write_bytes(b"broken")
    plain |= {"train_dir": videos / "train", "validation_dir": videos / "test", "max_steps": 4}
    one = settings_for(data, tmp_path / "one", **plain)
    two = settings_for(data, tmp_path / "two", per_device_train_batch_size=2, ddp_backend="gloo", **plain)
    results = []
    (tmp_path / "finetune.py").write_text(ENDED)
    for command, settings in (([sys.executable], one), (TORCHRUN, two)):
        process = start([*command, tmp_path / "finetune.py", *to_argv(settings)])
        assert process.returncode == 0, process.stderr[-3000:]
        results.append(process.stdout)
    assert "Training on 1 process(es)" in results[0] and "Training on 2 process(es)" in results[1]
    assert results[1].count("Training on") == 1, "one process speaks"
    assert "find_unused_parameters" not in process.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=1e-4, msg=name)
    scores = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two")]
    for name in ("eval_top1", "train_damaged_files", "eval_damaged_files"):
        assert scores[0][name] == scores[1][name]
    reports = [json.loads((tmp_path / name / "damaged_files.json").read_text()) for name in ("one", "two")]
    assert reports[0] == reports[1] and list(reports[0]["train"]) == list(map(str, broken))


def test_torchrun_does_not_train_copies(data, tmp_path):
    """Without --use_cpu, newer versions of accelerate leave each process by itself; older ones train together."""
    settings = settings_for(data, tmp_path, use_cpu=None)
    process = start([*TORCHRUN, EXAMPLES / "finetune.py", *to_argv(settings)], CUDA_VISIBLE_DEVICES="")
    if process.returncode == 0:
        assert "Training on 2 process(es)" in process.stdout
    else:
        assert "2 processes were started, but this one trains by itself" in process.stderr
        assert not any(tmp_path.iterdir())


def test_sharding_on_cpus_is_refused(data, tmp_path):
    settings = settings_for(data, tmp_path, use_cpu=None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [*LAUNCH, "--config_file", EXAMPLES / "fsdp2.yaml", "--num_processes", 2, "--main_process_port", port]
    process = start([*launch, EXAMPLES / "finetune.py", *to_argv(settings)], CUDA_VISIBLE_DEVICES="")
    assert process.returncode != 0
    assert "FSDP is set up, but on CPUs it would silently be plain data parallelism" in process.stderr
    assert not any(tmp_path.iterdir())


def test_accelerate_on_cpus_says_that_it_is_one_process(data, tmp_path):
    settings = settings_for(data, tmp_path, max_steps=1)
    process = start([*LAUNCH, "--cpu", "--num_processes", 2, EXAMPLES / "finetune.py", *to_argv(settings)])
    assert process.returncode == 0, process.stderr[-3000:]
    assert "One process only. On CPUs, `torchrun" in process.stdout
