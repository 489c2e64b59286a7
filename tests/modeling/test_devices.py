"""A model in pieces, on several devices or on the disk. The accelerator is a CPU here; accelerate does not mind."""

import copy

import accelerate
import pytest
import torch
from accelerate.utils import compute_module_sizes
from tiny_models import MODEL_CLASSES, first, make_clips, make_model, tiny_config

from vivit_hf import ViViTForVideoClassification


@pytest.fixture(params=MODEL_CLASSES, ids=lambda cls: cls.__name__)
def model(request, config):
    """Each model class, for each variant."""
    return make_model(config, request.param)


def pieces_of(model, budget):
    return accelerate.infer_auto_device_map(
        model, max_memory={0: budget, 1: budget, "cpu": 10**9}, no_split_module_classes=list(model._no_split_modules)
    )


def test_no_split_modules_are_not_split(model):
    """However small the devices, what holds a residual or a parameter of its own stays in one piece."""
    names = {name for name, _ in model.named_modules()}
    kept = [name for name in names if type(model.get_submodule(name)).__name__ in model._no_split_modules]
    sizes = compute_module_sizes(model)
    largest = max(sizes[name] for name in kept)
    split = 0
    for budget in range(largest // 4, sizes[""] + largest, largest // 4):
        pieces = pieces_of(model, budget)
        for piece in pieces:
            assert not any(piece.startswith(f"{name}.") for name in kept), (piece, budget)
        split += len(set(pieces.values())) > 1
    assert split > 3, "the model was never in pieces"
    # Inside of what is not split lies every residual, and every parameter that a class of ours owns by itself.
    whole = {name for name in names if any(f"{name}.".startswith(f"{keep}.") for keep in kept)}
    assert {name for name in names if name.endswith(("drop_path", "dot_product", "mlp"))} <= whole
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert {name for name in owners if type(model.get_submodule(name)).__module__.startswith("vivit_hf")} <= whole


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_disk_offload(model, clips, tmp_path, safe):
    model.config.num_hidden_layers = 4
    model = make_model(model.config, type(model))
    if safe:
        model.save_pretrained(tmp_path, max_shard_size="30KB")
    else:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        model.config.save_pretrained(tmp_path)
    size = compute_module_sizes(model)[""]
    expected = first(model(clips))
    for fraction in (0.5, 0.8):
        loaded = type(model).from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": int(size * fraction)}, offload_folder=tmp_path / "offload"
        )
        places = set(loaded.hf_device_map.values())
        assert "disk" in places and any(parameter.device.type == "meta" for parameter in loaded.parameters())
        torch.testing.assert_close(first(loaded(clips)), expected)
        torch.testing.assert_close(first(loaded(clips, output_hidden_states=True, output_attentions=True)), expected)


@pytest.mark.parametrize("changes", [{"image_size": 40}, {"id2label": {0: "up", 1: "down"}}], ids=str)
def test_weights_that_lie_on_the_disk_cannot_be_changed_while_loading(variant, tmp_path, changes):
    """They would be read from there again: a model that silently had the old ones would be worse than none."""
    model = make_model(tiny_config(variant, id2label={0: "left", 1: "right"}))
    model.save_pretrained(tmp_path)
    places = {f"vivit.{name}": "cpu" for name, _ in model.vivit.named_children()}
    places |= {"vivit.embeddings": "disk", "classifier": "disk"}
    place = {"device_map": places, "offload_folder": tmp_path / "offload"}
    assert ViViTForVideoClassification.from_pretrained(tmp_path, **place).classifier.weight.is_meta
    with pytest.raises(ValueError, match=r"(is|are) offloaded"):
        ViViTForVideoClassification.from_pretrained(tmp_path, **changes, **place)


def test_everything_offloaded(model, clips, tmp_path):
    expected = first(model(clips))
    on_disk = accelerate.disk_offload(copy.deepcopy(model), tmp_path, execution_device="cpu")
    assert {parameter.device.type for parameter in on_disk.parameters()} == {"meta"}
    torch.testing.assert_close(first(on_disk(clips)), expected)
    torch.testing.assert_close(
        first(on_disk(make_clips(model.config, num_frames=12), interpolate_pos_encoding=True)),
        first(model(make_clips(model.config, num_frames=12), interpolate_pos_encoding=True)),
    )


def test_cpu_offload(model, clips):
    expected = first(model(clips))
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    torch.testing.assert_close(first(offloaded(clips)), expected)


def test_dispatch_every_module_by_itself(model, clips):
    """As many pieces as there may be: each one gets what it needs through its own arguments."""
    expected = first(model(clips))
    sizes = compute_module_sizes(model)
    pieces = pieces_of(
        model, max(sizes[name] for name, m in model.named_modules() if type(m).__name__ in model._no_split_modules)
    )
    places = dict.fromkeys(pieces, "cpu")
    dispatched = accelerate.dispatch_model(copy.deepcopy(model), places, main_device="cpu", force_hooks=True)
    torch.testing.assert_close(first(dispatched(clips)), expected)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_map(model, clips, tmp_path, device_map):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map, num_frames=12)
    longer = make_clips(loaded.config)
    torch.testing.assert_close(first(loaded(longer)), first(model(longer, interpolate_pos_encoding=True)))
