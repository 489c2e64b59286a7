"""
What transformers promises of every model, as its own common tests (`ModelTesterMixin`) have it.

Each test bears the name of the one that it stands for. Devices are in test_devices.py, recorded outputs in
test_outputs.py. What cannot apply is not here: token embeddings, generation, head masks, tied weights.
"""

import copy
import inspect
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODEL_CLASSES, checkpoint_activations, first, make_clips, make_model, tiny_config
from transformers import AutoModel, AutoModelForVideoClassification
from transformers.modeling_utils import PreTrainedModel

from vivit_hf import ViViTForVideoClassification, ViViTModel


@pytest.fixture(params=MODEL_CLASSES, ids=lambda cls: cls.__name__)
def model(request, config):
    """Each model class, for each variant."""
    return make_model(config, request.param)


def assert_same_weights(one, other):
    theirs = other.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


# Saving and loading


def test_save_load(model, clips, tmp_path):
    expected = first(model(clips))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(first(again(clips)), expected)
    again.save_pretrained(tmp_path)
    assert_same_weights(type(model).from_pretrained(tmp_path), model)


def test_save_load_keys(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert not type(model)._keys_to_ignore_on_save and not model.all_tied_weights_keys


def test_from_pretrained_no_checkpoint(model):
    again = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_weights(again, model)


def test_can_use_safetensors(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    again, info = type(model).from_pretrained(tmp_path, use_safetensors=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_weights(again, model)


def test_torch_save_load(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    assert_same_weights(type(model).from_pretrained(tmp_path), model)
    fresh = type(model)(model.config)
    fresh.load_state_dict(torch.load(tmp_path / "pytorch_model.bin", weights_only=True), strict=True)
    assert_same_weights(fresh, model)


def test_save_load_sharded(model, clips, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1
    again = type(model).from_pretrained(tmp_path)
    assert_same_weights(again, model)


def test_save_load_variant(model, tmp_path):
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.fp16.safetensors").exists()
    assert_same_weights(type(model).from_pretrained(tmp_path, variant="fp16"), model)


def test_auto_classes(model, clips, tmp_path):
    auto = AutoModel if type(model) is ViViTModel else AutoModelForVideoClassification
    assert type(auto.from_config(model.config)) is type(model)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(again) is type(model) and again.config._attn_implementation == "eager"
    assert_same_weights(again, model)


def test_correct_missing_keys(config, tmp_path):
    """A head that is not in the checkpoint is missing, by name, and initialised; anything else is an error, by name."""
    base = make_model(config, ViViTModel)
    base.save_pretrained(tmp_path)
    model, info = ViViTForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.std().item() == pytest.approx(config.initializer_range, rel=0.4)
    assert not model.classifier.bias.any()

    state_dict = load_file(tmp_path / "model.safetensors")
    removed = sorted(state_dict)[::7]
    save_file(
        {n: t for n, t in state_dict.items() if n not in removed}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    for cls in MODEL_CLASSES:
        with pytest.raises(ValueError, match=f"{len(removed)} in the model, but not in the checkpoint: .*{removed[0]}"):
            cls.from_pretrained(tmp_path)


def test_model_weights_reload_no_missing_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    save_file({"stranger": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"(?s)without a place in the model: stranger.*not in the checkpoint"):
        type(model).from_pretrained(tmp_path)


def test_load_with_mismatched_shapes(model, clips, tmp_path):
    model.save_pretrained(tmp_path)
    cls = type(model)
    with pytest.raises(ValueError, match=r"of another shape in the checkpoint: .*mlp\.fc1\.bias \(48,\) -> \(40,\)"):
        cls.from_pretrained(tmp_path, intermediate_size=40)
    again, info = cls.from_pretrained(
        tmp_path, intermediate_size=40, ignore_mismatched_sizes=True, output_loading_info=True
    )
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    assert mismatched == {n for n in model.state_dict() if re.search(r"mlp\.fc1|mlp\.fc2\.weight", n)}
    for name, tensor in again.state_dict().items():
        if name in mismatched:  # as a new model has it
            expected = 0 if name.endswith("bias") else model.config.initializer_range
            assert tensor.std().item() == pytest.approx(expected, rel=0.2), name
        else:
            assert torch.equal(tensor, model.state_dict()[name]), name
    assert first(again(clips)).isfinite().all()
    if cls is ViViTForVideoClassification:  # the number of labels is the one thing that may differ without asking
        assert cls.from_pretrained(tmp_path, num_labels=42)(clips).logits.shape == (2, 42)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_load_save_dtype(config, clips, dtype, tmp_path):
    """Loads from the meta device in any dtype, and keeps what is saved."""
    model, cls = make_model(config), ViViTForVideoClassification
    model.save_pretrained(tmp_path / "single")
    for loaded in (
        cls.from_pretrained(tmp_path / "single", dtype=dtype),
        cls.from_pretrained(tmp_path / "single", torch_dtype=dtype),
        cls.from_pretrained(tmp_path / "single", dtype=str(dtype).removeprefix("torch.")),
    ):
        assert loaded.dtype == loaded.config.dtype == dtype
        for name, tensor in loaded.state_dict().items():
            assert tensor.device.type == "cpu" and torch.equal(tensor, model.state_dict()[name].to(dtype)), name
    loaded.save_pretrained(tmp_path / "saved")
    assert {tensor.dtype for tensor in load_file(tmp_path / "saved" / "model.safetensors").values()} == {dtype}
    for again in (cls.from_pretrained(tmp_path / "saved"), cls.from_pretrained(tmp_path / "saved", dtype="auto")):
        assert again.dtype == dtype
        assert_same_weights(again, loaded)
        torch.testing.assert_close(first(again(clips)), first(loaded(clips)))


def test_keep_in_fp32_modules(model, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules", ["layernorm"])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float16)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "layernorm" in name else torch.float16), name


def test_can_be_initialized_on_meta(model, clips):
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert first(empty(clips.to("meta"))).shape == first(model(clips)).shape
    empty.load_state_dict(model.state_dict(), assign=True)  # nothing of the model is kept outside of its weights
    assert torch.equal(first(empty.eval()(clips)), first(model(clips)))


def test_can_load_with_device_context_manager(model, clips, tmp_path):
    model.save_pretrained(tmp_path)
    with torch.device("cpu"):
        again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(first(again(clips)), first(model(clips)))


def test_deepcopy(model, clips):
    outputs = model(clips, output_hidden_states=True)  # with the recording hooks in place
    clone = copy.deepcopy(model)
    again = clone(clips, output_hidden_states=True)
    assert torch.equal(first(again), first(outputs))
    assert len(again.hidden_states) == len(outputs.hidden_states)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(first(model(clips, output_hidden_states=True)), first(outputs))


def test_num_labels_0(config, clips, tmp_path):
    """Without labels there is no classifier: the logits are the pooled features."""
    config.num_labels = 0
    model = make_model(config)
    assert not any("classifier" in name for name in model.state_dict())
    assert torch.equal(model(clips).logits, model.vivit(clips).pooler_output)
    model.save_pretrained(tmp_path)
    again = ViViTForVideoClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 0
    torch.testing.assert_close(again(clips).logits, model(clips).logits)
    assert ViViTForVideoClassification.from_pretrained(tmp_path, num_labels=4)(clips).logits.shape == (2, 4)
    with pytest.raises(ValueError, match="`labels` need a classifier, but `num_labels=0`"):
        again(clips, labels=torch.tensor([0, 1]))


def test_a_classifier_can_be_taken_off_while_loading(config, clips, tmp_path):
    model = make_model(config)
    model.save_pretrained(tmp_path)
    headless = ViViTForVideoClassification.from_pretrained(tmp_path, num_labels=0)
    torch.testing.assert_close(headless(clips).logits, model.vivit(clips).pooler_output)


# Initialisation


def test_initialization(variant):
    """Weights and position embeddings are normal with the configured spread, biases 0, norms the identity."""
    config = tiny_config(variant, hidden_size=64, intermediate_size=96, initializer_range=0.05, representation_size=48)
    model = ViViTForVideoClassification(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "cls_token")):
            assert not parameter.any(), name
        elif "layernorm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.15), name
            assert abs(parameter.mean().item()) < 4 * 0.05 / parameter.numel() ** 0.5, name
    one, other = ViViTForVideoClassification(config), ViViTForVideoClassification(config)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    torch.manual_seed(0)
    assert_same_weights(ViViTForVideoClassification(config), model)  # the seed of conftest.py


def test_init_weights_does_not_touch_what_was_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.init_weights()
    assert_same_weights(loaded, model)


def test_all_tensors_are_parameter_or_buffer(model, clips):
    model(clips, output_hidden_states=True, output_attentions=True)
    for name, module in model.named_modules():
        strangers = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not strangers, f"{name}: {strangers}"
    assert not list(model.buffers())


# Forward


def test_forward_signature(model):
    names = list(inspect.signature(model.forward).parameters)
    assert names[0] == "pixel_values" == model.main_input_name
    assert "interpolate_pos_encoding" in names
    assert ("labels" in names) == (type(model) is ViViTForVideoClassification)


def test_determinism(model, clips):
    assert torch.equal(first(model(clips)), first(model(clips)))
    assert torch.equal(first(model.train()(clips)), first(model.eval()(clips)))  # no chance is configured


def test_model_main_input_is_not_changed(model, clips):
    before = clips.clone()
    model(clips)
    assert torch.equal(clips, before)


def test_inputs_need_not_be_contiguous_and_can_be_cast(model, clips):
    expected = first(model(clips))
    channels_last = clips.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)  # as a decoder gives them
    assert not channels_last.is_contiguous()
    torch.testing.assert_close(first(model(channels_last)), expected)
    torch.testing.assert_close(first(model(clips.double())), expected)


def test_internal_model_config_is_the_same(config):
    model = make_model(config)
    assert model.config is model.vivit.config is model.base_model.config
    assert model.base_model is model.vivit and ViViTModel.base_model_prefix == "vivit"


def test_model_get_set_embeddings(model):
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Module) and embeddings is model.base_model.embeddings.patch_embeddings
    output = model.get_output_embeddings()
    assert output is None or isinstance(output, torch.nn.Linear)


def test_set_attn_implementation(model, clips):
    assert model.config._attn_implementation == "sdpa"
    expected = first(model(clips))
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
            implementation
        }
        if implementation != "flex_attention":
            torch.testing.assert_close(first(model(clips)), expected)
    with pytest.raises(ValueError, match="no_such_thing"):
        model.set_attn_implementation("no_such_thing")


def test_attention_outputs_asked_for_while_loading(model, clips, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager", output_attentions=True)
    assert loaded(clips).attentions
    loaded = type(model).from_pretrained(tmp_path, output_hidden_states=True)
    assert loaded(clips).hidden_states and loaded(clips).attentions is None


@pytest.mark.slow
def test_torch_export(model, clips):
    exported = torch.export.export(model, (), {"pixel_values": clips}, strict=False)
    torch.testing.assert_close(first(exported.module()(pixel_values=clips)), first(model(clips)))


# Training


def train_step(model, clips):
    """One step of a regression of the first output; gives the parameters that were left without a gradient."""
    model.train().zero_grad()
    outputs = model(clips, labels=torch.tensor([1, 4])) if hasattr(model, "classifier") else model(clips)
    loss = outputs.loss if hasattr(model, "classifier") else outputs.pooler_output.square().mean()
    loss.backward()
    return {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}


def test_training(model, clips):
    assert not {name for name in train_step(model, clips) if not name.endswith("k_proj.bias")}


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_training_gradient_checkpointing(model, clips, kwargs):
    checkpoint_activations(model, kwargs)
    assert not {name for name in train_step(model, clips) if not name.endswith("k_proj.bias")}


def test_gradient_checkpointing_enable_disable(model):
    word = "activation" if hasattr(model, "activation_checkpointing_disable") else "gradient"
    assert model.supports_gradient_checkpointing and not getattr(model, f"is_{word}_checkpointing")
    checkpoint_activations(model)
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert getattr(model, f"is_{word}_checkpointing")
    assert layers and all(layer.gradient_checkpointing for layer in layers)
    assert {type(layer).__name__ for layer in layers} <= set(model._no_split_modules)
    expected = model.config.num_hidden_layers
    expected += model.config.num_temporal_layers if model.config.attention_type == "factorised_encoder" else 0
    assert len(layers) == expected
    getattr(model, f"{word}_checkpointing_disable")()
    assert not getattr(model, f"is_{word}_checkpointing") and not any(layer.gradient_checkpointing for layer in layers)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_peft_gradient_checkpointing_enable_disable(model, clips, use_reentrant):
    """With the embeddings frozen, as adapters do, the gradient still reaches the layers."""
    checkpoint_activations(model, {"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for module in (model.base_model.embeddings, model.base_model.temporal_embeddings):
        if module is not None:
            module.requires_grad_(False)
    without = train_step(model, clips)
    assert not {name for name in without if not name.endswith("k_proj.bias")}
    model.disable_input_require_grads()


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 3])),
        ("single_label_classification", torch.tensor([[0.2, 0.8, 0, 0, 0], [0, 0, 0, 1, 0]])),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 0, 0, 1]])),
        ("regression", torch.tensor([[0.5], [-2.0]])),
    ],
)
def test_problem_types(variant, problem_type, labels, recwarn):
    num_labels = 1 if problem_type == "regression" else 5
    config = tiny_config(variant, problem_type=problem_type, num_labels=num_labels)
    model, clips = make_model(config).train(), make_clips(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        loss = model(clips, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert not [warning for warning in recwarn if "target size" in str(warning.message)]


def test_flags(model):
    assert issubclass(type(model), PreTrainedModel)
    assert model._supports_sdpa and model._supports_flash_attn and model._supports_flex_attn
    assert model._supports_attention_backend and model._can_compile_fullgraph
    assert "video" in model.input_modalities
