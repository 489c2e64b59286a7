"""Training on clips of different lengths: data sets, batches, losses and evaluation with `frame_mask`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import make_model, tiny_config
from transformers import TrainingArguments, VideoMAEConfig, VideoMAEForVideoClassification
from video_files import moving_frames, write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.data.annotations import LabelledVideo
from vivit_hf.data.labels import LabelMap
from vivit_hf.explain import draw_batch
from vivit_hf.training.augmentation import ClipAugmentation, clip_generator
from vivit_hf.training.clip_lengths import group_by_length, measure_lengths
from vivit_hf.training.clips import ClipSampler, StreamedClips, VideoClips
from vivit_hf.training.distillation import Distillation, Teacher
from vivit_hf.training.feature_cache import CachedClips, encode_clips, spatial_settings
from vivit_hf.training.finetuning import check_fit
from vivit_hf.training.finetuning_data import Splits
from vivit_hf.training.finetuning_parser import FineTuningArguments
from vivit_hf.training.mixing import ClipCollator
from vivit_hf.training.overfitting import overfit_one_batch
from vivit_hf.training.parameters import freeze
from vivit_hf.training.pretraining import TubeMaskCollator
from vivit_hf.training.probe_start import start_from_probe
from vivit_hf.training.stream_loading import StreamBatches
from vivit_hf.training.trainer import ClipTrainer


LABELS = LabelMap({"": ("even", "odd")})
LENGTHS = (8, 3, 1, 6, 20, 4)
AUGMENTATION = ClipAugmentation((24, 40), 0.5, (0.9, 1.33), 1.0, 0.0, 2, 8.0)
SIZES = {"num_labels": 2, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def processor_of(policy="mask", **settings):
    size, crop = {"shortest_edge": 40}, {"height": 24, "width": 40}
    settings = {"num_frames": 8, "frame_stride": 1, "size": size, "crop_size": crop, **settings}
    return ViViTVideoProcessor(short_video_policy=policy, **settings)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of these lengths, landscape and portrait in turn; the last is part of a longer file."""
    folder, found = tmp_path_factory.mktemp("videos"), []
    for index, length in enumerate(LENGTHS[:-1]):
        height, width = ((48, 64), (64, 48))[index % 2]
        path = write_video(folder / f"{index}.mp4", moving_frames(length, height, width))
        found.append(LabelledVideo(str(path), (("even", "odd")[index % 2],), f"list:{index}"))
    path = write_video(folder / "long.mp4", moving_frames(30))
    return [*found, LabelledVideo({"path": str(path), "start": 0.4, "end": 0.56}, ("odd",), "list:5")]


def clips_of(videos, processor=None, **settings):
    return VideoClips(videos, processor or processor_of(), LABELS, **settings)


def visible_in(length):
    return torch.arange(8) < length


def model_of(variant, **fields):
    return make_model(tiny_config(variant, **{**SIZES, **fields}))


# Data sets


def test_training_clips_end_with_their_last_visible_frame_masked(videos):
    clips = clips_of(videos, augmentation=AUGMENTATION)
    for index, length in enumerate(LENGTHS):
        item = clips[index]
        assert item["frame_mask"].dtype == torch.bool and torch.equal(item["frame_mask"], visible_in(length))
        shown = item["pixel_values"][min(length, 8) - 1]
        assert item["pixel_values"].shape == (8, 3, 24, 40) and (item["pixel_values"][min(length, 8) :] == shown).all()
    assert "frame_mask" not in clips_of(videos, processor_of("repeat_last"), augmentation=AUGMENTATION)[1]


def test_brightness_and_contrast_are_those_of_the_visible_frames(videos):
    item = clips_of(videos, augmentation=AUGMENTATION)[1]
    three = processor_of(num_frames=3)
    raw = three(videos[1].video, do_center_crop=False, do_rescale=False, do_normalize=False, return_tensors="np")
    frames = raw["pixel_values"][0].transpose(0, 2, 3, 1)
    expected = AUGMENTATION(np.ascontiguousarray(frames), clip_generator(0, 0, 1))
    expected = three.rescale_and_normalize(torch.from_numpy(expected.copy()).permute(0, 3, 1, 2))
    assert torch.equal(item["pixel_values"][:3], expected)


def test_evaluation_items_have_a_mask_for_each_view(videos):
    clips = clips_of(videos, num_clips=2, num_crops=3)
    for index, length in enumerate(LENGTHS):
        assert torch.equal(clips[index]["frame_mask"], visible_in(length).expand(6, 8))


