"""Relational distillation: distances and angles worked by hand, and samples that coincide."""

import torch

from src.methods.rkd import angle_cosines, relative_distances
from tests.helpers.methods import assert_published_weights, configured

TRIANGLE = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])


def test_published_weights():
    """Those of RepDistiller."""
    assert_published_weights(configured("rkd"), cross_entropy=1.0, distance=25.0, angle=50.0)


def test_distances_worked_by_hand():
    """Sides of 3, 4 and 5, whose mean is 4."""
    wanted = torch.tensor([[0.0, 3.0, 4.0], [3.0, 0.0, 5.0], [4.0, 5.0, 0.0]]) / 4
    torch.testing.assert_close(relative_distances(TRIANGLE), wanted)


def test_cosines_worked_by_hand():
    """Seen from the right angle, the others are 90 degrees apart. Seen from the others, cosines are 3/5 and 4/5."""
    cosines = angle_cosines(TRIANGLE)
    torch.testing.assert_close(cosines[0, 1, 2], torch.tensor(0.0))
    torch.testing.assert_close(cosines[1, 0, 2], torch.tensor(3 / 5))
    torch.testing.assert_close(cosines[2, 0, 1], torch.tensor(4 / 5))
    torch.testing.assert_close(cosines[0, 1, 1], torch.tensor(1.0))
    assert cosines[0, 0, 1] == 0


def test_samples_that_coincide_have_no_distance_and_no_gradient():
    features = torch.ones(3, 2, requires_grad=True)
    distances = relative_distances(features)
    assert (distances == 0).all()
    assert (torch.autograd.grad(distances.sum(), features)[0] == 0).all()
