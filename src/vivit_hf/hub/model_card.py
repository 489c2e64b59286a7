"""The model card of a ViViT: metadata for the Hub, facts about the model and its start, and code that loads it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..configuration_vivit import ViViTConfig


logger = logging.get_logger(__name__)

PAPER = "[ViViT (Arnab et al., ICCV 2021)](https://arxiv.org/abs/2103.15691)"
VARIANTS = {
    "spatio_temporal": "Model 1, spatio-temporal attention",
    "factorised_encoder": "Model 2, factorised encoder",
    "factorised_self_attention": "Model 3, factorised self-attention",
    "factorised_dot_product_attention": "Model 4, factorised dot-product attention",
}
DEFAULT_LICENSE = "apache-2.0"
_PIPELINE_TAGS = ("feature-extraction", "video-classification")  # without and with a classifier
DEFAULT_TAGS = ("vivit", "video-classification", "vision")

# The text between these two is rewritten each time; the text around it belongs to the user.
_BEGIN = "<!-- vivit_hf: from here on, push_to_hub writes this text anew -->"
_END = "<!-- vivit_hf: your own text is kept above and below -->"
_INITIALISATION = "## Initialisation\n"
_RESULTS = "## Results\n"
_DISTILLATION = "## Distillation\n"
_STARTED_FROM = "Started from "
# The empty form that transformers writes when it pushes a processor or a configuration to a new repository.
_EMPTY_FORM = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."


_USE = """## Use

With the package `vivit_hf` installed:

```python
{package}```

Without it, `transformers` runs the code in this repository (read it first, as any code that you download and run):

```python
import torch
from transformers import AutoImageProcessor, {auto_class}


repository = "{{repo_id}}"
processor = AutoImageProcessor.from_pretrained(repository, trust_remote_code=True)
model = {auto_class}.from_pretrained(repository, trust_remote_code=True)

inputs = processor("video.mp4", return_tensors="pt")
with torch.no_grad():
{outputs}```"""
_CLASSIFIER_USE = _USE.format(
    package="""from transformers import pipeline

import vivit_hf  # makes the model known to transformers


classify = pipeline("video-classification", model="{repo_id}")
print(classify("video.mp4"))
""",
    auto_class="AutoModelForVideoClassification",
    outputs="""    logits = model(**inputs).logits.mean(dim=0)  # over the views of the video
for index in logits.argsort(descending=True)[:5].tolist():
    print(model.config.id2label[index], logits[index].item())
""",
)
_BACKBONE_USE = _USE.format(
    package="""from vivit_hf import ViViTModel, ViViTVideoProcessor


processor = ViViTVideoProcessor.from_pretrained("{repo_id}")
model = ViViTModel.from_pretrained("{repo_id}")
features = model(**processor("video.mp4")).pooler_output
""",
    auto_class="AutoModel",
    outputs="    features = model(**inputs).pooler_output\n",
)
_PRETRAINED_USE = (
    """## Fine-tuning

The model has no classifier yet, and its decoder serves pretraining alone. With the package `vivit_hf` installed,
fine-tuning on labelled videos starts from the encoder:

```bash
vivit-hf finetune --train_dir videos/train --model_name_or_path {repo_id} --output_dir my_vivit
```

`ViViTForPreTraining.from_pretrained("{repo_id}")` loads the model with its decoder.