def test_a_replacement_brings_its_own_mask_and_a_blank_is_visible(videos, tmp_path):
    broken = LabelledVideo(str(tmp_path / "broken.mp4"), ("even",), "list:0")
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    item = clips_of([broken, videos[1]], augmentation=AUGMENTATION)[0]
    assert item["file"].endswith("1.mp4") and torch.equal(item["frame_mask"], visible_in(3))
    blank = clips_of([broken], num_clips=2)[0]
    assert blank["frame_mask"].shape == (2, 8) and blank["frame_mask"].all() and blank["labels"] == -100
    batch = ClipCollator(LABELS)([clips_of([one], num_clips=2)[0] for one in (broken, videos[1])])
    assert torch.equal(batch["frame_mask"], torch.stack([torch.ones(2, 8).bool(), visible_in(3).expand(2, 8)]))


def test_streams_carry_masks_on_all_processes(videos, tmp_path):
    broken = LabelledVideo(str(tmp_path / "broken.mp4"), ("even",), "list:0")
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    stream = StreamedClips([*videos, broken], processor_of(), LABELS, augmentation=AUGMENTATION)
    seen = []
    for process in range(2):
        for batch in StreamBatches(stream, 2, num_processes=2, process_index=process):
            items = stream.items(batch)
            assert all("frame_mask" in item for item in items)
            seen += [(item["index"], int(item["frame_mask"].sum())) for item in items]
    assert [count for _, count in sorted(seen)[:6]] == [min(length, 8) for length in LENGTHS]
    alone = stream.items([one for one in stream.read() if one.place == 6])
    assert alone[0]["labels"] == -100 and alone[0]["frame_mask"].all()
    evaluation = StreamedClips(videos, processor_of(), LABELS, num_clips=2)
    assert [item["frame_mask"].shape for item in evaluation] == [(2, 8)] * 6


# Batches


@pytest.mark.parametrize("mixing", [{"mixup_alpha": 0.5}, {"cutmix_alpha": 0.5}], ids=["mixup", "cutmix"])
def test_a_mixed_frame_is_visible_if_it_is_in_one_of_the_clips(videos, mixing):
    clips = clips_of(videos, augmentation=ClipAugmentation((24, 40)))
    items = [clips[1], clips[3]]
    batch = ClipCollator(LABELS, **mixing)(items)
    assert torch.equal(batch["frame_mask"], visible_in(6).expand(2, 8))
    plain = ClipCollator(LABELS, **mixing)([{k: v for k, v in item.items() if k != "frame_mask"} for item in items])
    assert torch.equal(batch["pixel_values"], plain["pixel_values"]) and torch.equal(batch["labels"], plain["labels"])


def test_masked_frames_are_crossed_out_in_the_picture_of_a_batch(videos):
    clips = clips_of(videos, augmentation=ClipAugmentation((24, 40)))
    batch = ClipCollator(LABELS)([clips[0], clips[1]])
    picture = draw_batch(
        batch["pixel_values"], batch["labels"], clips.processor, LABELS, batch["files"], batch["frame_mask"]
    )
    plain = draw_batch(batch["pixel_values"], batch["labels"], clips.processor, LABELS, batch["files"])
    changed = (np.asarray(picture) != np.asarray(plain)).any(axis=2)
    red = (np.asarray(picture) == (200, 0, 0)).all(axis=2)
    first_row, second_row = red[: 4 + 14 + 24], red[4 + 14 + 24 + 2 :]
    assert not first_row.any() and not second_row[:, : 4 + 3 * 42].any()
    for frame in range(3, 8):
        assert second_row[14:, 4 + frame * 42 : 4 + frame * 42 + 40].sum() >= 40
        assert changed[4 + 14 + 24 + 2 + 14 :][:24, 4 + frame * 42 : 4 + frame * 42 + 40].mean() > 0.9


def test_pretraining_takes_no_masks(videos):
    item = clips_of(videos, augmentation=AUGMENTATION)[0]
    with pytest.raises(ValueError, match=r"TubeMaskCollator does not take `frame_mask`.*short_video_policy"):
        TubeMaskCollator(tiny_config("factorised_encoder"))([item])


# Losses and evaluation


