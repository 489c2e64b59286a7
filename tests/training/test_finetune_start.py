"""The model and the clips of a fine-tuning run: given settings, those of the start, and those of a recipe."""

import json

import finetune
import numpy as np
import pytest
import torch
from image_conversion import jax_arrays
from safetensors.torch import save_file
from tiny_models import case_config, make_model
from transformers import HfArgumentParser, ViTMAEConfig, ViTMAEForPreTraining, ViTModel
from tuned_models import tune_folder
from vit_models import make_vit, make_whole_clip, make_whole_siglip, timm_weights

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.data.labels import LabelMap
from vivit_hf.training import finetuning
from vivit_hf.training.finetuning_arguments import DataArguments, ModelArguments
from vivit_hf.training.finetuning_data import Splits
from vivit_hf.training.finetuning_model import build_model
from vivit_hf.training.finetuning_parser import FineTuningArguments
from vivit_hf.training.recipes import RECIPES


LABELS = LabelMap({"": ("run", "sit")})
SMALL = RECIPES["small-data"]


def start_from(source, recipe=None, **given):
    """The start, and what is printed about it."""
    printed = []
    model = {name: value for name, value in given.items() if name in ModelArguments.__dataclass_fields__}
    data = {name: value for name, value in given.items() if name not in model}
    training = FineTuningArguments(recipe=None if recipe is None else recipe.name, use_cpu=True)
    model = ModelArguments(model_name_or_path=str(source), **model)
    start = build_model(model, DataArguments(**data), LABELS, printed.append, recipe=training.recipe)
    return start, "\n".join(printed)


def clips_of(start):
    """(frames, size, stride, short side) of the model and its processor, which have to agree."""
    config, processor = start.model.config, start.processor
    assert processor.num_frames == config.num_frames and processor.do_center_crop
    assert (processor.crop_size["height"], processor.crop_size["width"]) == config.frame_size
    return config.num_frames, config.image_size, processor.frame_stride, processor.size["shortest_edge"]


@pytest.fixture
def vivit(tmp_path):
    """A factorised encoder with 2 temporal layers, for 8 frames of 32 pixels at stride 3."""
    folder = tmp_path / "my_vivit"
    make_model(case_config("factorised_encoder", image_size=32)).save_pretrained(folder)
    processor = ViViTVideoProcessor(num_frames=8, frame_stride=3, size=34, crop_size=32, image_mean=0.4)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def vit(tmp_path):
    """An image ViT of 240 pixels, whose processor only resizes."""
    folder = tmp_path / "vit"
    make_vit(image_size=240, patch_size=16).save_pretrained(folder)
    stored = {"size": {"height": 240, "width": 240}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(stored))
    return folder


# A ViViT


def test_a_setting_of_tune_does_not_outlive_training(vivit):
    tune_folder(vivit, merge_tokens=2)
    assert ViViTConfig.from_pretrained(vivit).optimization["name"] == "merging-4"
    assert start_from(vivit)[0].model.config.optimization is None


def test_a_vivit_keeps_its_structure_frames_size_and_stride_under_a_recipe(vivit):
    start, printed = start_from(vivit, SMALL)
    assert clips_of(start) == (8, 32, 3, 34)
    assert start.model.config.num_temporal_layers == 2 and start.processor.image_mean == [0.4]
    assert f"  {vivit}: attention_type factorised_encoder, num_temporal_layers 2, " in printed
    assert (
        "num_frames 8, image_size 32, frame_stride 3, short_video_policy repeat_last, short side resized to 34, "
        "image_mean [0.4]"
    ) in printed
    line = next(line for line in printed.splitlines() if "overrides" in line)
    assert "overrides these settings of recipe small-data: " in line
    for text in ("num_temporal_layers 4", "num_frames 32", "image_size 224", "frame_stride 2", "resize_ratio 1.143"):
        assert text in line


