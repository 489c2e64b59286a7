"""
Loading and saving of checkpoints: our own, and those of transformers' own Vivit (Model 1).

Other names are translated only while loading. Saved files have the names of `state_dict()`, which `Trainer` reads when
it resumes or returns to the best model.
"""

import copy
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file, logging

from .calibration_vivit import carried_features, copy_features, drop_stale_calibration
from .configuration_vivit import CONFIG_FIELDS, ViViTConfig
from .limits_vivit import MOST_NEW_PARAMETERS
from .model_files import check_weight_indices, check_weights, named_json_errors, stale_weights_removed, upload


_Base: Any = PreTrainedModel if TYPE_CHECKING else object  # a mixin that type checkers treat as a model

logger = logging.get_logger(__name__)

# Where the Auto classes find our classes in a saved folder if this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_vivit.ViViTConfig",
    "AutoModel": "modeling_vivit.ViViTModel",
    "AutoModelForPreTraining": "modeling_vivit.ViViTForPreTraining",
    "AutoModelForVideoClassification": "modeling_vivit.ViViTForVideoClassification",
}

# Both key layouts of transformers' Vivit: that of its files, and that of its modules from 5.10 on, which FSDP, peft and
# plain dumps of a state dict write.
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
_CONFIG_ARGUMENTS = CONFIG_FIELDS | {"output_hidden_states", "output_attentions", "return_dict"}
_SIZES = ("num_frames", "image_size", "num_sampled_frames")


class CheckpointMixin(_Base):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of the ViViT models."""

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
        Load a ViViT from a folder or a Hub id; checkpoints of transformers' own Vivit load as Model 1.

        Any field of the configuration can be overridden. `num_frames`, `image_size` and `num_sampled_frames`
        interpolate the position embeddings. `num_labels`, or label names that differ from the stored ones, replace
        the classifier by a new one and log its name; new names for a classifier that was saved with `LABEL_0`, ...
        keep it. All other arguments are those of `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: if a key of the checkpoint has no place in the model, other than a classifier, or the decoder
                of pretraining, that this class does not have; if a parameter of the model is not in the checkpoint,
                other than those; if a file is damaged, needs code in it to be run, or names files outside its folder.
        """
        source = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        try:
            with named_json_errors(source, "config.json"):
                raw, _ = PretrainedConfig.get_config_dict(source, **hub)
        except (OSError, TypeError):
            raw = {}
        if not raw:  # a state dict, an adapter, or nothing: transformers loads it or explains why not
            options = {"ignore_mismatched_sizes": ignore_mismatched_sizes, "output_loading_info": output_loading_info}
            return super().from_pretrained(source, *model_args, config=config, **options, **kwargs)
        stored = ViViTConfig.from_dict(ViViTConfig.translate(raw, source))
        target = _target_config(config, raw, kwargs)

        # The checkpoint is read in its own sizes, and the position embeddings are interpolated afterwards.
        as_stored = copy.deepcopy(target)
        same_patches = (target.tubelet_size, target.embedding_type) == (stored.tubelet_size, stored.embedding_type)
        if same_patches:
            for name in _SIZES:
                setattr(as_stored, name, getattr(stored, name))
        if raw.get("model_type") == "vivit":
            kwargs["key_mapping"] = {**TRANSFORMERS_VIVIT_NAMES, **(kwargs.get("key_mapping") or {})}
        check_weight_indices(Path(source, kwargs.get("subfolder") or ""))
        try:
            model, info = super().from_pretrained(
                source,
                *model_args,
                config=as_stored,
                ignore_mismatched_sizes=True,  # mismatches are reported below, together with the other problems
                output_loading_info=True,
                **kwargs,
            )
        except Exception:
            _check_files(source, hub)  # if a file is the cause, this error names it
            raise
        _account_for_keys(model, info, source, ignore_mismatched_sizes)
        vars(model).pop("_weight_conversions", None)  # transformers would save under the other names again
        if target.num_labels == stored.num_labels and hasattr(model, "classifier"):
            _renew_classifier_of_other_labels(model, stored, target)
        if same_patches and any(getattr(target, name) != getattr(stored, name) for name in _SIZES):
            model.resize_position_embeddings(**{name: getattr(target, name) for name in _SIZES})
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """
        Save as `transformers.PreTrainedModel.save_pretrained` does, with the source files that define the model.

        Every Auto class loads the folder with `trust_remote_code=True` where this package is not installed. Weights and
        adapters of an earlier save, which `from_pretrained` might load instead or in addition, are removed at the end.
        A calibration of other weights is left out with a warning. Known features are copied.
        """
        drop_stale_calibration(self, args[0] if args else kwargs.get("state_dict"))
        if hasattr(self.config, "auto_map"):
            del self.config.auto_map  # it came with the checkpoint and may name another class
        if self._auto_class is not None and type(self).__module__.rpartition(".")[2] == "modeling_vivit":
            self.config.auto_map = dict(AUTO_MAP)
        features = carried_features(self)
        with stale_weights_removed(Path(save_directory)) if is_main_process else nullcontext():
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            if is_main_process:
                copy_features(features, save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """
        Push the model to the Hub with a model card, see `vivit_hf.hub.push_to_hub`.

        Without the package, `transformers.PreTrainedModel.push_to_hub` does it, with its own arguments and card.
        """
        try:
            from vivit_hf.hub.push import push_to_hub
        except ImportError:
            return super().push_to_hub(repo_id, **kwargs)
        return push_to_hub(self, repo_id, **kwargs)

    def _upload_modified_files(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        files_timestamps: dict[str, float],
        commit_message: str | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
    ) -> CommitInfo:
        """Upload as transformers does, and delete the weights of an earlier push in the same commit."""
        api = HfApi(token=token)
        if revision is not None and not revision.startswith("refs/pr") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        paths = [path for path in sorted(Path(working_dir).iterdir()) if path.is_file()]
        return upload(
            api,
            repo_id,
            [path for path in paths if path.stat().st_mtime != files_timestamps.get(path.name)],
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )

    def _move_missing_keys_from_meta_to_device(self, missing_keys: Any, *args: Any, **kwargs: Any) -> None:
        """Do as transformers does, but limit the memory for parameters that no file holds."""
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
    """Return the configuration that the caller asks for, and remove its fields from `kwargs`."""
    if isinstance(config, ViViTConfig):
        return copy.deepcopy(config)
    overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in _CONFIG_ARGUMENTS}
    if isinstance(config, PretrainedConfig):  # transformers' own VivitConfig
        raw = config.to_dict()
    elif config is not None:
        raw, _ = ViViTConfig.get_config_dict(config)
    return ViViTConfig.from_dict(raw, **overrides)


