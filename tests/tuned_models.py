"""Models with a setting as `vivit-hf tune` stores it."""

import json

import torch

from vivit_hf import ViViTForVideoClassification
from vivit_hf.inference.fingerprints import loaded_fingerprint
from vivit_hf.inference.stored_fields import write_field
from vivit_hf.inference.stored_settings import OptimizationSetting


def store(model, name="merging-4", dtype=torch.float32, **fields):
    """Put a setting into the configuration of a plain model, as it comes out of a config.json."""
    setting = OptimizationSetting(name, dtype, **fields)
    stored = setting.to_dict(loaded_fingerprint(model), model.device)
    model.config.optimization = json.loads(json.dumps(stored))
    return model


def tune_folder(folder, *arguments, **fields):
    """Store a setting in a model folder."""
    model = store(ViViTForVideoClassification.from_pretrained(folder), *arguments, **fields)
    write_field(folder, "optimization", model.config.optimization)
    return folder
