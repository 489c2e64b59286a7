"""The loss of every kind of labels against its definition, and the same for a batch and for its pieces."""

import pytest
import torch
from tiny_models import make_clips, make_model, tiny_config

from vivit_hf import ViViTConfig
from vivit_hf.modeling_vivit import infer_problem_type, video_classification_loss


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
BATCH, LABELS = 6, 5


def make_labels(kind, gaps=True):
    """(problem_type, labels) of a kind; with gaps, the first half of the batch has more of -100 than the second."""
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randn(BATCH, LABELS, generator=generator, dtype=torch.float64)
    if kind == "single":
        labels = torch.tensor([0, 4, 2, 2, 1, 3])
        labels[:2] = -100 if gaps else labels[:2]
        return SINGLE, labels
    if kind == "soft":
        return SINGLE, (2 * numbers).softmax(dim=1)
    if kind == "multi":
        labels = (numbers > 0).double()
        if gaps:
            labels[0, 1:4] = labels[4, 2] = -100
        return MULTI, labels
    return REGRESSION, numbers


KINDS = ["single", "soft", "multi", "regression"]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(BATCH, LABELS, generator=generator, dtype=torch.float64)).requires_grad_()


def by_hand(logits, labels, kind):
    """(sum of the losses, number of things that it is a sum over), one number at a time."""
    total, count = 0.0, 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        probabilities = torch.tensor(row, dtype=torch.float64).exp()
        probabilities /= probabilities.sum()
        if kind == "single":
            if label != -100:
                total, count = total - probabilities[label].log().item(), count + 1
        elif kind == "soft":
            total, count = total - sum(t * p.log().item() for t, p in zip(label, probabilities, strict=True)), count + 1
        for logit, target in zip(row, label if kind in ("multi", "regression") else [], strict=False):
            if kind == "regression":
                total, count = total + (logit - target) ** 2, count + 1
            elif target != -100:
                yes = torch.tensor(logit, dtype=torch.float64).sigmoid().item()
                loss = -(torch.tensor(yes if target == 1 else 1 - yes, dtype=torch.float64)).log().item()
                total, count = total + loss, count + 1
    return total, count


