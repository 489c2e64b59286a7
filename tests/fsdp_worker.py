"""
Two training steps of every variant, sharded with FSDP2; run under torchrun by test_fsdp.py.

    torchrun --nproc_per_node=2 tests/fsdp_worker.py OUTPUT.pt
"""

import sys

import torch
from tiny_models import ATTENTION_TYPES, make_clips, tiny_config
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from vivit_hf import ViViTForVideoClassification


STEPS, BATCH = 2, 4


def build(attention_type):
    torch.manual_seed(0)
    model = ViViTForVideoClassification(tiny_config(attention_type))
    clips = make_clips(model.config, batch=STEPS * BATCH)
    labels = torch.arange(STEPS * BATCH) % model.config.num_labels
    return model, clips.split(BATCH), labels.split(BATCH)


def train(model, clips, labels):
    """The loss of each step, summed over this process's part of the batch and divided by the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for clip, label in zip(clips, labels, strict=True):
        loss = model(clip, labels=label).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def main():
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    results = {}
    for attention_type in ATTENTION_TYPES:
        model, clips, labels = build(attention_type)
        wrapped = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
        for module in wrapped:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        mine = [[part[rank::size] for part in parts] for parts in (clips, labels)]
        losses = train(model, *mine)
        distributed.all_reduce(losses)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        local = sum(parameter.to_local().numel() for parameter in model.parameters())
        results[attention_type] = {
            "losses": losses / size,
            "state": state,
            "world_size": size,
            "wrapped": sum(isinstance(module, FSDPModule) for module in model.modules()),
            "local_share": local / sum(parameter.numel() for parameter in model.parameters()),
        }
    if rank == 0:
        torch.save(results, sys.argv[1])
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
