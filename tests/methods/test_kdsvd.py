"""KD-SVD: gradients of singular vectors, and the networks that it refuses."""

import pytest
import torch
from torch import Tensor

from src.common.errors import UserError
from src.methods.kdsvd import singular_vectors
from src.models.shufflenet_v1 import ShuffleV1
from src.models.wide_resnet import wrn_16_1
from tests.helpers.features import drawn
from tests.helpers.methods import assert_published_weights, configured, networks_of


def test_published_weights():
    assert_published_weights(configured("kdsvd"), cross_entropy=1.0, relation=1.0)


def diagonal(*values: float) -> Tensor:
    """Features whose matrix of pixels by channels is diagonal."""
    size = len(values)
    return torch.diag_embed(torch.tensor([values], dtype=torch.float64)).view(1, size, 1, size).requires_grad_()


def test_a_vectors_gradient_is_exact_if_only_other_singular_values_are_equal():
    def first(x: Tensor) -> Tensor:
        """The projector onto the first vector, which has no sign."""
        vectors, _ = singular_vectors(x, 1)
        return vectors @ vectors.transpose(1, 2)

    rank_one = (drawn((1, 3, 1, 1), 1) * drawn((1, 1, 2, 3), 2)).requires_grad_()
    assert torch.autograd.gradcheck(first, (rank_one,))
    assert torch.autograd.gradcheck(first, (diagonal(2.0, 1.0, 1.0),))


@pytest.mark.parametrize("second", [1.0, 1.0 - 1e-16, 1.0 - 1e-10])
def test_vectors_of_equal_singular_values_have_a_finite_gradient(second: float):
    x = diagonal(1.0, second, 0.5)
    vectors, _ = singular_vectors(x, 3)
    (gradient,) = torch.autograd.grad((vectors * drawn((1, 3, 3), 1)).sum(), x)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


def test_networks_of_other_channels_are_refused():
    with pytest.raises(UserError, match=r"^method=kdsvd compares stages of the same channels .* \[.*240.*\]"):
        configured("kdsvd").allocate(networks_of(wrn_16_1, ShuffleV1))
