"""Tokens of frozen parts are computed once: the same losses as without a cache, and never tokens of something else."""

import errno
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from finetune_runs import losses, run, settings_for, write_data
from moving_shapes import write_moving_shapes
from safetensors.torch import load_file
from tiny_models import ATTENTION_TYPES, make_clips, make_model, tiny_config
from video_files import moving_frames, write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.data.annotations import LabelledVideo
from vivit_hf.data.labels import LabelMap
from vivit_hf.training import feature_cache
from vivit_hf.training.augmentation import ClipAugmentation
from vivit_hf.training.feature_cache import (
    CachedClips,
    FeatureCacheError,
    StepStore,
    encode_clips,
    has_frozen_space,
    remove_stale,
    spatial_settings,
)
from vivit_hf.training.mixing import ClipCollator
from vivit_hf.training.parameters import freeze, frozen_modules
from vivit_hf.video_sources import VideoDecodingError


LABELS = LabelMap({"": ("even", "odd")})


# Whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 + 4 videos of exactly one clip, in the size of the crop, and a small image ViT: all clips are the same."""
    folder = write_data(tmp_path_factory.mktemp("data"))
    shutil.rmtree(folder / "videos")
    sizes = {"num_frames": 7, "height": 32, "width": 32}
    write_moving_shapes(folder / "videos", clips_per_class=4, test_clips_per_class=1, seed=0, **sizes)
    (folder / "videos" / "train" / "up_left" / "001.mp4").write_bytes(b"broken")
    return folder


