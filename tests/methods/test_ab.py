"""Activation boundaries: only the sign of the teacher's response matters."""

import torch

from src.methods.ab import boundary_loss
from tests.helpers.feature_losses import inputs
from tests.helpers.methods import assert_published_weights, configured


def test_published_weights_of_the_main_stage():
    assert_published_weights(configured("ab"), cross_entropy=1.0)


def test_the_strength_of_the_teachers_neurons_does_not_matter():
    (student,), (teacher,) = inputs("ab")
    value = boundary_loss(student, teacher, 1.0)
    assert torch.equal(boundary_loss(student, teacher * torch.rand(3, 3, 2, 2), 1.0), value)


def test_a_neuron_beyond_the_margin_on_its_side_is_not_moved():
    student = torch.tensor([2.0, -2.0, 0.5, -0.5]).view(1, 1, 2, 2).requires_grad_()
    loss = boundary_loss(student, torch.tensor([0.1, -0.1, 0.1, 0.1]).view(1, 1, 2, 2), 1.0)
    assert loss == 0.5**2 + 1.5**2
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.flatten().tolist() == [0.0, 0.0, -1.0, -3.0]
