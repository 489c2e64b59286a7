"""
Loading that accounts for every key: our own checkpoints, and those of transformers' own Vivit (Model 1).

Foreign names are changed only while loading. What is saved has the names of `state_dict()`, which is what `Trainer`
reads when it resumes or goes back to the best model.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_vivit import ViViTConfig
from .limits_vivit import MOST_NEW_PARAMETERS
from .model_files import check_weight_indices, check_weights, named_json_errors


_Base: Any = PreTrainedModel if TYPE_CHECKING else object  # a mixin, but of what a type checker should know

logger = logging.get_logger(__name__)

# Both key layouts of transformers' Vivit: the one in its files, and the one it has in memory from 5.10 on, which FSDP,
# peft and plain dumps of a state dict write.
TRANSFORMERS_VIVIT_NAMES = {
    r"(?<!encoder\.)\blayers\.": "encoder.layer.",
    r"attention\.attention\.query": "attention.q_proj",
    r"attention\.attention\.key": "attention.k_proj",
    r"attention\.attention\.value": "attention.v_proj",
    r"attention\.output\.dense": "attention.o_proj",
    r"intermediate\.dense": "mlp.fc1",
    r"(?<!attention\.)output\.dense": "mlp.fc2",
}

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
_CONFIG_ARGUMENTS = {
    *ViViTConfig.__annotations__,
    *(
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
    ),
}
_SIZES = ("num_frames", "image_size", "num_sampled_frames")


class CheckpointLoadingMixin(_Base):
    """`from_pretrained` for the ViViT models."""

    # transformers' VivitModel has a pooler that its classifier does not use; ours has none.
    _keys_to_ignore_on_load_unexpected = [r"^(vivit\.)?pooler\.dense\.(weight|bias)$"]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        A ViViT from a folder or a Hub id; checkpoints of transformers' own Vivit load as Model 1.

        Any field of the configuration can be overridden. `num_frames`, `image_size` and `num_sampled_frames`
        interpolate the position embeddings. `num_labels`, or label names other than the stored ones, give a fresh
        classifier, named in the log, and leave the rest as it is (real names for a classifier that was saved with
        `LABEL_0`, ... keep it).
        All other arguments are those of `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: if a key of the checkpoint has no place in the model, or a parameter of the model other than
                the classifier is not in the checkpoint; for files that are damaged, that could only be read by running
                code in them, or that name files outside of their folder.
        """
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        try:
            with named_json_errors(pretrained_model_name_or_path, "config.json"):
                raw, _ = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        except (OSError, TypeError):
            raw = {}
        if not raw:  # a state dict, an adapter, or nothing at all: transformers knows what to do or what to say
            return super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                config=config,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                output_loading_info=output_loading_info,
                **kwargs,
            )
        stored = ViViTConfig.from_dict(ViViTConfig.translate(raw, pretrained_model_name_or_path))
        target = _target_config(config, raw, kwargs)

        # The checkpoint is read in its own sizes, and the position embeddings are interpolated afterwards.
        as_stored = copy.deepcopy(target)
        same_patches = (target.tubelet_size, target.embedding_type) == (stored.tubelet_size, stored.embedding_type)
        if same_patches:
            for name in _SIZES:
                setattr(as_stored, name, getattr(stored, name))
        if raw.get("model_type") == "vivit":
            kwargs["key_mapping"] = {**TRANSFORMERS_VIVIT_NAMES, **(kwargs.get("key_mapping") or {})}
        new_head = target.num_labels != stored.num_labels
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        check_weight_indices(folder)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                config=as_stored,
                ignore_mismatched_sizes=True,  # what does not match is an error below, together with the rest
                output_loading_info=True,
                **kwargs,
            )
        except Exception:
            check_weights(folder)  # if they are the cause, its error names the file
            raise
        _account_for_keys(model, info, pretrained_model_name_or_path, ignore_mismatched_sizes)
        vars(model).pop("_weight_conversions", None)  # transformers would rename back to the foreign names on saving
        if not new_head and _names_other_classes(stored, target) and hasattr(model, "classifier"):
            _renew_classifier(model, stored, target)
        if same_patches and any(getattr(target, name) != getattr(stored, name) for name in _SIZES):
            model.resize_position_embeddings(**{name: getattr(target, name) for name in _SIZES})
        return (model, info) if output_loading_info else model

    def _move_missing_keys_from_meta_to_device(self, missing_keys: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but only so much memory is taken for parameters that no file holds."""
        shapes = {name: parameter for name, parameter in self.named_parameters() if name in set(missing_keys)}
        count = sum(parameter.numel() for parameter in shapes.values())
        if count > MOST_NEW_PARAMETERS:
            raise ValueError(
                f"The configuration asks for {count:,} parameters that are not in the checkpoint in this shape, such "
                f"as {min(shapes)}; the limit is {MOST_NEW_PARAMETERS:,} (see SECURITY.md). It belongs to another "
                "checkpoint, or is damaged."
            )
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)


def _target_config(config: Any, raw: dict[str, Any], kwargs: dict[str, Any]) -> ViViTConfig:
    """The configuration that the caller asks for; takes its fields out of `kwargs`."""
    if isinstance(config, ViViTConfig):
        return copy.deepcopy(config)
    overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in _CONFIG_ARGUMENTS}
    if isinstance(config, PretrainedConfig):  # transformers' own VivitConfig
        raw = config.to_dict()
    elif config is not None:
        raw, _ = ViViTConfig.get_config_dict(config)
    return ViViTConfig.from_dict(raw, **overrides)


def _account_for_keys(model: Any, info: dict[str, Any], source: Any, ignore_mismatched_sizes: bool) -> None:
    def is_head(name: str) -> bool:
        return name.startswith("classifier.")

    problems = {
        "in the checkpoint, without a place in the model": [n for n in info["unexpected_keys"] if not is_head(n)],
        "in the model, but not in the checkpoint": [n for n in info["missing_keys"] if not is_head(n)],
        "of another shape in the checkpoint": [
            f"{name} {tuple(there)} -> {tuple(here)}"
            for name, there, here in info["mismatched_keys"]
            if not (is_head(name) or ignore_mismatched_sizes)
        ],
    }
    if hasattr(model, "classifier") and not isinstance(model.classifier, nn.Linear):
        is_head_left = [name for name in info["unexpected_keys"] if is_head(name)]
        if is_head_left:
            logger.warning("Left out %s: the model has no labels (`num_labels=0`).", ", ".join(sorted(is_head_left)))
    found = {what: sorted(names) for what, names in problems.items() if names}
    if found:
        lines = [
            f"  {len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            for what, names in found.items()
        ]
        raise ValueError(
            f"The weights of {source} do not fit a {type(model).__name__} with this configuration "
            f"(attention_type={model.config.attention_type!r}, pooling={model.config.pooling!r}):\n"
            + "\n".join(lines)
            + "\nLoad it with the configuration that it was saved with, or convert it first."
        )


def _names_other_classes(stored: ViViTConfig, target: ViViTConfig) -> bool:
    generic = {index: f"LABEL_{index}" for index in range(stored.num_labels)}
    return stored.id2label != target.id2label and stored.id2label != generic


def _renew_classifier(model: Any, stored: ViViTConfig, target: ViViTConfig) -> None:
    if model.classifier.weight.is_meta:
        raise ValueError(
            "The classifier is offloaded and cannot be made anew for other labels. Load the model with these labels "
            "and without a `device_map` that offloads the classifier, save it, and load that."
        )
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    changed = [index for index in target.id2label if stored.id2label.get(index) != target.id2label[index]]
    first = changed[0]
    logger.warning(
        "classifier.weight and classifier.bias are newly initialised: %d of the %d labels are other ones than the "
        "checkpoint's (%d was %r and is now %r). To rename classes and keep the classifier, load it first and then "
        "change `model.config.id2label`.",
        *(len(changed), target.num_labels, first, stored.id2label.get(first), target.id2label[first]),
    )
