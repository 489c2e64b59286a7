"""DINOv2, CLIP and SigLIP become ViViTs that compute the same; models that cannot are refused by name."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_server import HubServer
from tiny_models import ATTENTION_TYPES, make_clips
from transformers import (
    Aimv2Config,
    Aimv2VisionConfig,
    AutoConfig,
    BeitConfig,
    Data2VecVisionConfig,
    DeiTConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    Siglip2Config,
    Siglip2VisionConfig,
    SiglipTextConfig,
)
from vit_models import (
    IMAGE_MODELS,
    make_clip,
    make_dinov2_with_registers,
    make_siglip,
    make_vit,
    make_vivit,
    write_layout,
)

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTModel
from vivit_hf.conversion.image_parity import image_outputs, image_reference
from vivit_hf.initialisation import ConversionError, config_from_vit, initialise_from_vit, read_image_source


INITS = {"tubelet_init": "central_frame", "temporal_attention_init": "zero_output", "position_init": "tile"}
GRIDS = ("factorised_self_attention", "factorised_dot_product_attention")
# How transformers resizes the position embeddings of each model, in its `interpolate_pos_encoding`.
RESIZING = {
    "dinov2": {},
    "dinov2_with_registers": {"antialias": True},
    "clip_vision_model": {},
    "siglip_vision_model": {},
}

pytestmark = pytest.mark.filterwarnings("ignore:The 3 register tokens")


def initialised(image_model, attention_type, cls=ViViTForVideoClassification, **overrides):
    vivit = make_vivit(image_model, attention_type, cls, **overrides).to(image_model.dtype)
    return vivit, initialise_from_vit(vivit, image_model)


def relative_difference(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# Equality


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("kind", IMAGE_MODELS)
@pytest.mark.parametrize("sizes", [{}, {"image_size": (40, 32)}, {"embedding_type": "uniform_frame_sampling"}])
def test_every_variant_computes_what_the_image_model_computes(kind, attention_type, sizes):
    image_model = IMAGE_MODELS[kind]().double()
    vivit, _ = initialised(image_model, attention_type, **sizes)
    with torch.no_grad():
        reference = image_reference(image_model, vivit.config, **INITS)
        outputs = image_outputs(vivit, reference)
    assert set(outputs) == set(reference.expected)
    for name, expected in reference.expected.items():
        # Some of transformers' models resize position embeddings in float32, whatever their dtype.
        assert relative_difference(outputs[name], expected) < (1e-6 if "image_size" in sizes else 1e-12), name


@pytest.mark.parametrize("kind", IMAGE_MODELS)
def test_the_vector_of_a_frame_is_that_of_transformers(kind):
    """By transformers' whole forward: the class token behind the last LayerNorm, or the mean of the patches."""
    image_model = IMAGE_MODELS[kind]()
    vivit, _ = initialised(image_model, "factorised_encoder", ViViTModel)
    clips = make_clips(vivit.config)
    tower = getattr(image_model, "vision_model", image_model)
    with torch.no_grad():
        steps = vivit.encode_steps(clips)
        outputs = [tower(clips[:, index]) for index in range(1, 8, 2)]
    is_siglip = "siglip" in kind
    expected = [one.last_hidden_state.mean(dim=1) if is_siglip else one.pooler_output for one in outputs]
    assert relative_difference(steps, torch.stack(expected, dim=1)) < 1e-5
    assert vivit.config.pooling == ("mean" if is_siglip else "cls")


@pytest.mark.parametrize("kind", RESIZING)
def test_positions_are_resized_as_the_image_model_resizes_them(kind):
    image_model = IMAGE_MODELS[kind](image_size=40)
    vivit, report = initialised(image_model, "factorised_encoder", ViViTModel, image_size=24)
    tables = [tensor for name, tensor in image_model.state_dict().items() if "position_embedding" in name]
    positions = tables[0].reshape(-1, 24)[-25:].T.reshape(1, 24, 5, 5)  # (1, hidden, height, width)
    resized = torch.nn.functional.interpolate(positions, size=(3, 3), mode="bicubic", **RESIZING[kind])
    ours = vivit.embeddings.position_embeddings[0, -9:]
    torch.testing.assert_close(ours, resized.flatten(2)[0].T, atol=1e-6, rtol=0)
    assert report.parameters["embeddings.position_embeddings"] == "resized"


def test_registers_and_layernorm_reach_the_outputs():
    """Without them, the equality above would say nothing about them."""
    for image_model, name in ((make_dinov2_with_registers(), "register_tokens"), (make_clip(), "pre_layernorm")):
        vivit, _ = initialised(image_model, "spatio_temporal", ViViTModel)
        clips = make_clips(vivit.config)
        with torch.no_grad():
            before = vivit(clips).pooler_output
            next(parameter for key, parameter in vivit.named_parameters() if name in key).neg_()
            assert relative_difference(vivit(clips).pooler_output, before) > 1e-3


