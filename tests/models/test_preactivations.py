"""Features before their ReLU, against what each family's layers say."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from src.models.deep_resnet import ResNet18
from src.models.mobilenet_v1 import mobilenet_v1
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network
from src.models.preactivations import forward_features
from src.models.resnet import resnet8
from src.models.shufflenet_v1 import ShuffleV1
from src.models.shufflenet_v2 import ShuffleV2
from src.models.slimnet import slimnet_300k
from src.models.torchvision_networks import resnet18
from src.models.vgg import vgg8
from src.models.wide_resnet import WideResNet, wrn_16_1

Maker = Callable[..., Network]
RECTIFIED: tuple[Maker, ...] = (resnet8, ResNet18, vgg8, slimnet_300k, mobilenet_v1, ShuffleV1, resnet18)
"""Families whose features end in a ReLU, in place in two of them."""
OTHERS: tuple[Maker, ...] = (wrn_16_1, MobileNetV2, ShuffleV2)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("maker", RECTIFIED)
def test_features_are_the_relu_of_what_was_before(maker: Maker):
    said = forward_features(maker(5), images(), preactivations=True)
    assert len(said.features) == len(said.preactivations)
    for features, before in zip(said.features, said.preactivations, strict=True):
        assert torch.equal(F.relu(before), features)
        assert before.min() < 0


def test_of_a_wide_resnet_they_are_behind_the_batch_norm_that_follows():
    network = wrn_16_1(5).eval()
    assert isinstance(network, WideResNet)
    said = forward_features(network, images(), preactivations=True)
    norms = [
        *(network.get_submodule(f"block{i}.layer.0.bn1") for i in (1, 2, 3)),
        network.bn1,
    ]
    for features, before, norm in zip(said.features, said.preactivations, norms, strict=True):
        assert torch.equal(before, norm(features))


@pytest.mark.parametrize(("maker", "rectified"), [(MobileNetV2, 1), (ShuffleV2, 1)])
def test_features_that_no_relu_made_stand_for_themselves(maker: Maker, rectified: int):
    said = forward_features(maker(5), images(), preactivations=True)
    assert torch.equal(F.relu(said.preactivations[0]), said.features[0])
    for features, before in list(zip(said.features, said.preactivations, strict=True))[rectified:]:
        assert before is features


@pytest.mark.parametrize("maker", [*RECTIFIED, *OTHERS])
def test_asking_for_them_changes_nothing_else(maker: Maker):
    torch.manual_seed(0)
    asked = maker(5)
    torch.manual_seed(0)
    plain = maker(5)
    said, wanted = (forward_features(network, images(), asking) for network, asking in ((asked, True), (plain, False)))
    assert wanted.preactivations == ()
    assert torch.equal(said.logits, wanted.logits)
    assert all(map(torch.equal, said.features, wanted.features))
    assert all(map(torch.equal, asked.buffers(), plain.buffers()))  # each batch norm ran once
    for output in (said, wanted):
        output.logits.square().sum().backward()
    for mine, other in zip(asked.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("maker", [resnet8, wrn_16_1])
def test_gradients_flow_through_them(maker: Maker):
    network = maker(5)
    said = forward_features(network, images(), preactivations=True)
    said.preactivations[1].square().sum().backward()
    assert network.get_parameter("conv1.weight").grad is not None
