"""Labelled videos of moving shapes and a model for them, for the tests of scripts and commands."""

import signal
import subprocess
import sys

from moving_shapes import MOTIONS, write_moving_shapes
from tiny_models import make_model

from vivit_hf import ViViTConfig, ViViTVideoProcessor


# Runs a script, or a module with -m, and kills itself when it would give the next file with a prefix its name.
KILLED_AFTER = """
import os, runpy, signal, sys
left, prefix, publish = int(sys.argv[1]), sys.argv[2], os.replace

def replace(source, target):
    global left
    if os.path.basename(target).startswith(prefix):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    publish(source, target)

os.replace, sys.argv = replace, sys.argv[3:]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--master_port=0"]


def write_labelled_videos(folder):
    """12 training videos, one of them broken, 4 test videos, and a model with random weights for them."""
    write_moving_shapes(folder / "videos", clips_per_class=3, test_clips_per_class=1, seed=0)
    (folder / "videos" / "train" / "up_left" / "001.mp4").write_bytes(b"broken")
    model = make_model(
        ViViTConfig.from_preset("vivit-tiny", num_frames=8, image_size=32, id2label=dict(enumerate(sorted(MOTIONS))))
    )
    model.save_pretrained(folder / "model")
    ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder / "model")
    return folder


def start_and_kill(command, num_files, prefix="part-"):
    """Run a command of Python that is killed with so many files, by default shards, however fast the machine is."""
    process = start([sys.executable, "-c", KILLED_AFTER, num_files, prefix, *command[1:]])
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]


def start(command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
