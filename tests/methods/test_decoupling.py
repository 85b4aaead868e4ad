"""The split of a softmax that DKD and others share: its definition, and its gradient, which is written by hand."""

import pytest
import torch
from torch import Tensor

from src.methods.decoupling import decouple, non_target_logits, target_log_odds
from tests.helpers.losses import random_case


def by_autograd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The same split, with the gradient of autograd."""
    log_p, log_q = (
        torch.log_softmax(non_target_logits(logits, target) / temperature, dim=1) for logits in (student, teacher)
    )
    log_odds = (target_log_odds(logits, target, temperature) for logits in (student, teacher))
    return (*log_odds, (log_q.exp() * (log_q - log_p)).sum(dim=1))


@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_values_and_gradients_match_autograd(classes: int, temperature: float):
    student, teacher, target = random_case(classes, torch.float64)
    student.requires_grad_()
    teacher.requires_grad_()
    found, wanted = decouple(student, teacher, target, temperature), by_autograd(student, teacher, target, temperature)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    upstream = torch.randn(2, len(target), dtype=torch.float64)
    of_found, of_teacher = torch.autograd.grad(
        (found.student_log_odds, found.non_target_kl), (student, teacher), list(upstream), allow_unused=True
    )
    (of_wanted,) = torch.autograd.grad((wanted[0], wanted[2]), student, list(upstream))
    torch.testing.assert_close(of_found, of_wanted)
    assert of_teacher is None
    assert not found.teacher_log_odds.requires_grad


def test_autograd_is_the_numerical_gradient():
    student, teacher, target = random_case(5, torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: decouple(u, teacher, target, 2.0)[::2], student)


def test_two_arrays_are_kept_for_the_gradient():
    student, teacher, target = random_case(100, torch.float32)
    student.requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
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
    assert (decouple(student, teacher, target, 4.0).non_target_kl == 0).all()


def test_the_target_is_removed_from_each_row():
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert non_target_logits(logits, torch.tensor([0, 2])).tolist() == [[2.0, 3.0], [4.0, 5.0]]


@pytest.mark.parametrize("gap", [0.0, 60.0, -60.0, 2e4])
def test_log_odds_are_exact_if_the_probability_rounds_to_zero_or_one(gap: float):
    """Of two classes, the log-odds at temperature 2 are half the gap of the logits."""
    logits = torch.tensor([[gap, 0.0]])
    for found in (target_log_odds(logits, torch.tensor([0]), 2.0), decouple(logits, logits, torch.tensor([0]), 2.0)[0]):
        assert found.item() == pytest.approx(gap / 2)
