"""`vivit-hf pretrain` on miniature videos: masks, pictures, resuming, damaged files, and fine-tuning afterwards."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from finetune_runs import EXAMPLES, SHORT_RUN, losses, run as finetune, settings_for, start, to_argv, write_data
from hub_server import HubServer
from labelled_videos import TORCHRUN
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_clips, make_model, tiny_config

from vivit_hf import ViViTConfig, ViViTForPreTraining, ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.cli.pretrain import main
from vivit_hf.explain.reconstruction_picture import assemble_patches, draw_reconstructions, fill_masked_patches
from vivit_hf.modeling_vivit import normalise_patches, patch_pixels, random_tube_masks, split_places, take_places
from vivit_hf.training.pretraining import TubeMaskCollator


TINY = {"model_name_or_path": "vivit-tiny", "num_frames": 4, "image_size": 64, "frame_stride": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def settings_for_run(output, **changes):
    return {**TINY, **SHORT_RUN, "output_dir": output, **changes}


def run(videos, output, **changes):
    """Pretrain in this process, and return the results."""
    main([str(videos), *to_argv(settings_for_run(output, **changes))])
    return json.loads((output / "all_results.json").read_text())


# Masks and pictures


def items_of(config, epochs_and_indices):
    clip = make_clips(config, batch=1)[0]
    return [{"pixel_values": clip, "epoch": epoch, "index": index} for epoch, index in epochs_and_indices]


def test_masks_depend_on_seed_epoch_and_index_alone():
    config = tiny_config("factorised_encoder")
    places = [(0, 0), (0, 1), (1, 0), (7, 3)]
    masks = TubeMaskCollator(config, seed=1)(items_of(config, places))["bool_masked_pos"]
    assert masks.sum(dim=1).tolist() == [int(0.9 * 15)] * 4 and len(torch.unique(masks, dim=0)) == 4
    again = TubeMaskCollator(config, seed=1)(items_of(config, places[::-1]))["bool_masked_pos"]
    assert torch.equal(again.flip(0), masks)
    assert not torch.equal(TubeMaskCollator(config, seed=2)(items_of(config, places))["bool_masked_pos"], masks)


@pytest.mark.parametrize("embedding_type", ["tubelet", "uniform_frame_sampling"])
def test_patches_are_put_together_again(embedding_type):
    config = tiny_config("spatio_temporal", embedding_type=embedding_type)
    clips = make_clips(config)
    shown = clips if embedding_type == "tubelet" else clips[:, [2, 3, 5, 6]]
    assert torch.equal(assemble_patches(patch_pixels(clips, config), config), shown)


def test_exact_predictions_give_the_original_pixels():
    config = tiny_config("spatio_temporal")
    patches = patch_pixels(make_clips(config), config)
    masks = random_tube_masks(2, 15, 0.8, torch.Generator().manual_seed(0))
    _, masked = split_places(masks)
    exact = take_places(normalise_patches(patches).flatten(3), masked)
    torch.testing.assert_close(fill_masked_patches(patches, exact, masks), patches, atol=1e-4, rtol=1e-4)


def test_a_picture_shows_original_masked_and_reconstruction():
    model = make_model(tiny_config("spatio_temporal"), ViViTForPreTraining).train()
    clips = make_clips(model.config, batch=1).clamp(-1, 1)
    masks = torch.zeros(1, 15, dtype=torch.bool)
    masks[0, 1:] = True  # only the first place is visible
    picture = np.asarray(draw_reconstructions(model, clips, masks, ViViTVideoProcessor(), max_frames=8))
    assert model.training
    frames = [picture[4 + 14 + row * (24 + 14 + 2) :][:24, 4:44] for row in range(3)]
    original = ((clips[0, 0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    np.testing.assert_allclose(frames[0].astype(int), original.astype(int), atol=1)
    for row in (1, 2):
        assert np.array_equal(frames[row][:8, :8], frames[0][:8, :8])
    assert (frames[1][8:] == 128).all() and (frames[1][:8, 8:] == 128).all()
    assert len(np.unique(frames[2][8:])) > 10 and not np.array_equal(frames[2][8:], frames[0][8:])


# Runs


def test_a_run_saves_model_processor_pictures_and_card(data, tmp_path, capsys):
    results = run(data / "videos", tmp_path, picture_steps=1, decoder_num_hidden_layers=2, mask_ratio=0.75)
    assert results["train_samples"] == 20 and results["train_damaged_files"] == 0
    model = ViViTForPreTraining.from_pretrained(tmp_path)
    assert (model.config.num_labels, model.config.mask_ratio, len(model.decoder.layer)) == (0, 0.75, 2)
    assert ViViTVideoProcessor.from_pretrained(tmp_path).num_frames == 4
    pictures = sorted(path.name for path in (tmp_path / "reconstructions").iterdir())
    assert pictures == ["step-000001.png", "step-000002.png"]
    assert Image.open(tmp_path / "reconstructions" / pictures[-1]).size[0] > 4 * 64
    assert "Pretrained without labels on 20 videos" in (tmp_path / "README.md").read_text()
    printed = capsys.readouterr().out
    assert "20 videos to train on, without labels" in printed
    assert "masks over 75% of the places; a decoder of 2 layers, width 48, 2 heads" in printed
    norms = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]
    assert {"grad_norm/decoder", "grad_norm/encoder", "grad_norm/temporal", "grad_norm/embeddings"} <= norms.keys()


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{"attention_type": "spatio_temporal"}, {"attention_type": "factorised_encoder"}])
def test_the_loss_falls_on_moving_shapes(data, tmp_path, extra):
    run(data / "videos", tmp_path, max_steps=60, learning_rate=2e-3, mask_ratio=0.5, picture_steps=0, **extra)
    curve = losses(tmp_path)
    assert np.mean(curve[-10:]) < 0.85 * np.mean(curve[:5])
    assert not (tmp_path / "reconstructions").exists()


@pytest.mark.slow
def test_a_resumed_run_has_the_same_losses(data, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "picture_steps": 5}
    run(data / "videos", tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for name in ("checkpoint-6", "reconstructions"):
        shutil.rmtree(tmp_path / "resumed" / name)
    (tmp_path / "resumed" / "model.safetensors").unlink()
    run(data / "videos", tmp_path / "resumed", **settings)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "reconstructions/step-000005.png"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_a_checkpoint_of_another_decoder_is_an_error(data, tmp_path):
    run(data / "videos", tmp_path, save_strategy="steps", save_steps=2, picture_steps=0)
    with pytest.raises(SystemExit, match=r"has decoder_sizes \(48, 1, 2\), this run \(48, 2, 2\)"):
        run(data / "videos", tmp_path, max_steps=4, decoder_num_hidden_layers=2)


def test_damaged_files_are_skipped_and_named(data, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(data / "videos" / "train", videos)
    broken = videos / "up_left" / "001.mp4"
    broken.write_bytes(b"broken")
    results = run(videos, tmp_path / "out", max_steps=4, picture_steps=0)
    assert results["train_samples"] == 16 and results["train_damaged_files"] == 1
    assert list(json.loads((tmp_path / "out" / "damaged_files.json").read_text())["train"]) == [str(broken)]


def test_a_file_of_paths_needs_no_labels(data, tmp_path, capsys):
    videos = sorted((data / "videos" / "train").rglob("*.mp4"))
    rows = [f"{path},{'test' if number < 6 else 'train'}" for number, path in enumerate(videos)]
    (tmp_path / "videos.csv").write_text("\n".join(["path,split", *rows]))
    assert run(tmp_path / "videos.csv", tmp_path / "out", max_steps=1, picture_steps=0)["train_samples"] == 10
    assert "10 train; the train rows are used." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "factorised_self_attention"}, "Pretraining with tube masks does not work"),
        ({"image_size": 16}, "single tubelet"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"picture_steps": -1}, "--picture_steps -1"),
        ({"eval_strategy": "epoch"}, "no evaluation"),
        ({"horizontal_flip": "auto"}, "expected yes or no"),
        ({"tubelet_init": "random"}, "not an image ViT"),
    ],
)
def test_wrong_arguments_are_errors_before_training(data, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=f"pretrain: .*{message}"):
        run(data / "videos", tmp_path, **changes)


def test_a_folder_without_videos_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="there are no videos in this folder"):
        run(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("missing", ["VIDEOS", "--output_dir"])
def test_required_arguments_are_named(missing, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--output_dir", str(tmp_path)] if missing == "VIDEOS" else [str(tmp_path)])
    assert ended.value.code == 2
    assert {"VIDEOS": "--videos", "--output_dir": "--output_dir"}[missing] in capsys.readouterr().err


def test_an_unknown_argument_is_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["videos", "--output_dir", str(tmp_path), "--num_clips", "4"])
    assert ended.value.code == 2 and "--num_clips 4" in capsys.readouterr().err


def test_pretraining_merges_visible_tokens(data, tmp_path):
    run(data / "videos", tmp_path, max_steps=2, picture_steps=0, merge_tokens="2", mask_ratio=0.5)
    model = ViViTForPreTraining.from_pretrained(tmp_path)
    assert model.vivit.encoder.schedule == [2] * model.config.num_hidden_layers


def test_pretraining_starts_from_an_image_model(data, tmp_path, capsys):
    image = {"model_name_or_path": data / "vit", "num_frames": 4, "image_size": 32, "picture_steps": 0}
    run(data / "videos", tmp_path, temporal_pooling="mean", ema_decay=0.5, **image)
    assert "inflated" in capsys.readouterr().out
    config = ViViTForPreTraining.from_pretrained(tmp_path).config
    assert (config.attention_type, config.temporal_pooling) == ("factorised_encoder", "mean")


def test_pretraining_goes_on_from_a_pretrained_model_with_its_decoder(data, tmp_path, capsys):
    run(data / "videos", tmp_path / "first", picture_steps=0, mask_ratio=0.6)
    again = {"model_name_or_path": tmp_path / "first", "num_frames": None, "image_size": None, "learning_rate": 0}
    run(data / "videos", tmp_path / "second", picture_steps=0, **again)
    assert "its decoder is kept" in capsys.readouterr().out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert ViViTConfig.from_pretrained(tmp_path / "second").mask_ratio == 0.6


def test_pretraining_starts_from_a_classifier_and_leaves_its_labels_behind(data, tmp_path, capsys):
    make_model(ViViTConfig.from_preset("vivit-tiny", num_labels=3)).save_pretrained(tmp_path / "model")
    run(data / "videos", tmp_path / "out", model_name_or_path=tmp_path / "model", picture_steps=0, learning_rate=0)
    assert "a new decoder" in capsys.readouterr().out
    assert not any(name.startswith("classifier") for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_finetuning_starts_from_the_encoders(data, tmp_path, capsys):
    run(data / "videos", tmp_path / "pretrained", picture_steps=0)
    start = {"model_name_or_path": tmp_path / "pretrained", "num_frames": None, "frame_stride": None}
    finetune(data, tmp_path / "tuned", max_steps=1, learning_rate=0, num_clips=1, num_crops=1, **start)
    printed = capsys.readouterr()
    assert "a new classifier for 4 classes" in printed.out
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "pretrained"))
    vivit = {name for name in theirs if name.startswith("vivit.")}
    assert set(ours) == vivit | {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(ours[name], theirs[name]) for name in vivit)
    assert ViViTForVideoClassification.from_pretrained(tmp_path / "tuned").config.num_labels == 4


@pytest.mark.parametrize("extra", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_bfloat16_and_gradient_checkpointing_train_alike(data, tmp_path, extra):
    run(data / "videos", tmp_path / "plain", picture_steps=0)
    run(data / "videos", tmp_path / "other", picture_steps=2, **extra)
    tolerance = 0.02 if "bf16" in extra else 1e-5
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_same_batch(data, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(data / "videos" / "train", videos)
    broken = videos / "up_left" / "000.mp4"
    broken.write_bytes(b"broken")
    settings = settings_for_run(tmp_path / "one", max_steps=4, lr_scheduler_type="constant", optim="sgd")
    two = {**settings, "output_dir": tmp_path / "two", "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    for command, given in (([sys.executable], settings), (TORCHRUN, two)):
        process = start([*command, EXAMPLES / "pretrain.py", videos, *to_argv(given)])
        assert process.returncode == 0, process.stderr[-3000:]
    assert (
        losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
        and len(losses(tmp_path / "one")) == 4
    )
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=1e-4, msg=name)
    reports = [json.loads((tmp_path / name / "damaged_files.json").read_text()) for name in ("one", "two")]
    assert reports[0] == reports[1] and list(reports[0]["train"]) == [str(broken)]
    assert (tmp_path / "two" / "reconstructions" / "step-000004.png").exists()


@pytest.mark.slow
def test_the_folder_loads_where_the_package_is_missing(data, tmp_path):
    run(data / "videos", tmp_path / "model", max_steps=1, picture_steps=0)
    program = f"""