"""
    + _BACKBONE_USE
)


class InitialisationSummary(Protocol):
    """The part of `InitialisationReport` that a card needs."""

    def to_markdown(self) -> str: ...


Report = InitialisationSummary | str


def write_model_card(
    folder: str | os.PathLike,
    model: Any,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] | str | None = None,
    metrics: Sequence[str] | str | None = None,
    tags: Sequence[str] | str = (),
    report: Report | None = None,
    results: Mapping[str, float] | None = None,
    protocol: str | None = None,
    distillation: str | None = None,
) -> Path:
    """
    Write `README.md`, in the Hub's format for model cards, into a folder.

    An existing card keeps its text, except for the part that this function wrote, and its metadata, except for the
    values given here and for missing values. A card whose metadata cannot be read is left unchanged, with a warning.

    Args:
        folder: the folder of a saved model.
        model: a `ViViTModel`, `ViViTForVideoClassification` or `ViViTForPreTraining`.
        repo_id: the name on the Hub, by default that of the folder.
        base_model: the model it was made from; a Hub id goes into the metadata, a path only into the text.
        license: by default that of the card, or "apache-2.0".
        datasets, metrics: one name on the Hub or several, such as "kinetics400" and "accuracy".
        tags: one or several besides "vivit", "video-classification" and "vision".
        report: the report of `initialise_from_vit`, or any Markdown about the origin of the weights.
        results: scores by name, such as {"top1": 0.8}, for the text and for the Hub's metadata (`model-index`).
        protocol: the views per video that the results are averages of; a score cannot be reproduced without them.
        distillation: Markdown about the teacher; None keeps that of the card, "" removes it.

    Returns:
        The path of the card.
    """
    path = Path(folder) / "README.md"
    try:
        old = _read(path)
    except ValueError as error:
        logger.warning("%s The card is left as it is.", error)
        return path
    given = {
        "base_model": base_model if is_repo_id(base_model) else None,
        "license": license,
        "datasets": _listed(datasets),
        "metrics": _listed(metrics),
    }
    old_data = old.data.to_dict() if old else {}
    old_tag = old_data.get("pipeline_tag")
    data = {
        "library_name": "transformers",
        "license": DEFAULT_LICENSE,
        **old_data,
        "pipeline_tag": old_tag if old_tag not in (None, *_PIPELINE_TAGS) else _PIPELINE_TAGS[_has_classifier(model)],
        **{name: value for name, value in given.items() if value},
        "tags": list(dict.fromkeys([*(old_data.get("tags") or []), *DEFAULT_TAGS, *_listed(tags)])),
    }

    initialisation = _initialisation(base_model, report) or (_section_in(old.text, _INITIALISATION) if old else "")
    repo_id = repo_id or Path(folder).resolve().name
    if results:
        text = _results(results, protocol)
        data["model_name"] = repo_id.rpartition("/")[2]
        data["eval_results"] = _eval_results(results, datasets, protocol)
        data.pop("model-index", None)
    else:
        text = _section_in(old.text, _RESULTS) if old else ""
    if distillation is None:
        distillation = _section_in(old.text, _DISTILLATION) if old else ""
    written = f"{_BEGIN}\n{_description(model, repo_id, initialisation, distillation, text)}\n{_END}"
    if old is None:
        text = f"\n# {repo_id.rpartition('/')[2]}\n\n{written}\n"
    elif _BEGIN in old.text and _END in old.text:
        before, _, rest = old.text.partition(_BEGIN)
        text = before + written + rest.partition(_END)[2]
    else:
        text = old.text
    path.write_text(f"---\n{ModelCardData(**data)}\n---\n{text}", encoding="utf-8")
    return path


def read_initialisation(folder: str | os.PathLike) -> tuple[str | None, str | None]:
    """Return the base model and the initialisation that `write_model_card` wrote into a folder, None if it did not."""
    card = _own_card(folder)
    if card is None:
        return None, None
    base_model = card.data.to_dict().get("base_model")
    return base_model if isinstance(base_model, str) else None, _section_in(card.text, _INITIALISATION) or None


def read_distillation(folder: str | os.PathLike) -> str | None:
    """Return what `write_model_card` wrote into a folder about the teacher, None if it did not."""
    card = _own_card(folder)
    return None if card is None else _section_in(card.text, _DISTILLATION) or None


def _own_card(folder: str | os.PathLike) -> ModelCard | None:
    """Return the card in a folder if `write_model_card` wrote a part of it, else None."""
    try:
        card = _read(Path(folder) / "README.md")
    except ValueError:
        return None
    return card if card is not None and _BEGIN in card.text else None


def _read(path: Path) -> ModelCard | None:
    """Return the card, None if it is missing or transformers' empty form; raise a ValueError for invalid metadata."""
    content = path.read_text(encoding="utf-8") if path.exists() else _EMPTY_FORM
    if _EMPTY_FORM in content:
        return None
    try:
        return ModelCard(content)
    except Exception as error:  # PyYAML's errors and those of ModelCard share no base class
        raise ValueError(f"The metadata at the top of {path} cannot be read: {error}") from error


