"""Every network against the numbers that published checkpoints of it imply."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.models import resnet, slimnet, wide_resnet
from src.models.network import Network, Shapes, shapes
from src.models.resnet import BasicBlock, CifarResNet
from src.models.slimnet import SlimNet
from src.models.wide_resnet import PreActivationBlock, WideResNet


class Row(NamedTuple):
    make: Callable[..., Network]
    parameters: int
    keys: int
    features: str  # channels x size
    pooled: int
    first: str
    last: str


RESNET_FIRST = "conv1.weight bn1.weight bn1.bias bn1.running_mean bn1.running_var"
WRN_FIRST = (
    "conv1.weight block1.layer.0.bn1.weight block1.layer.0.bn1.bias "
    "block1.layer.0.bn1.running_mean block1.layer.0.bn1.running_var"
)
WRN_LAST = "bn1.running_mean bn1.running_var bn1.num_batches_tracked fc.weight fc.bias"
SLIMNET_FIRST = (
    "features.0.conv.weight features.0.conv.bias features.0.bn.weight features.0.bn.bias features.0.bn.running_mean"
)
SLIMNET_LAST = (
    "features.12.bn.running_mean features.12.bn.running_var features.12.bn.num_batches_tracked "
    "classifier.weight classifier.bias"
)
NARROW = "16x32 16x32 32x16 64x8"
WIDE = "32x32 64x32 128x16 256x8"


def resnet_last(batch_norm: str) -> str:
    parts = ("running_mean", "running_var", "num_batches_tracked")
    return " ".join(f"layer3.{batch_norm}.{part}" for part in parts) + " fc.weight fc.bias"


TABLE = [
    Row(resnet.resnet8, 83_892, 56, NARROW, 64, RESNET_FIRST, resnet_last("0.downsample.1")),
    Row(resnet.resnet14, 181_108, 92, NARROW, 64, RESNET_FIRST, resnet_last("1.bn2")),
    Row(resnet.resnet20, 278_324, 128, NARROW, 64, RESNET_FIRST, resnet_last("2.bn2")),
    Row(resnet.resnet32, 472_756, 200, NARROW, 64, RESNET_FIRST, resnet_last("4.bn2")),
    Row(resnet.resnet44, 667_188, 272, NARROW, 64, RESNET_FIRST, resnet_last("6.bn2")),
    Row(resnet.resnet56, 861_620, 344, NARROW, 64, RESNET_FIRST, resnet_last("8.bn2")),
    Row(resnet.resnet110, 1_736_564, 668, NARROW, 64, RESNET_FIRST, resnet_last("17.bn2")),
    Row(resnet.resnet8x4, 1_233_540, 62, WIDE, 256, RESNET_FIRST, resnet_last("0.downsample.1")),
    Row(resnet.resnet32x4, 7_433_860, 206, WIDE, 256, RESNET_FIRST, resnet_last("4.bn2")),
    Row(wide_resnet.wrn_16_1, 180_916, 82, NARROW, 64, WRN_FIRST, WRN_LAST),
    Row(wide_resnet.wrn_16_2, 703_284, 83, "16x32 32x32 64x16 128x8", 128, WRN_FIRST, WRN_LAST),
    Row(wide_resnet.wrn_40_1, 569_780, 226, NARROW, 64, WRN_FIRST, WRN_LAST),
    Row(wide_resnet.wrn_40_2, 2_255_156, 227, "16x32 32x32 64x16 128x8", 128, WRN_FIRST, WRN_LAST),
    Row(slimnet.slimnet_600k, 611_911, 93, "40x32 72x32 81x16 120x8", 120, SLIMNET_FIRST, SLIMNET_LAST),
    Row(slimnet.slimnet_300k, 309_154, 93, "30x32 50x32 58x16 90x8", 90, SLIMNET_FIRST, SLIMNET_LAST),
]


@pytest.fixture(params=TABLE, ids=lambda row: row.make.__name__)
def row(request: pytest.FixtureRequest) -> Row:
    torch.manual_seed(0)
    return request.param


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def counters(network: nn.Module) -> list[int]:
    return [int(value) for name, value in network.named_buffers() if name.endswith("num_batches_tracked")]


def test_sizes_and_names_are_the_published_ones(row: Row):
    network = row.make()
    names = list(network.state_dict())
    assert count(network) == row.parameters
    assert len(names) == row.keys
    assert names[:5] == row.first.split()
    assert names[-5:] == row.last.split()

    features = tuple((int(c), int(s), int(s)) for c, s in (size.split("x") for size in row.features.split()))
    assert shapes(network, (3, 32, 32)) == Shapes(100, features, row.pooled)
    assert network.classifier_layer.in_features == row.pooled


def test_ten_classes_change_the_head_alone(row: Row):
    hundred, ten = row.make(), row.make(num_classes=10)
    before = {name: value.shape for name, value in hundred.state_dict().items()}
    after = {name: value.shape for name, value in ten.state_dict().items()}
    assert list(before) == list(after)
    assert {name for name in before if before[name] != after[name]} == {row.last.split()[-2], row.last.split()[-1]}
    assert tuple(ten.classifier_layer.weight.shape) == (10, row.pooled)


def test_one_step_ticks_each_batch_norm_once_and_reaches_each_parameter(row: Row):
    network = row.make(num_classes=10).train()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        network(images)
    assert set(counters(network)) == {1}

    output = network.forward_features(images)
    assert set(counters(network)) == {2}
    F.cross_entropy(output.logits, torch.tensor([0, 1])).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    # Batch norm subtracts whatever a bias before it adds: that gradient is 0 but for rounding.
    zero = [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()]
    assert [name for name in zero if not name.endswith("conv.bias")] == []


@torch.no_grad()
def test_forward_is_the_logits_of_forward_features(row: Row):
    network = row.make().eval()
    images = torch.randn(2, 3, 32, 32)
    output = network.forward_features(images)
    assert torch.equal(network(images), output.logits)
    assert torch.equal(network.classifier_layer(output.pooled), output.logits)


@torch.no_grad()
def test_another_image_size_is_accepted(row: Row):
    assert row.make(num_classes=10).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def is_uniform(values: Tensor, bound: float) -> bool:
    """Whether values fill -bound .. bound evenly: standard deviation bound / sqrt(3), to 5 standard errors."""
    tolerance = 5 * 0.45 / math.sqrt(values.numel())
    return bool(values.abs().max() <= bound) and abs(values.std().item() / bound * math.sqrt(3) - 1) < tolerance


def test_initialisation(row: Row):
    network = row.make()
    scaled = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()
        if isinstance(module, nn.Conv2d) and isinstance(network, SlimNet):
            assert module.bias is not None
            assert is_uniform(module.weight.flatten(), 1 / math.sqrt(module.in_channels * 9))
        elif isinstance(module, nn.Conv2d):
            assert module.bias is None
            deviation = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            scaled.append(module.weight.flatten() / deviation)
            assert scaled[-1].std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * scaled[-1].numel()))

    if scaled:
        values = torch.cat(scaled)
        assert values.mean().item() == pytest.approx(0, abs=5 / math.sqrt(values.numel()))
        assert values.abs().gt(2).float().mean().item() == pytest.approx(0.0455, abs=0.004), "not a normal distribution"

    head = network.classifier_layer
    assert is_uniform(head.weight.flatten(), 1 / math.sqrt(row.pooled))
    assert head.bias.eq(0).all().item() == isinstance(network, WideResNet)


def randomised(module: nn.Module) -> Any:
    """With batch norms that are not the identity."""
    for value in module.state_dict().values():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5)
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 2)])
def test_shortcut_of_a_basic_block(channels: int, stride: int):
    block = randomised(BasicBlock(8, channels, stride))
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    nn.init.zeros_(block.bn2.running_mean)
    x = torch.randn(2, 8, 6, 6)
    shortcut = x if channels == 8 else block.downsample(x)
    assert torch.equal(block(x), F.relu(shortcut))
    assert (block.downsample is None) == (channels == 8)


@torch.no_grad()
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 2), (16, 1)])
def test_shortcut_of_a_pre_activation_block_is_raw_where_widths_agree_and_activated_where_not(channels, stride):
    block = randomised(PreActivationBlock(8, channels, stride))
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 8, 6, 6)
    expected = x if channels == 8 else F.conv2d(F.relu(block.bn1(x)), block.convShortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_pre_activation_block_normalises_before_both_convolutions():
    block = randomised(PreActivationBlock(8, 8, 1))
    x = torch.randn(2, 8, 6, 6)
    inner = block.conv1(F.relu(block.bn1(x)))
    torch.testing.assert_close(block(x), x + block.conv2(F.relu(block.bn2(inner))))


@torch.no_grad()
def test_features_are_those_of_each_family(row: Row):
    network = randomised(row.make())
    images = torch.randn(2, 3, 32, 32)
    f0, *_, f3 = features = network.forward_features(images).features
    pooled = network.forward_features(images).pooled
    if isinstance(network, WideResNet):
        assert torch.equal(f0, network.conv1(images))
        assert all(feature.min() < 0 for feature in features), "features are those before batch norm and ReLU"
        expected = F.relu(network.bn1(f3)).mean((2, 3))
    elif isinstance(network, CifarResNet):
        assert torch.equal(f0, F.relu(network.bn1(network.conv1(images))))
        assert all(feature.min() >= 0 for feature in features)
        expected = f3.mean((2, 3))
    else:
        assert torch.equal(f0, F.relu(network.features[0](images)))
        assert all(feature.min() >= 0 for feature in features)
        expected = F.max_pool2d(f3, 8).flatten(1)
    torch.testing.assert_close(pooled, expected)
