"""Teachers of videos for the tests of distillation, and the divergence of what they say by hand."""

import json

import numpy as np
from tiny_models import randomise
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from vivit_hf.data import LabelMap


LABELS = LabelMap({"": ("dark", "grey", "bright")})
SEVERAL = LabelMap({"": ("dark", "grey", "bright")}, has_several=True)
GROUPS = LabelMap({"noun": ("pan", "cup"), "verb": ("take", "put", "open")})
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SHUFFLED = ("bright", "other", "dark", "grey")  # a label more, and another order


def log_softmax(values):
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def divergence(teacher, student):
    """The Kullback-Leibler divergence of two softmax distributions, over the last axis."""
    theirs, ours = log_softmax(teacher), log_softmax(student)
    return (np.exp(theirs) * (theirs - ours)).sum(axis=-1)


def names_of(labels):
    return {"id2label": dict(enumerate(labels))}


def write_processor(folder, file="preprocessor_config.json", **changes):
    settings = {"image_mean": MEAN, "image_std": STD, "do_normalize": True, "do_rescale": True}
    settings |= {"rescale_factor": 1 / 255, "size": {"shortest_edge": 32}, **changes}
    (folder / file).write_text(json.dumps(settings))
    return folder


def write_videomae(folder, labels=SHUFFLED, **changes):
    sizes = {"image_size": 32, "patch_size": 16, "num_frames": 4, **SMALL}
    config = VideoMAEConfig(**{**sizes, **names_of(labels), **changes})
    model = randomise(VideoMAEForVideoClassification(config))
    model.save_pretrained(folder)
    write_processor(folder)
    return model.eval()