# The report


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("kind", IMAGE_MODELS)
def test_the_report_accounts_for_every_weight(kind, attention_type):
    image_model = IMAGE_MODELS[kind]()
    vivit, report = initialised(image_model, attention_type)
    assert set(report.vit_keys) == set(image_model.state_dict())
    assert set(report.parameters) == {name for name, _ in vivit.named_parameters()}
    reasons = set(report.unused().values())
    expected = {"mask token"} if "dinov2" in kind else set()
    expected |= {"text tower"} if kind in ("clip", "siglip") else set()
    expected |= {"projection for comparison with texts"} if kind == "clip" else set()
    expected |= {"scale of the comparison with texts"} if kind in ("clip", "siglip") else set()
    expected |= {"attention-pooling head"} if "siglip" in kind else set()
    if attention_type in GRIDS:
        expected |= {"no class token with pooling='mean'"} if "siglip" not in kind else set()
        expected |= {f"no register tokens with {attention_type=}"} if "registers" in kind else set()
    assert reasons == expected
    assert not any(name.startswith("encoder.") for name in report.unused())
    for reason in ("text tower", "attention-pooling head"):
        assert (f"more ({reason})" in report.to_markdown()) == (reason in expected)


def test_layer_scale_is_folded_into_the_projections():
    image_model = make_dinov2_with_registers()
    vivit, report = initialised(image_model, "spatio_temporal", ViViTModel)
    weights = image_model.state_dict()
    scale = weights["encoder.layer.1.layer_scale2.lambda1"]
    expected = scale[:, None] * weights["encoder.layer.1.mlp.fc2.weight"]
    assert torch.equal(vivit.encoder.layer[1].mlp.fc2.weight, expected)
    assert report.counts()["scaled"] == 2 * 4
    assert report.vit_keys["encoder.layer.1.layer_scale2.lambda1"] == "used"


# Settings


def test_the_configuration_has_what_the_image_model_computes():
    clip, siglip = config_from_vit(make_clip().config), config_from_vit(make_siglip().config)
    dinov2 = config_from_vit(make_dinov2_with_registers().config)
    assert (clip.hidden_act, clip.layer_norm_eps, clip.pooling) == ("quick_gelu", 1e-5, "cls")
    assert (clip.pre_layernorm, clip.patch_bias, clip.num_register_tokens) == (True, False, 0)
    assert (siglip.hidden_act, siglip.layer_norm_eps, siglip.pooling) == ("gelu_pytorch_tanh", 1e-6, "mean")
    assert (siglip.pre_layernorm, siglip.patch_bias, siglip.num_register_tokens) == (False, True, 0)
    assert (dinov2.hidden_act, dinov2.intermediate_size, dinov2.num_register_tokens) == ("gelu", 48, 3)
    for attention_type in (*GRIDS, "factorized_self_attention"):
        grid = config_from_vit(make_dinov2_with_registers().config, attention_type=attention_type)
        assert grid.num_register_tokens == 0


def test_a_plain_vit_changes_no_new_setting():
    config, default = config_from_vit(make_vit().config), ViViTConfig()
    for name in ("num_register_tokens", "pre_layernorm", "patch_bias"):
        assert getattr(config, name) == getattr(default, name)


def test_a_bias_that_the_image_model_lacks_becomes_zero():
    image_model = make_clip()
    vivit, report = initialised(image_model, "spatio_temporal", ViViTModel, patch_bias=True)
    assert report.parameters["embeddings.patch_embeddings.projection.bias"] == "zeroed"
    assert not vivit.embeddings.patch_embeddings.projection.bias.any()


