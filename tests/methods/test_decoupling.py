"""The decomposition that DKD's losses share: its definition in float64, and its gradient, which is written by hand."""

import pytest
import torch
from torch import Tensor

from src.methods.decoupling import decouple, non_target_logits, target_log_odds
from tests.methods.test_losses import random_case


def by_autograd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The same without a gradient of its own."""
    log_p, log_q = (
        torch.log_softmax(non_target_logits(logits, target) / temperature, dim=1) for logits in (student, teacher)
    )
    log_odds = (target_log_odds(logits, target, temperature) for logits in (student, teacher))
    return (*log_odds, (log_q.exp() * (log_q - log_p)).sum(dim=1))


@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_values_and_gradients(classes: int, temperature: float):
    student, teacher, target = random_case(classes, torch.float64)
    student.requires_grad_()
    teacher.requires_grad_()
    said, wanted = decouple(student, teacher, target, temperature), by_autograd(student, teacher, target, temperature)
    for one, other in zip(said, wanted, strict=True):
        torch.testing.assert_close(one, other)
    upstream = torch.randn(2, len(target), dtype=torch.float64)
    of_said, of_teacher = torch.autograd.grad(
        (said.student, said.divergence), (student, teacher), list(upstream), allow_unused=True
    )
    (of_wanted,) = torch.autograd.grad((wanted[0], wanted[2]), student, list(upstream))
    torch.testing.assert_close(of_said, of_wanted)
    assert of_teacher is None
    assert not said.teacher.requires_grad


def test_gradcheck():
    student, teacher, target = random_case(5, torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: decouple(u, teacher, target, 2.0)[::2], student)


def test_two_arrays_are_kept_for_the_gradient():
    student, teacher, target = random_case(100, torch.float32)
    student.requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        decouple(student, teacher, target, 2.0)
    assert sum(kept) == 2 * student.numel() + len(target)


def test_inputs_stay_as_they_are():
    student, teacher, target = random_case(5, torch.float32)
    before = student.clone(), teacher.clone()
    decouple(student, teacher, target, 1.0)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_two_classes_have_no_others_to_differ_in():
    student, teacher, target = random_case(2, torch.float32)
    assert (decouple(student, teacher, target, 4.0).divergence == 0).all()
