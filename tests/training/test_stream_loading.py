"""Streams in training and evaluation: passes, workers, processes, damaged files, and runs that are resumed."""

import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from stream_runs import LABELS, ShuffledVideos, run, trainer_of, videos_of, write_videos

from vivit_hf.data.annotations import AnnotationError
from vivit_hf.data.hub_datasets import hub_videos
from vivit_hf.data.labels import IGNORED
from vivit_hf.training.clips import StreamedClips
from vivit_hf.training.stream_loading import StreamBatches
from vivit_hf.video_sources import VideoDecodingError


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("streams") / "videos")


def batches_of(loader, epoch):
    loader.set_epoch(epoch)
    return [(batch["pixel_values"], batch["labels"], batch["damaged_files"]) for batch in loader]


def assert_same(one, other):
    assert len(one) == len(other)
    for (clips, labels, damaged), (clips_2, labels_2, damaged_2) in zip(one, other, strict=True):
        assert torch.equal(clips, clips_2) and torch.equal(labels, labels_2) and damaged == damaged_2


# How videos are dealt out


class Numbered:
    """What `StreamBatches` asks of a stream, without any video."""

    def __init__(self, count, augmentation="any"):
        self.count, self.augmentation = count, augmentation

    read = StreamedClips.read
    _epoch = torch.zeros(1)

    @property
    def videos(self):
        return iter(range(self.count))


@pytest.mark.parametrize("count", [1, 5, 7, 8, 17])
@pytest.mark.parametrize(("batch", "processes", "rounds"), [(4, 1, 1), (4, 2, 1), (1, 3, 1), (2, 2, 3)])
def test_all_processes_train_on_equal_shares_of_every_pass(count, batch, processes, rounds):
    settings = {"num_processes": processes, "rounds_per_step": rounds}
    shares = [list(StreamBatches(Numbered(count), batch, process_index=one, **settings)) for one in range(processes)]
    assert {len(one) for share in shares for one in share} == {batch}
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) % rounds == 0
    together = [one for a_round in zip(*shares, strict=True) for batch in a_round for one in batch]
    assert [one.place for one in together] == list(range(len(together))), "no two clips draw the same random numbers"
    assert [one.video for one in together] == [place % count for place in range(len(together))]
    assert 0 <= len(together) - count < batch * processes * rounds
    whole = list(StreamBatches(Numbered(count), batch * processes * rounds))
    assert [one for batch in whole for one in batch] == together, "however a step is cut into pieces"


@pytest.mark.parametrize("count", [1, 5, 7, 8, 17])
@pytest.mark.parametrize(("batch", "processes"), [(4, 1), (4, 2), (1, 3)])
def test_all_processes_evaluate_equally_many_batches_and_each_video_once(count, batch, processes):
    loaders = [
        StreamBatches(Numbered(count, None), batch, num_processes=processes, process_index=one)
        for one in range(processes)
    ]
    shares = [list(loader) for loader in loaders]
    sizes = [[len(one) for one in share] for share in shares]
    assert all(one == sizes[0] for one in sizes)
    gathered = [one.video for a_round in zip(*shares, strict=True) for batch in a_round for one in batch]
    assert gathered[:count] == list(range(count)) and gathered[count:] == [None] * (len(gathered) - count)
    assert len(gathered) - count < processes and [loader.num_videos for loader in loaders] == [count] * processes


def test_the_last_videos_of_a_pass_can_be_dropped():
    found = list(StreamBatches(Numbered(17), 2, num_processes=2, process_index=1, drop_last=True))
    assert [[one.place for one in batch] for batch in found] == [[2, 3], [6, 7], [10, 11], [14, 15]]
    with pytest.raises(ValueError, match="3 videos, fewer than the 4 of one step"):
        list(StreamBatches(Numbered(3), 4, drop_last=True))


@pytest.mark.parametrize("augmentation", [None, "any"])
def test_an_empty_stream_is_an_error(augmentation):
    with pytest.raises(ValueError, match="The stream has no videos"):
        list(StreamBatches(Numbered(0, augmentation), 2))


# Batches


def test_every_pass_has_an_order_and_crops_of_its_own_for_any_number_of_workers(folder, tmp_path):
    def loader(workers):
        trainer = trainer_of(folder, tmp_path, 9, damaged=(3,), dataloader_num_workers=workers)
        return trainer.get_train_dataloader()

    alone, together = loader(0), loader(2)
    first, second = batches_of(alone, 0), batches_of(alone, 1)
    assert len(first) == len(second) == 3
    assert not any(torch.equal(one[0], other[0]) for one, other in zip(first, second, strict=True))
    assert_same(first, batches_of(together, 0))
    assert_same(second, batches_of(together, 1))
    assert_same(first, batches_of(alone, 0))


