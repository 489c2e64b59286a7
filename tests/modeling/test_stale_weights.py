"""Saving over an earlier save: the last save is loaded, whatever the layouts of the two."""

import peft
import pytest
import torch
from tiny_models import make_clips, make_model, randomise, tiny_config
from transformers import Trainer, TrainingArguments

from vivit_hf import ViViTForVideoClassification


def save_single(model, folder):
    model.save_pretrained(folder)


def save_sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="30KB")


def save_smaller_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")


def save_pickle(model, folder):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)


def save_by_trainer(model, folder):
    Trainer(model, TrainingArguments(folder, use_cpu=True, report_to=[])).save_model(folder)


def saved_files(folder):
    return {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json")}


@pytest.mark.parametrize("first", [save_single, save_sharded, save_pickle])
@pytest.mark.parametrize("second", [save_single, save_sharded, save_smaller_shards, save_by_trainer])
def test_the_last_save_is_loaded(tmp_path, first, second):
    model = make_model(tiny_config("factorised_encoder"))
    (tmp_path / "model").mkdir()
    first(model, tmp_path / "model")
    randomise(model, seed=1)
    for name in ("model", "alone"):
        second(model, tmp_path / name)
    assert saved_files(tmp_path / "model") == saved_files(tmp_path / "alone")
    loaded = ViViTForVideoClassification.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_save_that_fails_removes_nothing(tmp_path, monkeypatch):
    model = make_model(tiny_config("factorised_encoder"))
    save_single(model, tmp_path)
    before = saved_files(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_sharded(randomise(model, seed=1), tmp_path)
    assert saved_files(tmp_path) >= before


def test_other_files_of_the_folder_stay(tmp_path):
    model = make_model(tiny_config("factorised_encoder"))
    save_single(model, tmp_path)
    others = {"training_args.bin", "model.fp16.safetensors", "optimizer.pt"}
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    save_sharded(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= others
    model.save_pretrained(tmp_path, variant="fp16")
    model.save_pretrained(tmp_path, is_main_process=False, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()


def test_a_merged_model_replaces_the_adapter(tmp_path):
    model = make_model(tiny_config("factorised_encoder"))
    clips = make_clips(model.config)
    save_single(model, tmp_path)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        merged = adapted.merge_and_unload()
        logits = merged(clips).logits
        merged.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("adapter*"))
        loaded = ViViTForVideoClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(clips).logits, logits)


def test_an_adapter_leaves_the_weights_beside_it(tmp_path):
    model = make_model(tiny_config("factorised_encoder"))
    save_single(model, tmp_path)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert saved_files(tmp_path) >= {"model.safetensors", "adapter_model.safetensors", "adapter_config.json"}
