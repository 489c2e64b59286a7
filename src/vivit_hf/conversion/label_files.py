"""Read label names from files and from the Hub's data set of label files."""

from collections.abc import Mapping, Sequence

from huggingface_hub import hf_hub_download
from transformers import PretrainedConfig

from ..data.escaping import counted
from ..data.labels import LabelMap, read_label_groups
from ..initialisation.weight_files import ConversionError
from .scenic_releases import Release
from .terminal import one_line, warn


LABEL_FILES_REPOSITORY = "huggingface/label-files"


def set_labels(config: PretrainedConfig, names: Sequence[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def read_labels(path: str) -> list[str]:
    """Read label names from a file, in the order of the outputs; see `read_label_groups`."""
    return LabelMap(read_label_groups(path)).names


def find_labels(path: str | None, release: Release | None, num_labels: int) -> list[str] | None:
    """
    Read label names from a file, or from the Hub for a released model; return None after a warning without either.

    Raises:
        ConversionError: if the number of names is not `num_labels`.
    """
    groups = dict(release.label_groups or {}) if release else {}
    file = path or (release.label_file if release else None)
    names: list[str] | None
    if path is not None:
        names = _grouped_labels(path, groups) if groups else read_labels(path)
    else:
        names = _labels_from_hub(file) if file else None
        if names is None:
            warn("the labels have no names, only numbers; give --labels FILE")
            names = _prefixed({group: [f"LABEL_{n}" for n in range(size)] for group, size in groups.items()}) or None
    if names is not None and len(names) != num_labels:
        found = counted(len(names), "label")
        raise ConversionError(f"{file} names {found}, but the classifier has {num_labels} outputs.")
    return names


def _labels_from_hub(file_name: str) -> list[str] | None:
    """Read labels from the Hub's data set of label files; return None after a warning if that fails."""
    try:
        path = hf_hub_download(LABEL_FILES_REPOSITORY, file_name, repo_type="dataset")
    except (OSError, ValueError) as error:
        warn(f"no {file_name} from {LABEL_FILES_REPOSITORY} ({one_line(error)[:200]})")
        return None
    return read_labels(path)


def _grouped_labels(path: str, groups: Mapping[str, int]) -> list[str]:
    """Read lists of names by group, or one list of all names in the order of the groups."""
    stored = {group: list(names) for group, names in read_label_groups(path).items()}
    if set(stored) != set(groups):
        names, start = [name for names in stored.values() for name in names], 0
        for group, size in groups.items():
            stored[group], start = names[start : start + size], start + size
        stored[group] += names[start:]  # extra names are reported below
    for group, size in groups.items():
        if len(stored[group]) != size:
            sizes = " and ".join(f"{size} of {group}" for group, size in groups.items())
            raise ConversionError(f"{path} names {len(stored[group])} of {group}; expected {sizes}, in this order.")
    return _prefixed({group: stored[group] for group in groups})


def _prefixed(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Prefix names with their group (`noun: pan`), so that a name in two groups is two labels."""
    return [f"{group}: {name.removeprefix(f'{group}: ')}" for group, names in groups.items() for name in names]
