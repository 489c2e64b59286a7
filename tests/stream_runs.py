"""
Trains and evaluates a tiny model on streams, and notes what it saw; for test_stream_*.py, also under torchrun:

    torchrun --nproc_per_node 2 tests/stream_runs.py FOLDER     FOLDER/jobs.json holds the settings of each run
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tiny_models import tiny_config
from transformers import TrainingArguments
from video_files import moving_frames, write_video

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.data.annotations import LabelledVideo
from vivit_hf.data.labels import LabelMap
from vivit_hf.training.augmentation import ClipAugmentation
from vivit_hf.training.clips import StreamedClips
from vivit_hf.training.mixing import ClipCollator
from vivit_hf.training.trainer import ClipTrainer


LABELS = LabelMap({"": ("dark", "grey", "bright")})
NUM_VIDEOS = 17


class ShuffledVideos:
    """A stream whose order is another one in each epoch, as a shuffled one of `datasets`."""

    def __init__(self, videos):
        self.videos, self.epoch = videos, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.videos))
        return (self.videos[index] for index in order)


def write_videos(folder):
    """Readable and broken videos; gives the folder."""
    folder.mkdir()
    for index in range(NUM_VIDEOS):
        frames = np.clip(moving_frames(12, 32, 40) // 8 + 12 * index, 0, 255).astype(np.uint8)
        write_video(folder / f"{index:02}.mp4", frames)
        (folder / f"broken{index:02}.mp4").write_bytes(b"broken")
    return folder


def videos_of(folder, count, damaged=()):
    """The first `count` videos; those numbered in `damaged` cannot be read."""
    paths = [folder / f"{'broken' if index in damaged else ''}{index:02}.mp4" for index in range(count)]
    names = LABELS.groups[""]
    return [LabelledVideo(str(path), (names[index % 3],), str(path)) for index, path in enumerate(paths)]


def trainer_of(folder, output, count=NUM_VIDEOS, damaged=(), eval_damaged=(), mixup=0.2, drop_path=0.2, **settings):
    config = tiny_config("factorised_encoder", **LABELS.config_fields(), drop_path_rate=drop_path)
    torch.manual_seed(0)
    height, width = config.frame_size
    sizes = {"size": {"shortest_edge": width}, "crop_size": {"height": height, "width": width}}
    processor = ViViTVideoProcessor(num_frames=config.num_frames, frame_stride=1, **sizes)
    augmentation = ClipAugmentation((height, width), flip_probability=0.5, scale_jitter=(1.0, 1.5))
    arguments = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **settings,
    }
    train = ShuffledVideos(videos_of(folder, count, damaged))
    return NotedTrainer(
        model=ViViTForVideoClassification(config),
        args=TrainingArguments(**arguments),
        train_dataset=StreamedClips(train, processor, LABELS, augmentation=augmentation, seed=5),
        eval_dataset=StreamedClips(videos_of(folder, count, eval_damaged), processor, LABELS, num_clips=2),
        data_collator=ClipCollator(LABELS, mixup_alpha=mixup, seed=5),
        processing_class=processor,
        label_map=LABELS,
    )


class NotedTrainer(ClipTrainer):
    """Keeps the sum of each batch's pixels and what its labels are, of each step."""

    def training_step(self, model, inputs, *arguments, **settings):
        pixels = inputs["pixel_values"].double().flatten(1).sum(dim=1).tolist()
        self.batches = [*getattr(self, "batches", []), (pixels, inputs["labels"].tolist())]
        return super().training_step(model, inputs, *arguments, **settings)


def run(folder, output, *, do_train=True, resume=None, **settings):
    """What a run saw in this process, and what it came to."""
    trainer = trainer_of(folder, output, **settings)
    if do_train:
        trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    predictions = trainer.predict(trainer.eval_dataset)
    history = trainer.state.log_history
    return {
        "batches": getattr(trainer, "batches", []),
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "evaluated_at": [entry["step"] for entry in history if "eval_loss" in entry],
        "weights": [parameter.detach().flatten().tolist() for parameter in trainer.model.parameters()],
        "metrics": {name: value for name, value in metrics.items() if name.endswith(("loss", "top1", "top5"))},
        "logits": predictions.predictions.tolist(),
        "labels": predictions.label_ids.tolist(),
        "damaged": trainer.all_damaged_files(),
        "world_size": trainer.args.world_size,
    }


def main():
    folder = Path(sys.argv[1])
    results = {}
    for name, settings in json.loads((folder / "jobs.json").read_text()).items():
        results[name] = run(folder / "videos", folder / name, ddp_backend="gloo", **settings)
    rank = torch.distributed.get_rank()
    (folder / f"results{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
