"""Runs of fine-tuning on miniature data, in this process and in others, for test_finetune*.py."""

import json
import os
import subprocess
from pathlib import Path

import finetune
import torch
from moving_shapes import write_moving_shapes
from transformers import ViTConfig, ViTModel


EXAMPLES = Path(finetune.__file__).parent
SHORT_RUN = {
    "use_cpu": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "dataloader_num_workers": 0,
    "report_to": "none",
    "disable_tqdm": True,
}


def write_data(folder):
    """Write 16 + 4 videos of 4 classes and a small image ViT."""
    write_moving_shapes(folder / "videos", clips_per_class=4, test_clips_per_class=1, seed=0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ViTModel(ViTConfig(image_size=32, patch_size=16, initializer_range=0.2, **sizes)).save_pretrained(folder / "vit")
    return folder


def settings_for(data, output, **changes):
    return {
        "train_dir": data / "videos" / "train",
        "validation_dir": data / "videos" / "test",
        "model_name_or_path": data / "vit",
        "num_frames": 4,
        "frame_stride": 2,
        "output_dir": output,
        **SHORT_RUN,
        **changes,
    }


def to_argv(settings):
    given = [(name, value) for name, value in settings.items() if value is not None]
    return [text for name, value in given for text in (f"--{name}", str(value))]


def run(data, output, **changes):
    """Run the script in this process, and return its results."""
    finetune.main(to_argv(settings_for(data, output, **changes)))
    return json.loads((Path(output) / "all_results.json").read_text())


def start(command, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, env=environment)


def losses(folder):
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
