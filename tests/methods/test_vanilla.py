"""Training alone: cross-entropy on the student's own logits, and nothing else."""

import dataclasses
from typing import Any

import pytest
import torch

from src.methods.method import Labels
from src.methods.vanilla import Vanilla
from tests.helpers.closed_forms import assert_same
from tests.helpers.losses import BATCH, PRECISIONS, log_softmax, observed, three_logits
from tests.helpers.methods import configured


def test_the_loss_is_cross_entropy_of_the_students_own_logits():
    own, distilled, teacher, target = three_logits()
    terms = configured("vanilla").all_terms(*observed(distilled, teacher, target, own=own, views=2))
    assert set(terms) == {"cross_entropy"} == set(Vanilla().weights(0))
    of_own, of_distilled = torch.autograd.grad(terms["cross_entropy"], (own, distilled), allow_unused=True)
    log_p = torch.tensor([log_softmax(row, 1.0) for row in own.tolist()], dtype=torch.float64)
    assert_same(terms["cross_entropy"], -log_p.gather(1, target[:, None]).mean())
    assert_same(of_own, (log_p.exp() - torch.eye(10)[target]) / BATCH)
    assert of_distilled is None


def test_smoothed_labels_and_class_weights_change_cross_entropy():
    own, distilled, teacher, target = three_logits()
    batch, logits = observed(distilled, teacher, target, own=own)
    class_weights = torch.linspace(0.5, 2.0, 10, dtype=torch.float64)
    log_p = torch.tensor([log_softmax(row, 1.0) for row in own.tolist()], dtype=torch.float64)
    smoothed = 0.7 * torch.eye(10, dtype=torch.float64)[target] + 0.03
    for options, labels, weights in (
        ({"label_smoothing": 0.3}, smoothed, torch.ones(BATCH, dtype=torch.float64)),
        ({"class_weights": class_weights}, torch.eye(10)[target], class_weights[target]),
        ({"label_smoothing": 0.3, "class_weights": class_weights}, smoothed, class_weights[target]),
    ):
        changed = dataclasses.replace(batch, **options)
        term = Vanilla().all_terms(changed, logits)["cross_entropy"]
        assert_same(term, -(weights * (labels * log_p).sum(dim=1)).mean())
        (gradient,) = torch.autograd.grad(term, own, retain_graph=True)
        assert_same(gradient, weights[:, None] * (log_p.exp() - labels) / BATCH)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_label_of_a_mixed_image_is_the_mean_of_two_labels(smoothing: float, weighted: bool):
    own, distilled, teacher, target = three_logits()
    batch, logits = observed(distilled, teacher, target, own=own)
    other, share = (target + 3) % 10, torch.linspace(0, 1, BATCH, dtype=torch.float64)
    class_weights = torch.linspace(0.5, 2.0, 10, dtype=torch.float64) if weighted else None
    weights = torch.ones(10, dtype=torch.float64) if class_weights is None else class_weights
    mixed = dataclasses.replace(
        batch,
        target=(target + 1) % 10,  # the class for distillation does not count
        labels=Labels(target, other, share),
        label_smoothing=smoothing,
        class_weights=class_weights,
    )
    smoothed = (1 - smoothing) * torch.eye(10, dtype=torch.float64) + smoothing / 10
    one, two = ((of * weights[each])[:, None] * smoothed[each] for each, of in ((target, share), (other, 1 - share)))
    labels = one + two
    log_p = torch.tensor([log_softmax(row, 1.0) for row in own.tolist()], dtype=torch.float64)
    term = Vanilla().all_terms(mixed, logits)["cross_entropy"]
    assert_same(term, -(labels * log_p).sum(dim=1).mean())
    (gradient,) = torch.autograd.grad(term, own)
    assert_same(gradient, (labels.sum(dim=1, keepdim=True) * log_p.exp() - labels) / BATCH)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, {"class_weights": torch.linspace(0.5, 2.0, 10)}])
def test_images_without_a_label_do_not_count(options: dict[str, Any]):
    own, distilled, teacher, target = three_logits()
    batch, logits = observed(distilled, teacher, target, own=own)
    has_label = torch.arange(BATCH) % 2 == 0
    labels = Labels(torch.where(has_label, target, -1), labelled_share=0.25)
    whole = Vanilla().all_terms(dataclasses.replace(batch, labels=labels, **options), logits)["cross_entropy"]
    (gradient,) = torch.autograd.grad(whole, own, retain_graph=True)
    assert (gradient[~has_label] == 0).all()
    part, logits_of_part = observed(distilled[::2], teacher[::2], target[::2], own=own[::2])
    alone = Vanilla().all_terms(dataclasses.replace(part, **options), logits_of_part)["cross_entropy"]
    # the share is that of the whole batch, of which this may be the part of one device
    assert_same(whole, alone * has_label.double().mean() / 0.25)


def test_a_batch_without_labels_has_no_cross_entropy():
    own, distilled, teacher, target = three_logits()
    batch, logits = observed(distilled, teacher, target, own=own)
    labels = Labels(torch.full_like(target, -1), labelled_share=0.0)
    term = Vanilla().all_terms(dataclasses.replace(batch, labels=labels), logits)["cross_entropy"]
    (gradient,) = torch.autograd.grad(term, own)
    assert term == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_the_loss_is_a_float32_scalar_in_every_precision_of_the_network(dtype: torch.dtype):
    own, distilled, teacher, target = three_logits(dtype)
    (term,) = Vanilla().all_terms(*observed(distilled, teacher, target, own=own)).values()
    assert term.dtype == torch.float32
    assert term.shape == ()


def test_it_needs_no_teacher():
    own, distilled, _, target = three_logits()
    assert not Vanilla.needs_teacher
    assert not Vanilla().distils_logits
    terms = Vanilla().all_terms(*observed(distilled, None, target, own=own))
    assert torch.isfinite(terms["cross_entropy"])


@pytest.mark.parametrize("epoch", [0, 19, 239])
def test_the_weight_is_one(epoch: int):
    assert Vanilla().weights(epoch) == {"cross_entropy": 1.0}
