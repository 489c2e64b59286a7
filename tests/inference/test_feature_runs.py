"""Runs that embed many videos: killed and started again, the file is the one of an undisturbed run."""

import shutil

import numpy as np
import pyarrow.parquet
import pytest
from tiny_models import make_model, tiny_config
from video_files import moving_frames, write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.inference import feature_runs, read_features
from vivit_hf.inference.feature_runs import FeatureRun, feature_settings
from vivit_hf.inference.processes import process_group
from vivit_hf.inference.shards import OtherRunError


FINGERPRINT = {"weights": "0" * 64, "config": "1" * 64, "processor": "2" * 64}
ALONE = process_group(use_cpu=True)
OPTIONS = {"batch_size": 4, "num_workers": 0}


@pytest.fixture(scope="module")
def encoder():
    model = make_model(tiny_config("factorised_encoder"))
    crop = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 40}}
    return model, ViViTVideoProcessor(num_frames=8, frame_stride=1, **crop)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """20 parts of one file and a broken file: 11 shards of 2."""
    folder = tmp_path_factory.mktemp("videos")
    path = str(write_video(folder / "a.mp4", moving_frames(60)))
    (folder / "broken.mp4").write_bytes(b"no video")
    parts = [{"path": path, "start": index / 25, "end": (index + 20) / 25} for index in range(20)]
    return [*parts[:5], str(folder / "broken.mp4"), *parts[5:]]


def make_run(output, encoder, videos, per_step=False, **changes):
    described = {"name": "a", "fingerprint": {**FINGERPRINT, **changes}, "per_step": per_step}
    settings = feature_settings(*encoder, videos, **described, num_clips=2, num_crops=1)
    return FeatureRun(output, videos, settings)


def finish(run, encoder, overwrite=False):
    """Do what the command does, and return the number of videos that were embedded."""
    if run.is_finished(overwrite):
        return 0
    run.start(overwrite, ALONE)
    count = sum(1 for _ in run.embed(*encoder, run.missing(), **OPTIONS))
    run.join()
    return count


@pytest.fixture(scope="module", params=[False, True], ids=["per video", "per step"])
def undisturbed(request, encoder, videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "f.parquet"
    assert finish(make_run(output, encoder, videos, request.param), encoder) == 21
    return request.param, output


def test_the_file_has_every_video_that_can_be_read_and_names_the_others(undisturbed, videos):
    _, output = undisturbed
    features = read_features(output)
    assert list(features.starts) == [index / 25 for index in range(20)] and len(features.files) == 20
    (failed,) = features.settings["failed"]
    assert failed["file"] == videos[5] and "broken.mp4" in failed["error"] and failed["start"] is None
    assert [path.name for path in output.parent.iterdir()] == ["f.parquet"], "the shards are gone"


def test_a_killed_run_goes_on_and_gives_the_same_file(undisturbed, encoder, videos, tmp_path):
    per_step, expected = undisturbed
    run = make_run(tmp_path / "f.parquet", encoder, videos, per_step)
    run.start(False, ALONE)
    for count, _ in enumerate(run.embed(*encoder, run.missing(), **OPTIONS)):
        if count == 8:  # in the middle of the fifth shard
            break
    half = run.parts / ".part-00004.parquet.1.unfinished"
    half.write_bytes(b"PAR1 half")
    assert len(run.missing()) == 7
    assert finish(make_run(tmp_path / "f.parquet", encoder, videos, per_step), encoder) == 21 - 8
    assert (tmp_path / "f.parquet").read_bytes() == expected.read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "f.parquet"]


def test_shares_of_several_processes_make_the_same_file(undisturbed, encoder, videos, tmp_path):
    per_step, expected = undisturbed
    run = make_run(tmp_path / "f.parquet", encoder, videos, per_step)
    run.start(False, ALONE)
    missing = run.missing()
    for process in (2, 0, 1):  # 4, 4 and 3 shards, in any order
        assert sum(1 for _ in run.embed(*encoder, missing[process::3], **OPTIONS)) in (6, 7, 8)
    run.join()
    assert (tmp_path / "f.parquet").read_bytes() == expected.read_bytes()


