"""Which weights fine-tuning trains, and in which precision."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from finetune_runs import run, write_data
from transformers import ViTModel

from vivit_hf import ViViTForVideoClassification, config_from_vit, initialise_from_vit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A Model 1 all of whose weights have been trained."""
    folder = tmp_path_factory.mktemp("trained")
    run(data, folder, attention_type="spatio_temporal", max_steps=1)
    return folder


def test_lora_trains_little_and_leaves_a_whole_model(data, trained, tmp_path, capsys):
    run(data, tmp_path / "out", lora_rank=2, model_name_or_path=trained)
    output = capsys.readouterr().out
    count = int(re.search(r"([\d,]+) parameters to train", output)[1].replace(",", ""))
    model = ViViTForVideoClassification.from_pretrained(tmp_path / "out")
    assert count == 2 * (2 * 2 * 16) + 16 * 4 + 4, "rank 2 for queries and values, and the classifier"
    assert "trained in full" not in output
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert not any("lora" in name for name, _ in model.named_parameters())
    before = ViViTForVideoClassification.from_pretrained(trained).state_dict()
    changed = {name.split(".")[-2] for name, one in model.state_dict().items() if not torch.equal(one, before[name])}
    assert changed == {"q_proj", "v_proj", "classifier"}


def sees_order(model):
    """Whether the logits depend on the order of the tubelets of a clip."""
    config = model.config
    torch.manual_seed(1)
    clip = torch.randn(1, config.num_frames, 3, *config.frame_size)
    turned = clip.unflatten(1, (-1, config.tubelet_size[0])).flip(1).flatten(1, 2)
    with torch.no_grad():
        logits, others = model.eval()(clip).logits, model(turned).logits
    return not torch.allclose(logits, others, atol=1e-6, rtol=0)


def test_lora_trains_a_new_learned_query_in_full(data, tmp_path, capsys):
    run(data, tmp_path, lora_rank=2, num_temporal_layers=0, temporal_pooling="attention")
    assert "trained in full, because they ignore the order of frames so far: temporal_pooler" in capsys.readouterr().out
    assert ViViTForVideoClassification.from_pretrained(tmp_path).vivit.temporal_pooler.query.any()


@pytest.mark.parametrize("is_converted", [False, True])
def test_lora_from_an_image_vit_learns_the_order_of_frames(data, tmp_path, variant, is_converted, capsys):
    """Straight from the ViT, and from the ViViT that a conversion leaves."""
    given = {"lora_rank": 2, "attention_type": variant, "num_temporal_layers": None}
    if variant == "factorised_encoder":
        given["num_temporal_layers"] = 1
    if is_converted:
        vit = ViTModel.from_pretrained(data / "vit")
        fields = {name: value for name, value in given.items() if value is not None and name != "lora_rank"}
        model = ViViTForVideoClassification(config_from_vit(vit.config, num_frames=8, num_labels=0, **fields))
        initialise_from_vit(model, vit)
        model.save_pretrained(tmp_path / "start")
        given = {"lora_rank": 2, "model_name_or_path": tmp_path / "start"}
    run(data, tmp_path / "out", **given, max_steps=3, save_strategy="steps", save_steps=2, layer_decay=0.7)
    assert "LoRA: trained in full, because they ignore the order of frames so far: " in capsys.readouterr().out
    model = ViViTForVideoClassification.from_pretrained(tmp_path / "out")
    assert sees_order(model)
    if variant == "factorised_self_attention":
        assert all(layer.attention_time.o_proj.weight.any() for layer in model.vivit.encoder.layer)
    # Resumed from its second step, the run ends where it has ended.
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    (tmp_path / "out" / "model.safetensors").unlink()
    run(data, tmp_path / "out", **given, max_steps=3, save_strategy="steps", save_steps=2, layer_decay=0.7)
    assert "Resuming from" in capsys.readouterr().out
    again = ViViTForVideoClassification.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name]), name