FROZEN = {
    "freeze": "spatial",
    "num_temporal_layers": 2,
    "temporal_pooling": "mean",
    "resize": 32,
    "max_steps": None,
    "num_train_epochs": 3,
    "drop_path_rate": 0.3,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def uncached(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncached")
    return run(data, folder, **FROZEN), folder


def test_losses_and_scores_equal_those_without_cache_to_the_bit(data, uncached, tmp_path, capsys):
    expected, folder = uncached
    results = run(data, tmp_path, cache_features=True, **FROZEN)
    assert losses(tmp_path) == losses(folder) and len(losses(folder)) == 12 and len(set(losses(folder))) == 12
    for name in ("eval_loss", "eval_top1", "train_damaged_files", "train_samples"):
        assert results[name] == expected[name], name
    assert results["train_damaged_files"] == 1
    ours, theirs = (load_file(one / "model.safetensors") for one in (tmp_path, folder))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert "tokens of 20 views, 20 of them computed now" in capsys.readouterr().out
    assert len(list((tmp_path / "feature_cache").rglob("*.safetensors"))) == 19  # all but the broken video
    assert not list((tmp_path / "feature_cache").rglob("*.unfinished"))


def test_a_second_run_computes_nothing_but_what_is_unreadable(data, tmp_path, capsys):
    settings = {**FROZEN, "num_train_epochs": 1, "cache_features": True, "num_cached_views": 2}
    run(data, tmp_path, **settings)
    first = losses(tmp_path)
    assert "tokens of 36 views, 36 of them" in capsys.readouterr().out
    run(data, tmp_path, **settings, resume_from_checkpoint="no", weight_decay=0.0)
    assert "tokens of 36 views, 2 of them computed now" in capsys.readouterr().out
    assert losses(tmp_path) == first


def test_another_model_or_processor_makes_the_cache_stale(data, tmp_path, capsys):
    settings = {**FROZEN, "num_train_epochs": 1, "cache_features": True, "max_train_samples": 4}
    run(data, tmp_path, **settings)
    capsys.readouterr()
    run(data, tmp_path, **settings, frame_stride=1)
    output = capsys.readouterr().out
    assert "feature_cache: stored tokens are stale and removed; changed: processor" in output
    assert "tokens of 8 views, 8 of them computed now" in output
    run(data, tmp_path, **settings, frame_stride=1, horizontal_flip="yes")
    output = capsys.readouterr().out
    assert "removed; changed: views" in output and "tokens of 8 views, 4 of them" in output  # validation has no flips
    assert len([path for path in (tmp_path / "feature_cache").iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("caching", [{}, {"cache_features": True, "num_cached_views": 2}], ids=["not cached", "cached"])
def test_a_run_resumed_within_an_epoch_has_the_same_losses(data, tmp_path, caching):
    settings = {**FROZEN, **caching, "mixup_alpha": 0.3, "horizontal_flip": "yes"}
    run(data, tmp_path / "whole", **settings)
    saved = {**settings, "save_strategy": "steps", "save_steps": 5, "eval_strategy": "no"}
    run(data, tmp_path / "parts", **saved)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-12")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-10")
    if caching:
        shutil.rmtree(tmp_path / "parts" / "feature_cache")  # computed anew, to the same tokens
    run(data, tmp_path / "parts", **saved)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 12


def test_labels_are_not_part_of_the_cache(data, tmp_path, capsys):
    files = sorted((data / "videos" / "train").rglob("*.mp4"))
    rows = [{"path": str(path), "label": path.parent.name} for path in files]
    settings = {**FROZEN, "num_train_epochs": 1, "cache_features": True, "train_dir": None, "validation_dir": None}
    settings |= {"train_file": tmp_path / "train.json", "train_val_split": 0, "output_dir": tmp_path / "out"}
    (tmp_path / "train.json").write_text(json.dumps(rows))
    run(data, tmp_path / "out", **settings)
    for row in rows[::3]:
        row["label"] = rows[-1]["label"]
    (tmp_path / "train.json").write_text(json.dumps(rows[1:]))
    capsys.readouterr()
    run(data, tmp_path / "out", **settings)
    assert "tokens of 15 views, 1 of them computed now" in capsys.readouterr().out  # the broken one


def test_arguments_may_come_from_a_file(data, tmp_path, capsys):
    settings = {**FROZEN, "num_train_epochs": 1, "cache_features": True, "num_cached_views": 3}
    settings = settings_for(data, tmp_path / "out", **settings)
    lines = [
        f"{name}: {json.dumps(value if isinstance(value, (bool, int, float)) else str(value))}"
        for name, value in settings.items()
        if value is not None
    ]
    (tmp_path / "settings.yaml").write_text("\n".join(lines))
    import finetune

    finetune.main([str(tmp_path / "settings.yaml")])
    assert "tokens of 52 views" in capsys.readouterr().out  # 16 * 3 + 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "none"}, "stores the outputs of frozen weights: add --freeze spatial"),
        ({"freeze": "none", "lora_rank": 2}, "--lora_rank changes the weights whose outputs --cache_features stores"),
        ({"cutmix_alpha": 1.0}, "--cutmix_alpha does not go with --cache_features: it mixes pixels"),
        ({"save_batch_picture": "picture.png"}, "--save_batch_picture does not go with --cache_features"),
        (
            {"attention_type": "factorised_self_attention", "num_temporal_layers": None, "temporal_pooling": None},
            "--cache_features needs Model 2",
        ),
        ({"num_cached_views": 0}, "--num_cached_views 0: expected at least 1"),
        ({"cache_features": False, "num_cached_views": 4}, "--num_cached_views 4: .* together with --cache_features"),
    ],
)
def test_what_does_not_go_with_a_cache_is_refused_by_name(data, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        run(data, tmp_path, **{**FROZEN, "cache_features": True, **changes})


def test_a_full_disk_is_a_named_error_and_leaves_no_half_file(data, tmp_path, monkeypatch):
    save, count = feature_cache.save_file, 0

    def save_until_full(tensors, path, metadata):
        nonlocal count
        count += 1
        save(tensors, path, metadata)
        if count > 5:
            path.write_bytes(path.read_bytes()[:50])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_cache, "save_file", save_until_full)
    with pytest.raises(SystemExit, match=r"the tokens cannot be written .*No space left on device.* free some space"):
        run(data, tmp_path, cache_features=True, **FROZEN)
    assert len(list((tmp_path / "feature_cache").rglob("*.safetensors*"))) == 5


# The data set


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Five videos, the third of which is broken."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [write_video(folder / f"{index}.mp4", moving_frames(20, 40 + 2 * index, 64)) for index in range(5)]
    paths[2].write_bytes(b"this is not a video")
    return [LabelledVideo(str(path), (("even", "odd")[index % 2],), str(path)) for index, path in enumerate(paths)]


@pytest.fixture
def frozen_model():
    model = make_model(tiny_config("factorised_encoder", image_size=32, num_frames=4, num_labels=2))
    freeze(model, "spatial")
    return model


def cached(files, folder, model, is_training=True, **settings):
    processor = ViViTVideoProcessor(
        num_frames=4, frame_stride=2, size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    )
    if is_training:
        settings.setdefault("augmentation", ClipAugmentation((32, 32), flip_probability=0.5))
    clips = CachedClips(
        files, processor, LABELS, root=folder, frozen=spatial_settings(model), step_shape=(2, 32), **settings
    )
    clips.store.start()
    return clips


def fill(clips, model, **settings):
    return clips.fill(lambda pixels, mask: encode_clips(model, pixels, frame_mask=mask), **settings)


def test_a_copy_of_the_videos_elsewhere_has_the_same_clips(files, frozen_model, tmp_path):
    copies = []
    for number, one in enumerate(files):
        copy = shutil.copyfile(one.path(), tmp_path / f"copy of {number}.mp4")  # with another name and time of change
        copies.append(replace(one, video=str(copy)))
    clips, others = (cached(videos, tmp_path / "cache", frozen_model) for videos in (files, copies))
    for index in (0, 1, 3):
        assert clips.identities[index] != others.identities[index]
        assert torch.equal(clips.pixels(index, 0)["pixel_values"], others.pixels(index, 0)["pixel_values"])
    assert not torch.equal(clips.pixels(0, 0)["pixel_values"], clips.pixels(0, 1)["pixel_values"])


def test_each_view_comes_up_once_in_as_many_epochs_and_in_an_order_of_the_seed(
    files, frozen_model, tmp_path, monkeypatch
):
    clips = cached(files, tmp_path, frozen_model, num_views=4)
    assert fill(clips, frozen_model) == 20
    taken, stored = [], clips._stored
    monkeypatch.setattr(clips, "_stored", lambda index, view: (taken.append(view), stored(index, view))[1])
    seen = {index: [] for index in (0, 1, 3, 4)}
    orders = {index: [] for index in seen}
    for epoch in range(8):
        clips.set_epoch(epoch)
        for index, found in seen.items():
            found.append(clips[index]["steps"])
            orders[index].append(taken.pop())
            path = clips.store.path(clips.identities[index], orders[index][-1])
            assert torch.equal(found[-1], clips.store.read(path)["steps"])
    views = [clips.store.read(clips.store.path(clips.identities[0], view))["steps"] for view in range(4)]
    distinct = [one for place, one in enumerate(views) if not any(torch.equal(one, other) for other in views[:place])]
    assert len(distinct) >= 3, "views are drawn at random, and two may happen to be equal"
    for order in orders.values():
        assert sorted(order[:4]) == sorted(order[4:]) == [0, 1, 2, 3]
    again = cached(files, tmp_path, frozen_model, num_views=4)
    assert fill(again, frozen_model) == 4  # those of the broken video
    again.set_epoch(5)
    assert torch.equal(again[0]["steps"], seen[0][5])
    other = cached(files, tmp_path, frozen_model, num_views=4, seed=1)
    assert other.store.folder != clips.store.folder


def test_items_are_what_the_spatial_encoder_gives_for_the_views(files, frozen_model, tmp_path):
    clips = cached(files, tmp_path, frozen_model, is_training=False, num_clips=2, num_crops=3)
    fill(clips, frozen_model)
    with torch.no_grad():
        pixels = clips._make(files[0].video, None)["pixel_values"]
        expected = frozen_model.vivit.encode_steps(pixels)
    item = clips[0]
    torch.testing.assert_close(item["steps"], expected, atol=1e-5, rtol=0)
    assert item["steps"].shape == (6, 2, 32) and "pixel_values" not in item
    broken = clips[2]
    assert not broken["steps"].any() and broken["labels"] == -100 and broken["damaged_files"][0][0] == files[2].video
    batch = ClipCollator(LABELS)([item, broken])
    assert batch["steps"].shape == (2, 6, 2, 32)


def test_a_video_that_cannot_be_read_is_replaced_as_without_a_cache(files, frozen_model, tmp_path):
    clips = cached(files, tmp_path, frozen_model)
    fill(clips, frozen_model)
    item = clips[2]
    (name, reason), *_ = item["damaged_files"]
    assert name == files[2].video and reason and item["file"] != name
    chosen = int(np.random.default_rng((0x7265706C, 0, 0, 2, 0)).integers(5))
    assert item["file"] == files[chosen].video or chosen == 2
    gone = [*files[:1], LabelledVideo("nowhere.mp4", ("odd",), "list:2"), *files[3:]]
    clips = cached(gone, tmp_path, frozen_model, is_training=False)
    fill(clips, frozen_model)
    assert clips[1]["damaged_files"][0][0] == "nowhere.mp4"


def test_too_little_space_is_an_error_before_anything_is_computed(files, frozen_model, tmp_path, monkeypatch):
    clips = cached(files, tmp_path, frozen_model, num_views=3)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FeatureCacheError, match=r"0\.0 MB are free .* the tokens of 15 views .*--num_cached_views"):
        clips.fill(None)


