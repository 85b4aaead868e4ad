"""Every network against the numbers that published checkpoints of it imply."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from src.models import deep_resnet, mobilenet_v2, resnet, shufflenet_v1, shufflenet_v2, slimnet, vgg, wide_resnet
from src.models.checkpoints import load_weights
from src.models.deep_resnet import Bottleneck
from src.models.mobilenet_v2 import InvertedResidual, InvertedResidualNetwork
from src.models.network import Network, Shapes, shapes
from src.models.resnet import BasicBlock, PaddedShortcut
from src.models.shufflenet_v1 import GroupedShuffleUnit, ShuffleNetV1
from src.models.shufflenet_v2 import DownUnit, ShuffleNetV2, SplitUnit
from src.models.slimnet import SlimNet
from src.models.vgg import VGG
from src.models.wide_resnet import PreActivationBlock, WideResNet

CONFIGS = Path(__file__).parents[2] / "conf" / "network"


class Row(NamedTuple):
    make: Callable[..., Network]
    parameters: int
    keys: int
    features: str  # channels x size
    pooled: int
    first: str
    last: str
    classes: int = 100


RESNET_FIRST = "conv1.weight bn1.weight bn1.bias bn1.running_mean bn1.running_var"
WRN_FIRST = (
    "conv1.weight block1.layer.0.bn1.weight block1.layer.0.bn1.bias "
    "block1.layer.0.bn1.running_mean block1.layer.0.bn1.running_var"
)
SLIMNET_FIRST = (
    "features.0.conv.weight features.0.conv.bias features.0.bn.weight features.0.bn.bias features.0.bn.running_mean"
)
VGG_FIRST = "block0.0.weight block0.0.bias block0.1.weight block0.1.bias block0.1.running_mean"
MOBILENET_FIRST = "conv1.0.weight conv1.1.weight conv1.1.bias conv1.1.running_mean conv1.1.running_var"
VGG_SIZES = "64x32 128x16 256x8 512x4 512x4"
NARROW = "16x32 16x32 32x16 64x8"
DEEP = "64x32 64x32 128x16 256x8 512x4"
DEEP_WIDE = "64x32 256x32 512x16 1024x8 2048x4"
MOBILENET_SIZES = "16x16 12x16 16x8 48x4 160x2"
SHUFFLE_SIZES = "24x32 240x16 480x8 960x4"
WIDE = "32x32 64x32 128x16 256x8"


def last(batch_norm: str, head: str) -> str:
    parts = ("running_mean", "running_var", "num_batches_tracked")
    return " ".join(f"{batch_norm}.{part}" for part in parts) + f" {head}.weight {head}.bias"


def resnet_last(batch_norm: str) -> str:
    return last(f"layer3.{batch_norm}", "fc")


WRN_LAST = last("bn1", "fc")
SLIMNET_LAST = last("features.12.bn", "classifier")
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
    Row(vgg.vgg8, 3_965_028, 37, VGG_SIZES, 512, VGG_FIRST, last("block4.1", "classifier")),
    Row(vgg.vgg11, 9_277_284, 58, VGG_SIZES, 512, VGG_FIRST, last("block4.4", "classifier")),
    Row(vgg.vgg13, 9_462_180, 72, VGG_SIZES, 512, VGG_FIRST, last("block4.4", "classifier")),
    Row(vgg.vgg16, 14_774_436, 93, VGG_SIZES, 512, VGG_FIRST, last("block4.7", "classifier")),
    Row(vgg.vgg19, 20_086_692, 114, VGG_SIZES, 512, VGG_FIRST, last("block4.10", "classifier")),
    Row(
        mobilenet_v2.MobileNetV2, 812_836, 320, MOBILENET_SIZES, 1280, MOBILENET_FIRST, last("conv2.1", "classifier.0")
    ),
    Row(shufflenet_v1.ShuffleV1, 949_258, 296, SHUFFLE_SIZES, 960, RESNET_FIRST, last("layer3.3.bn3", "linear")),
    Row(shufflenet_v2.ShuffleV2, 1_355_528, 338, "24x32 116x16 232x8 464x4", 1024, RESNET_FIRST, last("bn2", "linear")),
    Row(deep_resnet.ResNet18, 11_220_132, 122, DEEP, 512, RESNET_FIRST, last("layer4.1.bn2", "linear")),
    Row(deep_resnet.ResNet34, 21_328_292, 218, DEEP, 512, RESNET_FIRST, last("layer4.2.bn2", "linear")),
    Row(deep_resnet.ResNet50, 23_705_252, 320, DEEP_WIDE, 2048, RESNET_FIRST, last("layer4.2.bn3", "linear")),
    Row(resnet.resnet20_option_a, 269_722, 116, NARROW, 64, RESNET_FIRST, last("layer3.2.bn2", "linear"), 10),
    Row(resnet.resnet32_option_a, 464_154, 188, NARROW, 64, RESNET_FIRST, last("layer3.4.bn2", "linear"), 10),
    Row(resnet.resnet44_option_a, 658_586, 260, NARROW, 64, RESNET_FIRST, last("layer3.6.bn2", "linear"), 10),
    Row(resnet.resnet56_option_a, 853_018, 332, NARROW, 64, RESNET_FIRST, last("layer3.8.bn2", "linear"), 10),
    Row(resnet.resnet110_option_a, 1_727_962, 656, NARROW, 64, RESNET_FIRST, last("layer3.17.bn2", "linear"), 10),
    Row(slimnet.slimnet_600k, 611_911, 93, "40x32 72x32 81x16 120x8", 120, SLIMNET_FIRST, SLIMNET_LAST),
    Row(slimnet.slimnet_300k, 309_154, 93, "30x32 50x32 58x16 90x8", 90, SLIMNET_FIRST, SLIMNET_LAST),
]


def is_large(row: Row) -> bool:
    return row.parameters > 12_000_000


@pytest.fixture(
    params=[pytest.param(row, marks=[pytest.mark.slow] * is_large(row), id=row.make.__name__) for row in TABLE]
)
def row(request: pytest.FixtureRequest) -> Row:
    torch.manual_seed(0)
    return request.param


every_row = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.make.__name__)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def counters(network: nn.Module) -> list[int]:
    return [int(value) for name, value in network.named_buffers() if name.endswith("num_batches_tracked")]


@every_row
def test_sizes_and_names_are_the_published_ones(row: Row):
    with torch.device("meta"):
        network = row.make()
    names = list(network.state_dict())
    assert count(network) == row.parameters
    assert len(names) == row.keys
    assert names[:5] == row.first.split()
    assert names[-5:] == row.last.split()

    features = tuple((int(c), int(s), int(s)) for c, s in (size.split("x") for size in row.features.split()))
    assert shapes(network, (3, 32, 32)) == Shapes(row.classes, features, row.pooled)
    assert network.classifier_layer.in_features == row.pooled


@every_row
def test_ten_classes_change_the_head_alone(row: Row):
    with torch.device("meta"):
        hundred, ten = row.make(num_classes=100), row.make(num_classes=10)
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
    assert output.unpooled is not None
    assert output.unpooled.shape[:2] == output.pooled.shape
    assert torch.equal(network.pool(output.unpooled), output.pooled)
    F.cross_entropy(output.logits, torch.tensor([0, 1])).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    # Batch norm subtracts whatever a bias before it adds: that gradient is 0 but for rounding.
    biases = {f"{name}.bias" for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    zero = {name for name, gradient in gradients.items() if gradient is not None and not gradient.any()}
    assert zero - biases == set()


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
        if not isinstance(module, nn.Conv2d):
            continue
        assert (module.bias is not None) == isinstance(network, SlimNet | VGG)
        if isinstance(network, SlimNet | ShuffleNetV1 | ShuffleNetV2):
            assert is_uniform(module.weight.flatten(), 1 / math.sqrt(module.weight[0].numel()))
            continue
        assert module.bias is None or module.bias.eq(0).all()
        deviation = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
        scaled.append(module.weight.flatten() / deviation)
        assert scaled[-1].std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * scaled[-1].numel()))

    if scaled:
        assert_normal(torch.cat(scaled))

    head = network.classifier_layer
    if isinstance(network, VGG | InvertedResidualNetwork):
        assert_normal(head.weight.flatten() / 0.01)
    else:
        assert is_uniform(head.weight.flatten(), 1 / math.sqrt(row.pooled))
    assert head.bias.eq(0).all().item() == isinstance(network, WideResNet | VGG | InvertedResidualNetwork)


def assert_normal(values: Tensor) -> None:
    """Standard normal, by mean, deviation and the share beyond 2."""
    assert values.mean().item() == pytest.approx(0, abs=5 / math.sqrt(values.numel()))
    assert values.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * values.numel()))
    assert values.abs().gt(2).float().mean().item() == pytest.approx(0.0455, abs=0.004), "not a normal distribution"


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
    output = network.forward_features(images)
    features, pooled = output.features, output.pooled
    first, last = features[0], features[-1]
    is_activated = [bool(feature.min() >= 0) for feature in features]
    expected = last.mean((2, 3))
    if isinstance(network, WideResNet):
        stem = network.conv1(images)
        assert not any(is_activated), "features are those before batch norm and ReLU"
        expected = F.relu(network.bn1(last)).mean((2, 3))
    elif isinstance(network, InvertedResidualNetwork):
        stem = network.conv1(images)
        assert is_activated == [True, False, False, False, False], "bottlenecks are linear"
        assert torch.equal(features[2], network.blocks[2](features[1]))
        assert torch.equal(features[4], network.blocks[6](network.blocks[5](features[3])))
        expected = network.conv2(last).mean((2, 3))
    else:
        assert all(is_activated)
        if isinstance(network, SlimNet):
            stem = F.relu(network.features[0](images))
            expected = F.max_pool2d(last, 8).flatten(1)
        elif isinstance(network, VGG):
            stem = F.relu(network.block0(images))
            assert torch.equal(last, F.relu(network.block4(features[3])))
        else:
            stem = F.relu(network.bn1(network.conv1(images)))
        if isinstance(network, ShuffleNetV2):
            expected = F.relu(network.bn2(network.conv2(last))).mean((2, 3))
    assert torch.equal(first, stem)
    torch.testing.assert_close(pooled, expected)


@torch.no_grad()
def test_vgg_halves_large_images_once_more():
    features = vgg.vgg8(10).eval().forward_features(torch.randn(1, 3, 64, 64)).features
    assert [feature.shape[2] for feature in features] == [64, 32, 16, 8, 4]


def test_option_a_shortcut_pads_the_middle_channels_and_has_no_parameters():
    block = BasicBlock(2, 6, 2, option_a=True)
    assert isinstance(block.downsample, PaddedShortcut)
    assert not block.downsample.state_dict()
    x = torch.arange(2 * 5 * 4.0).reshape(1, 2, 5, 4)
    expected = torch.zeros(1, 6, 3, 2)
    for channel in range(2):
        for i in range(3):
            for j in range(2):
                expected[0, 2 + channel, i, j] = x[0, channel, 2 * i, 2 * j]
    assert torch.equal(block.downsample(x), expected)
    assert block.eval()(x).shape == expected.shape
    assert BasicBlock(6, 6, 1, option_a=True).downsample is None


@torch.no_grad()
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 1), (8, 2)])
def test_bottleneck_has_its_stride_in_its_3x3_convolution(channels: int, stride: int):
    block = randomised(Bottleneck(8, channels, stride))
    assert [layer.kernel_size[0] for layer in (block.conv1, block.conv2, block.conv3)] == [1, 3, 1]
    x = torch.randn(2, 8, 6, 6)
    inner = F.relu(block.bn1(F.conv2d(x, block.conv1.weight)))
    inner = F.relu(block.bn2(F.conv2d(inner, block.conv2.weight, stride=stride, padding=1)))
    shortcut = x
    if (channels, stride) != (8, 1):
        convolution, batch_norm = block.shortcut
        shortcut = batch_norm(F.conv2d(x, convolution.weight, stride=stride))
    torch.testing.assert_close(block(x), F.relu(block.bn3(F.conv2d(inner, block.conv3.weight)) + shortcut))


@torch.no_grad()
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (12, 1), (8, 2)])
def test_inverted_residual_is_linear_at_its_end_and_adds_the_input_where_it_fits(channels: int, stride: int):
    block = randomised(InvertedResidual(8, channels, stride, expansion=6))
    projection, batch_norm = block.conv[6], block.conv[7]
    assert [type(layer) for layer in block.conv].count(nn.ReLU) == 2
    assert block.conv[3].groups == projection.in_channels == 48
    nn.init.zeros_(projection.weight)
    x = torch.randn(2, 8, 6, 6)
    constant = batch_norm.bias - batch_norm.running_mean * batch_norm.weight / (batch_norm.running_var + 1e-5).sqrt()
    residual = x if (channels, stride) == (8, 1) else torch.zeros(2, channels, 6 // stride, 6 // stride)
    torch.testing.assert_close(block(x), residual + constant[:, None, None])


def passing_on(module: nn.Module) -> Any:
    """With 1x1 convolutions that hand channel i to channel i, 3x3 that hand on the centre, batch norms of identity."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.zeros_(child.weight)
            centre = child.kernel_size[0] // 2
            inputs, outputs = (size // child.groups for size in (child.in_channels, child.out_channels))
            for index in range(child.out_channels):
                child.weight.data[index, index % outputs % inputs, centre, centre] = 1
        if isinstance(child, nn.BatchNorm2d):
            child.eps = 0
    return module.eval()


@torch.no_grad()
def test_unit_of_shufflenet_v1_mixes_its_groups():
    x = torch.rand(2, 24, 5, 5)
    unit = GroupedShuffleUnit(48, 48, 1)
    assert (unit.conv1.groups, unit.conv2.groups, unit.conv3.groups) == (3, 12, 3)
    # Channels in rows of groups, read by columns, section 3.1: 12 channels in 3 groups.
    order = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    wide = torch.cat([x, x + 1], 1)
    inner = F.relu(unit.eval().bn1(unit.conv1(wide)))[:, order]
    expected = F.relu(unit.bn3(unit.conv3(F.relu(unit.bn2(unit.conv2(inner))))) + wide)
    torch.testing.assert_close(unit(wide), expected)

    first = GroupedShuffleUnit(24, 72, 2).eval()
    assert (first.conv1.groups, first.conv3.groups, first.conv3.out_channels) == (1, 3, 48)
    averaged = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
    torch.testing.assert_close(first(x)[:, 48:], averaged)


@torch.no_grad()
def test_units_of_shufflenet_v2_interleave_both_halves():
    x = torch.rand(2, 6, 6, 6)
    split = passing_on(SplitUnit(6))
    torch.testing.assert_close(split(x), x[:, [0, 3, 1, 4, 2, 5]])
    down = passing_on(DownUnit(6, 12))
    nn.init.constant_(down.bn5.bias, 1)
    expected = torch.stack([x, x + 1], 2).flatten(1, 2)[:, :, ::2, ::2]
    torch.testing.assert_close(down(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [20, 56])
@torch.no_grad()
def test_published_networks_of_option_a_reach_their_accuracy(depth: int):
    if "AEKT_DATA" not in os.environ:
        pytest.skip("AEKT_DATA names no folder with cifar10.npz and teachers/")
    data = Path(os.environ["AEKT_DATA"])
    facts: Any = OmegaConf.load(CONFIGS / f"resnet{depth}_option_a.yaml")
    network = getattr(resnet, f"resnet{depth}_option_a")()
    load_weights(network, data / "teachers" / f"resnet{depth}_cifar10_option_a.th")
    network.eval().to(memory_format=torch.channels_last)
    with np.load(data / "cifar10.npz", allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["test_images"][:1000]).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(arrays["test_labels"][:1000]).long()
    mean, std = (torch.tensor(list(facts[name]))[:, None, None] for name in ("mean", "std"))
    predicted = torch.cat([network((part - mean) / std).argmax(1) for part in images.split(250)])
    accuracy = 100 * (predicted == labels).float().mean().item()
    assert accuracy == pytest.approx(facts.published_accuracy.cifar10, abs=2)


@every_row
def test_each_network_has_a_config_named_after_it(row: Row):
    name = row.make.__name__
    files = [path for path in CONFIGS.glob("*.yaml") if path.stem.replace("_", "") == name.lower().replace("_", "")]
    assert len(files) == 1
    facts = OmegaConf.load(files[0])
    assert facts._target_ == f"{row.make.__module__}.{name}"
    assert facts.name == files[0].stem
    assert facts.learning_rate == (0.01 if name in ("MobileNetV2", "ShuffleV1", "ShuffleV2") else 0.05)