def test_a_run_killed_while_its_shards_are_joined_is_joined_again(undisturbed, encoder, videos, tmp_path, monkeypatch):
    per_step, expected = undisturbed
    monkeypatch.setattr(feature_runs, "remove_folder", lambda folder: None)
    finish(make_run(tmp_path / "f.parquet", encoder, videos, per_step), encoder)
    monkeypatch.undo()
    (tmp_path / "f.parquet").unlink()
    assert finish(make_run(tmp_path / "f.parquet", encoder, videos, per_step), encoder) == 0
    assert (tmp_path / "f.parquet").read_bytes() == expected.read_bytes()


def test_a_finished_file_is_not_computed_again_unless_that_is_wished(undisturbed, encoder, videos, tmp_path):
    per_step, output = undisturbed
    copied = shutil.copy(output, tmp_path / "f.parquet")
    assert finish(make_run(copied, encoder, videos, per_step), encoder) == 0
    assert finish(make_run(copied, encoder, videos, per_step), encoder, overwrite=True) == 21


def test_another_run_is_refused_by_its_settings_and_replaced_if_that_is_wished(encoder, videos, tmp_path):
    output = tmp_path / "f.parquet"
    few = videos[:3]
    finish(make_run(output, encoder, few), encoder)
    before = output.read_bytes()
    for run, named in (
        (make_run(output, encoder, few, weights="3" * 64), "weights 000000000000... -> 333333333333..."),
        (make_run(output, encoder, few, per_step=True), "kind 'video' -> 'step'"),
        (make_run(output, encoder, videos[:2]), "num_videos 3 -> 2"),
        (make_run(output, encoder, videos[1:4]), "videos_digest"),
    ):
        with pytest.raises(OtherRunError, match=named.replace(".", r"\.")):
            run.is_finished(overwrite=False)
        assert output.read_bytes() == before
    other = make_run(output, encoder, few, weights="3" * 64)
    assert finish(other, encoder, overwrite=True) == 3
    assert read_features(output).settings["fingerprint"]["weights"] == "3" * 64


def test_a_video_that_was_replaced_makes_another_run(encoder, tmp_path):
    path, output = tmp_path / "a.mp4", tmp_path / "f.parquet"
    write_video(path, moving_frames(20))
    assert finish(make_run(output, encoder, [str(path)]), encoder) == 1
    assert finish(make_run(output, encoder, [str(path)]), encoder) == 0
    write_video(path, moving_frames(24))
    with pytest.raises(OtherRunError, match="videos_digest"):
        make_run(output, encoder, [str(path)]).is_finished(False)


def test_shards_of_another_run_are_refused(encoder, videos, tmp_path):
    run = make_run(tmp_path / "f.parquet", encoder, videos[:3])
    run.start(False, ALONE)
    list(run.embed(*encoder, run.missing()[:1], **OPTIONS))
    other = make_run(tmp_path / "f.parquet", encoder, videos[:3], processor="3" * 64)
    with pytest.raises(OtherRunError, match="processor"):
        other.is_finished(overwrite=False)
    assert finish(other, encoder, overwrite=True) == 3


def test_a_file_without_features_is_never_replaced(encoder, videos, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"label": ["a"]}), tmp_path / "labels.parquet")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds no features"):
            make_run(tmp_path / "labels.parquet", encoder, videos[:2]).is_finished(overwrite)


def test_videos_none_of_which_can_be_read_give_an_empty_file(encoder, videos, tmp_path):
    finish(make_run(tmp_path / "f.parquet", encoder, videos[5:6]), encoder)
    features = read_features(tmp_path / "f.parquet")
    assert features.vectors.shape == (0, 32) and len(features.settings["failed"]) == 1
    assert np.array_equal(features.starts, [])