def test_freezing_space_still_learns_the_order_of_frames(data, tmp_path):
    run(data, tmp_path, freeze="spatial", attention_type="factorised_self_attention", max_steps=3)
    assert sees_order(ViViTForVideoClassification.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "all_but_head"}, "would freeze the temporal encoder, which is newly initialised"),
        ({"freeze": "spatial", "tubelet_init": "random"}, "would freeze the random kernel"),
        ({"freeze": "all_but_head", "model_name_or_path": "vivit-tiny"}, "the random weights of the preset"),
        ({"lora_rank": 2, "model_name_or_path": "vivit-tiny"}, "the random weights of the preset"),
    ],
)
def test_random_weights_are_not_frozen(data, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        run(data, tmp_path, **changes, num_frames=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extra", [{}, {"bf16": True}, {"lora_rank": 2}])
def test_half_precision_checkpoints_are_trained_in_float32(data, trained, tmp_path, capsys, dtype, extra):
    half = ViViTForVideoClassification.from_pretrained(trained, dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    shutil.copy(trained / "preprocessor_config.json", tmp_path / "half")
    run(data, tmp_path / "out", model_name_or_path=tmp_path / "half", learning_rate=1e-5, max_steps=4, **extra)
    name = str(dtype).removeprefix("torch.")
    assert f"stored in {name}, trained and saved in float32 (--dtype)" in capsys.readouterr().out
    model = ViViTForVideoClassification.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32 and model.config.dtype == torch.float32
    before = half.float().state_dict()
    moved = {key: (one != before[key]).float().mean() for key, one in model.state_dict().items()}
    if not extra:  # steps of 1e-5 that would be lost in the rounding of half precision
        total = sum(one.numel() for one in before.values())
        assert sum(moved[key] * one.numel() for key, one in before.items()) / total > 0.95
    elif "lora_rank" in extra:
        assert moved["vivit.encoder.layer.0.attention.q_proj.weight"] > 0.3
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    again = run(data, tmp_path / "again", model_name_or_path=tmp_path / "out", do_eval=True)
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], abs=0.02 if "bf16" in extra else 1e-5)


def test_an_image_vit_in_half_precision_starts_a_float32_model(data, tmp_path):
    ViTModel.from_pretrained(data / "vit", dtype=torch.float16).save_pretrained(tmp_path / "vit")
    run(data, tmp_path / "out", model_name_or_path=tmp_path / "vit", max_steps=1)
    assert ViViTForVideoClassification.from_pretrained(tmp_path / "out").dtype == torch.float32


@pytest.mark.parametrize("extra", [{}, {"lora_rank": 2}])
def test_weights_are_trained_in_bfloat16_if_asked_for(data, trained, tmp_path, extra):
    results = run(data, tmp_path, model_name_or_path=trained, dtype="bfloat16", **extra)
    assert ViViTForVideoClassification.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert np.isfinite(results["eval_loss"])
    with pytest.raises(SystemExit, match="--dtype float16: expected one of float32, bfloat16"):
        run(data, tmp_path, dtype="float16")


def test_lora_does_not_overwrite_the_weights_that_its_checkpoints_belong_to(data, trained):
    with pytest.raises(SystemExit, match="give another folder"):
        run(data, trained, model_name_or_path=trained, lora_rank=2)


def test_a_checkpoint_of_another_run_is_not_resumed(data, trained, tmp_path):
    with pytest.raises(SystemExit, match="was trained without LoRA, unlike this run"):
        run(data, trained, attention_type="spatio_temporal", max_steps=3, lora_rank=2)
    with pytest.raises(SystemExit, match=r"has num_frames 4, this run 2: give another --output_dir"):
        run(data, trained, attention_type="spatio_temporal", max_steps=3, num_frames=2)
    shutil.copytree(data / "videos", tmp_path / "videos")
    for split in ("train", "test"):
        (tmp_path / "videos" / split / "up_left").rename(tmp_path / "videos" / split / "zebra")
    folders = {"train_dir": tmp_path / "videos" / "train", "validation_dir": tmp_path / "videos" / "test"}
    with pytest.raises(SystemExit, match=r"has id2label .*zebra"):
        run(data, trained, attention_type="spatio_temporal", max_steps=3, **folders)
    run(data, tmp_path / "lora", model_name_or_path=trained, lora_rank=2, max_steps=1)
    with pytest.raises(SystemExit, match="was trained with --lora_rank 2, unlike this run"):
        run(data, tmp_path / "lora", model_name_or_path=trained, lora_rank=4)
