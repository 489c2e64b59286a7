"""Clips of video files: the same for the same (seed, epoch, index), and a damaged file stops nothing."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from video_files import moving_frames, write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.data.annotations import LabelledVideo
from vivit_hf.data.labels import LabelMap
from vivit_hf.training.augmentation import ClipAugmentation
from vivit_hf.training.clips import ClipSampler, StreamedClips, VideoClips
from vivit_hf.training.mixing import ClipCollator
from vivit_hf.video_sources import VideoDecodingError


LABELS = LabelMap({"": ("even", "odd")})
AUGMENTATION = ClipAugmentation(
    crop_size=(32, 32),
    flip_probability=0.5,
    scale_jitter=(0.9, 1.33),
    colour_jitter_probability=0.5,
    rand_augment_layers=1,
    rand_augment_magnitude=10,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Seven videos; the third is not one, and the fifth is cut off so early that no frame is left."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [write_video(folder / f"{index}.mp4", moving_frames(20, 40 + 2 * index, 64)) for index in range(7)]
    paths[2].write_bytes(b"this is not a video")
    paths[4].write_bytes(paths[4].read_bytes()[:200])
    return [LabelledVideo(str(path), (("even", "odd")[index % 2],), str(path)) for index, path in enumerate(paths)]


@pytest.fixture
def processor():
    return ViViTVideoProcessor(
        num_frames=4, frame_stride=2, size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    )


def good(files):
    return [one for index, one in enumerate(files) if index not in (2, 4)]


def batches(dataset, epoch, num_workers=0, **settings):
    """All batches of an epoch, mixed; with a loader of its own unless one is given."""
    sampler = ClipSampler(dataset, seed=3)
    collator = ClipCollator(LABELS, mixup_alpha=0.3, cutmix_alpha=0.3, label_smoothing=0.1, seed=3)
    loader = DataLoader(
        dataset, batch_size=3, sampler=sampler, collate_fn=collator, num_workers=num_workers, **settings
    )
    sampler.set_epoch(epoch)
    return loader, sampler, list(loader)


def assert_same_batches(one, other):
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first["pixel_values"], second["pixel_values"])
        assert torch.equal(first["labels"], second["labels"])
        assert first["damaged_files"] == second["damaged_files"]


def test_a_training_item(files, processor):
    data = VideoClips(good(files), processor, LABELS, augmentation=AUGMENTATION)
    item = data[1]
    assert item["pixel_values"].shape == (4, 3, 32, 32) and item["pixel_values"].dtype == torch.float32
    assert item["pixel_values"].min() >= -1 and item["pixel_values"].max() <= 1
    assert (item["labels"].item(), item["index"], item["epoch"], item["damaged_files"]) == (1, 1, 0, [])
    with pytest.raises(IndexError, match="no video 5 of 5"):
        data[5]


def test_two_workers_or_none_give_the_same_batches(files, processor):
    data = VideoClips(files, processor, LABELS, augmentation=AUGMENTATION, seed=3)
    _, _, alone = batches(data, epoch=0)
    loader, sampler, together = batches(data, epoch=0, num_workers=2, persistent_workers=True)
    assert_same_batches(alone, together)
    # Workers that live on see the next epoch begin.
    sampler.set_epoch(1)
    together = list(loader)
    _, _, next_epoch = batches(data, epoch=1)
    assert_same_batches(next_epoch, together)
    assert not torch.equal(alone[0]["pixel_values"], next_epoch[0]["pixel_values"])
    del loader


def test_an_item_depends_on_seed_epoch_and_index_alone(files, processor):
    data = VideoClips(good(files), processor, LABELS, augmentation=AUGMENTATION, seed=1)
    first = data[3]["pixel_values"]
    torch.manual_seed(123)
    data[0]
    assert torch.equal(data[3]["pixel_values"], first)
    data.set_epoch(1)
    assert not torch.equal(data[3]["pixel_values"], first)
    other = VideoClips(good(files), processor, LABELS, augmentation=AUGMENTATION, seed=2)
    assert not torch.equal(other[3]["pixel_values"], first)


def test_a_damaged_file_is_replaced_and_named(files, processor):
    data = VideoClips(files, processor, LABELS, augmentation=AUGMENTATION)
    item = data[2]
    (name, reason), *_ = item["damaged_files"]
    assert name == files[2].video and reason
    assert item["pixel_values"].shape == (4, 3, 32, 32)
    replacements = set()
    for epoch in range(12):
        data.set_epoch(epoch)
        item = data[2]
        replacements.add((item["labels"].item(), item["pixel_values"].sum().item()))
        assert data[2]["labels"] == item["labels"]
    assert len(replacements) > 3, "not always the same file stands in"


def test_a_set_of_nothing_but_damaged_files_is_an_error(files, processor):
    data = VideoClips([files[2], files[4]], processor, LABELS, augmentation=AUGMENTATION, max_replacements=3)
    with pytest.raises(VideoDecodingError, match=r"4 videos in a row cannot be read.*2\.mp4.*vivit-hf scan"):
        data[0]


def test_evaluation_has_views_and_damaged_files_do_not_count(files, processor):
    data = VideoClips(files, processor, LABELS, num_clips=2, num_crops=3)
    item = data[0]
    assert torch.equal(item["pixel_values"], processor(files[0].video, num_clips=2, num_crops=3)["pixel_values"])
    damaged = data[4]
    assert damaged["pixel_values"].shape == (6, 4, 3, 32, 32) and damaged["labels"].item() == -100
    assert damaged["damaged_files"][0][0] == files[4].video


PROCESSORS = {
    "exact size": {"size": {"height": 24, "width": 40}, "do_center_crop": False},
    "crop": {"size": {"shortest_edge": 36}, "crop_size": {"height": 24, "width": 40}},
    "crop alone": {"do_resize": False, "crop_size": {"height": 24, "width": 40}},
    "short side": {"size": {"shortest_edge": 20}, "do_center_crop": False},
    "as it is": {"do_resize": False, "do_center_crop": False},
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("kind", [VideoClips, StreamedClips])
def test_a_damaged_validation_file_raises_with_no_processor(files, name, kind):
    processor = ViViTVideoProcessor(num_frames=4, frame_stride=2, **PROCESSORS[name])
    data = kind([files[2], files[0], files[4]], processor, LABELS, num_clips=2)
    batch = ClipCollator(LABELS)(list(data))
    assert batch["pixel_values"].shape == (3, *processor(files[0].video, num_clips=2)["pixel_values"].shape)
    assert batch["labels"].tolist() == [-100, 0, -100]
    assert not batch["pixel_values"][[0, 2]].any() and batch["pixel_values"][1].any()
    assert [file for file, _ in batch["damaged_files"]] == [files[2].video, files[4].video]
    if "height" in str(PROCESSORS[name]):
        assert next(iter(data))["pixel_values"].shape == (2, 4, 3, 24, 40), "without another clip as well"


def test_the_order_of_an_epoch(files, processor):
    data = VideoClips(good(files), processor, LABELS, augmentation=AUGMENTATION)
    sampler = ClipSampler(data, seed=5)
    first = list(sampler)
    assert sorted(first) == list(range(5)) and list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(5)) and list(sampler) != first
    assert list(ClipSampler(data, seed=6)) != first


def test_balanced_sampling_draws_classes_equally_often(files, processor):
    many = [files[0]] * 90 + [files[1]] * 10
    data = VideoClips(many, processor, LABELS, augmentation=AUGMENTATION)
    sampler = ClipSampler(data, seed=0, is_balanced=True)
    labels = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        labels += [data.targets[index].item() for index in sampler]
    assert len(labels) == 2000
    assert np.mean(labels) == pytest.approx(0.5, abs=0.05)


def test_a_damaged_file_at_the_end_of_a_stream_is_named(files, processor):
    for augmentation in (None, AUGMENTATION):
        items = list(StreamedClips([files[0], files[2], files[4]], processor, LABELS, augmentation=augmentation))
        assert [name for item in items for name, _ in item["damaged_files"]] == [files[2].video, files[4].video]
        assert items[0]["labels"] == 0 and all(item["labels"] == -100 for item in items[1:])


def test_streams_leave_damaged_files_out_and_name_them(files, processor):
    stream = StreamedClips(files, processor, LABELS, augmentation=AUGMENTATION)
    items = list(stream)
    assert [item["labels"].item() for item in items] == [0, 1, 1, 1, 0]
    assert [name for item in items for name, _ in item["damaged_files"]] == [files[2].video, files[4].video]
    assert torch.equal(next(iter(stream))["pixel_values"], items[0]["pixel_values"])
    stream.set_epoch(1)
    assert not torch.equal(next(iter(stream))["pixel_values"], items[0]["pixel_values"])


def test_a_part_of_a_long_video_is_a_clip_of_its_own(tmp_path, processor):
    """Frame i is of the grey level 8 * i: what is seen tells which frames were taken."""
    frames = np.repeat(np.arange(30, dtype=np.uint8) * 8, 40 * 40 * 3).reshape(30, 40, 40, 3)
    path = write_video(tmp_path / "long.mp4", frames, rate=10)
    settings = {"do_rescale": False, "do_normalize": False, "frame_stride": 1}

    def seen(**part):
        values = processor({"path": str(path), **part}, **settings)["pixel_values"]
        return [round(float(frame.float().mean()) / 8) for frame in values[0]]

    assert seen(start=0.5, end=0.9) == [5, 6, 7, 8]
    assert seen(start=2.0) == [23, 24, 25, 26]
    assert seen(end=0.4) == [0, 1, 2, 3]
    assert seen(start=1.0, end=1.2) == [10, 11, 11, 11], "a short part is filled by its own last frame"
    whole = processor({"path": str(path), "start": 1.0, "end": 1.5}, do_sample_frames=False, **settings)
    assert whole["pixel_values"].shape[1] == 5
    with pytest.raises(
        VideoDecodingError, match=r"long\.mp4: there is no frame from 7 s to 8 s; the last one is at 2\.900 s"
    ):
        seen(start=7, end=8)