def is_repo_id(name: str | None) -> bool:
    """Return whether a name is a valid Hub id and not a path on this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None and not os.path.exists(name)


def linked(name: str) -> str:
    """Return a Hub id as a Markdown link, and a path as code."""
    return f"[{name}](https://huggingface.co/{name})" if is_repo_id(name) else f"`{name}`"


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _initialisation(base_model: str | None, report: Report | None) -> str:
    text = report if report is None or isinstance(report, str) else report.to_markdown()
    if base_model and not (text or "").startswith(_STARTED_FROM):  # a text from an earlier card has this line
        text = f"{_STARTED_FROM}{linked(base_model)}." + (f"\n\n{text}" if text else "")
    return text or ""


def _results(results: Mapping[str, float], protocol: str | None) -> str:
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in results.items())
    return f"| | |\n| --- | --- |\n{rows}" + (f"\n\nViews per video: {protocol}." if protocol else "")


def _eval_results(
    results: Mapping[str, float], datasets: Sequence[str] | str | None, protocol: str | None
) -> list[EvalResult]:
    dataset = datasets if isinstance(datasets, str) else datasets[0] if datasets else "custom"
    return [
        EvalResult(
            task_type="video-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type="accuracy" if name.endswith(("top1", "top5")) else name,
            metric_name=f"{name} ({protocol})" if protocol else name,
            metric_value=round(value, 6),
        )
        for name, value in results.items()
    ]


def _section_in(text: str, heading: str) -> str:
    """Return the text below a heading, from the part that `write_model_card` wrote."""
    written = text.partition(_BEGIN)[2].partition(_END)[0]
    return written.partition(heading)[2].partition("\n## ")[0].strip()


def _description(model: Any, repo_id: str, initialisation: str, distillation: str, results: str) -> str:
    config: ViViTConfig = model.config
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(model))
    parts = [
        f"A Video Vision Transformer, {PAPER}, in the implementation of `vivit_hf`.",
        f"| | |\n| --- | --- |\n{rows}",
        _use(model).format(repo_id=repo_id),
        "Reading video files requires PyAV (`pip install av`); lists of frames and arrays do not.",
    ]
    if results:
        parts.append(f"{_RESULTS}\n{results}")
    if initialisation:
        parts.append(f"{_INITIALISATION}\n{initialisation}")
    if distillation:
        parts.append(f"{_DISTILLATION}\n{distillation}")
    height, width = config.frame_size
    limits = [
        f"The model sees clips of {config.num_frames} frames of {height} x {width} pixels, sampled from the video as "
        "the processor is configured. It does not see anything between these frames or outside the crop.",
        "Scores depend on the views (clips and crops per video): state them with every result.",
    ]
    if _has_classifier(model):
        limits.append(f"{_answers(config)} It has the biases of its training data.")
        if any(status in initialisation for status in ("newly initialised", "Newly initialised")):
            limits.append("Newly initialised parameters must be trained before the model is of any use.")
    parts.append("## Limitations\n\n" + "\n".join(f"- {limit}" for limit in limits))
    return "\n\n".join(parts)


def _has_classifier(model: Any) -> bool:
    return hasattr(model, "classifier") and model.config.num_labels > 0


def _answers(config: ViViTConfig) -> str:
    if config.problem_type == "regression" or config.num_labels == 1:
        return f"It gives {config.num_labels} numbers for any video, whether or not the video shows what they measure."
    if config.problem_type == "multi_label_classification":
        return f"It gives any video a probability for each of {config.num_labels} labels, and knows no others."
    each = f" of each group ({', '.join(config.label_groups)})" if config.label_groups else ""
    return (
        f"It distinguishes {config.num_labels} classes and assigns one{each or ' of them'} to any video, even if the "
        "video shows none of them."
    )


def _use(model: Any) -> str:
    if _has_classifier(model):
        return _CLASSIFIER_USE
    return _PRETRAINED_USE if hasattr(model, "decoder") else _BACKBONE_USE


def _facts(model: Any) -> list[tuple[str, str]]:
    config: ViViTConfig = model.config
    time, height, width = config.grid_size
    layers, over_time = f"{config.num_hidden_layers} layers", config.temporal_pooling
    if config.attention_type == "factorised_encoder":
        layers = f"{config.num_hidden_layers} spatial and {config.num_temporal_layers} temporal layers"
    parameters = list(model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    count = sum(parameter.numel() for parameter in parameters)
    dtype = str(model.dtype).removeprefix("torch.")
    frame, patch = (" x ".join(map(str, sides)) for sides in (config.frame_size, config.tubelet_size))
    facts = [
        ("variant", f"{VARIANTS[config.attention_type]} (`{config.attention_type}`)"),
        ("input", f"{config.num_frames} frames of {frame} pixels, {config.num_channels} channels"),
        ("tokens", f"{time} x {height} x {width} (`{config.embedding_type}`, {patch})"),
        ("encoder", f"{layers}, width {config.hidden_size}, {config.num_attention_heads} heads"),
        ("pooling", f"`{config.pooling}`" + (f", over time `{over_time}`" if over_time else "")),
        ("parameters", f"{_amount(count)} ({dtype}, {_amount(size)}B)"),
    ]
    if _has_classifier(model):
        names = [str(config.id2label[index]) for index in sorted(config.id2label)]
        shown = ", ".join(names[:5]).replace("|", "\\|") + ", ..." * (len(names) > 5)
        facts.append(("labels", f"{len(names)}: {shown}"))
    if (tuned := config.optimization) is not None:
        agreement, count = (tuned["measured"].get(name) for name in ("agreement", "clips"))
        measured = (
            f": the answer of the plain model for {agreement:.1%} of {count:g} clips" if agreement and count else ""
        )
        facts.append(("tuned", f"`{tuned['name']}` on a {tuned['device']}{measured}"))
    if hasattr(model, "decoder"):
        decoder = "width {}, layers: {}, heads: {}".format(*config.decoder_sizes)
        facts.append(("decoder", decoder))
        facts.append(("pretraining", f"tube masks over {config.mask_ratio:.0%} of the places"))
    return facts


def _amount(number: int) -> str:
    for unit, factor in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} "
