"""Videos that are given by address: fine-tuning, evaluation and labelling read them, and write no secret down."""

import json

import classify_dataset
import finetune
import pyarrow.parquet
import pytest
from command_line import invoke
from finetune_runs import settings_for, to_argv, write_data
from video_files import http_server


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def everything_written(*folders):
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return b"".join(path.read_bytes() for path in files if path.suffix != ".safetensors")


def test_addresses_from_training_to_labels(data, tmp_path, capsys):
    videos = sorted((data / "videos").rglob("*.mp4"))
    with http_server(data / "videos") as server:
        rows = [(f"{server}/{path.relative_to(data / 'videos')}?key=hunter2", path.parent.name) for path in videos]
        rows += [(f"{server}/gone.mp4?key=hunter2", "up_left"), ("http://u:hunter2@[::1/x.mp4", "up_left")]
        listed = tmp_path / "videos.csv"
        listed.write_text("\n".join(["path,label", *(",".join(row) for row in rows)]) + "\n")
        model, scores, labels = (tmp_path / name for name in ("model", "scores", "labels"))
        changes = {"train_dir": None, "validation_dir": None, "train_file": listed, "validation_file": listed}
        argv = to_argv(settings_for(data, model, **changes, save_total_limit=1, max_steps=8))
        finetune.main([*argv, "--allow_private_addresses"])

        stored = json.loads((model / "preprocessor_config.json").read_text())
        assert not stored["video_limits"]
        damaged = json.loads((model / "damaged_files.json").read_text())["eval"]
        lines = len(videos) + 2, len(videos) + 3
        names = {f"{listed}:{lines[0]}: {server}/gone.mp4?***", f"{listed}:{lines[1]}: http://***@[::1/x.mp4"}
        assert set(damaged) == names
        common = ["--model", str(model), "--num_clips", "1", "--num_crops", "1", "--use_cpu", "--num_workers", "0"]
        evaluated = invoke("evaluate", *common, "--data", listed, "--output_dir", scores, "--allow_private_addresses")
        assert evaluated.exit_code == 0 and "hunter2" not in evaluated.output
        rows_of_scores = pyarrow.parquet.read_table(scores / "predictions.parquet").to_pylist()
        assert [row["error"] is None for row in rows_of_scores] == [True] * len(videos) + [False, False]

        addresses = tmp_path / "list.txt"
        addresses.write_text("\n".join(address for address, _ in rows))
        common += ["--videos", str(addresses)]
        classify_dataset.main([*common, "--output_dir", str(labels), "--allow_private_addresses"])
        found = pyarrow.parquet.read_table(labels / "part-00000.parquet").to_pylist()
        assert [row["error"] is None for row in found] == [True] * len(videos) + [False, False]
        assert found[0]["video"].endswith(".mp4?***")
        sealed = tmp_path / "sealed"
        classify_dataset.main([*common, "--output_dir", str(sealed)])
        found = pyarrow.parquet.read_table(sealed / "part-00000.parquet").to_pylist()
        assert all("is not a public address" in row["error"] for row in found[:-1])
    assert b"hunter2" not in everything_written(model, scores, labels, sealed)
    printed = capsys.readouterr()
    assert "hunter2" not in printed.out + printed.err
