"""The closed forms of gradients at the logits, against autograd."""

from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from src.analysis.gradient_forms import (
    explicit_transfer_gradient,
    kd_gradient,
    nckd_gradient,
    target_direction,
    tckd_gradient,
)
from src.methods.aekt import Weighting
from src.methods.kd import kd_loss
from tests.helpers.losses import explicit_transfer_loss, nckd_loss, random_case, tckd_loss

Gradient = Callable[[Tensor, Tensor, Tensor, float], Tensor]


PAIRS: dict[str, tuple[Gradient, Gradient]] = {
    "kd": (
        lambda u, v, _, temperature: kd_loss(u, v, temperature),
        lambda u, v, _, temperature: kd_gradient(u, v, temperature),
    ),
    "tckd": (tckd_loss, tckd_gradient),
    "nckd": (nckd_loss, nckd_gradient),
} | {
    f"{weighting} {term}": (
        partial(explicit_transfer_loss, weighting=weighting, max_weight=3.0, confidence_term=term),
        partial(explicit_transfer_gradient, weighting=weighting, max_weight=3.0, confidence_term=term),
    )
    for weighting in get_args(Weighting)
    for term in (True, False)
}
"""Loss and closed form of its gradient, by name."""


def autograd(loss: Gradient, student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute the gradient of each sample's loss by autograd."""
    student = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher, target, temperature), student)
    return len(student) * gradient


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", PAIRS)
def test_closed_forms_equal_autograd(name: str, temperature: float) -> None:
    loss, gradient = PAIRS[name]
    for classes in (2, 3, 50):
        student, teacher, target = random_case(classes, torch.float64)
        found = gradient(student, teacher, target, temperature)
        torch.testing.assert_close(found, autograd(loss, student, teacher, target, temperature), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(found.sum(dim=1), torch.zeros(len(found), dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_closed_forms_are_exact_for_extreme_logits(name: str) -> None:
    loss, gradient = PAIRS[name]
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 3.0], [0.0, 0.0, 0.0], [60.0, 1.0, 0.0]])
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 5.0], [1e4, 0.0, 0.0], [90.0, 0.0, 1.0]])
    target = torch.zeros(4, dtype=torch.int64)
    found = gradient(student, teacher, target, 1.0)
    assert torch.isfinite(found).all()
    expected = autograd(loss, student.double(), teacher.double(), target, 1.0)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_losses_of_p_t_alone_push_along_one_direction() -> None:
    student, teacher, target = random_case(10, torch.float64)
    one = tckd_gradient(student, teacher, target, 4.0)
    other = explicit_transfer_gradient(student, teacher, target, 4.0)
    cosine = F.cosine_similarity(one, other, dim=1)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine))
    direction = target_direction(student, target, 4.0)
    torch.testing.assert_close(F.cosine_similarity(direction, other, dim=1), torch.ones_like(cosine))


def test_the_direction_gives_to_the_target_what_it_takes_from_the_others() -> None:
    student, _, target = random_case(10, torch.float64)
    direction = target_direction(student, target, 4.0)
    p = (student / 4.0).softmax(dim=1)
    p_t = p.gather(1, target[:, None])
    torch.testing.assert_close(direction, (p / (1 - p_t)).scatter(1, target[:, None], -1.0))