def trainer_of(model, folder, **settings):
    arguments = TrainingArguments(
        folder, use_cpu=True, report_to=[], per_device_eval_batch_size=4, label_names=["labels"],
        remove_unused_columns=False, dataloader_pin_memory=False, **settings.pop("arguments", {}),
    )  # fmt: skip
    return ClipTrainer(model, arguments, label_map=LABELS, data_collator=ClipCollator(LABELS), **settings)


def test_a_loss_is_that_of_the_clips_one_by_one(variant, videos, tmp_path):
    model = model_of(variant)
    clips = clips_of(videos, augmentation=AUGMENTATION)
    items = [clips[index] for index in range(len(clips))]
    batch = {
        name: value
        for name, value in ClipCollator(LABELS)(items).items()
        if name in ("pixel_values", "frame_mask", "labels")
    }
    batch["pixel_values"].requires_grad_()
    loss = trainer_of(model, tmp_path).compute_loss(model, batch)
    alone = [
        model(item["pixel_values"][None], frame_mask=item["frame_mask"][None], labels=item["labels"][None]).loss
        for item in items
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)
    loss.backward()
    gradient = batch["pixel_values"].grad.abs().sum(dim=(2, 3, 4))  # (batch, frames)
    assert not gradient[~batch["frame_mask"]].any() and gradient[:, 0].all()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_evaluation_averages_masked_views(variant, videos, tmp_path, frozen):
    if frozen and variant != "factorised_encoder":
        pytest.skip("only Model 2 leaves its spatial encoder out")
    model = model_of(variant)
    if frozen:
        freeze(model, "spatial")
    clips = clips_of(videos, num_clips=2, num_crops=1)
    trainer = trainer_of(model, tmp_path, eval_dataset=clips)
    output = trainer.predict(clips)
    with torch.no_grad():
        rows = [model(item["pixel_values"], frame_mask=item["frame_mask"]).logits for item in clips]
        repeated = [model(item["pixel_values"]).logits for item in clips]
    expected, others = (torch.stack([row.log_softmax(1).logsumexp(0) for row in one]) for one in (rows, repeated))
    found = torch.from_numpy(output.predictions).log_softmax(dim=1)
    torch.testing.assert_close(found, expected.log_softmax(dim=1), atol=1e-5, rtol=1e-5)
    assert (found[[1, 2, 5]] - others.log_softmax(1)[[1, 2, 5]]).abs().max() > 1e-3, "repeated frames count"


@pytest.mark.parametrize("case", ["tubelet", "uniform_frame_sampling"])
def test_a_frozen_spatial_encoder_has_the_loss_of_a_trained_one(videos, tmp_path, case):
    model = model_of("factorised_encoder", embedding_type=case)
    clips = clips_of(videos, augmentation=AUGMENTATION)
    trainer = trainer_of(model, tmp_path)
    batch = ClipCollator(LABELS)([clips[index] for index in range(len(clips))])
    inputs = {name: batch[name] for name in ("pixel_values", "frame_mask", "labels")}
    expected = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
    freeze(model, "spatial")
    frozen = trainer._without_frozen_part(trainer._prepare_inputs(inputs))
    assert set(frozen) == {"steps", "frame_mask", "labels"}
    loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_a_video_without_a_frame_that_the_model_samples_is_its_last_frame_repeated(variant, videos, tmp_path):
    model = model_of(variant, embedding_type="uniform_frame_sampling")
    clips = clips_of(videos, augmentation=AUGMENTATION)
    batch = ClipCollator(LABELS)([clips[1], clips[2]])
    inputs = trainer_of(model, tmp_path)._prepare_inputs(batch)
    assert inputs["frame_mask"].sum(dim=1).tolist() == [3, 8]
    report = overfit_one_batch(model, batch, LABELS, torch.optim.AdamW, [{"params": model.parameters()}], num_steps=1)
    assert np.isfinite(report.first_loss)


# Stored tokens


def cached(videos, folder, model, processor=None, **settings):
    clips = CachedClips(
        videos, processor or processor_of(), LABELS, root=folder, frozen=spatial_settings(model), step_shape=(4, 16),
        augmentation=AUGMENTATION, **settings,
    )  # fmt: skip
    clips.store.start()
    clips.fill(lambda pixels, mask: encode_clips(model, pixels, frame_mask=mask))
    return clips


