"""Two models on one video: where they agree, in one sentence."""

import re
from collections.abc import Sequence


def key_of(label: str) -> str:
    """Return what makes a label itself: `playing_guitar` and `Playing guitar` are the same one."""
    return re.sub(r"[\W_]+", " ", label).strip().casefold()


def compare(names: Sequence[str], answers: Sequence[Sequence[str]], known: Sequence[Sequence[str]]) -> str:
    """
    Return where the answers of two models agree and differ.

    Args:
        names: of the models.
        answers: the labels that each gives the video; with groups of labels in the form `noun: pan`.
        known: all answers that each can give.
    """
    mine, theirs = ({key_of(label): label for label in one} for one in answers)
    both = [label for key, label in mine.items() if key in theirs]
    only = [[label for key, label in mine.items() if key not in theirs]]
    only.append([label for key, label in theirs.items() if key not in mine])
    parts = [f"both say {_listed(both)}"] if both else []
    parts += [
        f"{'only ' if both else ''}{name!r} says {_listed(labels)}"
        for name, labels in zip(names, only, strict=True)
        if labels
    ]
    parts += [f"{name!r} gives no label" for name, labels in zip(names, answers, strict=True) if not labels]
    kind = "The models differ" if not both else "The models agree in part"
    if not any(only):
        kind = "The models agree"
    text = f"{kind}: {'; '.join(parts)}."
    can_say = [{key_of(label) for label in labels} for labels in known]
    for name, labels, possible in zip(names, reversed(only), can_say, strict=True):
        if foreign := [label for label in labels if key_of(label) not in possible]:
            text += f" {name!r} cannot say {_listed(foreign, 'or')}."
    return text


def _listed(labels: Sequence[str], word: str = "and") -> str:
    named = [repr(label) for label in labels]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} {word} {named[-1]}"
