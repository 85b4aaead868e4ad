"""Probabilistic transfer: probabilities worked by hand, and opposite samples."""

import torch

from src.methods.pkt import nearness, transfer_loss
from tests.helpers.methods import assert_published_weights, configured


def test_published_weights():
    """Those of RepDistiller's run_cifar_distill.sh."""
    assert_published_weights(configured("pkt"), cross_entropy=1.0, transfer=30000.0)


def test_probabilities_worked_by_hand():
    """Kernels of 1 for the same direction, 1/2 at right angles, 0 for the opposite."""
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    wanted = torch.tensor([[2 / 3, 1 / 3, 0.0], [1 / 4, 2 / 4, 1 / 4], [0.0, 1 / 3, 2 / 3]])
    torch.testing.assert_close(nearness(features), wanted)


def test_opposite_samples_of_the_student_give_a_finite_loss():
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = transfer_loss(student, torch.ones(2, 3))
    assert torch.isfinite(loss)
    assert loss > 1
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


def test_a_sample_of_zeros_is_at_right_angles_to_all():
    torch.testing.assert_close(nearness(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))[1], torch.tensor([1 / 3, 2 / 3]))
