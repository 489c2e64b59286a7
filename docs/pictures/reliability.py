"""
Draw how reliable probabilities are before and after calibration: what `vivit-hf evaluate --calibrate` prints and draws.

The videos are moving shapes in poor light, with much noise, which the demo model was not trained on.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from moving_shapes import MOTIONS, Scene, write_video

from vivit_hf import demo_model_path


COMMAND = "evaluate --model my_vivit --data dark_videos --num-clips 1 --num-crops 1 --calibrate --output-dir scores"
CONTRAST, NOISE = 0.15, 60  # the share that is left, and a standard deviation in grey levels


def write_dark_videos(folder: Path, clips_per_class: int) -> None:
    """Write videos of moving shapes in class folders, with noise of its own in each pixel of each frame."""
    for number in range(clips_per_class):
        rng = np.random.default_rng([1, number])
        scene = Scene.draw(rng, num_frames=24, height=80, width=96)
        for motion in MOTIONS:
            frames = 128 + CONTRAST * (scene.render(motion, 24) - 128.0) + rng.normal(0, NOISE, (24, 80, 96, 3))
            path = folder / motion / f"{number:03d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, np.clip(np.rint(frames), 0, 255).astype(np.uint8))


def main(folder: Path) -> Path:
    """Write reliability.png to the folder, and print what the command prints."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        shutil.copytree(demo_model_path(), work / "my_vivit", ignore=shutil.ignore_patterns("samples"))
        write_dark_videos(work / "dark_videos", clips_per_class=50)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "vivit_hf", *COMMAND.split()]
        printed = subprocess.run(
            command, cwd=work, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        print(f"vivit-hf {COMMAND}\n{printed}")
        path = folder / "reliability.png"
        Image.open(work / "scores" / "reliability.png").convert("RGB").quantize(128).save(path, optimize=True)
    return path
