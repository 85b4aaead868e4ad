"""Folding of batch norms into convolutions changes outputs only by rounding."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.models.folding import fold_batch_norms
from src.models.mobilenet_v1 import mobilenet_v1
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network, Output
from src.models.resnet import resnet8, resnet20_option_a
from src.models.vgg import vgg8
from src.models.wide_resnet import wrn_16_1
from tests.helpers.families import FAMILIES

IMAGE_SHAPE = (3, 32, 32)


def trained(network: Network) -> Network:
    """Run a batch in training mode, so that batch norms are not the identity."""
    with torch.no_grad():
        network.train()(torch.randn(16, *IMAGE_SHAPE))
    return network.eval()


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
@torch.no_grad()
def test_outputs_of_every_family_change_only_by_rounding(make: Callable[..., Network]):
    torch.manual_seed(0)
    network = trained(make(5))
    folded = copy.deepcopy(network)
    count = fold_batch_norms(folded, IMAGE_SHAPE)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    left = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert count == len(norms) - len(left)
    images = torch.randn(4, *IMAGE_SHAPE)
    output, expected = folded.forward_features(images), network.forward_features(images)
    for one, other in zip((output.logits, *output.features), (expected.logits, *expected.features), strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (resnet8, 1 + 3 * 2 + 2),  # the stem, the blocks and two shortcuts
        (resnet20_option_a, 1 + 9 * 2),  # shortcuts have no batch norm
        (vgg8, 5),
        (mobilenet_v1, 1 + 13 * 2),
        (MobileNetV2, 53),
        # The second batch norm of each block. The others read a sum, or the output of the stem, which is a feature.
        (wrn_16_1, 6),
    ],
)
def test_batch_norms_that_read_only_a_convolution_are_folded(make: Callable[..., Network], folded: int):
    assert fold_batch_norms(make(5).eval(), IMAGE_SHAPE) == folded


def test_folded_weights_are_frozen():
    network = resnet8(5).eval()
    network.requires_grad_(False)
    fold_batch_norms(network, IMAGE_SHAPE)
    assert not any(parameter.requires_grad for parameter in network.parameters())


class Composed(Network):
    """A convolution and a batch norm, composed to a map by `compose`."""

    def __init__(self, compose: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        nn.init.ones_(self.norm.bias)
        self.compose = compose

    def forward_features(self, images: Tensor) -> Output:
        pooled = self.pool(self.compose(self.convolution, self.norm, images))
        return Output(self.fc(pooled), (), pooled)


def test_a_convolution_whose_output_something_else_reads_is_refused():
    network = Composed(lambda convolution, norm, x: (y := convolution(x)) + norm(y)).eval()
    with pytest.raises(UserError, match=r"teacher\.fold=true does not fit this network"):
        fold_batch_norms(network, IMAGE_SHAPE)


@pytest.mark.parametrize(
    "compose",
    [
        lambda convolution, norm, x: norm(convolution(x)) + norm(convolution(x)),
        lambda convolution, norm, x: norm(convolution(x).relu()),
        lambda convolution, norm, x: convolution(x),
    ],
    ids=["used twice", "ReLU between them", "no batch norm"],
)
@torch.no_grad()
def test_other_batch_norms_are_kept(compose: Callable[[nn.Module, nn.Module, Tensor], Tensor]):
    network = Composed(compose).eval()
    images = torch.randn(2, *IMAGE_SHAPE)
    expected = network(images)
    assert fold_batch_norms(network, IMAGE_SHAPE) == 0
    assert torch.equal(network(images), expected)
