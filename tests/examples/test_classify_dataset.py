"""examples/classify_dataset.py as its users start it, on miniature data."""

import shutil
import sys

import classify_dataset
import pyarrow.parquet
import pytest
from labelled_videos import TORCHRUN, start, start_and_kill, write_labelled_videos
from moving_shapes import MOTIONS
from paths import EXAMPLES

from vivit_hf import ViViTVideoProcessor


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_labelled_videos(tmp_path_factory.mktemp("data"))


def classify(data, output, *more):
    return [
        *("--model", data / "model", "--videos", data / "videos", "--use_cpu", "--num_workers", 0),
        *("--output_dir", output, "--shard_size", 3, *more),
    ]


def rows_of(folder):
    parts = sorted(folder.glob("part-*.parquet"))
    return [row for part in parts for row in pyarrow.parquet.read_table(part).to_pylist()]


@pytest.fixture(scope="module")
def classified(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("classified")
    classify_dataset.main(list(map(str, classify(data, output))))
    return rows_of(output)


def test_every_video_is_classified_once(data, classified):
    assert [row["index"] for row in classified] == list(range(16))
    assert [row["video"] for row in classified] == sorted(str(path) for path in (data / "videos").rglob("*.mp4"))
    for row in classified:
        if row["error"] is not None:
            assert row["video"].endswith("up_left/001.mp4") and row["labels"] is None
            continue
        assert sorted(row["labels"]) == sorted(MOTIONS) and sum(row["scores"]) == pytest.approx(1, abs=1e-5)
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert sum(row["error"] is not None for row in classified) == 1


def test_killed_and_started_again_nothing_is_lost_or_done_twice(data, classified, tmp_path):
    command = [sys.executable, EXAMPLES / "classify_dataset.py", *classify(data, tmp_path, "--num_clips", 1)]
    start_and_kill(command, num_files=2)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*.parquet")}
    assert len(finished) == 2

    again = start(command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "16 videos in 6 parts, 2 of them finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    rows = rows_of(tmp_path)
    assert [(row["index"], row["video"], row["error"]) for row in rows] == [
        (row["index"], row["video"], row["error"]) for row in classified
    ]
    assert not list(tmp_path.glob(".*unfinished*")) or len(rows) == 16


def test_processes_share_the_parts(data, classified, tmp_path):
    process = start([*TORCHRUN, EXAMPLES / "classify_dataset.py", *classify(data, tmp_path)])
    assert process.returncode == 0, process.stderr[-3000:]
    rows = rows_of(tmp_path)
    assert [row["video"] for row in rows] == [row["video"] for row in classified]
    for row, expected in zip(rows, classified, strict=True):
        assert row["error"] == expected["error"]
        assert row["labels"] == expected["labels"]
        assert row["scores"] is None or row["scores"] == pytest.approx(expected["scores"], abs=1e-6)


def test_a_list_of_files_and_a_data_set(data, tmp_path):
    files = sorted((data / "videos" / "test").rglob("*.mp4"))
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, files)) + "\n\n")
    common = ["--model", data / "model", "--use_cpu", "--num_workers", 0, "--top_k", 2]
    classify_dataset.main(list(map(str, [*common, "--videos", listed, "--output_dir", tmp_path / "list"])))
    given = ["--dataset_name", data / "videos", "--split", "test", "--output_dir", tmp_path / "set"]
    classify_dataset.main(list(map(str, [*common, *given])))
    one, two = rows_of(tmp_path / "list"), rows_of(tmp_path / "set")
    assert [row["scores"] for row in one] == [row["scores"] for row in two] and len(one) == 4
    assert all(len(row["labels"]) == 2 for row in one)
    assert two[0]["video"] == f"{data / 'videos'}/test[0]"


def test_another_policy_for_short_videos_is_refused_by_its_name(data, tmp_path):
    shutil.copytree(data / "model", tmp_path / "model")
    (tmp_path / "list.txt").write_text(f"{sorted((data / 'videos').rglob('*.mp4'))[0]}\n")
    arguments = ["--model", str(tmp_path / "model"), "--videos", str(tmp_path / "list.txt"), "--use_cpu"]
    arguments += ["--num_workers", "0", "--output_dir", str(tmp_path / "out")]
    classify_dataset.main(arguments)
    ViViTVideoProcessor.from_pretrained(data / "model", short_video_policy="mask").save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="short_video_policy 'repeat_last' -> 'mask'"):
        classify_dataset.main(arguments)


def test_a_processor_that_does_not_fit_the_model_is_said(data, tmp_path):
    shutil.copytree(data / "model", tmp_path / "short")
    settings = {**ViViTVideoProcessor.from_pretrained(data / "model").to_dict(), "num_frames": 4}
    ViViTVideoProcessor.from_dict(settings).save_pretrained(tmp_path / "short")
    arguments = ["--model", tmp_path / "short", "--videos", data / "videos", "--output_dir", tmp_path / "labels"]
    with pytest.raises(SystemExit, match=r"classify-dataset: The model expects clips of \(8, 32, 32\)"):
        classify_dataset.main(list(map(str, [*arguments, "--use_cpu", "--num_workers", "0"])))
    assert not list((tmp_path / "labels").glob("*.parquet"))


def test_another_run_is_not_mixed_in(data, tmp_path):
    arguments = list(map(str, classify(data, tmp_path)))
    classify_dataset.main(arguments)
    for more in (["--num_clips", "2"], ["--videos", str(data / "videos" / "test")]):
        with pytest.raises(SystemExit, match=r"holds another run \((num_clips 1 -> 2|num_videos 16 -> 4)"):
            classify_dataset.main([*arguments, *more])
    for source in ("nowhere", "model"):
        with pytest.raises(SystemExit, match=r"there (is no such|are no videos)"):
            classify_dataset.main([*arguments, "--videos", str(data / source)])
