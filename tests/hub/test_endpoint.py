"""The handler of Inference Endpoints: loaded as an endpoint does, with the answers of `vivit-hf classify`."""

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from command_line import SAMPLES, invoke, rows
from paths import ROOT
from python_without import python_without
from tiny_models import make_model, tiny_config
from video_files import http_server, write_video

from vivit_hf import ViViTModel, ViViTVideoProcessor
from vivit_hf.hub.endpoint import write_endpoint
from vivit_hf.hub.push import push_to_hub
from vivit_hf.video_sources import VideoDecodingError


VIEWS = {"num_clips": 4, "num_crops": 3, "num_files": 9, "num_units": 9}
LABELS = {
    "one group": {"id2label": dict(enumerate("abcde"))},
    "groups": {"id2label": dict(enumerate("abcde")), "label_groups": {"noun": 2, "verb": 3}},
    "named groups": {
        "id2label": {0: "noun: a", 1: "noun: b", 2: "verb: c", 3: "verb: d", 4: "verb: e"},
        "label_groups": {"noun": 2, "verb": 3},
    },
    "several": {"problem_type": "multi_label_classification"},
    "values": {"problem_type": "regression"},
    "one value": {"num_labels": 1},
    "calibrated": {"calibration": {"temperatures": [1.7], **VIEWS, "averaging": "probabilities"}},
    "calibrated groups": {
        "id2label": dict(enumerate("abcde")),
        "label_groups": {"noun": 2, "verb": 3},
        "calibration": {"temperatures": [0.5, 2.0], **VIEWS, "averaging": "logits"},
    },
    "thresholds": {
        "problem_type": "multi_label_classification",
        "calibration": {"temperatures": [0.1], "thresholds": [0.5] * 5, **VIEWS, "averaging": "probabilities"},
    },
}


def handler_of(folder, monkeypatch):
    """Load handler.py as the toolkit of the endpoints does."""
    write_endpoint(folder)
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "handler", module)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def save(folder, attention_type="factorised_encoder", policy="repeat_last", **fields):
    make_model(tiny_config(attention_type, **fields)).save_pretrained(folder)
    sizes = {"num_frames": 8, "frame_stride": 1, "size": 30, "crop_size": (24, 40)}
    ViViTVideoProcessor(**sizes, short_video_policy=policy).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("endpoint") / "video.mp4", num_frames=40)


def classified(folder, video, *options):
    (row,) = rows(invoke("classify", video, "--model", folder, "--json", *options).stdout)
    return row["predictions"]


def encoded(path):
    return base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("kind", LABELS)
def test_answers_are_those_of_classify(kind, video, tmp_path, monkeypatch):
    handler = handler_of(save(tmp_path, **LABELS[kind]), monkeypatch)
    expected = classified(tmp_path, video)
    found = handler({"inputs": {"video": encoded(video)}})
    assert [{**one, "score": 0} for one in found] == [{**one, "score": 0} for one in expected]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=2e-4)


def test_every_variant_answers_as_classify(variant, video, tmp_path, monkeypatch):
    handler = handler_of(save(tmp_path, variant), monkeypatch)
    found = handler({"inputs": encoded(video), "parameters": {"num_clips": 2, "num_crops": 1, "top_k": 2}})
    expected = classified(tmp_path, video, "--num-clips", 2, "--num-crops", 1, "--top-k", 2)
    assert [one["label"] for one in found] == [one["label"] for one in expected] and len(found) == 2
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=2e-4)


def test_the_ends_of_short_videos_are_masked_as_by_classify(variant, tmp_path, monkeypatch):
    short = write_video(tmp_path / "short.mp4", num_frames=3)
    handler = handler_of(save(tmp_path, variant, "mask"), monkeypatch)
    found = handler({"inputs": encoded(short)})
    assert [one["score"] for one in found] == pytest.approx(
        [one["score"] for one in classified(tmp_path, short)], abs=2e-4
    )
    repeating = handler_of(save(tmp_path, variant), monkeypatch)
    assert [one["score"] for one in repeating({"inputs": encoded(short)})] != pytest.approx(
        [one["score"] for one in found], abs=1e-3
    )


