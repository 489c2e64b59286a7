"""Training a part of the weights: the checks of `--freeze`, and LoRA."""

from typing import Any

from ..configuration_vivit import ViViTConfig
from ..modeling_vivit import ViViTForVideoClassification
from .finetuning_arguments import ModelArguments
from .finetuning_parser import Say, without_renaming_warnings
from .parameters import untrained_modules


LORA_TARGETS = r".*\.(q_proj|v_proj)"


def check_freezing(model: ViViTForVideoClassification, arguments: ModelArguments, has_random_tubelets: bool) -> None:
    """Raise ValueError if `--freeze` or `--lora_rank` would freeze weights that have never been trained."""
    if arguments.freeze == "none" and not arguments.lora_rank:
        return
    given = f"--freeze {arguments.freeze}" if arguments.freeze != "none" else f"--lora_rank {arguments.lora_rank}"
    if arguments.model_name_or_path in ViViTConfig.presets:
        raise ValueError(f"{given} would freeze the random weights of the preset: leave it out, or start from a model.")
    if arguments.lora_rank:
        return  # it trains untrained modules in full
    if has_random_tubelets:
        raise ValueError(f"{given} would freeze the random kernel of --tubelet_init random: leave one of them out.")
    is_new = "temporal_encoder" in untrained_modules(model)
    # While its output projections are zero, the encoder is an average over time.
    is_random = is_new and model.vivit.temporal_encoder.layer[0].attention.o_proj.weight.any()
    if arguments.freeze == "all_but_head" and is_random:
        raise ValueError(
            "--freeze all_but_head would freeze the temporal encoder, which is newly initialised. Use --freeze "
            "spatial, or --num_temporal_layers 0 for the average over time."
        )


def add_lora(model: ViViTForVideoClassification, arguments: ModelArguments, has_random_tubelets: bool, say: Say) -> Any:
    """Return a peft model that trains low-rank updates, and in full the classifier and modules that are still new."""
    from peft import LoraConfig, get_peft_model

    whole = untrained_modules(model)
    if has_random_tubelets and "vivit.embeddings" not in whole:
        whole.append("vivit.embeddings")
    if whole:
        say(f"LoRA: trained in full, because they ignore the order of frames so far: {', '.join(whole)}")
    settings = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,  # type: ignore[arg-type]  # floats work, too
        target_modules=LORA_TARGETS,
        exclude_modules=rf".*\.({'|'.join(whole)})\..*" if whole else None,
        modules_to_save=["classifier", *whole],
    )
    with without_renaming_warnings():
        adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = arguments.model_name_or_path
    return adapted
