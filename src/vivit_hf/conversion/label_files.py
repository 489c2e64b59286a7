"""Read label names from files and from the Hub's data set of label files."""

from collections.abc import Mapping

from huggingface_hub import hf_hub_download

from ..configuration_vivit import ViViTConfig
from ..data.escaping import counted
from ..data.labels import LabelMap, read_label_groups
from ..initialisation.weight_files import ConversionError
from .scenic_releases import Release
from .terminal import one_line, warn


LABEL_FILES_REPOSITORY = "huggingface/label-files"


def set_labels(config: ViViTConfig, labels: LabelMap) -> None:
    """Set the names and groups of the labels, but not the `problem_type`, which no file of labels tells."""
    fields = labels.config_fields()
    config.id2label = fields["id2label"]
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.label_groups = fields["label_groups"]


def find_labels(path: str | None, release: Release | None, num_labels: int) -> LabelMap | None:
    """
    Read labels from a file, or from the Hub for a released model; return None after a warning without either.

    Raises:
        ConversionError: if the number of names is not `num_labels`.
    """
    groups = dict(release.label_groups or {}) if release else {}
    file = path or (release.label_file if release else None)
    labels: LabelMap | None
    if path is not None:
        labels = _grouped_labels(path, groups) if groups else LabelMap.from_file(path)
    elif (labels := _labels_from_hub(file) if file else None) is None:
        warn("the labels have no names, only numbers; give --labels FILE")
        numbers = {group: [f"LABEL_{n}" for n in range(size)] for group, size in groups.items()}
        labels = LabelMap(numbers) if groups else None
    if labels is not None and len(labels.names) != num_labels:
        found = counted(len(labels.names), "label")
        raise ConversionError(f"{file} names {found}, but the classifier has {num_labels} outputs.")
    return labels


def _labels_from_hub(file_name: str) -> LabelMap | None:
    """Read labels from the Hub's data set of label files; return None after a warning if that fails."""
    try:
        path = hf_hub_download(LABEL_FILES_REPOSITORY, file_name, repo_type="dataset")
    except (OSError, ValueError) as error:
        warn(f"no {file_name} from {LABEL_FILES_REPOSITORY} ({one_line(error)[:200]})")
        return None
    return LabelMap(read_label_groups(path))


def _grouped_labels(path: str, groups: Mapping[str, int]) -> LabelMap:
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
    # In a list of all names, these can have the prefix that `LabelMap.names` writes.
    unprefixed = {group: [name.removeprefix(f"{group}: ") for name in stored[group]] for group in groups}
    return LabelMap(unprefixed).checked(path)
