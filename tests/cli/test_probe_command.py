"""`vivit-hf probe`: from videos to a model in three commands, the table, and refusals."""

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import check_refusal, invoke, rows, said
from python_without import python_without
from tiny_models import make_model, tiny_config
from video_files import write_video
from vit_models import make_vit

import vivit_hf
from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.inference.feature_files import read_features


FEW = ("--folds", 3, "--repeats", 1)


def write_fading_videos(folder, count=12, num_frames=8):
    """Videos that fade in or out, four of every patient: only the order of the frames tells the class."""
    rng = np.random.default_rng(0)
    written = [("path", "label", "patient")]
    for number in range(count):
        noise = rng.integers(0, 40, size=(num_frames, 32, 48, 3))
        levels = rng.uniform(30, 90) + np.linspace(0, 100, num_frames)[:, None, None, None]
        for label, frames in (("fades in", levels + noise), ("wird dünkler", levels[::-1] + noise)):
            name = f"{number}_{label[:4]}.mp4"
            write_video(folder / name, frames.astype(np.uint8))
            written.append((name, label, f"P{number // 2}"))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(written)
    return folder


@pytest.fixture(scope="module")
def fading(tmp_path_factory):
    """The videos, a random Model 2 with a temporal encoder, and the features per step of that model."""
    folder = write_fading_videos(tmp_path_factory.mktemp("fading"))
    config = tiny_config("factorised_encoder", tubelet_size=(1, 8, 8))  # each step is a single frame
    make_model(config).save_pretrained(folder / "model")
    ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"shortest_edge": 30}, crop_size={"height": 24, "width": 40}
    ).save_pretrained(folder / "model")
    features = folder / "steps.parquet"
    views = ("--num-clips", 1, "--num-crops", 1, "--workers", 0)
    result = invoke("embed", folder, "--model", folder / "model", "--per-step", "--output", features, *views)
    assert result.exit_code == 0, result.stderr
    return folder


def options(folder, *more):
    return ("probe", "--features", folder / "steps.parquet", "--labels", folder / "labels.csv", *FEW, *more)


@pytest.fixture(scope="module")
def probed(fading, tmp_path_factory):
    output = tmp_path_factory.mktemp("probed") / "probe"
    result = invoke(*options(fading, "--groups", "patient", "--output", output))
    assert result.exit_code == 0, result.stderr
    return output, result.stdout


@pytest.mark.slow
def test_the_table_has_all_heads_beside_the_majority_class(probed):
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in probed[1].splitlines() if "│" in line}
    assert list(lines) == [
        *("linear, mean", "linear, ordered", "attentive", "neighbours, mean", "neighbours, ordered"),
        "majority class: fades in",
    ]
    assert [cell.strip() for cell in lines["majority class: fades in"]] == ["0.500", "0.500", ""]
    assert lines["linear, ordered"][0].strip() == "1.000 ± 0.000" and " ± " in lines["linear, mean"][0]
    assert "24 videos of 2 classes, 8 steps of 32 features each; 3 folds of 6 whole groups." in probed[1]


@pytest.mark.slow
def test_classify_gives_the_probabilities_of_the_probe(fading, probed):
    output, printed = probed
    assert f"vivit-hf classify VIDEO --model {output} --num-clips 1 --num-crops 1" in printed
    model = ViViTForVideoClassification.from_pretrained(output)
    assert model.config.temporal_pooling == "concatenate" and model.config.num_temporal_layers == 0
    features = read_features(fading / "steps.parquet")
    steps = features.vectors.reshape(len(features.files), -1)
    logits = steps @ model.classifier.weight.detach().numpy().T + model.classifier.bias.detach().numpy()
    expected = torch.from_numpy(logits).softmax(dim=1).numpy()
    views = ("--num-clips", 1, "--num-crops", 1, "--json")
    found = rows(invoke("classify", *features.files, "--model", output, *views).stdout)
    for row, file, probabilities in zip(found, features.files, expected, strict=True):
        scores = {one["label"]: one["score"] for one in row["predictions"]}
        assert row["file"] == file
        assert [scores["fades in"], scores["wird dünkler"]] == pytest.approx(probabilities.tolist(), abs=2e-4)
        assert max(scores, key=scores.get)[:4] in file


