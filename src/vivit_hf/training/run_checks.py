"""The checks of a training command before a run: processes, output folder, repository, checkpoint and disk."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from ..configuration_vivit import ViViTConfig
from ..initialisation.weight_files import read_json
from .checkpoints import is_complete_checkpoint, last_complete_checkpoint
from .finetuning_arguments import ModelArguments, Say
from .finetuning_model import SIZES, STRUCTURE, Start
from .finetuning_parser import VideoTrainingArguments
from .weight_average import AVERAGE_FILE


_MEGABYTE = 1e6


def check_machine(training: VideoTrainingArguments, say: Say) -> None:
    """Create the output folder. Raise ValueError if it or the processes that were started cannot be used."""
    _check_processes(training, say)
    _check_folder(Path(training.output_dir))


def check_start(
    training: VideoTrainingArguments, start: Start, arguments: ModelArguments, checkpoint: str | None
) -> None:
    """Raise ValueError for a checkpoint of another run, and for a disk without space for the model and a checkpoint."""
    if checkpoint is not None:
        _check_checkpoint(checkpoint, start, arguments, training.ema_decay)
    if (reason := lack_of_space(training, start.model)) is not None:
        raise ValueError(reason)


def _check_processes(training: VideoTrainingArguments, say: Say) -> None:
    """Raise ValueError for launchers that start several processes which would not train together."""
    shards = [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"]
    if "FSDP" in shards and training.device.type == "cpu":
        raise ValueError("FSDP is set up, but on CPUs it would silently be plain data parallelism: it needs GPUs.")
    if shards and training.ema_decay:
        raise ValueError(
            f"--ema_decay does not support weights that {shards[0]} divides among processes: leave it out."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != training.world_size:
        raise ValueError(
            f"{started} processes were started, but this one trains by itself (world size {training.world_size}): "
            f"there would be {started} independent copies. On CPUs add --use_cpu --ddp_backend gloo."
        )
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" and started == 1:
        say("One process only. On CPUs, `torchrun --nproc_per_node N ... --use_cpu` starts several.")
    say(f"Training on {training.world_size} process(es), device type {training.device.type}.")


def _check_folder(folder: Path) -> None:
    """Create the output folder. Raise ValueError if that or a file in it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder}: the folder cannot be created or written to ({error.strerror}): give another one."
        ) from error


def find_checkpoint(training: VideoTrainingArguments, say: Say) -> str | None:
    """Return the checkpoint to resume from: the last whole one, unless --resume_from_checkpoint says otherwise."""
    wish: Any = training.resume_from_checkpoint
    if not training.do_train or wish in (False, "False", "false", "no"):
        return None
    if wish in (None, True, "True", "true", "last"):
        found = last_complete_checkpoint(training.output_dir)
        if found is None:
            return None
        say(f"Resuming from {found}; --resume_from_checkpoint no starts anew.")
        return str(found)
    if not is_complete_checkpoint(Path(wish)):
        raise ValueError(f"--resume_from_checkpoint {wish}: there is no complete checkpoint in this folder.")
    return str(wish)


def _check_checkpoint(checkpoint: str, start: Start, arguments: ModelArguments, ema_decay: float) -> None:
    """Raise ValueError for a checkpoint of a run with another model, classes, LoRA settings or moving average."""
    folder = Path(checkpoint)
    has_config = (folder / "config.json").exists()
    adapter = read_json(path) if (path := folder / "adapter_config.json").exists() else {}
    rank, alpha, kind = adapter.get("r"), adapter.get("lora_alpha"), adapter.get("peft_type", "LORA")
    base, source = adapter.get("base_model_name_or_path"), arguments.model_name_or_path
    differences = []
    if kind != "LORA":
        differences.append(f"has an adapter of peft_type {kind!r}, expected 'LORA'")
    if rank != (arguments.lora_rank or None) and (adapter or has_config):
        differences.append(f"was trained with{'out LoRA' if rank is None else f' --lora_rank {rank}'}, unlike this run")
    if adapter and alpha != arguments.lora_alpha:
        differences.append(f"was trained with --lora_alpha {alpha}, unlike this run")
    if base is not None and base != source and Path(base).resolve() != Path(source).resolve():
        differences.append(f"was trained on top of {base}, this run on {source}")
    if (has_average := (folder / AVERAGE_FILE).exists()) != bool(ema_decay):
        differences.append(f"was trained with{'' if has_average else 'out'} --ema_decay, unlike this run")
    if has_config:
        stored, wanted = ViViTConfig.from_pretrained(checkpoint), start.model.config
        for name in ("id2label", *STRUCTURE, *SIZES, "decoder_sizes"):
            if getattr(stored, name) != getattr(wanted, name):
                differences.append(f"has {name} {getattr(stored, name)}, this run {getattr(wanted, name)}")
    if differences:
        raise ValueError(
            f"{checkpoint} {differences[0]}: give another --output_dir, or --resume_from_checkpoint no to start anew."
        )


def lack_of_space(training: VideoTrainingArguments, model: torch.nn.Module) -> str | None:
    """Return an error if the disk has no space for the model and one checkpoint, else None."""
    sizes = [(one.nbytes, one.requires_grad) for one in model.parameters()]
    whole, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    needed = whole
    if training.save_strategy != "no":
        needed += (trained if hasattr(model, "peft_config") else whole) + 2 * trained  # with the state of AdamW
        needed += 2 * trained * bool(training.ema_decay)  # the average, and the weights that training goes on with
    free = shutil.disk_usage(training.output_dir).free
    if free >= needed:
        return None
    return (
        f"--output_dir {training.output_dir}: {free / _MEGABYTE:.1f} MB are free on its disk, and the model with a "
        f"checkpoint takes about {needed / _MEGABYTE:.1f} MB: free some space, or give a folder on another disk."
    )


def repository_of(training: VideoTrainingArguments) -> str:
    return training.hub_model_id or Path(training.output_dir).resolve().name


def check_repository(training: VideoTrainingArguments) -> bool:
    """Return whether to push the model, once after training, and create the repository for it now.

    Raises ValueError if the Hub refuses that or cannot be reached.
    """
    push, training.push_to_hub = training.push_to_hub and training.do_train, False
    if not push or training.process_index != 0:
        return push
    try:
        api = HfApi(token=training.hub_token)
        api.create_repo(repository_of(training), private=training.hub_private_repo, exist_ok=True)
    except Exception as error:
        raise ValueError(f"--push_to_hub: the Hub does not accept {repository_of(training)}: {error}") from error
    return True
