"""Push to the Hub and load from it with the real client over HTTP, with this package and without it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import TUNED
from hub_server import HubServer
from huggingface_hub import ModelCard
from paths import TESTS
from python_without import python_without
from tiny_models import make_model, tiny_config
from transformers import ViTConfig, ViTModel
from transformers.dynamic_module_utils import get_imports
from video_files import write_video

import vivit_hf
from vivit_hf.calibration_vivit import KNOWN_FEATURES


pytestmark = pytest.mark.slow


NAME = "tester/vivit-tiny"
SOURCE = Path(vivit_hf.__file__).parent
CODE = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py", "__main__.py"}


def weight_files(names):
    return sorted(name for name in names if ".safetensors" in name)


class Client:
    """Runs the steps of hub_client.py against a server, each in a process."""

    def __init__(self, hub, folder):
        self.hub, self.folder = hub, folder

    def run(self, step, command, **variables):
        environment = {**os.environ, **self.hub.environment(self.folder / f"home of {step}", "hf_writer"), **variables}
        process = subprocess.run(
            [*command, str(TESTS / "hub_client.py"), step, str(self.folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert process.returncode == 0, process.stderr[-5000:]
        return torch.load(self.folder / f"{step}.pt", weights_only=False)

    def run_with_package(self, step):
        source = str(Path(vivit_hf.__file__).parents[1])
        return self.run(step, [sys.executable], PYTHONPATH=os.pathsep.join([source, str(TESTS)]))

    def run_without(self, step, *missing):
        return self.run(step, python_without(self.folder / f"site of {step}", *missing))


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    frames = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    write_video(folder / "video.mp4", frames)
    return Client(hub, folder)


def damaged_repositories(folder):
    """Return the files of repositories with damaged weights, by repository name."""
    make_model(tiny_config("factorised_encoder")).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights, index = files.pop("model.safetensors"), b'{"metadata": {}, "weight_map": {"a": "../b.safetensors"}}'
    return {
        "tester/truncated": {**files, "model.safetensors": weights[: len(weights) // 2]},
        "tester/pickle": {**files, "pytorch_model.bin": b"hello" * 100},
        "tester/index": {**files, "model.safetensors.index.json": b"{"},
        "tester/outside": {**files, "model.safetensors.index.json": index},
    }


@pytest.fixture(scope="module")
def pushed(hub, client):
    for name, files in damaged_repositories(client.folder / "sound").items():
        hub.create_repository(name, files)
    hub.create_repository("tester/gated", {"config.json": b"{}"}).gated = True
    hub.create_repository("someone/private", {"config.json": b"{}"}).private = True
    return client.run_with_package("push")


@pytest.fixture(scope="module")
def card(hub, client, pushed):
    text = hub.repositories[NAME].files["README.md"].decode()
    (client.folder / "card.md").write_text(text, encoding="utf-8")
    return text


@pytest.fixture(scope="module")
def elsewhere(hub, client, card):
    weights = hub.repositories["tester/larger"].files["model.safetensors"]
    hub.cut_once.add(hub.digest(weights))
    return client.run_without("elsewhere", "vivit_hf", "_vivit_hf")


# What a push leaves


def test_a_push_leaves_weights_configuration_processor_code_and_card(hub, pushed):
    repository = hub.repositories[NAME]
    files = repository.files
    rest = {".gitattributes", "README.md", "config.json", "model.safetensors"}
    rest |= {"preprocessor_config.json", "video_preprocessor_config.json"}
    assert set(files) == rest | CODE
    assert all(files[name] == (SOURCE / name).read_bytes() for name in CODE)
    assert repository.private
    assert ("POST", "/api/repos/create", 409, None) in hub.requests, "the second push finds it there"
    assert pushed["repository"] == NAME and pushed["commit"].endswith(repository.branches["main"])
    assert hub.digest(files["model.safetensors"]) in repository.large, "weights go by LFS"


def test_a_saved_folder_holds_the_files_that_load_it_and_no_wing(model, tmp_path):
    """transformers copies the files that `from .name import x` reaches: the whole root and no wing."""
    model.save_pretrained(tmp_path / "model")
    vivit_hf.ViViTVideoProcessor().save_pretrained(tmp_path / "processor")
    model_code, processor_code = (
        {path.name for path in (tmp_path / name).glob("*.py")} for name in ("model", "processor")
    )
    assert model_code | processor_code == CODE
    assert "modeling_vivit.py" in model_code and not [name for name in model_code if name.startswith("video_")]
    assert "video_processing_vivit.py" in processor_code and "modeling_vivit.py" not in processor_code
    assert not [path for path in tmp_path.glob("*/*") if path.is_dir()]


def test_code_that_travels_does_not_require_the_package():
    for name in CODE:
        assert "vivit_hf" not in get_imports(SOURCE / name), name


def test_the_card_has_the_hubs_metadata_and_says_where_the_weights_come_from(card, pushed):
    read = ModelCard(card)
    assert read.data.to_dict() == {
        "base_model": "google/vit-base-patch16-224-in21k",
        "datasets": ["kinetics400"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "video-classification",
        "tags": ["vivit", "video-classification", "vision"],
    }
    assert "# vivit-tiny" in read.text and pushed["report"] in read.text
    assert "2 spatial and 2 temporal layers" in read.text and "8 frames of 24 x 40 pixels" in read.text
    assert "5: motion 0, motion 1" in read.text and "huggingface.co/google/vit-base-patch16-224-in21k" in read.text
    assert "| tuned | `merging-4` on a cpu: the answer of the plain model for 99.5% of 200 clips |" in read.text
    assert "automatically generated" not in read.text, "transformers' empty form is left"


def test_weights_above_the_limit_are_sharded_and_replace_the_single_file(hub, pushed):
    weights = weight_files(hub.repositories["tester/sharded"].files)
    count = len(weights) - 1
    assert count > 1
    expected = [f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]
    assert weights == [*expected, "model.safetensors.index.json"]
    assert torch.equal(pushed["sharded"], pushed["logits"])


def test_saving_with_push_to_hub_replaces_weights_in_another_layout(hub, pushed):
    assert weight_files(hub.repositories["tester/saved"].files) == ["model.safetensors"]
    for commit in pushed["saved"]:
        names = weight_files(hub.repositories["tester/saved"].commits[commit])
        assert ("model.safetensors" in names) == (len(names) == 1), names
    assert [len(weight_files(hub.repositories["tester/saved"].commits[commit])) > 1 for commit in pushed["saved"]] == [
        *(False, True, False)
    ]


def test_a_push_without_the_package_replaces_weights_in_another_layout(hub, elsewhere):
    assert weight_files(hub.repositories["tester/passed-on"].files) == ["model.safetensors"]


def test_a_whole_model_replaces_an_adapter(hub, pushed):
    files = hub.repositories["tester/adapted"].files
    assert "model.safetensors" in files and not [name for name in files if "adapter" in name]


# Back again


def test_with_the_package_it_loads_without_trusting_any_code(pushed):
    loaded = pushed["loaded"]
    assert all(module.startswith("vivit_hf.") for module in loaded["modules"])
    assert loaded["names"] == ["ViViTConfig", "ViViTForVideoClassification", "ViViTModel", "ViViTVideoProcessor"]
    assert torch.equal(loaded["logits"], pushed["logits"])
    assert sum(pushed["scores"].values()) == pytest.approx(1)


def test_without_the_package_it_loads_and_computes_the_same_to_the_bit(pushed, elsewhere):
    assert elsewhere["package"] is None
    ours, theirs = pushed["loaded"], elsewhere["loaded"]
    assert all(module.startswith("transformers_modules.tester") for module in theirs["modules"])
    assert theirs["names"] == ours["names"] and theirs["labels"] == ours["labels"]
    for name in ("logits", "pooled", "pixel_values"):
        assert torch.equal(theirs[name], ours[name]), name


def test_the_setting_of_tune_travels_with_the_model(pushed, elsewhere):
    assert pushed["loaded"]["optimization"] == elsewhere["loaded"]["optimization"] == TUNED


def test_known_features_travel_with_the_model(hub, client, pushed, elsewhere):
    """Through a push, a push of what was downloaded, and code from the Hub that saves it."""
    known = pushed["known"]
    assert torch.equal(known["knowing"], known["given"]) and torch.equal(known["knowing-too"], known["given"])
    expected = hub.repositories["tester/knowing"].files[KNOWN_FEATURES]
    assert (client.folder / "knowing elsewhere" / KNOWN_FEATURES).read_bytes() == expected


def test_the_pipeline_samples_the_same_frames_with_and_without_the_package(pushed, elsewhere):
    assert elsewhere["scores"] == pushed["scores"]


def test_without_the_package_code_runs_only_when_trusted(elsewhere):
    name, message = elsewhere["untrusted"]
    assert name == "ValueError" and "trust_remote_code=True" in message


def test_what_is_saved_and_pushed_elsewhere_loads_anywhere(hub, client, pushed, elsewhere):
    """Also where PyAV is missing: only reading video files needs it."""
    passed_on, original = hub.repositories["tester/passed-on"].files, hub.repositories[NAME].files
    assert {name: passed_on[name] for name in CODE} == {name: original[name] for name in CODE}
    assert "automatically generated" in passed_on["README.md"].decode(), "without the package, transformers' own card"
    bare = client.run_without("bare", "vivit_hf", "_vivit_hf", "av")
    assert bare["found"] == {"vivit_hf": None, "av": None}
    assert len(bare["loaded"]) == 3
    for loaded in bare["loaded"]:
        assert torch.equal(loaded["logits"], pushed["logits"])
        assert torch.equal(loaded["pixel_values"], pushed["loaded"]["pixel_values"])
    again = vivit_hf.ViViTForVideoClassification.from_pretrained(client.folder / "saved elsewhere").eval()
    clips = torch.randn(2, 8, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # as the client runs it
        assert torch.equal(again(clips).logits, pushed["logits"])


def test_a_download_that_breaks_off_is_resumed_where_it_stopped(hub, pushed, elsewhere):
    weights = hub.repositories["tester/larger"].files["model.safetensors"]
    path = f"/storage/{hub.digest(weights)}"
    ranges = [(status, asked) for method, where, status, asked in hub.requests if (method, where) == ("GET", path)]
    assert len(ranges) == 2 and ranges[0] == (200, None)
    status, asked = ranges[1]
    start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
    assert status == 206 and 0 < start <= len(weights) // 2
    assert torch.equal(elsewhere["larger"], pushed["larger"])


def test_the_snippets_of_the_card_run(pushed, elsewhere):
    assert "motion" in pushed["snippet"] and "score" in pushed["snippet"]
    assert len(re.findall(r"^motion \d -?\d+\.\d+$", elsewhere["snippet"], re.MULTILINE)) == 5


# Pushing over what is there


def test_a_card_that_somebody_wrote_in_is_not_overwritten(hub, pushed):
    read = ModelCard(hub.repositories["tester/edited"].files["README.md"].decode())
    assert "# My model\n\nIt knows five motions.\n" in read.text and read.text.endswith("\nThanks to all.\n")
    assert "changed by hand" not in read.text and pushed["report"] in read.text
    assert read.data.license == "mit" and read.data.metrics == ["accuracy"] and read.data.datasets == ["kinetics400"]


def test_a_model_pushed_elsewhere_names_the_one_it_was_loaded_from(hub, pushed):
    repository = hub.repositories["tester/fine-tuned"]
    assert set(repository.files) == {".gitattributes"}, "it went to the branch"
    read = ModelCard(repository.commits[repository.branches["trial"]]["README.md"].decode())
    assert read.data.base_model == NAME and read.data.license == "cc-by-nc-4.0"


# What is refused

ERRORS = {
    "refused token": ("HfHubHTTPError", ["401", "'vivit-tiny'", "hf auth login", "token="]),
    "no token": ("HfHubHTTPError", ["401", "'vivit-tiny'", "hf auth login", "token="]),
    "token for reading": ("HfHubHTTPError", ["403", "'reader/new'", "write permission"]),
    "another's namespace": ("HfHubHTTPError", ["403", "'google/vivit-tiny'", "namespace of your own"]),
    "name for the client": ("HFValidationError", ["'my model'", "alphanumeric"]),
    "name for the Hub": ("BadRequestError", ["'models' is reserved", "letters, digits"]),
    "public, not private": ("ValueError", ["tester/sharded", "exists and is public"]),
    "missing": ("OSError", ["tester/nothing", "not a valid model identifier"]),
    "someone's private": ("OSError", ["someone/private", "private repository"]),
    "gated": ("OSError", ["tester/gated", "gated repo"]),
    "truncated": ("ValueError", ["model.safetensors is damaged", "force_download=True"]),
    "pickle": ("ValueError", ["pytorch_model.bin is damaged", "safetensors"]),
    "index": ("ValueError", ["model.safetensors.index.json", "cannot be read"]),
    "outside": ("ValueError", ["model.safetensors.index.json", "'../b.safetensors'", "same folder"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_refused_is_an_error_that_says_why(pushed, case):
    expected, parts = ERRORS[case]
    name, message = pushed["errors"][case]
    assert name == expected, message
    assert all(part in message for part in parts), message


def test_nothing_is_left_of_refused_pushes(hub, pushed):
    assert not {name for name in hub.repositories if name.partition("/")[0] in ("reader", "google")}
    assert not {"tester/models", "tester/my model", "tester/nothing"} & set(hub.repositories)


def test_a_conversion_pushes_what_it_wrote(hub, tmp_path):
    """`--push-to-hub` as a user types it, through the real client."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes)).save_pretrained(tmp_path / "vit")
    script = TESTS.parent / "conversion" / "convert_vit_checkpoint.py"
    command = [sys.executable, script, "--source", tmp_path / "vit", "--output", tmp_path / "out", "--num-labels", 3]
    command += ["--attention-type", "factorised_encoder", "--num-frames", 4, "--image-size", 32]
    process = subprocess.run(
        [*map(str, command), "--push-to-hub", "tester/converted", "--private"],
        env={
            **os.environ,
            **hub.environment(tmp_path / "home", "hf_writer"),
            "PYTHONPATH": str(Path(vivit_hf.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    repository = hub.repositories["tester/converted"]
    assert repository.private
    files = repository.files
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", *CODE} <= set(files)
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "newly initialised" in card and "pipeline_tag: video-classification" in card