def test_what_is_given_wins_over_a_vivit_and_a_recipe(vivit):
    given = {"num_frames": 4, "image_size": 64, "frame_stride": 1, "resize": 70, "num_temporal_layers": 2}
    start, printed = start_from(vivit, SMALL, **given)
    assert clips_of(start) == (4, 64, 1, 70)
    assert (
        "  given: num_temporal_layers 2, num_frames 4, image_size 64, frame_stride 1, short side resized to 70"
        in printed
    )
    start, printed = start_from(vivit, SMALL, image_size=64)
    assert clips_of(start) == (8, 64, 3, 68), "the short side follows the crop"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"num_temporal_layers": 4},
            "has num_temporal_layers=2, which its weights fix: leave --num_temporal_layers 4",
        ),
        ({"attention_type": "spatio_temporal"}, "leave --attention_type spatio_temporal out"),
        ({"tubelet_size": "4,8,8"}, r"has tubelet_size=\[2, 8, 8\]"),
        (
            {"tubelet_init": "central_frame"},
            "is not an image ViT to start from: leave --tubelet_init central_frame out",
        ),
        ({"temporal_encoder_init": "random"}, "leave --temporal_encoder_init random out"),
        ({"tubelet_size": "2x8"}, "--tubelet_size is time,height,width, got '2x8'"),
        ({"resize": 40, "resize_ratio": 1.2}, "--resize and --resize_ratio set the same"),
        ({"frame_stride": 1, "frames_per_second": 5.0}, "--frame_stride and --frames_per_second set the same"),
        ({"resize": 24}, "resize=24 makes frames smaller than the model's crop of 32 x 32"),
    ],
)
def test_a_flag_that_cannot_be_is_named(vivit, given, message):
    with pytest.raises(ValueError, match=message):
        start_from(vivit, SMALL, **given)


def test_temporal_pooling_is_structure_that_the_weights_fix(vit, vivit):
    start, printed = start_from(vit, num_temporal_layers=1, temporal_pooling="mean")
    assert start.model.config.temporal_pooling == "mean" and "temporal_pooling mean" in printed
    assert start.model.config.pooling == "cls", "space keeps its class token"
    assert not start.model.vivit.temporal_encoder.layer[0].mlp.fc2.weight.any(), "the encoder starts without effect"
    start.model.save_pretrained(vivit)
    again, printed = start_from(vivit, temporal_pooling="mean")
    assert again.model.config.temporal_pooling == "mean"
    with pytest.raises(
        ValueError, match="has temporal_pooling='mean', which its weights fix: leave --temporal_pooling"
    ):
        start_from(vivit, temporal_pooling="cls")


def test_the_other_spelling_of_a_variant_is_no_contradiction(vivit):
    start_from(vivit, attention_type="factorized_encoder", tubelet_size="2,8,8", embedding_type="tubelet")


def test_a_vivit_without_a_crop_gets_one(vivit):
    ViViTVideoProcessor(num_frames=8, size=(32, 32), do_center_crop=False, frames_per_second=4.0).save_pretrained(vivit)
    start, printed = start_from(vivit, SMALL)
    assert clips_of(start)[3] == 37 and start.processor.frames_per_second == 4.0
    assert "frames_per_second 4.0" in printed and "recipe small-data: short side resized to 37" in printed


def test_a_vivit_without_a_processor_takes_clips_as_the_recipe_does(vivit):
    for file in vivit.glob("*preprocessor_config.json"):
        file.unlink()
    start, printed = start_from(vivit, RECIPES["ssv2-l-fe"])
    assert clips_of(start) == (8, 32, 1, 36) and "recipe ssv2-l-fe: frame_stride 1, short side resized to 36" in printed
    assert clips_of(start_from(vivit)[0]) == (8, 32, 2, 37)