def test_mixup_mixes_tokens_and_cutmix_is_refused(files, frozen_model, tmp_path):
    clips = cached(files, tmp_path, frozen_model)
    fill(clips, frozen_model)
    items = [clips[0], clips[1]]
    batch = ClipCollator(LABELS, mixup_alpha=0.5)(items)
    weight = batch["labels"][0, 0]
    expected = weight * items[0]["steps"] + (1 - weight) * items[1]["steps"]
    torch.testing.assert_close(batch["steps"][0], expected)
    assert 0 < weight < 1
    with pytest.raises(ValueError, match=r"`cutmix_alpha=0.5` mixes pixels"):
        ClipCollator(LABELS, cutmix_alpha=0.5)(items)


def test_processes_share_the_work_unevenly_and_every_view_once(files, frozen_model, tmp_path):
    clips = [cached(files[:2] + files[3:], tmp_path, frozen_model, num_views=2) for _ in range(3)]
    counts = [fill(one, frozen_model, process_index=rank, num_processes=3) for rank, one in enumerate(clips)]
    assert counts == [3, 3, 2]
    assert fill(cached(files[:2] + files[3:], tmp_path, frozen_model, num_views=2), frozen_model) == 0


# Staleness and damage


def test_a_changed_or_damaged_file_is_computed_anew(files, frozen_model, tmp_path):
    copies = []
    for one in files[:2]:
        shutil.copy(one.video, tmp_path)
        copies.append(LabelledVideo(str(tmp_path / os.path.basename(one.video)), one.labels, one.where))
    clips = cached(copies, tmp_path / "cache", frozen_model)
    assert fill(clips, frozen_model) == 2
    before = clips[0]["steps"]
    shutil.copy(files[3].video, copies[0].video)  # other content
    os.utime(copies[1].video, ns=(1, 1))  # another time
    clips = cached(copies, tmp_path / "cache", frozen_model)
    assert fill(clips, frozen_model) == 2 and not torch.equal(clips[0]["steps"], before)
    paths = [clips.store.path(identity, 0) for identity in clips.identities]
    damaged = bytearray(paths[0].read_bytes())
    damaged[-3] ^= 1
    paths[0].write_bytes(bytes(damaged))
    paths[1].write_bytes(paths[1].read_bytes()[:-5])
    with pytest.raises(FeatureCacheError, match="is damaged: run again to compute it anew"):
        clips[0]
    with pytest.raises(FeatureCacheError, match="cannot be read"):
        clips[1]
    assert fill(clips, frozen_model) == 2 and clips[0]["steps"].isfinite().all()