import sys
sys.modules["vivit_hf"] = None
from transformers import AutoModelForPreTraining
model = AutoModelForPreTraining.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
print(type(model).__name__, type(model).__module__.startswith("transformers_modules"))
"""
    process = start([sys.executable, "-c", program], HF_HOME=str(tmp_path / "home"))
    assert process.stdout.split() == ["ViViTForPreTraining", "True"], process.stderr[-2000:]


@pytest.mark.slow
def test_finetuning_starts_from_a_pretrained_model_on_the_hub(data, tmp_path):
    pushed = {"push_to_hub": True, "hub_model_id": "tester/masked", "picture_steps": 0, "mask_ratio": 0.75}
    tuned = settings_for(data, tmp_path / "tuned", model_name_or_path="tester/masked", learning_rate=0)
    tuned |= {"num_frames": None, "frame_stride": None}
    with HubServer() as hub:
        environment = {**hub.environment(tmp_path / "home", "hf_writer"), "HF_HUB_OFFLINE": "0"}
        for command, settings in (
            (["pretrain", data / "videos"], settings_for_run(tmp_path / "pretrained", **pushed)),
            (["finetune"], tuned),
        ):
            process = start([sys.executable, "-m", "vivit_hf", *command, *to_argv(settings)], **environment)
            assert process.returncode == 0, process.stderr[-3000:]
        card = hub.repositories["tester/masked"].files["README.md"].decode()
    assert "Pretrained without labels on 20 videos" in card and "masks over 75% of the places" in card
    assert "vivit-hf finetune --train_dir videos/train --model_name_or_path tester/masked" in card
    assert "a new classifier for 4 classes" in process.stdout
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "pretrained"))
    vivit = [name for name in theirs if name.startswith("vivit.")]
    assert vivit and all(torch.equal(ours[name], theirs[name]) for name in vivit)