def test_stored_tokens_have_their_masks_and_the_losses_of_pixels(videos, tmp_path):
    model = model_of("factorised_encoder")
    freeze(model, "spatial")
    clips, trainer = cached(videos, tmp_path / "cache", model), trainer_of(model, tmp_path)
    batch = ClipCollator(LABELS)([clips[index] for index in range(len(clips))])
    assert [int(count) for count in batch["frame_mask"].sum(dim=1)] == [min(length, 8) for length in LENGTHS]
    views = [{name: view[0] for name, view in clips.pixels(index, 0).items()} for index in range(len(clips))]
    pixels = {name: torch.stack([view[name] for view in views]) for name in views[0]}
    losses = [
        trainer.compute_loss(model, {**inputs, "labels": batch["labels"]})
        for inputs in ({name: batch[name] for name in ("steps", "frame_mask")}, pixels)
    ]
    assert torch.equal(*losses)


def test_a_mask_belongs_to_the_checksum_and_another_policy_to_another_store(videos, tmp_path):
    model = model_of("factorised_encoder")
    clips = cached(videos[:2], tmp_path, model)
    path = clips.store.path(clips.identities[1], 0)
    stored = clips.store.read(path)
    assert stored["frame_mask"].sum() == 3
    data = bytearray(path.read_bytes())
    place = data.index(bytes([1] * 3 + [0] * 5))
    data[place + 3] = 1  # a frame more
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: run again"):
        clips[1]
    clips.store.write(path, {"steps": stored["steps"]})  # as an older version wrote it
    assert clips.fill(lambda pixels, mask: encode_clips(model, pixels, frame_mask=mask)) == 1
    assert torch.equal(clips[1]["frame_mask"], visible_in(3))
    other = cached(videos[:2], tmp_path, model, processor_of("repeat_last"))
    assert other.store.folder != clips.store.folder and "frame_mask" not in other[1]