@pytest.fixture
def handler(tmp_path, monkeypatch):
    return handler_of(save(tmp_path), monkeypatch)


def test_bytes_and_data_addresses_are_videos(handler, video):
    expected = handler({"inputs": {"video": encoded(video)}})
    assert handler({"inputs": video.read_bytes()}) == expected
    assert handler({"inputs": {"video": f"data:video/mp4;base64,{encoded(video)}"}}) == expected


def test_no_file_or_private_address_of_the_endpoint_is_read(handler, video):
    for name in (str(video), f"file://{video}", "/etc/passwd", "concat:/etc/passwd"):
        with pytest.raises((ValueError, VideoDecodingError)) as caught:
            handler({"inputs": {"video": name}})
        assert "Expected" in str(caught.value) or "bytes of video data" in str(caught.value)
    with http_server(video.parent) as address, pytest.raises(RuntimeError, match=r"127\.0\.0\.1 is not a public"):
        handler({"inputs": {"video": f"{address}/video.mp4"}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "There is no video in the request. Expected"),
        ({"inputs": {"url": "http://x"}}, "There is no video in the request. Expected"),
        ({"inputs": {"video": 1}}, "There is no video"),
        ({"inputs": "no base64!"}, "neither base64 nor an http"),
        ({"inputs": "AAAA", "parameters": {"top": 1}}, "must be of top_k, num_clips, num_crops"),
        ({"inputs": "AAAA", "parameters": {"top_k": 0}}, "`top_k=0` must be a whole number from 1 to 1000"),
        ({"inputs": "AAAA", "parameters": {"num_clips": 10**9}}, "num_clips"),
    ],
)
def test_wrong_requests_are_errors_with_what_is_expected(handler, data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        handler(data)


def test_a_broken_video_is_an_error(handler):
    with pytest.raises(RuntimeError, match="Cannot read <8 bytes of video data>"):
        handler({"inputs": base64.b64encode(b"no video").decode()})


def test_requirements_are_those_of_the_package(tmp_path):
    write_endpoint(tmp_path)
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    floors = dict(re.fullmatch(r"([\w-]+).*?>=([\d.]+).*", line).groups() for line in lines)
    names = {name.replace("-", "_"): floor for name, floor in floors.items()}
    assert set(names) == {"transformers", "huggingface_hub", "av", "numpy", "pillow"}
    assert all(f'"{name}>={floor}' in declared for name, floor in names.items())


@pytest.mark.parametrize("policy", ["repeat_last", "mask"])
def test_it_answers_where_the_package_is_not_installed(policy, tmp_path):
    video = write_video(tmp_path / "short.mp4", num_frames=5)
    folder = save(tmp_path / "model", policy=policy)
    write_endpoint(folder)
    program = tmp_path / "program.py"
    program.write_text(
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('handler', sys.argv[1] + '/handler.py')\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "found = module.EndpointHandler(sys.argv[1])({'inputs': open(sys.argv[2], 'rb').read()})\n"
        "print(json.dumps([found, 'vivit_hf' in sys.modules]))\n"
    )
    command = [*python_without(tmp_path / "site", "vivit_hf", "_vivit_hf"), program, folder, video]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    found, has_package = json.loads(process.stdout.splitlines()[-1])
    expected = classified(folder, video)
    assert not has_package and [one["label"] for one in found] == [one["label"] for one in expected]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=2e-4)


def test_a_model_without_classifier_has_no_endpoint():
    with pytest.raises(ValueError, match="`endpoint=True` needs a model with a classifier, got a ViViTModel"):
        push_to_hub(ViViTModel(tiny_config("factorised_encoder")), "tester/x", endpoint=True)


def test_the_samples_have_their_labels(tmp_path, monkeypatch):
    model = SAMPLES.parent
    for path in model.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    handler = handler_of(tmp_path, monkeypatch)
    assert handler({"inputs": {"video": encoded(SAMPLES / "up_left.mp4")}})[0]["label"] == "up_left"