def test_processes_draw_other_random_numbers(folder, tmp_path):
    """One video over and over: only what is random tells its clips apart."""
    clips = trainer_of(folder, tmp_path).train_dataset
    clips.videos = videos_of(folder, 1) * 8
    found = [
        item["pixel_values"]
        for process in range(2)
        for batch in StreamBatches(clips, 2, num_processes=2, process_index=process)
        for item in clips.items(batch)
    ]
    assert len(found) == 8
    assert len({clip.double().sum().item() for clip in found}) == 8


def test_a_damaged_file_is_replaced_within_its_batch_and_named(folder, tmp_path):
    clips = trainer_of(folder, tmp_path).train_dataset
    clips.videos = videos_of(folder, 6, damaged=(1, 5))
    first, second, third = (clips.items(batch) for batch in StreamBatches(clips, 2))
    assert torch.equal(first[1]["pixel_values"], first[0]["pixel_values"]) and first[1]["labels"] == first[0]["labels"]
    assert [name for name, _ in first[1]["damaged_files"]] == [str(folder / "broken01.mp4")]
    assert not second[0]["damaged_files"] and not second[1]["damaged_files"]
    assert [name for name, _ in third[1]["damaged_files"]] == [str(folder / "broken05.mp4")], "the last of the stream"
    assert third[1]["labels"] == third[0]["labels"]


def test_a_batch_without_a_readable_file_does_not_count(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, 4, damaged=(0, 1, 2), per_device_train_batch_size=1, max_steps=4, mixup=0)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sorted(losses)[:3] == [0, 0, 0] and sorted(losses)[3] > 0.5
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert len(trainer.all_damaged_files()["train"]) == 3
    for smoothing in (0.0, 0.1):
        trainer.data_collator.label_smoothing = smoothing
        batch = trainer.data_collator(
            [
                trainer.train_dataset._item(one) | {"pixel_values": torch.zeros(1), "labels": LABELS.ignored()}
                for one in trainer.train_dataset.read()
            ]
        )
        assert (batch["labels"] == (0 if smoothing else IGNORED)).all()


def test_a_stream_of_nothing_but_damaged_files_is_an_error(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, 5, damaged=range(5), max_steps=1000)
    with pytest.raises(VideoDecodingError, match=r"100 videos of the stream in a row.*broken0\d\.mp4"):
        trainer.train()


# Resumed runs

SETTINGS = {"count": 8, "max_steps": 9, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    return output, run(folder, output, **SETTINGS)


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (2, 0), (5, 0), (5, 2), (8, 2)])
def test_a_resumed_run_goes_on_to_the_bit(folder, uninterrupted, tmp_path, step, workers):
    """8 videos in batches of 4: passes end at steps 2, 4, 6 and 8."""
    output, whole = uninterrupted
    resumed = run(
        folder,
        tmp_path,
        resume=str(output / f"checkpoint-{step}"),
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        **SETTINGS,
    )
    assert len(whole["batches"]) == 9 and resumed["batches"] == whole["batches"][step:]
    assert resumed["losses"] == whole["losses"] and resumed["weights"] == whole["weights"]
    assert resumed["evaluated_at"] == whole["evaluated_at"] == [2, 4, 6, 8, 9, 9], (
        "once after each pass, and at the end"
    )


def test_a_resumed_run_with_accumulation_and_more_steps(folder, tmp_path):
    """5 videos in steps of 2 batches of 2: passes of 2 steps."""
    settings = {"count": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "damaged": (4,)}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    whole = run(folder, tmp_path / "whole", max_steps=7, **settings)
    run(folder, tmp_path / "short", max_steps=3, **settings)
    longer = run(folder, tmp_path / "longer", max_steps=7, resume=str(tmp_path / "short" / "checkpoint-3"), **settings)
    assert len(whole["batches"]) == 14 and longer["batches"] == whole["batches"][6:]
    assert longer["weights"] == whole["weights"]


