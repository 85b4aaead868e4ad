"""Correlation congruence: a value worked by hand, batches of one, and both trained embeddings."""

import torch

from src.methods.cc import congruence_loss
from src.models.network import Shapes
from tests.helpers.methods import assert_published_weights, configured, on_shapes


def test_published_weights():
    """Those of RepDistiller's run_cifar_distill.sh."""
    assert_published_weights(configured("cc"), cross_entropy=1.0, congruence=0.02)


def test_a_value_worked_by_hand():
    """Distances (1, 2), (3, 4) and (0, 1): the mean of 1 * 3 + 2 * 4 and 3 * 0 + 4 * 1."""
    student = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 5.0]])
    teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 6.0]])
    assert congruence_loss(student, teacher) == (11 + 4) / 2


def test_a_batch_of_one_has_no_neighbours():
    assert congruence_loss(torch.ones(1, 3), torch.zeros(1, 3)) == 0


def test_embeddings_of_both_networks_have_one_size():
    made = on_shapes("cc", Shapes(5, ((2, 8, 8),), 6), Shapes(5, ((2, 8, 8),), 8))
    assert (
        made.student_embedding(torch.zeros(1, 6)).shape == made.teacher_embedding(torch.zeros(1, 8)).shape == (1, 128)
    )