@pytest.mark.parametrize(
    ("make", "overrides", "message"),
    [
        (make_clip, {"pre_layernorm": False}, "`pre_layernorm` is False in the ViViT and True in the ViT"),
        (make_vit, {"pre_layernorm": True}, "`pre_layernorm` is True in the ViViT and False in the ViT"),
        (make_dinov2_with_registers, {"num_register_tokens": 2}, "`num_register_tokens` is 2 in the ViViT and 3"),
        (make_vit, {"patch_bias": False}, "The ViT has a bias for its patches; .* `patch_bias=False`"),
        (make_siglip, {"pooling": "cls"}, "`pooling='cls'` needs a class token, .*; use `pooling='mean'`"),
    ],
)
def test_a_vivit_that_does_not_fit_is_refused(make, overrides, message):
    image_model = make()
    vivit = make_vivit(image_model, "spatio_temporal", **overrides)
    before = {name: tensor.clone() for name, tensor in vivit.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialise_from_vit(vivit, image_model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vivit.state_dict().items())


@pytest.mark.parametrize("attention_type", GRIDS)
def test_registers_that_are_left_out_are_named_in_a_warning(attention_type):
    image_model = make_dinov2_with_registers()
    vivit = make_vivit(image_model, attention_type)
    with pytest.warns(UserWarning, match=f"The 3 register tokens .* left out.*{attention_type}"):
        initialise_from_vit(vivit, image_model)


# Refusals


REFUSED = {
    "SwiGLU": (Dinov2Config(use_swiglu_ffn=True), "type 'dinov2' with SwiGLU layers"),
    "rotary": (DINOv3ViTConfig(), r"a DINOv3, whose attention rotates .* \(RoPE\)"),
    "NaFlex": (Siglip2Config(), "a NaFlex SigLIP 2, .* are of type 'siglip'"),
    "NaFlex tower": (Siglip2VisionConfig(), "a NaFlex SigLIP 2"),
    "distilled DeiT": (DeiTConfig(), "a distilled DeiT, whose distillation token"),
    "BEiT": (BeitConfig(), "a BEiT, whose attention has relative position biases"),
    "data2vec": (Data2VecVisionConfig(), "a BEiT, whose attention"),
    "AIMv2": (Aimv2Config(), "an AIMv2, which has RMSNorm and SwiGLU layers"),
    "AIMv2 tower": (Aimv2VisionConfig(), "an AIMv2, which"),
    "text tower": (SiglipTextConfig(), "a text model, which sees no images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_compute_otherwise_are_refused_by_name(name, tmp_path):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config_from_vit(config)
    config.save_pretrained(tmp_path)
    for read in (config_from_vit, read_image_source):
        with pytest.raises(ConversionError, match=message):
            read(str(tmp_path))


# Folders and Hub ids


@pytest.mark.parametrize("layout", ["names in files", "names in memory", "torch file", "sharded"])
@pytest.mark.parametrize("kind", IMAGE_MODELS)
def test_a_folder_gives_what_the_loaded_model_gives(kind, layout, tmp_path):
    image_model = IMAGE_MODELS[kind]()
    write_layout(image_model, tmp_path, layout)
    expected, expected_report = initialised(image_model, "factorised_encoder")
    config = config_from_vit(tmp_path, attention_type="factorised_encoder", num_frames=8, num_temporal_layers=2)
    strangers = {"transformers_version", "_name_or_path", "dtype"}
    ours, theirs = ({k: v for k, v in c.to_dict().items() if k not in strangers} for c in (config, expected.config))
    assert ours == theirs
    vivit = make_vivit(image_model, "factorised_encoder", ViViTForVideoClassification)
    report = initialise_from_vit(vivit, str(tmp_path))
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in vivit.state_dict().items())
    assert report.parameters == expected_report.parameters
    assert report.counts() == expected_report.counts()
    assert set(report.unused().values()) == set(expected_report.unused().values())
    assert len(report.vit_keys) == len(expected_report.vit_keys)


PROGRAM = """
import sys
import torch
from vivit_hf import ViViTForVideoClassification, config_from_vit, initialise_from_vit

for number, source in enumerate(sys.argv[2:]):
    config = config_from_vit(source, attention_type="factorised_encoder", num_frames=4, num_temporal_layers=1)
    model = ViViTForVideoClassification(config)
    report = initialise_from_vit(model, source)
    torch.save(model.vivit.encoder.state_dict(), f"{sys.argv[1]}/{number}.pt")
    print(report.unused().get("text_model.final_layer_norm.weight"))
"""


def test_hub_ids_give_what_folders_give(tmp_path):
    makers = {"tester/clip": IMAGE_MODELS["clip"], "tester/dinov2-reg": IMAGE_MODELS["dinov2_with_registers"]}
    with HubServer() as hub:
        for name, make in makers.items():
            folder = tmp_path / name
            make().save_pretrained(folder)
            hub.create_repository(name, {path.name: path.read_bytes() for path in folder.iterdir()})
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", **hub.environment(tmp_path / "home", "hf_reader")}
        run = {"capture_output": True, "text": True, "timeout": 200, "env": environment}
        process = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), *makers], **run)
        assert process.returncode == 0, process.stderr[-3000:]
        convert = [sys.executable, "-m", "vivit_hf", "convert", "vit", "--source", "tester/clip"]
        command = subprocess.run([*convert, "--output", str(tmp_path / "out"), "--num-frames", "4"], **run)
    assert process.stdout.split("\n")[:2] == ["text tower", "None"]
    for number, make in enumerate(makers.values()):
        expected, _ = initialised(make(), "factorised_encoder")
        found = torch.load(tmp_path / f"{number}.pt")
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.vivit.encoder.state_dict().items())
    assert command.returncode == 0, command.stderr[-3000:]
    assert "more (text tower)" in " ".join(command.stdout.split())
    assert AutoConfig.from_pretrained(tmp_path / "out").pre_layernorm


def test_a_weight_without_a_place_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    make_clip().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "vision_model.adapter.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"no place for: .*adapter\.weight"):
        read_image_source(str(tmp_path))
    weights.pop(next(name for name in weights if "pre_layrnorm.bias" in name))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"missing: .*pre_layrnorm\.bias"):
        read_image_source(str(tmp_path))


def test_pixels_are_prepared_as_for_the_image_model(tmp_path):
    from vivit_hf.initialisation import processor_for

    make_clip().save_pretrained(tmp_path)
    stored = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3, "do_center_crop": True}
    stored |= {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    source = read_image_source(str(tmp_path))
    processor = processor_for(config_from_vit(str(tmp_path), num_frames=4), source.processor_settings)
    assert processor.image_mean == stored["image_mean"] and processor.image_std == stored["image_std"]
    assert processor.size == {"shortest_edge": 24} and processor.crop_size == {"height": 24, "width": 24}