def test_a_checkpoint_without_a_position_is_refused(folder, uninterrupted, tmp_path):
    output, _ = uninterrupted
    state_file = output / "checkpoint-5" / "trainer_state.json"
    text = state_file.read_text()
    state = json.loads(text)
    del state["stateful_callbacks"]["StreamPosition"]
    state_file.write_text(json.dumps(state))
    try:
        with pytest.raises(ValueError, match="has no position in a stream"):
            run(folder, tmp_path, resume=str(output / "checkpoint-5"), **SETTINGS)
    finally:
        state_file.write_text(text)


# Streams of `datasets`


def numbered_stream(count, num_shards=1):
    return Dataset.from_dict(
        {"video": [f"{index}.mp4" for index in range(count)], "label": ["dark"] * count}
    ).to_iterable_dataset(num_shards=num_shards)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_stream_of_datasets_is_the_whole_one_in_any_worker_and_reshuffled(num_shards):
    dataset = numbered_stream(12, num_shards).shuffle(seed=3, buffer_size=4)
    videos = hub_videos(dataset, "numbers")
    orders = []
    for epoch in range(3):
        videos.set_epoch(epoch)
        order = [one.video for one in videos]
        assert [one.video for one in videos] == order and sorted(order) == sorted(f"{index}.mp4" for index in range(12))
        loader = torch.utils.data.DataLoader(Names(videos), num_workers=2, batch_size=None)
        assert list(loader) == [name for name in order for _ in range(2)], "each of two workers has the whole stream"
        orders.append(order)
    assert len(set(map(tuple, orders))) == 3


class Names(torch.utils.data.IterableDataset):
    def __init__(self, videos):
        self.videos = videos

    def __iter__(self):
        return (one.video for one in self.videos)


class HubFiles(MemoryFileSystem):
    protocol = "hf"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("hf://").strip("/")


def test_videos_that_are_left_on_the_hub_are_read(folder, tmp_path, monkeypatch):
    """A folder of videos is streamed as addresses; of other protocols in a data set none is opened."""
    monkeypatch.setitem(_registry, "hf", HubFiles)
    address = "hf://datasets/someone/videos@1234/train/dark"
    HubFiles().pipe(f"{address}/00.mp4", (folder / "00.mp4").read_bytes())
    names = [f"{address}/00.mp4", f"{address}/gone.mp4", "memory://00.mp4", "simplecache::hf://datasets/a/b.mp4"]
    rows = {"video": [{"path": name, "bytes": None} for name in names], "label": ["dark"] * 4}
    videos = hub_videos(Dataset.from_dict(rows).to_iterable_dataset(), "hub")
    clips = StreamedClips(videos, trainer_of(folder, tmp_path).processing_class, LABELS)
    found = list(clips)
    assert [item["labels"].item() for item in found] == [0, IGNORED, IGNORED, IGNORED]
    assert found[0]["pixel_values"].any() and not found[0]["damaged_files"]
    damaged = [item["damaged_files"][0] for item in found[1:]]
    assert [name for name, _ in damaged] == names[1:]
    assert "cannot be downloaded (FileNotFoundError" in damaged[0][1] and "only http" in damaged[1][1]


def test_damaged_files_of_one_name_are_told_apart(folder, tmp_path):
    rows = {"video": [{"path": "0.mp4", "bytes": content} for content in (b"one", b"two")], "label": ["dark"] * 2}
    clips = StreamedClips(
        hub_videos(Dataset.from_dict(rows).to_iterable_dataset(), "packed"),
        trainer_of(folder, tmp_path).processing_class,
        LABELS,
    )
    names = [name for item in clips for name, _ in item["damaged_files"]]
    assert len(set(names)) == 2 and all(name.startswith("0.mp4 (SHA-256 ") for name in names)


def test_a_stream_that_is_split_already_is_refused():
    dataset = split_dataset_by_node(numbered_stream(4), rank=0, world_size=2)
    assert isinstance(dataset, IterableDataset)
    with pytest.raises(AnnotationError, match="already divided among processes"):
        hub_videos(dataset, "numbers")


def test_a_loader_of_torch_gives_each_video_once_with_any_number_of_workers(folder, tmp_path):
    clips = trainer_of(folder, tmp_path, 5).train_dataset
    alone = {item["index"]: item["pixel_values"] for item in clips}
    loader = torch.utils.data.DataLoader(clips, batch_size=None, num_workers=2)
    together = {item["index"]: item["pixel_values"] for item in loader}
    assert sorted(together) == list(range(5))
    assert all(torch.equal(together[index], clip) for index, clip in alone.items())
    assert isinstance(clips.videos, ShuffledVideos)
