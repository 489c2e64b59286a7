"""
Trains each kind of labels for three steps and saves the weights; run alone or under torchrun by test_trainer.py.

    python tests/train_worker.py OUTPUT.pt --batch 8 --accumulation 1
"""

import argparse
import os

import torch
from tiny_models import tiny_config
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from vivit_hf import ViViTForVideoClassification


PROBLEMS = ("single", "soft", "multi", "regression")
CLIPS = 24


class Clips(torch.utils.data.Dataset):
    """Random clips whose labels leave gaps (-100), so that a mean of means is not the mean of the whole batch."""

    def __init__(self, config, problem):
        generator = torch.Generator().manual_seed(0)
        size = (CLIPS, config.num_frames, config.num_channels, *config.frame_size)
        self.clips = torch.randn(size, generator=generator)
        labels = torch.randn(CLIPS, config.num_labels, generator=generator)
        if problem == "single":
            self.labels = labels.argmax(dim=1)
            self.labels[[0, 1, 2, 9, 13]] = -100
        elif problem == "soft":
            self.labels = labels.softmax(dim=1)
        elif problem == "multi":
            self.labels = (labels > 0).float()
            self.labels[[0, 1, 2, 9]] = -100.0
        else:
            self.labels = labels

    def __len__(self):
        return CLIPS

    def __getitem__(self, index):
        return {"pixel_values": self.clips[index], "labels": self.labels[index]}


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--accumulation", type=int, default=1)
    args = parser.parse_args()
    results = {}
    for problem in PROBLEMS:
        kinds = {"multi": "multi_label_classification", "regression": "regression"}
        config = tiny_config("factorised_encoder", problem_type=kinds.get(problem, "single_label_classification"))
        torch.manual_seed(0)
        model = ViViTForVideoClassification(config)
        arguments = TrainingArguments(
            output_dir=args.output + ".trainer",
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulation,
            max_steps=3,
            learning_rate=0.5,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
            dataloader_num_workers=0,
            disable_tqdm=True,
        )
        trainer = InOrder(model, arguments, train_dataset=Clips(config, problem))
        trainer.train()
        results[problem] = {
            "state_dict": {name: parameter.detach().clone() for name, parameter in model.state_dict().items()},
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "world_size": arguments.world_size,
        }
    if arguments.process_index == 0:
        torch.save(results, args.output)
    if torch.distributed.is_initialized():
        # A process that ends before the other one is done can abort: gloo's threads are still running.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
