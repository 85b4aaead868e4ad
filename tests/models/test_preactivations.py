"""Features before their ReLU, compared with the layers of each family."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from src.models.deep_resnet import ResNet18
from src.models.mobilenet_v1 import mobilenet_v1
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network, Output
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
"""Families whose features end in a ReLU. Two of them compute it in place."""
OTHERS: tuple[Maker, ...] = (wrn_16_1, MobileNetV2, ShuffleV2)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("maker", RECTIFIED)
def test_features_are_the_relu_of_their_preactivations(maker: Maker):
    output = forward_features(maker(5), images(), preactivations=True)
    assert len(output.features) == len(output.preactivations)
    for features, before in zip(output.features, output.preactivations, strict=True):
        assert torch.equal(F.relu(before), features)
        assert before.min() < 0


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "torch.relu(input=...)": lambda values: torch.relu(input=values),
    "Tensor.relu": lambda values: values.relu(),
    "torch.relu_": torch.relu_,
    "Tensor.relu_": lambda values: values.relu_(),
}


class Rectified(Network):
    """A network whose features are the output of `relu`, or the tensor that it changed."""

    def __init__(self, relu: Callable[[Tensor], Tensor], in_place: bool) -> None:
        super().__init__()
        self.convolution, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)
        self.relu, self.in_place = relu, in_place

    def forward_features(self, images: Tensor) -> Output:
        before = self.convolution(images)
        after = self.relu(before)
        features = before if self.in_place else after
        return Output(self.fc(self.pool(features)), (features,), self.pool(features), unpooled=features)


@pytest.mark.parametrize("name", RELUS)
def test_every_way_to_call_a_relu_is_recorded(name: str):
    network = Rectified(RELUS[name], in_place=name.endswith("_"))
    output = forward_features(network, images(), preactivations=True)
    before = network.convolution(images())
    torch.testing.assert_close(output.preactivations[0], before)
    torch.testing.assert_close(output.features[0], F.relu(before))
    output.preactivations[0].square().sum().backward()
    gradient = network.convolution.weight.grad
    network.zero_grad()
    before.square().sum().backward()
    torch.testing.assert_close(gradient, network.convolution.weight.grad)


def test_preactivations_of_a_wide_resnet_are_outputs_of_the_next_batch_norm():
    network = wrn_16_1(5).eval()
    assert isinstance(network, WideResNet)
    output = forward_features(network, images(), preactivations=True)
    norms = [
        *(network.get_submodule(f"block{i}.layer.0.bn1") for i in (1, 2, 3)),
        network.bn1,
    ]
    for features, before, norm in zip(output.features, output.preactivations, norms, strict=True):
        assert torch.equal(before, norm(features))


@pytest.mark.parametrize(("maker", "rectified"), [(MobileNetV2, 1), (ShuffleV2, 1)])
def test_features_without_a_relu_are_their_own_preactivations(maker: Maker, rectified: int):
    output = forward_features(maker(5), images(), preactivations=True)
    assert torch.equal(F.relu(output.preactivations[0]), output.features[0])
    for features, before in list(zip(output.features, output.preactivations, strict=True))[rectified:]:
        assert before is features


@pytest.mark.parametrize("maker", [*RECTIFIED, *OTHERS])
def test_recording_changes_neither_outputs_nor_gradients_nor_statistics(maker: Maker):
    torch.manual_seed(0)
    recorded = maker(5)
    torch.manual_seed(0)
    plain = maker(5)
    output = forward_features(recorded, images(), preactivations=True)
    expected = forward_features(plain, images(), preactivations=False)
    assert expected.preactivations == ()
    assert torch.equal(output.logits, expected.logits)
    assert all(map(torch.equal, output.features, expected.features))
    assert all(map(torch.equal, recorded.buffers(), plain.buffers()))  # each batch norm ran once
    for logits in (output.logits, expected.logits):
        logits.square().sum().backward()
    for one, other in zip(recorded.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("maker", [resnet8, wrn_16_1])
def test_gradients_flow_through_preactivations(maker: Maker):
    network = maker(5)
    output = forward_features(network, images(), preactivations=True)
    output.preactivations[1].square().sum().backward()
    assert network.get_parameter("conv1.weight").grad is not None


class Synchronised(torch.autograd.Function):
    """Compute batch norm out of sight of `F.batch_norm`, as several devices do."""

    @staticmethod
    def forward(_, values: Tensor) -> Tensor:
        return (values - values.mean(dim=(0, 2, 3), keepdim=True)) / values.std(dim=(0, 2, 3), keepdim=True)


def test_batch_norm_of_several_devices_is_recorded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", lambda _, values: Synchronised.apply(values))
    network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(wrn_16_1(5)).eval()
    output = forward_features(network, images(), preactivations=True)
    for features, before in zip(output.features, output.preactivations, strict=True):
        assert torch.equal(before, Synchronised.apply(features))
    assert not any(module._forward_hooks for module in network.modules())