@pytest.mark.parametrize("pooling", ["concatenate", "mean"])
def test_the_classifier_starts_from_masked_tokens(videos, tmp_path, monkeypatch, pooling):
    model = model_of("factorised_encoder", temporal_pooling=pooling, num_temporal_layers=1)
    copies = [replace(one, keep_together=(f"number={index}",)) for index, one in enumerate(videos)]
    clips = cached(copies, tmp_path, model, num_views=2)
    stored, indices = clips.stored_views()
    visible = stored["frame_mask"].unflatten(1, (4, 2)).any(dim=2)[..., None]  # (views, time, 1)
    assert not visible.all()
    # What tells the classes is in the visible steps alone.
    signs = torch.tensor([2.0 * int(clips.targets[index]) - 1 for index in indices])[:, None, None]
    direction = torch.randn(stored["steps"].shape[2], generator=torch.Generator().manual_seed(0))
    steps, found = stored["steps"] + 3 * signs * direction, []
    for masked in (0.0, 1e3):
        tensors = {**stored, "steps": torch.where(visible, steps, masked)}
        monkeypatch.setattr(clips, "stored_views", lambda tensors=tensors: (tensors, indices))
        text = start_from_probe(model, clips, seed=0)
        assert "logistic regression on 12 clips" in text and float(text.split("clips, ")[1].split("%")[0]) >= 90
        found.append((text, model.classifier.weight.clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    one, mask = steps[:1], visible_in(3)[None]
    with torch.no_grad():
        expected = model(steps=one, frame_mask=mask).logits
        garbage = torch.where(torch.tensor([1, 1, 0, 0]).bool()[:, None], one, 1e3)
        assert expected.isfinite().all() and torch.equal(model(steps=garbage, frame_mask=mask).logits, expected)


# A teacher


def teacher_of(model, frames, takes_masks):
    channels = torch.ones(3, 1, 1)
    return Teacher(model, torch.tensor(frames), (24, 40), channels, 0 * channels, torch.arange(2), takes_masks)


def test_a_vivit_teaches_with_the_masks_of_its_frames(videos):
    teacher_model = model_of("spatio_temporal", num_frames=4)
    teacher = teacher_of(teacher_model, [1, 3, 5, 7], True)
    clips = clips_of(videos, augmentation=AUGMENTATION)
    batch = ClipCollator(LABELS)([clips[index] for index in range(len(clips))])
    found = teacher.logits(batch["pixel_values"], frame_mask=batch["frame_mask"])
    mask = batch["frame_mask"][:, [1, 3, 5, 7]]
    mask[2] = True  # the only frame of this clip is none of the teacher's: it sees that frame, repeated
    with torch.no_grad():
        expected = teacher_model(batch["pixel_values"][:, [1, 3, 5, 7]], frame_mask=mask).logits
    torch.testing.assert_close(found, expected)
    garbage = batch["pixel_values"].masked_fill(~batch["frame_mask"][:, :, None, None, None], 1e3)
    torch.testing.assert_close(teacher.logits(garbage, frame_mask=batch["frame_mask"]), expected)


def test_another_teacher_sees_the_last_visible_frame_repeated(videos, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = VideoMAEConfig(image_size=(24, 40), patch_size=8, num_frames=8, tubelet_size=2, num_labels=2, **sizes)
    teacher = teacher_of(VideoMAEForVideoClassification(config).eval(), list(range(8)), False)
    clips = clips_of(videos, augmentation=AUGMENTATION)
    batch = ClipCollator(LABELS)([clips[index] for index in range(len(clips))])
    expected = teacher.logits(batch["pixel_values"])
    garbage = batch["pixel_values"].masked_fill(~batch["frame_mask"][:, :, None, None, None], 1e3)
    assert torch.equal(teacher.logits(garbage, frame_mask=batch["frame_mask"]), expected)
    student = model_of("factorised_encoder")
    distillation = Distillation(teacher, "videomae", temperature=2.0, weight=0.5)
    inputs = {name: batch[name] for name in ("pixel_values", "frame_mask", "labels")}
    assert trainer_of(student, tmp_path, distillation=distillation).compute_loss(student, inputs).isfinite()


# Batches by length


def test_lengths_are_those_of_the_clips(videos, tmp_path):
    broken = LabelledVideo(str(tmp_path / "broken.mp4"), ("even",), "list:0")
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    clips = clips_of([*videos, broken], augmentation=AUGMENTATION)
    assert measure_lengths(clips).tolist() == [min(length, 8) for length in LENGTHS] + [8]
    assert measure_lengths(clips, num_workers=2).tolist() == measure_lengths(clips).tolist()
    strided = clips_of(videos, processor_of(frame_stride=3), augmentation=AUGMENTATION)
    assert measure_lengths(strided).tolist() == [int(strided[index]["frame_mask"].sum()) for index in range(6)]
    rate = clips_of(videos, processor_of(frames_per_second=12.5), augmentation=AUGMENTATION)
    assert measure_lengths(rate).tolist() == [int(rate[index]["frame_mask"].sum()) for index in range(6)]


@pytest.mark.parametrize("count", [64, 203, 5])
def test_batches_have_clips_of_similar_length_and_every_video_once(count):
    lengths = np.random.default_rng(0).integers(1, 33, count)
    order = np.random.default_rng(1).permutation(count)
    grouped = group_by_length(order, lengths, 4, np.random.default_rng(2))
    assert sorted(grouped.tolist()) == list(range(count))
    whole = count // 4 * 4
    spreads = [np.ptp(lengths[one[:whole].reshape(-1, 4)], axis=1).mean() for one in (grouped, order)]
    assert spreads[0] < spreads[1] / 2 or count == 5
    firsts = lengths[grouped[:whole]].reshape(-1, 4).mean(axis=1)
    assert count == 5 or ((np.diff(firsts) < 0).any() and (np.diff(firsts) > 0).any()), "batches come in random order"
    other = group_by_length(np.random.default_rng(7).permutation(count), lengths, 4, np.random.default_rng(2))
    assert count == 5 or not np.array_equal(other, grouped)


def test_the_sampler_groups_every_epoch_anew_and_alike_in_every_process(videos, tmp_path):
    clips = clips_of(videos * 4, augmentation=AUGMENTATION)
    arguments = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4}
    trainers = [
        trainer_of(model_of("spatio_temporal"), tmp_path, train_dataset=clips, arguments=arguments) for _ in "ab"
    ]
    samplers = [trainer._get_train_sampler() for trainer in trainers]
    orders = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        first, second = (list(sampler) for sampler in samplers)
        assert first == second and sorted(first) == list(range(24))
        orders.append(first)
    assert orders[0] != orders[1] and list(ClipSampler(clips, 42)) != orders[1]


def test_a_stream_cannot_be_grouped(videos, tmp_path):
    training = FineTuningArguments(tmp_path, use_cpu=True, max_steps=1, train_sampling_strategy="group_by_length")
    training.do_train = True
    check_fit(training, Splits(videos, None, LABELS))
    with pytest.raises(ValueError, match="group_by_length needs the lengths of the training videos, which a stream"):
        check_fit(training, Splits(iter(videos), None, LABELS))
