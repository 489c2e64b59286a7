"""How sure an answer is, in plain sentences."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from vivit_hf.calibration_vivit import Calibration
from vivit_hf.data.escaping import counted
from vivit_hf.data.labels import LabelMap, to_probabilities
from vivit_hf.inference import VideoPrediction
from vivit_hf.inference.label_sets import check_sets, label_set
from vivit_hf.inference.prediction import Answers
from vivit_hf.inference.unknown import UNKNOWN


COVERAGE = 0.9  # of the label set, if the model has it
MOST_NAMED = 8  # labels of a set


def how_sure(answers: Answers, prediction: VideoPrediction, num_views: dict[str, int]) -> list[str]:
    """Return what the model's calibration says about the answer for a video."""
    label_map, config = answers.label_map, answers.model.config
    if label_map.is_regression:
        return ["The model gives values, not labels: how far they are off is not known."]
    calibration = Calibration.of(config)
    return [
        *_unknown(answers, prediction, calibration),
        *_scores(label_map, prediction, calibration, num_views),
        *([] if prediction.unknown else _set(config, prediction, calibration, num_views)),
        *([] if not label_map.has_several else _thresholds(label_map)),
    ]


def _unknown(answers: Answers, prediction: VideoPrediction, calibration: Calibration | None) -> Iterator[str]:
    if prediction.unknown:
        assert calibration is not None and calibration.unknown is not None
        plain = replace(answers.label_map, thresholds=())
        nearest = " and ".join(repr(label) for label in plain.best(prediction.probabilities))
        yield (
            f"{UNKNOWN.capitalize()}: the video is unlike those that the model was trained on. Its nearest label is "
            f"{nearest}. The model says so wrongly of about {calibration.unknown['false_alarms']:.0%} of the videos "
            "that do show a label."
        )
    elif prediction.unknown is not None:
        yield f"The video resembles those that the model was trained on, so the answer is not {UNKNOWN!r}."
    elif calibration is not None and calibration.unknown is not None:
        yield f"The model cannot say {UNKNOWN!r}: a file of its rule is missing beside its weights."
    else:
        yield f"The model cannot say {UNKNOWN!r}: it gives a label to every video, whatever it shows."


def _scores(
    label_map: LabelMap, prediction: VideoPrediction, calibration: Calibration | None, num_views: dict[str, int]
) -> Iterator[str]:
    if calibration is None:
        yield (
            "The scores are not calibrated: they put the labels in order, but of answers with a score of 80%, more or "
            "fewer than 80 in 100 may be right."
        )
        return
    yield (
        f"The scores are calibrated on {counted(calibration.num_files, 'labelled file')}: of answers with a score of "
        "80%, about 80 in 100 should be right."
    )
    if not prediction.unknown:
        yield from _temperatures(label_map, prediction, calibration.temperatures)
    fitted = {"num_clips": calibration.num_clips, "num_crops": calibration.num_crops}
    if num_views != fitted:
        yield (
            f"It was calibrated on {_views(fitted)} per video, which would take too long here. With "
            f"{_views(num_views)}, scores fit less well."
        )


def _temperatures(label_map: LabelMap, prediction: VideoPrediction, temperatures: Sequence[float]) -> Iterator[str]:
    """Say what the temperature of each group does to the score of its first label."""
    assert prediction.probabilities is not None and prediction.logits is not None
    plain = to_probabilities(torch.from_numpy(prediction.logits), replace(label_map, temperatures=())).numpy()
    start = 0
    for (group, names), temperature in zip(label_map.groups.items(), temperatures, strict=True):
        best = start + int(prediction.probabilities[start : start + len(names)].argmax())
        label, score = names[best - start], float(prediction.probabilities[best])
        start += len(names)
        if f"{temperature:.2f}" == "1.00":
            continue
        effect = "less sure" if temperature > 1 else "surer"
        yield (
            f"{f'{group}: the' if group else 'The'} temperature {temperature:.2f} makes scores {effect}: without it, "
            f"{label!r} would have {percent(float(plain[best]))} instead of {percent(score)}."
        )


def _set(
    config: Any, prediction: VideoPrediction, calibration: Calibration | None, num_views: dict[str, int]
) -> Iterator[str]:
    """Name the label set, if the model has one for these views."""
    stored = [] if calibration is None or calibration.sets is None else sorted(calibration.sets, key=float)
    if not stored:
        return
    coverage = COVERAGE if f"{COVERAGE:g}" in stored else float(stored[-1])
    try:
        check_sets(config, coverage, num_views)
    except ValueError:
        return
    assert prediction.logits is not None
    sets: dict[str, list[str]] = {}
    for group, label, _ in label_set(prediction.logits, config, coverage):
        sets.setdefault(group, []).append(label)
    for group, labels in sets.items():
        named = ", ".join(map(repr, labels[:MOST_NAMED]))
        if len(labels) > MOST_NAMED:
            named += f" and {len(labels) - MOST_NAMED} more"
        yield (
            f"{f'{group}: the' if group else 'The'} label set at {coverage:.0%} coverage is {named}: about "
            f"{100 * coverage:g} in 100 such sets hold the true label."
        )


def _thresholds(label_map: LabelMap) -> Iterator[str]:
    if label_map.thresholds:
        yield "Each label is given from its own threshold on, which was chosen on the labelled files."
    else:
        yield "A label is given from a score of 50% on: the model has no thresholds of its own."


def percent(share: float) -> str:
    """Return a share in percent, with a digit more near 0% and 100%."""
    if share >= 0.9995:
        return ">99.9%"
    if share < 0.0005:
        return "<0.1%"
    return f"{share:.0%}" if 0.01 <= share < 0.99 else f"{share:.1%}"


def _views(num_views: dict[str, int]) -> str:
    return f"{counted(num_views['num_clips'], 'clip')} x {counted(num_views['num_crops'], 'crop')}"
