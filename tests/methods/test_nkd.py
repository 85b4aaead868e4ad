"""Normalised distillation: its non-target part does not see the target, and is DKD's NCKD plus an entropy."""

import torch

from src.methods.nkd import non_target_loss, soft_target_loss
from tests.helpers.logit_losses import LOGIT_LOSSES, TEMPERATURE, value_and_gradient
from tests.helpers.losses import nckd_loss, observed, random_case, three_logits
from tests.helpers.methods import configured


def test_published_weights():
    assert configured("nkd").weights(0) == {"cross_entropy": 1.0, "soft_target": 1.0, "non_target": 3.5}
    on_imagenet = configured("nkd", "resnet34_to_resnet18")
    assert on_imagenet.weights(0) == {"cross_entropy": 1.0, "soft_target": 1.0, "non_target": 1.5}
    assert on_imagenet.temperature == 1.0


def test_terms_are_the_two_losses():
    own, distilled, teacher, target = three_logits()
    terms = configured("nkd").all_terms(*observed(distilled, teacher, target, own=own))
    assert terms["soft_target"] == soft_target_loss(distilled, teacher, target)
    assert terms["non_target"] == non_target_loss(distilled, teacher, target, 3.0)


def test_the_soft_target_worked_by_hand():
    """p_t = 1/4 and q_t = 1/2 give log(4) / 2."""
    student = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    value = soft_target_loss(student, teacher, torch.tensor([0]))
    torch.testing.assert_close(value, torch.tensor(4.0, dtype=torch.float64).log() / 2)


def test_the_non_target_part_does_not_see_the_target():
    student, teacher, target = random_case(6, torch.float64)
    value, gradient = value_and_gradient(LOGIT_LOSSES["nkd, non-target"], student, teacher, target)
    column = target[:, None]
    moved = (student.scatter(1, column, 50.0), teacher.scatter(1, column, -50.0), target)
    assert torch.equal(value_and_gradient(LOGIT_LOSSES["nkd, non-target"], *moved)[0], value)
    assert (gradient.gather(1, column) == 0).all()


def test_the_non_target_part_is_nckd_and_an_entropy():
    """The entropy is the loss of a student that has reached its teacher."""
    student, teacher, target = random_case(6, torch.float64)
    entropy = non_target_loss(teacher, teacher, target, TEMPERATURE)
    torch.testing.assert_close(
        non_target_loss(student, teacher, target, TEMPERATURE),
        nckd_loss(student, teacher, target, TEMPERATURE) + entropy,
    )