@pytest.mark.parametrize("gaps", [True, False], ids=["with -100", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_the_definition(logits, kind, gaps):
    problem_type, labels = make_labels(kind, gaps)
    total, count = by_hand(logits, labels, kind)
    assert count == {"single": BATCH - 2 * gaps, "soft": BATCH, "multi": 30 - 4 * gaps, "regression": 30}[kind]
    loss = video_classification_loss(logits, labels, problem_type)
    assert loss.ndim == 0 and loss.item() == pytest.approx(total / count, rel=1e-10)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_given_count_takes_the_place_of_the_batchs_own(logits, kind, as_tensor):
    problem_type, labels = make_labels(kind)
    total, _ = by_hand(logits, labels, kind)
    items = torch.tensor(40) if as_tensor else 40
    divisor = 40 / LABELS if kind == "soft" else 40  # Trainer counts every element of soft labels
    loss = video_classification_loss(logits, labels, problem_type, num_items_in_batch=items)
    assert loss.item() == pytest.approx(total / divisor, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_batch_add_up_to_the_batch(logits, kind):
    """Loss and gradient; and without the count they do not, or this would show nothing."""
    problem_type, labels = make_labels(kind)
    whole = video_classification_loss(logits, labels, problem_type)
    (expected,) = torch.autograd.grad(whole, logits, retain_graph=True)
    items = (labels != -100).sum()  # as Trainer counts

    def pieces(count):
        parts = zip(logits.split([2, 4]), labels.split([2, 4]), strict=True)
        return sum(video_classification_loss(part, label, problem_type, count) for part, label in parts)

    assert pieces(items).item() == pytest.approx(whole.item(), rel=1e-10)
    torch.testing.assert_close(torch.autograd.grad(pieces(items), logits)[0], expected)
    assert pieces(None).item() / 2 != pytest.approx(whole.item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_accumulates_the_gradients_of_the_whole_batch(variant, kind):
    problem_type, labels = make_labels(kind)
    config = tiny_config(variant, problem_type=problem_type)
    model, clips = make_model(config).double(), make_clips(config, batch=BATCH).double()

    def gradients(cuts, **kwargs):
        model.zero_grad()
        for piece, label in zip(clips.split(cuts), labels.split(cuts), strict=True):
            model(piece, labels=label, **kwargs).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole = gradients([BATCH])
    accumulated = gradients([2, 4], num_items_in_batch=(labels != -100).sum())
    for name, gradient in whole.items():
        torch.testing.assert_close(accumulated[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_one_hot_soft_labels_are_hard_labels(logits):
    _, hard = make_labels("single", gaps=False)
    soft = torch.nn.functional.one_hot(hard, LABELS).double()
    losses = [video_classification_loss(logits, labels, SINGLE) for labels in (hard, soft)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*gradients)
    hard_count, soft_count = (
        video_classification_loss(logits, labels, SINGLE, num_items_in_batch=labels.numel()) for labels in (hard, soft)
    )
    torch.testing.assert_close(hard_count, soft_count)


def test_mixed_labels_are_mixed_losses(logits):
    _, labels = make_labels("single", gaps=False)
    one, other = (torch.nn.functional.one_hot(each, LABELS).double() for each in (labels, labels.flip(0)))
    mixed = video_classification_loss(logits, 0.3 * one + 0.7 * other, SINGLE)
    apart = [video_classification_loss(logits, each, SINGLE) for each in (labels, labels.flip(0))]
    torch.testing.assert_close(mixed, 0.3 * apart[0] + 0.7 * apart[1])


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_a_batch_without_a_single_label_has_no_loss_and_no_gradient(logits, kind):
    problem_type, labels = make_labels(kind)
    ignored = torch.full_like(labels, -100)
    for items in (0, torch.tensor(0)):
        assert video_classification_loss(logits, ignored, problem_type, num_items_in_batch=items).item() == 0
    loss = video_classification_loss(logits, ignored, problem_type)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_computed_in_single_precision_at_least(logits, kind, dtype):
    problem_type, labels = make_labels(kind)
    labels = labels.to(dtype) if labels.is_floating_point() else labels
    loss = video_classification_loss(logits.to(dtype), labels, problem_type)
    wide = video_classification_loss(logits.to(dtype).double(), labels, problem_type)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(wide.item(), rel=1e-5)


# Shapes


@pytest.mark.parametrize(
    ("problem_type", "shape", "logits_shape", "dtype"),
    [
        (SINGLE, (6, 1), (6, 5), torch.int64),
        (SINGLE, (6,), (6, 5), torch.int32),
        (MULTI, (6, 5), (6, 5), torch.int64),
        (MULTI, (6,), (6, 1), torch.float32),
        (REGRESSION, (6,), (6, 1), torch.float32),
        (REGRESSION, (6, 1), (6, 1), torch.int64),
    ],
)
def test_labels_may_leave_out_or_add_a_side_of_one_and_be_of_another_dtype(problem_type, shape, logits_shape, dtype):
    labels = torch.ones(shape, dtype=dtype)
    reference = torch.ones(
        (6,) if problem_type == SINGLE else logits_shape, dtype=torch.int64 if problem_type == SINGLE else None
    )
    logits = torch.randn(logits_shape)
    loss = video_classification_loss(logits, labels, problem_type)
    torch.testing.assert_close(loss, video_classification_loss(logits, reference, problem_type))


@pytest.mark.parametrize(
    ("problem_type", "shape", "dtype"),
    [
        (SINGLE, (5,), torch.int64),
        (SINGLE, (6, 5), torch.int64),
        (SINGLE, (6,), torch.float32),
        (SINGLE, (6, 4), torch.float32),
        (MULTI, (6,), torch.float32),
        (MULTI, (6, 1), torch.float32),
        (MULTI, (5, 6), torch.float32),
        (REGRESSION, (6,), torch.float32),
        (REGRESSION, (6, 1), torch.float32),
        (REGRESSION, (1, 5), torch.float32),
        (REGRESSION, (), torch.float32),
    ],
)
def test_labels_that_do_not_fit_are_an_error_that_prints_both_shapes(problem_type, shape, dtype):
    """Above all those that broadcasting would have taken."""
    expected = r"\(6,\)" if (problem_type, dtype) == (SINGLE, torch.int64) else r"\(6, 5\)"
    shape_text = str(tuple(shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(
        ValueError, match=rf"Labels of shape {shape_text}.*logits of shape \(6, 5\).*expected {expected}"
    ):
        video_classification_loss(torch.zeros(6, 5), torch.zeros(shape, dtype=dtype), problem_type)


def test_an_unknown_problem_type_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match="'ranking'` is not known; expected 'single_label_classification'"):
        video_classification_loss(torch.zeros(6, 5), torch.zeros(6), "ranking")


# The model


@pytest.mark.parametrize(
    ("num_labels", "labels", "expected"),
    [
        (5, torch.tensor([1, 4]), SINGLE),
        (5, torch.rand(2, 5), MULTI),
        (1, torch.rand(2), REGRESSION),
        (1, torch.rand(2, 1), REGRESSION),
    ],
)
def test_the_problem_type_is_told_from_the_labels_and_kept(num_labels, labels, expected):
    config = tiny_config("factorised_encoder", num_labels=num_labels)
    model = make_model(config)
    assert config.problem_type is None
    assert infer_problem_type(labels, num_labels) == expected
    outputs = model(make_clips(config), labels=labels)
    assert model.config.problem_type == expected
    torch.testing.assert_close(outputs.loss, video_classification_loss(outputs.logits, labels, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_the_problem_type_of_the_configuration_decides(variant, kind):
    problem_type, labels = make_labels(kind)
    config = tiny_config(variant, problem_type=problem_type)
    model, clips = make_model(config), make_clips(config, batch=BATCH)
    outputs = model(clips, labels=labels, num_items_in_batch=17)
    expected = video_classification_loss(outputs.logits, labels, problem_type, 17)
    torch.testing.assert_close(outputs.loss, expected)
    assert model.config.problem_type == problem_type
    assert outputs[0] is outputs.loss and model(clips).loss is None


GROUPS = {"noun": 4, "verb": 3}


def soft_blocks(batch):
    return torch.cat([torch.rand(batch, size).softmax(dim=1) for size in GROUPS.values()], dim=1)


def test_the_loss_of_groups_is_the_mean_of_theirs():
    torch.manual_seed(0)
    logits, sizes = torch.randn(5, 7), tuple(GROUPS.values())
    hard = torch.tensor([[0, 2], [3, 0], [1, 1], [2, 2], [0, 1]])
    nouns = torch.nn.functional.cross_entropy(logits[:, :4], hard[:, 0])
    verbs = torch.nn.functional.cross_entropy(logits[:, 4:], hard[:, 1])
    loss = video_classification_loss(logits, hard, "single_label_classification", None, sizes)
    torch.testing.assert_close(loss, (nouns + verbs) / 2)
    one_hot = torch.cat([torch.nn.functional.one_hot(hard[:, g], size) for g, size in enumerate(sizes)], dim=1).float()
    torch.testing.assert_close(
        video_classification_loss(logits, one_hot, "single_label_classification", None, sizes), loss
    )
    gap = hard.clone()
    gap[:, 1] = -100
    torch.testing.assert_close(
        video_classification_loss(logits, gap, "single_label_classification", None, sizes), nouns
    )


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_pieces_of_a_batch_with_groups_add_up(kind):
    torch.manual_seed(0)
    logits, sizes = torch.randn(5, 7), tuple(GROUPS.values())
    labels = soft_blocks(5) if kind == "soft" else torch.tensor([[0, 2], [3, -100], [1, 1], [2, 2], [-100, 1]])
    whole = video_classification_loss(logits, labels, "single_label_classification", None, sizes)
    items = (labels != -100).sum()  # as Trainer counts
    parts = [
        video_classification_loss(logits[rows], labels[rows], "single_label_classification", items, sizes)
        for rows in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_a_model_with_groups_trains_and_is_saved_with_them(tmp_path):
    model = make_model(tiny_config("factorised_encoder", label_groups=GROUPS, num_labels=7))
    assert ViViTConfig(label_groups=GROUPS).num_labels == 7
    labels = torch.tensor([[3, 0], [1, 2]])
    outputs = model(make_clips(model.config), labels=labels)
    outputs.loss.backward()
    assert outputs.logits.shape == (2, 7) and model.classifier.weight.grad.abs().sum() > 0
    split = model.split_logits(outputs.logits)
    assert {name: tuple(part.shape) for name, part in split.items()} == {"noun": (2, 4), "verb": (2, 3)}
    by_hand = sum(torch.nn.functional.cross_entropy(part, labels[:, g]) for g, part in enumerate(split.values())) / 2
    torch.testing.assert_close(outputs.loss, by_hand)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert list(again.config.label_groups.items()) == list(GROUPS.items())
    assert again.config.problem_type == "single_label_classification"
    fresh = type(model).from_pretrained(tmp_path, num_labels=5)
    assert fresh.config.label_groups is None and fresh.config.num_labels == 5
    other = type(model).from_pretrained(tmp_path, label_groups={"noun": 2, "verb": 2})
    assert other.config.num_labels == 4
    with pytest.raises(ValueError, match="one group"):
        other.from_pretrained(tmp_path, num_labels=5).split_logits(torch.zeros(1, 5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_groups": {"noun": 5}}, "at least two groups"),
        (
            {"label_groups": {"noun": 4, "verb": 0}},
            "label_groups=.*'verb': 0.* must be the sizes of at least two groups by name",
        ),
        ({"label_groups": GROUPS, "num_labels": 6}, "are 7 labels, but there are 6"),
        ({"label_groups": GROUPS, "num_labels": 7, "problem_type": "regression"}, "does not go with `label_groups`"),
        (
            {"label_groups": {"verb": 3, "noun": 4}, "num_labels": 7},
            r"loaded in the order \['noun', 'verb'\].*'group: label'",
        ),
    ],
)
def test_groups_that_cannot_be_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("factorised_encoder", **fields)