def test_the_store_is_of_the_frozen_weights_and_settings_alone(frozen_model):
    settings = spatial_settings(frozen_model)
    with torch.no_grad():
        frozen_model.vivit.temporal_encoder.layer[0].mlp.fc1.weight.add_(1)
        frozen_model.classifier.weight.add_(1)
    assert spatial_settings(frozen_model) == settings
    with torch.no_grad():
        frozen_model.vivit.layernorm.bias[0] += 1e-6
    assert spatial_settings(frozen_model)["weights"] != settings["weights"]
    assert spatial_settings(frozen_model.bfloat16())["weights"] != settings["weights"]
    other = make_model(tiny_config("factorised_encoder", image_size=32, num_frames=4, num_labels=2, pooling="mean"))
    assert spatial_settings(other)["config"] != settings["config"]


def test_stale_stores_and_what_killed_processes_left_are_removed(tmp_path):
    new = StepStore(tmp_path, {"weights": "b", "processor": {}, "views": {"num_clips": 1}})
    old = StepStore(tmp_path, {"weights": "a", "processor": {}, "views": {"num_clips": 2}})
    for store in (new, old):
        store.start()
        store.write(store.path("video", 0), {"steps": torch.ones(2, 3)})
    left = new.path("video", 1).with_name(".x.safetensors.1.unfinished")
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    (tmp_path / "damaged").mkdir()
    assert remove_stale(tmp_path, [new]) == ["views, weights", "settings.json"]
    stored = new.read(new.path("video", 0))["steps"]
    assert not left.exists() and not old.folder.exists() and torch.equal(stored, torch.ones(2, 3))


