"""classify_dataset.py never mixes the answers of two models: weights and settings tell them apart, not a name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import classify_dataset
import pyarrow.parquet
import pytest
import torch
from hub_server import HubServer
from tuned_models import tune_folder

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.inference import BatchPredictor, fingerprints
from vivit_hf.inference.fingerprints import hub_commit, model_fingerprint


pytestmark = pytest.mark.slow
# The calibration of the old weights goes with them.
CHANGED = r"holds another run \(calibration \w{12}\.\.\. -> None, weights \w{12}\.\.\. -> \w{12}\.\.\.\):"


@pytest.fixture
def model(tmp_path):
    """A folder with the demo model, as it is saved."""
    ViViTForVideoClassification.from_pretrained(demo_model_path()).save_pretrained(tmp_path / "model")
    ViViTVideoProcessor.from_pretrained(demo_model_path()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def retrain(folder):
    """Other weights in the same place."""
    model = ViViTForVideoClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight.neg_()
    model.save_pretrained(folder)


def options(model, output, *more):
    given = ["--model", model, "--videos", demo_model_path() / "samples", "--output_dir", output, "--shard_size", 2]
    return list(map(str, [*given, "--use_cpu", "--num_workers", 0, *more]))


def parts(folder):
    return {path.name: pyarrow.parquet.read_table(path).to_pylist() for path in sorted(folder.glob("part-*.parquet"))}


def fingerprint(folder):
    config = ViViTForVideoClassification.config_class.from_pretrained(folder)
    return model_fingerprint(folder, config, ViViTVideoProcessor.from_pretrained(folder))


def test_weights_and_settings_each_change_their_part_of_a_fingerprint(model, tmp_path):
    before = fingerprint(model)
    shutil.copytree(model, tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == before
    retrain(model)
    assert {name for name, value in fingerprint(model).items() if value != before[name]} == {"weights"}
    for file, name, change in (
        ("config.json", "config", {"id2label": {"0": "b", "1": "a", "2": "c", "3": "d"}}),
        ("preprocessor_config.json", "processor", {"frame_stride": 3}),
    ):
        path = tmp_path / "moved" / file
        text = path.read_text()
        path.write_text(json.dumps({**json.loads(text), **change}))
        assert {part for part, value in fingerprint(tmp_path / "moved").items() if value != before[part]} == {name}
        path.write_text(text)
    sharded = tmp_path / "sharded"
    ViViTForVideoClassification.from_pretrained(tmp_path / "moved").save_pretrained(sharded, max_shard_size="100KB")
    shutil.copy(tmp_path / "moved" / "preprocessor_config.json", sharded)
    first = fingerprint(sharded)
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert fingerprint(sharded)["weights"] != first["weights"]


def test_a_setting_that_a_later_version_adds_changes_no_fingerprint_until_it_is_used(model):
    class Later(ViViTConfig):
        new_option: int = 0

    stored = ViViTConfig.from_pretrained(model)
    processor = ViViTVideoProcessor.from_pretrained(model)
    before = model_fingerprint(model, stored, processor)
    assert model_fingerprint(model, Later.from_dict(stored.to_dict()), processor) == before
    used = Later.from_dict(stored.to_dict(), new_option=1)
    assert model_fingerprint(model, used, processor)["config"] != before["config"]


def test_a_model_that_was_trained_on_in_place_is_another_run(model, tmp_path):
    output = tmp_path / "labels"
    classify_dataset.main(options(model, output))
    old = parts(output)
    assert len(old) == 3
    (output / "part-00001.parquet").unlink()  # as if the run had been killed
    retrain(model)
    with pytest.raises(SystemExit, match=CHANGED + ".* --overwrite"):
        classify_dataset.main(options(model, output))
    assert sorted(parts(output)) == ["part-00000.parquet", "part-00002.parquet"], (
        "the refusal left everything as it was"
    )

    classify_dataset.main(options(model, output, "--overwrite"))
    new = parts(output)
    assert sorted(new) == sorted(old)
    assert all(new[name][0]["labels"] != old[name][0]["labels"] for name in old), "no answer of the old model is left"


def test_overwriting_goes_on_with_the_same_run(model, tmp_path):
    output = tmp_path / "labels"
    classify_dataset.main(options(model, output))
    (output / "part-00001.parquet").unlink()
    kept = (output / "part-00000.parquet").stat().st_mtime_ns
    shutil.copytree(model, tmp_path / "moved")  # the same model by another name
    classify_dataset.main(options(tmp_path / "moved", output, "--overwrite"))
    assert len(parts(output)) == 3 and (output / "part-00000.parquet").stat().st_mtime_ns == kept


def test_answers_of_unknown_origin_are_refused(model, tmp_path):
    output = tmp_path / "labels"
    classify_dataset.main(options(model, output))
    (output / "_run.json").unlink()
    with pytest.raises(SystemExit, match=r"holds another run \(_run\.json is missing\)"):
        classify_dataset.main(options(model, output))
    classify_dataset.main(options(model, output, "--overwrite", "--shard_size", "5"))
    assert list(parts(output)) == ["part-00000.parquet"]
    with pytest.raises(SystemExit, match=r"classify-dataset: .*nowhere"):
        classify_dataset.main(options(tmp_path / "nowhere", output))


def test_a_model_of_the_hub_is_known_by_its_commit(model, tmp_path):
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    script = Path(classify_dataset.__file__)
    with HubServer() as hub:
        repository = hub.create_repository("tester/moves", files)

        def run(*more):
            command = [sys.executable, script, *options("tester/moves", tmp_path / "labels", *more)]
            environment = {**hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PATH": ""}
            return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)

        first = run()
        assert first.returncode == 0, first.stderr[-2000:]
        stored = json.loads((tmp_path / "labels" / "_run.json").read_text())
        assert stored["weights"] == repository.branches["main"] and stored["model"] == "tester/moves"
        retrain(model)
        repository.commit("main", {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()})
        second = run()
        assert second.returncode == 1 and re.search(CHANGED, second.stderr), second.stderr[-2000:]
        assert run("--overwrite").returncode == 0


def test_answers_with_and_without_a_setting_of_tune_do_not_mix(model, tmp_path, capsys):
    before = fingerprint(model)
    tune_folder(model, "merging-1", merge_tokens=1)
    assert fingerprint(model) == before, "features are those of the exact model, so they are still its own"
    output = tmp_path / "labels"
    classify_dataset.main(options(model, output))
    assert "the setting 'merging-1' that `vivit-hf tune` stored" in capsys.readouterr().out
    tuned = parts(output)
    with pytest.raises(SystemExit, match=r"optimization merging-1 \w{12}\.\.\. -> None"):
        classify_dataset.main(options(model, output, "--dtype", "float32"))
    classify_dataset.main(options(model, output, "--dtype", "float32", "--overwrite"))
    exact = parts(output)
    assert exact.keys() == tuned.keys() and exact != tuned
    retrain(model)
    with pytest.raises(SystemExit, match=r"have changed since.*Or give --dtype float32"):
        classify_dataset.main(options(model, tmp_path / "others"))


@pytest.mark.parametrize("model", ["my_vivit", "nowhere/at-all"])
def test_a_model_that_is_nowhere_is_named_at_once(model, tmp_path, monkeypatch):
    """Without this, transformers asks an unreachable Hub again and again, for half a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fingerprints, "cached_file", lambda *_: pytest.fail("asks the Hub"), raising=False)
    for use in (hub_commit, BatchPredictor):
        with pytest.raises(OSError, match=f"there is no folder '{model}', and"):
            use(model)
    with pytest.raises(SystemExit, match=f"^classify-dataset: there is no folder '{model}', and"):
        classify_dataset.main(options(model, tmp_path / "labels"))
