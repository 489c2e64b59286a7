"""
Steps of a user of the Hub. Each runs in its own process, because huggingface_hub reads HF_ENDPOINT on import.

    python tests/hub_client.py STEP FOLDER

A step writes FOLDER/STEP.pt for test_hub_roundtrip.py. The steps `elsewhere` and `bare` run without `vivit_hf`.
"""

import contextlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, upload_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForVideoClassification,
    ViTConfig,
    ViTModel,
    pipeline,
)


torch.set_num_threads(1)

REPOSITORY, LARGER, SHARDED = "tester/vivit-tiny", "tester/larger", "tester/sharded"
LABELS = {index: f"motion {index}" for index in range(5)}
TUNED = {
    "name": "merging-4",
    "weights": "0" * 64,
    "device": "cpu",
    "dtype": "float32",
    "merge_tokens": 4,
    "int8_inputs": {"vivit.encoder.layer.0.mlp.fc1": [0.0123456789012345, 118], "vivit.encoder.layer.0.mlp.fc2": None},
    "measured": {"agreement": 0.995, "clips": 200, "speed": 2.5},
}


def clips() -> torch.Tensor:
    return torch.randn(2, 8, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def error_of(action: Callable[[], Any]) -> tuple[str, str]:
    """Return the class name and the message of the error that an action raises."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "no error", ""


@torch.no_grad()
def loaded(source: str, **arguments: Any) -> dict[str, Any]:
    """Load a source with each Auto class, and return classes and outputs."""
    config = AutoConfig.from_pretrained(source, **arguments)
    classifier = AutoModelForVideoClassification.from_pretrained(source, **arguments)
    model = AutoModel.from_pretrained(source, **arguments)
    processor = AutoImageProcessor.from_pretrained(source, **arguments)
    assert not classifier.training
    return {
        "modules": {type(thing).__module__ for thing in (config, classifier, model, processor)},
        "names": [type(thing).__name__ for thing in (config, classifier, model, processor)],
        "labels": config.id2label,
        "optimization": config.optimization,
        "logits": classifier(clips()).logits,
        "pooled": model(clips()).pooler_output,
        "pixel_values": processor(clips()[0].mul(20).add(128).clamp(0, 255).byte())["pixel_values"],
    }


def run_snippet(card: str, number: int) -> str:
    """Run a code block of the card, and return its output."""
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[number]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, {})
    return output.getvalue()


def scores(repository: str, **arguments: Any) -> dict[str, float]:
    classify = pipeline("video-classification", model=repository, **arguments)
    return {entry["label"]: entry["score"] for entry in classify("video.mp4", top_k=5)}


def push(folder: Path) -> dict[str, Any]:
    from tiny_models import make_model, tiny_config

    from vivit_hf import ViViTVideoProcessor
    from vivit_hf.initialisation.from_image import initialise_from_vit

    model = make_model(tiny_config("factorised_encoder", id2label=LABELS))
    vit = ViTModel(
        ViTConfig(
            image_size=(24, 40),
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
        )
    )
    report = initialise_from_vit(model, vit)
    model.config.optimization = TUNED
    processor = ViViTVideoProcessor(num_frames=8, frame_stride=2, size=48, crop_size=(24, 40))
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")

    about: dict[str, Any] = {
        "base_model": "google/vit-base-patch16-224-in21k",
        "datasets": "kinetics400",
        "report": report,
    }
    processor.push_to_hub("vivit-tiny", private=True)
    commit = model.push_to_hub("vivit-tiny", private=True, **about)
    card = Path(hf_hub_download(REPOSITORY, "README.md")).read_text(encoding="utf-8")

    model.push_to_hub("edited", **about)
    text = card.replace("# vivit-tiny\n", "# My model\n\nIt knows five motions.\n") + "\nThanks to all.\n"
    text = text.replace("license: apache-2.0", "license: mit").replace("width 32", "width changed by hand")
    upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="tester/edited")
    model.push_to_hub("edited", metrics=["accuracy"])
    loaded_model = AutoModelForVideoClassification.from_pretrained(REPOSITORY)
    loaded_model.push_to_hub("fine-tuned", revision="trial", license="cc-by-nc-4.0")

    model.push_to_hub("sharded")
    model.push_to_hub("sharded", max_shard_size="60KB")
    sharded = AutoModelForVideoClassification.from_pretrained(SHARDED)

    saved = []
    for number, limit in enumerate(("5GB", "60KB", "5GB")):
        model.save_pretrained(folder / f"saved {number}", push_to_hub=True, repo_id="saved", max_shard_size=limit)
        saved.append(HfApi().model_info("tester/saved").sha)
    model.push_to_hub("adapted")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="tester/adapted")
    model.push_to_hub("adapted")

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_temporal_layers": 4}
    as_in_image_models = {"num_register_tokens": 2, "pre_layernorm": True, "patch_bias": False}
    larger = make_model(tiny_config("factorised_encoder", **sizes, **as_in_image_models))
    larger.push_to_hub("larger")
    with torch.no_grad():
        return {
            "commit": str(commit),
            "repository": commit.repo_url.repo_id,
            "logits": model(clips()).logits,
            "larger": larger(clips()).logits,
            "sharded": sharded(clips()).logits,
            "report": report.to_markdown(),
            "saved": saved,
            "loaded": loaded(REPOSITORY),
            "scores": scores(REPOSITORY),
            "snippet": run_snippet(card, 0),
            "known": push_known_features(folder),
            "errors": push_errors(model),
        }


def push_known_features(folder: Path) -> dict[str, torch.Tensor]:
    """Push a model that knows its training videos, once as it is saved and once as it was downloaded."""
    from tiny_models import make_model, tiny_config

    from vivit_hf.calibration_vivit import Calibration, answer_fingerprint
    from vivit_hf.inference.calibration_files import store_calibration
    from vivit_hf.inference.unknown import UnknownRule

    load = AutoModelForVideoClassification.from_pretrained
    model = make_model(tiny_config("spatio_temporal"))
    model.save_pretrained(folder / "knowing")
    calibration = Calibration(
        temperatures=(1.5,),
        num_files=20,
        num_units=20,
        num_clips=1,
        num_crops=1,
        averaging="probabilities",
        weights=answer_fingerprint(model),
        unknown={"score": "neighbours", "false_alarms": 0.05, "threshold": 0.5, "window_threshold": 0.6},
    )
    known = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)).half()
    store_calibration(folder / "knowing", calibration, known)
    load(folder / "knowing").push_to_hub("knowing")
    load("tester/knowing").push_to_hub("knowing-too")
    rules = {name: UnknownRule.of(load(f"tester/{name}")) for name in ("knowing", "knowing-too")}
    return {"given": known.float(), **{name: rule.known for name, rule in rules.items() if rule is not None}}


def push_errors(model: Any) -> dict[str, tuple[str, str]]:
    load = AutoModelForVideoClassification.from_pretrained
    return {
        "refused token": error_of(lambda: model.push_to_hub("vivit-tiny", token="hf_wrong")),
        "no token": error_of(lambda: model.push_to_hub("vivit-tiny", token=False)),
        "token for reading": error_of(lambda: model.push_to_hub("reader/new", token="hf_reader")),
        "another's namespace": error_of(lambda: model.push_to_hub("google/vivit-tiny")),
        "name for the client": error_of(lambda: model.push_to_hub("my model")),
        "name for the Hub": error_of(lambda: model.push_to_hub("models")),
        "public, not private": error_of(lambda: model.push_to_hub("sharded", private=True)),
        "missing": error_of(lambda: load("tester/nothing")),
        "someone's private": error_of(lambda: load("someone/private")),
        "gated": error_of(lambda: load("tester/gated", token="hf_reader")),
        "truncated": error_of(lambda: load("tester/truncated")),
        "pickle": error_of(lambda: load("tester/pickle")),
        "index": error_of(lambda: load("tester/index")),
        "outside": error_of(lambda: load("tester/outside")),
    }


def elsewhere(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"package": importlib.util.find_spec("vivit_hf")}
    result["untrusted"] = error_of(lambda: AutoModelForVideoClassification.from_pretrained(REPOSITORY))
    result["loaded"] = loaded(REPOSITORY, trust_remote_code=True)
    result["scores"] = scores(REPOSITORY, trust_remote_code=True)
    with torch.no_grad():
        larger = AutoModelForVideoClassification.from_pretrained(LARGER, trust_remote_code=True)
        result["larger"] = larger(clips()).logits
    result["snippet"] = run_snippet((folder / "card.md").read_text(encoding="utf-8"), 1)
    model = AutoModelForVideoClassification.from_pretrained(REPOSITORY, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(REPOSITORY, trust_remote_code=True)
    model.save_pretrained(folder / "saved elsewhere")
    processor.save_pretrained(folder / "saved elsewhere")
    model.push_to_hub("passed-on", max_shard_size="60KB")
    model.push_to_hub("passed-on")
    processor.push_to_hub("passed-on")
    knowing = AutoModelForVideoClassification.from_pretrained("tester/knowing", trust_remote_code=True)
    knowing.save_pretrained(folder / "knowing elsewhere")
    return result


def bare(folder: Path) -> dict[str, Any]:
    """Load folders and repositories from either side without the package and without PyAV."""
    sources = [str(folder / "saved"), str(folder / "saved elsewhere"), "tester/passed-on"]
    found = {name: importlib.util.find_spec(name) for name in ("vivit_hf", "av")}
    return {"found": found, "loaded": [loaded(source, trust_remote_code=True) for source in sources]}


if __name__ == "__main__":
    step, destination = sys.argv[1], Path(sys.argv[2])
    os.chdir(destination)
    torch.save({"push": push, "elsewhere": elsewhere, "bare": bare}[step](destination), f"{step}.pt")