def test_a_damaged_processor_is_not_a_missing_one(vivit):
    (vivit / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises((OSError, ValueError), match="JSON"):
        start_from(vivit)


def test_a_preset_keeps_its_structure_under_a_recipe():
    start, printed = start_from("vivit-tiny", SMALL)
    preset = ViViTConfig.from_preset("vivit-tiny")
    assert start.model.config.num_temporal_layers == preset.num_temporal_layers != 4
    assert clips_of(start) == (preset.num_frames, preset.image_size, 2, round(preset.image_size * 256 / 224))
    assert "vivit-tiny: attention_type factorised_encoder" in printed
    start, _ = start_from("vivit-tiny", SMALL, attention_type="spatio_temporal", image_size=32)
    assert start.model.config.attention_type == "spatio_temporal" and clips_of(start)[1] == 32


# An image ViT


def test_a_recipe_decides_on_clips_from_an_image_vit(vit):
    start, printed = start_from(vit, SMALL)
    assert clips_of(start) == (32, 224, 2, 256)
    assert start.processor.image_mean == [0.1, 0.2, 0.3] and start.model.config.num_temporal_layers == 4
    assert f"  {vit}: tubelet_size [2, 16, 16], image_mean [0.1, 0.2, 0.3]" in printed
    assert "  recipe small-data: attention_type factorised_encoder, num_temporal_layers 4, " in printed
    assert "given" not in printed
    assert [line for line in printed.splitlines() if "default" in line] == ["  default: short_video_policy repeat_last"]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("image_size", [64, 96])
def test_sizes_of_recipes_are_relative_to_the_crop(vit, name, image_size):
    start, _ = start_from(vit, RECIPES[name], image_size=image_size, num_frames=4, num_temporal_layers=1)
    ratio = {"ssv2-l-fe": 288 / 256, "few-labels": 1.0}.get(name, 256 / 224)
    assert clips_of(start)[3] == round(image_size * ratio)


def test_without_a_recipe_an_image_vit_does_not_set_frames_of_more_than_224_pixels(vit, tmp_path):
    start, printed = start_from(vit)
    assert clips_of(start) == (32, 224, 2, 256)
    assert "default: attention_type factorised_encoder" in printed and "image_size 224" in printed
    make_vit(image_size=48, patch_size=16).save_pretrained(tmp_path / "small")
    assert clips_of(start_from(tmp_path / "small")[0]) == (32, 48, 2, 55)


def test_the_rate_that_is_given_takes_the_place_of_the_recipes_stride(vit):
    start, printed = start_from(vit, SMALL, frames_per_second=5.0, image_size=32)
    assert start.processor.frames_per_second == 5.0
    assert "given: image_size 32, frames_per_second 5.0" in printed and "stride" not in printed


def test_another_variant_than_the_recipes(vit):
    start, printed = start_from(vit, SMALL, attention_type="factorised_self_attention", image_size=32)
    assert start.model.config.attention_type == "factorised_self_attention" and "num_temporal" not in printed


def test_settings_of_recipes_are_arguments():
    names = {action.dest for action in HfArgumentParser((ModelArguments, DataArguments))._actions}
    for recipe in RECIPES.values():
        assert set(recipe.model) <= names and not set(recipe.model) & set(recipe.arguments)


def test_the_script_hands_the_recipe_over(vivit, tmp_path, monkeypatch, capsys):
    def stop(*arguments):
        raise ValueError("that is enough")

    monkeypatch.setattr(finetuning, "make_trainer", stop)
    monkeypatch.setattr(finetuning, "load_splits", lambda *_: Splits([], [], LABELS))
    argv = ["--recipe", "small-data", "--model_name_or_path", str(vivit), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="that is enough"):
        finetune.main([*argv, "--use_cpu", "--frame_stride", "5"])
    printed = capsys.readouterr().out
    assert "given: frame_stride 5" in printed and "overrides these settings of recipe small-data" in printed


# Sources of image ViTs


def write_timm(folder, **config):
    weights = timm_weights(make_vit(lambda config: ViTModel(config, add_pooling_layer=False)))
    weights |= {f"blocks.{block}.ls{branch}.gamma": torch.rand(24) for block in (0, 1) for branch in (1, 2)}
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    pretrained = {"input_size": [3, 24, 24], "mean": [0.1, 0.2, 0.3], "std": [0.4] * 3, "crop_pct": 0.75}
    stored = {"architecture": "vit_tiny", "model_args": {"num_heads": 4}, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


def test_weights_of_timm_are_converted(tmp_path):
    folder = write_timm(tmp_path / "timm")
    start, printed = start_from(folder, num_frames=4)
    assert clips_of(start) == (4, 24, 2, 32) and start.processor.image_mean == [0.1, 0.2, 0.3]
    assert "4 arrays of LayerScale folded" in printed
    assert "short side resized to 32" in next(line for line in printed.splitlines() if line.startswith(f"  {folder}"))
    with pytest.raises(ValueError, match=r"24 wide.*vivit-hf convert vit --source .* --num-heads"):
        start_from(folder / "model.safetensors", num_frames=4)


def test_weights_of_jax_are_converted(tmp_path):
    np.savez(tmp_path / "vit.npz", **jax_arrays())
    start, _ = start_from(tmp_path / "vit.npz", num_frames=4)
    assert clips_of(start) == (4, 24, 2, 27)
    assert isinstance(start.model, ViViTForVideoClassification)


def test_mae_is_converted_without_its_decoder(tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = ViTMAEConfig(**sizes, **decoder, decoder_intermediate_size=16, image_size=32, patch_size=16)
    ViTMAEForPreTraining(config).save_pretrained(tmp_path / "mae")
    start, _ = start_from(tmp_path / "mae", SMALL, num_frames=4, image_size=32)
    assert clips_of(start) == (4, 32, 2, 37)


def test_towers_of_clip_and_siglip_are_converted_without_the_rest(tmp_path):
    for make, left_out in ((make_whole_clip, ["text tower"]), (make_whole_siglip, ["text tower", "pooling head"])):
        make().save_pretrained(tmp_path / make.__name__)
        start, printed = start_from(tmp_path / make.__name__, num_frames=4)
        assert clips_of(start) == (4, 24, 2, 27)
        line = next(line for line in printed.splitlines() if "left out" in line)
        assert all(f"{what})" in line for what in left_out)
    assert start.model.config.pooling == "mean"


def test_other_models_are_refused_by_name(tmp_path):
    for config, message in (
        ({"model_type": "deit"}, "a distilled DeiT"),
        ({"model_type": "swin"}, "of type 'swin', not a plain ViT"),
        ({"model_type": "dinov3_vit"}, "a DINOv3, whose attention rotates"),
        ({"hidden_size": 8}, "neither transformers' `model_type` nor timm's `architecture`"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            start_from(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        start_from(tmp_path)


def test_settings_of_an_image_processor_in_the_newer_file(vit):
    stored = json.loads((vit / "preprocessor_config.json").read_text())
    (vit / "preprocessor_config.json").unlink()
    (vit / "processor_config.json").write_text(json.dumps({"image_processor": stored}))
    assert start_from(vit)[0].processor.image_mean == [0.1, 0.2, 0.3]
    (vit / "processor_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"processor_config\.json does not hold the settings"):
        start_from(vit)


def test_a_vivit_whose_processor_is_in_the_file_for_videos(vivit):
    (vivit / "preprocessor_config.json").unlink()
    assert clips_of(start_from(vivit, SMALL)[0]) == (8, 32, 3, 34)


def test_a_recipes_clips_do_not_count_where_one_is_spread_over_a_video(vivit, tmp_path, monkeypatch, capsys):
    ViViTVideoProcessor(num_frames=8, size=34, crop_size=32, frame_sampling="uniform").save_pretrained(vivit)

    def stop(arguments, *_):
        raise ValueError(f"{arguments[1].num_clips} x {arguments[1].num_crops} views")

    monkeypatch.setattr(finetuning, "make_trainer", stop)
    monkeypatch.setattr(finetuning, "load_splits", lambda *_: Splits([], [], LABELS))
    argv = ["--model_name_or_path", str(vivit), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    with pytest.raises(SystemExit, match="1 x 3 views"):
        finetune.main([*argv, "--recipe", "small-data"])
    assert "num_clips of the recipe small-data does not apply" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="num_clips=2"):
        finetune.main([*argv, "--num_clips", "2"])


@pytest.mark.parametrize(("given", "schedule"), [("3", [3, 3]), ("5,2", [5, 2])])
def test_tokens_merge_in_training_on_request(vivit, vit, given, schedule):
    for source in (vivit, vit):
        start, printed = start_from(source, merge_tokens=given)
        assert start.model.vivit.encoder.schedule == schedule
        assert start.model.config.merging_schedule == schedule and "merge_tokens" in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [("many", "one number, or one per layer"), ("1,2,3", "num_hidden_layers=2"), ("-1", "at least 0")],
)
def test_tokens_that_cannot_merge_are_refused(vivit, given, message):
    with pytest.raises(ValueError, match=f"merge_tokens.*{message}"):
        start_from(vivit, merge_tokens=given)
