"""The unknown answer: scores against their formulas and scikit-learn, rules, and the file of known features."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from tiny_models import ATTENTION_TYPES, make_clips, make_model, tiny_config

from vivit_hf import ViViTConfig, ViViTForVideoClassification, ViViTVideoProcessor
from vivit_hf.calibration_vivit import KNOWN_FEATURES, Calibration, answer_fingerprint
from vivit_hf.data import LabelMap
from vivit_hf.data.annotations import LabelledVideo
from vivit_hf.inference.calibration_files import store_calibration
from vivit_hf.inference.evaluation import Evaluation
from vivit_hf.inference.fingerprints import model_fingerprint
from vivit_hf.inference.prediction import VideoOutputs, VideoPrediction, predict_videos
from vivit_hf.inference.segments import merge_windows, window_segments
from vivit_hf.inference.streaming import StreamingClassifier
from vivit_hf.inference.unknown import UNKNOWN, UnknownRule, classifier_inputs, distances, energies
from vivit_hf.inference.unknown_choice import auroc, choose_known, choose_rule


FIVE = LabelMap({"": tuple("abcde")})
FIELDS = {"temperatures": [1.0], "num_files": 40, "num_units": 40, "num_clips": 2, "num_crops": 1}
FIELDS |= {"averaging": "probabilities"}


def test_energies_are_sums_of_exponentials():
    logits = torch.randn(3, 5, dtype=torch.float64)
    single = -logits.exp().sum(-1).log()
    assert torch.allclose(energies(logits, FIVE), single.float(), atol=1e-6)
    heads = LabelMap({"noun": tuple("abc"), "verb": tuple("xy")})
    both = -logits[:, :3].exp().sum(-1).log() - logits[:, 3:].exp().sum(-1).log()
    assert torch.allclose(energies(logits, heads), both.float(), atol=1e-6)
    several = LabelMap({"": tuple("abcde")}, has_several=True)
    assert torch.allclose(energies(logits, several), -(1 + logits.exp()).log().sum(-1).float(), atol=1e-6)


def test_distances_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    known, found = rng.normal(size=(50, 8)), rng.normal(size=(7, 8))
    normal = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (known, found)]
    expected = NearestNeighbors(n_neighbors=1).fit(normal[0]).kneighbors(normal[1])[0][:, 0]
    assert distances(torch.tensor(found), torch.tensor(known)).numpy() == pytest.approx(expected, abs=1e-5)


def test_the_auroc_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    known, unknown = np.round(rng.normal(size=80), 1), np.round(rng.normal(0.7, size=30), 1)  # with ties
    expected = roc_auc_score([0] * 80 + [1] * 30, np.concatenate([known, unknown]))
    assert auroc(known, unknown) == pytest.approx(expected)


def test_known_videos_are_as_many_of_each_class_as_possible():
    videos = [LabelledVideo(f"{n}", ("a" if n < 90 else "b" if n < 97 else "c",), str(n)) for n in range(100)]
    labels = [one.labels[0] for one in choose_known(videos, 30)]
    assert [labels.count(name) for name in "abc"] == [20, 7, 3]
    assert choose_known(videos, 30) == choose_known(videos, 30) and len(choose_known(videos, 1000)) == 100


def outputs(rng, count, centre, spread=0.3):
    """Files around a centre of feature space, whose logits are the products with the axes."""
    found = []
    for index in range(count):
        features = (centre + spread * rng.normal(size=8)).astype(np.float32)
        logits = 4 * features[:5]
        energy = float(energies(torch.from_numpy(logits), FIVE))
        found.append(VideoPrediction(index, logits, outputs=VideoOutputs(energy, features, logits, features)))
    return found


@pytest.fixture(scope="module")
def files():
    """Files and training files of five classes along five axes; unknown ones along a sixth, and between two classes."""
    rng, axes = np.random.default_rng(0), np.eye(8)
    targets = np.arange(200) % 5
    predictions = [outputs(rng, 1, axes[target])[0] for target in targets]
    videos = [LabelledVideo(f"{index}.mp4", (), str(index)) for index in range(200)]
    found = Evaluation(videos, FIVE, targets, predictions, "views", 1)
    known = [outputs(rng, 1, axes[target])[0] for target in targets]
    return {
        "found": found,
        "known": {"known": known, "known_labels": targets.tolist()},
        "sixth": outputs(rng, 60, axes[6]),
        "weak": outputs(rng, 60, 0.05 * axes[:5].sum(axis=0), spread=0.02),
    }


@pytest.mark.parametrize("score", ["energy", "neighbours"])
def test_no_more_known_files_than_asked_for_are_called_unknown(files, score):
    """With 200 files, the threshold is the score of rank ceil(201 * 0.95) = 191, so 9 files lie above."""
    rule = choose_rule(files["found"], score, 0.05, **files["known"]).rule
    if score == "energy":
        scores = [one.outputs.energy for one in files["found"].predictions]
    else:
        known = torch.tensor(np.stack([one.outputs.features for one in files["known"]["known"]])).half()
        features = torch.tensor(np.stack([one.outputs.features for one in files["found"].predictions]))
        scores = distances(features, known).tolist()
    assert (np.array(scores) > rule["threshold"] + 1e-7).sum() == 9
    assert rule["threshold"] == pytest.approx(rule["window_threshold"]) and rule["false_alarms"] == 0.05


def test_the_score_that_tells_unknown_videos_better_is_chosen(files):
    of_sixth = choose_rule(files["found"], "auto", unknown=files["sixth"], **files["known"])
    assert of_sixth.rule["score"] == max(of_sixth.aurocs, key=of_sixth.aurocs.get)
    assert of_sixth.aurocs["neighbours"] > 0.9 and of_sixth.called > 0.7
    only = choose_rule(files["found"], "energy", unknown=files["weak"])
    assert only.aurocs == {"energy": pytest.approx(1.0, abs=0.01)} and only.known is None and only.called > 0.95


def test_without_unknown_videos_each_class_is_left_out_in_turn(files):
    choice = choose_rule(files["found"], "auto", **files["known"])
    assert choice.aurocs["energy"] > 0.9 and choice.aurocs["neighbours"] > 0.9
    assert "classes that are left out in turn" in choice.lines[1]


def test_files_of_one_group_count_once(files):
    grouped = [
        LabelledVideo(one.video, (), one.where, (f"group={index // 10}",))
        for index, one in enumerate(files["found"].videos)
    ]
    found = Evaluation(grouped, FIVE, files["found"].targets, files["found"].predictions, "views", 1)
    assert choose_rule(found, "energy", 0.05).rule["threshold"]  # 20 groups: 19 are needed
    with pytest.raises(ValueError, match="needs at least 99 labelled files or groups of files, got 20"):
        choose_rule(found, "energy", 0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "neighbours"}, "give them with --known-data"),
        ({"score": "energy", "false_alarms": 0.001}, "needs at least 999 labelled files"),
    ],
)
def test_what_cannot_be_chosen_is_named(files, arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_rule(files["found"], **arguments)


def saved(folder, attention_type="factorised_encoder", score="neighbours", known=None, threshold=0.5):
    """A model whose known features are those of some clips."""
    model = make_model(tiny_config(attention_type))
    model.save_pretrained(folder)
    ViViTVideoProcessor(
        num_frames=8, frame_stride=1, size={"shortest_edge": 24}, crop_size={"height": 24, "width": 40}
    ).save_pretrained(folder)
    rule = {"score": score, "false_alarms": 0.05, "threshold": threshold, "window_threshold": threshold}
    calibration = Calibration(**{**FIELDS, "weights": answer_fingerprint(model), "unknown": rule})
    store_calibration(folder, calibration, known)
    return ViViTForVideoClassification.from_pretrained(folder).eval()


def frames(config, seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 24, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_videos_near_the_known_ones_have_labels_and_others_have_none(attention_type, tmp_path):
    """The known feature is that of one video, so its distance is 0 up to float16, and that of the other is not."""
    model = saved(tmp_path, attention_type, known=torch.ones(1, 32))
    processor = ViViTVideoProcessor.from_pretrained(tmp_path)
    videos = [frames(model.config, 0), frames(model.config, 1)]
    with classifier_inputs(model) as seen, torch.no_grad():
        clips = torch.cat([processor(one)["pixel_values"] for one in videos])
        logits = model(clips).logits
    far = float(distances(seen[0][1:], seen[0][:1]))
    saved(tmp_path, attention_type, known=seen[0][:1].half(), threshold=far / 2)
    model = ViViTForVideoClassification.from_pretrained(tmp_path).eval()
    found = list(predict_videos(model, processor, videos))
    assert [one.unknown for one in found] == [False, True]
    assert found[1].logits == pytest.approx(logits[1].numpy(), abs=1e-4)  # the logits are still there
    windows = []
    for video in videos:
        stream = StreamingClassifier(model, processor)
        windows += stream.push(list(video)) + stream.last_window()
    assert [one.unknown for one in windows] == [False, True]
    segments = list(window_segments(windows, model.config))
    assert segments[0].label != UNKNOWN and (segments[1].label, segments[1].score) == (UNKNOWN, 1.0)
    assert [one.label for one in merge_windows(windows[1:], model.config)] == [UNKNOWN]


def test_energies_need_no_file(tmp_path):
    model = saved(tmp_path, score="energy", threshold=1e6)
    processor = ViViTVideoProcessor.from_pretrained(tmp_path)
    assert next(predict_videos(model, processor, [frames(model.config, 0)])).unknown is False
    model = saved(tmp_path, score="energy", threshold=-1e6)
    assert next(predict_videos(model, processor, [frames(model.config, 0)])).unknown is True
    assert not (tmp_path / KNOWN_FEATURES).exists()


def test_a_model_without_a_rule_says_nothing(tmp_path):
    model = make_model(tiny_config("spatio_temporal"))
    assert UnknownRule.of(model) is None
    model.save_pretrained(tmp_path)
    assert not (tmp_path / KNOWN_FEATURES).exists()


def test_known_features_are_saved_with_the_model(tmp_path):
    model = saved(tmp_path / "a", known=torch.ones(3, 32).half())
    model.save_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "a")  # onto itself
    for folder in ("a", "b"):
        again = ViViTForVideoClassification.from_pretrained(tmp_path / folder)
        assert UnknownRule.of(again).known.tolist() == torch.ones(3, 32).tolist()


def test_a_model_without_its_known_features_loads_and_answers(tmp_path, caplog):
    model = saved(tmp_path / "a", known=torch.ones(3, 32).half())
    (tmp_path / "a" / KNOWN_FEATURES).unlink()
    assert UnknownRule.of(model) is None
    model.save_pretrained(tmp_path / "b")
    stored = ViViTConfig.from_pretrained(tmp_path / "b").calibration
    assert "unknown" not in stored and stored["temperatures"] == [1.0]


def test_features_of_other_weights_are_refused(tmp_path):
    saved(tmp_path / "a", known=torch.ones(3, 32).half())
    path = tmp_path / "a" / KNOWN_FEATURES
    save_file({"features": torch.ones(3, 32)}, path, {"weights": "0" * 16})
    model = ViViTForVideoClassification.from_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"belongs to other weights than the calibration in config.json"):
        UnknownRule.of(model)


def test_a_calibration_of_other_weights_is_refused(tmp_path):
    saved(tmp_path / "a", known=torch.ones(3, 32).half())
    make_model(tiny_config("factorised_encoder"), seed=5).save_pretrained(tmp_path / "b")
    shutil.copyfile(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    model = ViViTForVideoClassification.from_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="belongs to other weights: run"):
        UnknownRule.of(model)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"features": torch.ones(3, 31)}, r"=\[3, 31\]` must be at most 100,000 features of 32 numbers"),
        ({"features": torch.full((3, 32), float("nan"))}, "not finite numbers"),
        ({"others": torch.ones(3, 32)}, "is damaged"),
    ],
)
def test_damaged_features_are_named(tensors, message, tmp_path):
    model = saved(tmp_path, known=torch.ones(3, 32).half())
    save_file(tensors, tmp_path / KNOWN_FEATURES, {"weights": model.config.calibration["weights"]})
    with pytest.raises(ValueError, match=message):
        UnknownRule.of(model)


def test_half_precision_has_nearly_the_same_scores(tmp_path):
    model = saved(tmp_path, known=torch.randn(20, 32, generator=torch.Generator().manual_seed(0)).half())
    clips, scores = make_clips(model.config, 6), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = ViViTForVideoClassification.from_pretrained(tmp_path, dtype=dtype).eval()
        rule = UnknownRule.of(loaded)
        with classifier_inputs(loaded) as seen, torch.no_grad():
            logits = loaded(clips.to(dtype)).logits
        scores[dtype] = rule.scores(logits[:, None], seen[0][:, None])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.allclose(scores[dtype], scores[torch.float32], atol=0.03)


def test_stored_features_of_videos_stay_valid(tmp_path):
    """A calibration and known features are no part of the fingerprint that `embed` stores."""
    folder = tmp_path / "a"
    make_model(tiny_config("factorised_encoder")).save_pretrained(folder)
    processor = ViViTVideoProcessor()
    before = model_fingerprint(folder, ViViTConfig.from_pretrained(folder), processor)
    saved(folder, known=torch.ones(3, 32).half())
    assert json.loads((folder / "config.json").read_text())["calibration"]["unknown"]
    assert model_fingerprint(folder, ViViTConfig.from_pretrained(folder), processor) == before


@pytest.mark.parametrize(
    "unknown",
    [
        {"score": "guess", "threshold": 1.0, "window_threshold": 1.0, "false_alarms": 0.05},
        {"score": "energy", "threshold": float("inf"), "window_threshold": 1.0, "false_alarms": 0.05},
        {"score": "energy", "threshold": 1.0, "window_threshold": "1", "false_alarms": 0.05},
        {"score": "energy", "threshold": 1.0, "window_threshold": 1.0, "false_alarms": 1.5},
        {"score": "energy", "threshold": 1.0},
        "energy",
    ],
)
def test_stored_rules_are_checked(unknown):
    with pytest.raises(ValueError, match=r"calibration.unknown"):
        tiny_config("spatio_temporal", calibration={**FIELDS, "unknown": unknown})