@pytest.mark.slow
def test_the_report_is_written_beside_the_model(probed):
    written = json.loads((probed[0] / "probe.json").read_text())
    assert written["written"] == "linear, ordered" and written["scores"]["linear, ordered"]["accuracy"] == 1
    assert written["majority_class_accuracy"] == 0.5 and written["features"]["kind"] == "step"
    assert len(written["scores"]["attentive"]["accuracies"]) == 3


@pytest.mark.slow
def test_one_vector_per_video_gives_the_whole_model_a_new_classifier(fading, tmp_path):
    features, output = tmp_path / "vectors.parquet", tmp_path / "probe"
    views = ("--num-clips", 1, "--num-crops", 1, "--workers", 0)
    assert not invoke("embed", fading, "--model", fading / "model", "--output", features, *views).exit_code
    result = invoke("probe", "-f", features, "-l", fading / "labels.csv", *FEW, "--output", output)
    assert result.exit_code == 0, result.stderr
    model = ViViTForVideoClassification.from_pretrained(output)
    assert model.config.num_temporal_layers == 2 and model.config.num_labels == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_image_model_alone_becomes_a_video_model(fading, tmp_path, dtype):
    """The features are in two files."""
    make_vit(image_size=32, num_channels=3).save_pretrained(tmp_path / "vit")
    views = ("--num-clips", 1, "--num-crops", 1, "--workers", 0, "--num-frames", 4, "--dtype", dtype)
    files = sorted(fading.glob("*.mp4"))
    for name, part in (("a", files[:10]), ("b", files[10:])):
        embedding = ("--model", tmp_path / "vit", "--per-step", "--output", tmp_path / f"{name}.parquet", *views)
        assert invoke("embed", *part, *embedding).exit_code == 0
    features = ("-f", tmp_path / "a.parquet", "-f", tmp_path / "b.parquet")
    output = tmp_path / "probe"
    result = invoke("probe", *features, "-l", fading / "labels.csv", *FEW, "--output", output)
    assert result.exit_code == 0, result.stderr
    model = ViViTForVideoClassification.from_pretrained(output)
    processor = ViViTVideoProcessor.from_pretrained(output)
    assert model.config.num_temporal_layers == 0 and processor.frame_sampling == "uniform"
    stored = read_features([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    with torch.no_grad():
        logits = model(**processor(stored.files[11])).logits
        expected = model.classify_steps(torch.from_numpy(stored.vectors[11:12]))
    torch.testing.assert_close(logits, expected, atol=1e-4 if dtype == "float32" else 0.3, rtol=1e-4)


@pytest.mark.slow
def test_another_model_than_that_of_the_features_is_refused(fading, tmp_path):
    make_model(tiny_config("factorised_encoder", tubelet_size=(1, 8, 8)), seed=1).save_pretrained(tmp_path / "model")
    ViViTVideoProcessor.from_pretrained(fading / "model").save_pretrained(tmp_path / "model")
    arguments = options(fading, "--model", tmp_path / "model", "--output", tmp_path / "out")
    check_refusal(arguments, 2, "is not the one that the features come from: its weights changed")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_an_output_no_model_is_needed(fading, tmp_path):
    labels = (fading / "labels.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "some.csv").write_text("\n".join([*labels[:-1], "lost.mp4,fades in,P9"]), encoding="utf-8")
    features = ("--features", fading / "steps.parquet", "--labels", tmp_path / "some.csv", "--video-root", fading)
    result = invoke("probe", *features, *FEW)
    assert result.exit_code == 0, result.stderr
    assert f"1 video left out, without features: {fading}/lost.mp4" in result.stdout
    assert f"1 video left out, without a label: {fading}/11_wird.mp4" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--groups", "tape"], "no column of groups named 'tape'"),
        (["--label-column-name", "verb"], "no column of labels named 'verb'"),
        (["--folds", "1"], "--folds"),
        (["--features", "none.parquet"], "none.parquet"),
    ],
)
def test_wrong_usage_is_refused(fading, more, message):
    check_refusal(options(fading, *more), 2, message)


def test_a_missing_scikit_learn_is_named_with_its_extra(tmp_path):
    source = Path(vivit_hf.__file__).parents[1]
    program = f"import sys\nsys.path.insert(0, {str(source)!r})\nfrom vivit_hf.cli.app import main\n"
    (tmp_path / "probe.py").write_text(f"{program}main(['probe', '-f', 'f', '-l', 'l'])\n")
    command = [*python_without(tmp_path / "site", "sklearn"), str(tmp_path / "probe.py")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert "sklearn is not installed; run `pip install 'vivit-hf[probe]'`" in said(found.stderr)