def _check_files(source: Any, hub: dict[str, Any]) -> None:
    """Raise a ValueError that names the first damaged file of weights in a folder, or in the cache of a Hub id."""
    try:
        config = cached_file(source, CONFIG_NAME, **{**hub, "force_download": False})
    except OSError:
        return
    if config is not None:
        folder = Path(config).parent
        check_weight_indices(folder, is_complete=os.path.isdir(source))
        check_weights(folder)


def _account_for_keys(model: Any, info: dict[str, Any], source: Any, ignore_mismatched_sizes: bool) -> None:
    """Raise a ValueError unless checkpoint and model have the same parameters, classifier and decoder aside."""
    own = set(model.state_dict())
    has_head = {head: any(name.startswith(head) for name in own) for head in ("classifier.", "decoder.")}
    unused = {
        head: sorted(name for name in info["unexpected_keys"] if name.startswith(head) and not has_head[head])
        for head in has_head
    }
    left_out = {name for names in unused.values() for name in names}
    # A classifier may be new, and a decoder, but not a part of a decoder.
    is_new_decoder = {name for name in own if name.startswith("decoder.")} <= set(info["missing_keys"])
    new = ("classifier.", "decoder.") if is_new_decoder else ("classifier.",)
    problems = {
        "in the checkpoint, without a place in the model": [n for n in info["unexpected_keys"] if n not in left_out],
        "in the model, but not in the checkpoint": [n for n in info["missing_keys"] if not n.startswith(new)],
        "of another shape in the checkpoint": [
            f"{name} {tuple(there)} -> {tuple(here)}"
            for name, there, here in info["mismatched_keys"]
            if not (name.startswith("classifier.") or ignore_mismatched_sizes)
        ],
    }
    if unused["classifier."] and hasattr(model, "classifier"):
        logger.warning("Left out %s: the model has no labels (`num_labels=0`).", ", ".join(unused["classifier."]))
    if unused["decoder."]:
        logger.warning("Left out the decoder of masked pretraining (%d tensors).", len(unused["decoder."]))
    lines = [
        f"  {len(names)} {what}: {', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}\n"
        for what, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(
            f"The weights of {source} do not fit a {type(model).__name__} with this configuration "
            f"(attention_type={model.config.attention_type!r}, pooling={model.config.pooling!r}):\n{''.join(lines)}"
            "Load it with the configuration that it was saved with, or convert it first."
        )


def _renew_classifier_of_other_labels(model: Any, stored: ViViTConfig, target: ViViTConfig) -> None:
    """Initialise the classifier anew if its labels have other names than the stored ones, generic names aside."""
    changed = [index for index in target.id2label if stored.id2label.get(index) != target.id2label[index]]
    if not changed or stored.id2label == {index: f"LABEL_{index}" for index in range(stored.num_labels)}:
        return
    if model.classifier.weight.is_meta:
        raise ValueError(
            "The classifier is offloaded, so it cannot be initialised for new labels. Load the model with these labels "
            "and without a `device_map` that offloads the classifier, save it, and load the saved folder."
        )
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    first = changed[0]
    logger.warning(
        "classifier.weight and classifier.bias are newly initialised: %d of the %d labels differ from the "
        "checkpoint's (%d was %r and is now %r). To rename classes and keep the classifier, load it first and then "
        "change `model.config.id2label`.",
        *(len(changed), target.num_labels, first, stored.id2label.get(first), target.id2label[first]),
    )