# Frozen parts run in evaluation mode


def test_frozen_modules_are_the_largest_without_a_trained_parameter():
    model = make_model(tiny_config("factorised_encoder"))
    assert frozen_modules(model) == [] and not has_frozen_space(model)
    freeze(model, "spatial")
    assert frozen_modules(model) == [model.vivit.embeddings, model.vivit.encoder, model.vivit.layernorm]
    assert has_frozen_space(model)
    freeze(model, "all_but_head")
    assert frozen_modules(model) == [model.vivit] and has_frozen_space(model)
    other = make_model(tiny_config("factorised_self_attention"))
    freeze(other, "spatial")
    assert other.vivit.encoder.layer[0].mlp in frozen_modules(other) and not has_frozen_space(other)


def test_classifier_takes_steps_in_place_of_pixels():
    model = make_model(tiny_config("factorised_encoder"))
    clips = torch.randn(2, 8, 3, 24, 40)
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        expected, steps = model(clips, labels=labels), model.vivit.encode_steps(clips)
        found = model(steps=steps, labels=labels)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert torch.equal(model.bfloat16()(steps=steps).logits, model(steps=steps.bfloat16()).logits)  # as with pixels
    with pytest.raises(ValueError, match="Both `pixel_values` and `steps` were given"):
        model(clips, steps=steps)
    with pytest.raises(ValueError, match=r"`steps` must be \(batch, time, 32\), got \(4, 32\)"):
        model(steps=steps[0])
    with pytest.raises(TypeError, match="unexpected argument 'foo'"):
        model(steps=steps, foo=1)


@pytest.mark.parametrize("attention_type", [one for one in ATTENTION_TYPES if one != "factorised_encoder"])
def test_steps_of_other_models_are_an_error_at_every_entry(attention_type):
    model, steps = make_model(tiny_config(attention_type)), torch.randn(2, 4, 32)
    clips = make_clips(model.config)
    encode = model.vivit.encode_steps
    for call in (lambda: model(steps=steps), lambda: model.classify_steps(steps), lambda: encode(clips)):
        with pytest.raises(ValueError, match=f"Model 2 .* `attention_type='{attention_type}'` takes `pixel_values`"):
            call()


def test_unreadable_views_raise_what_a_damaged_video_raises(files, frozen_model, tmp_path):
    clips = cached(files[2:3], tmp_path, frozen_model, max_replacements=2)
    fill(clips, frozen_model)
    with pytest.raises(VideoDecodingError, match="3 videos in a row cannot be read"):
        clips[0]
