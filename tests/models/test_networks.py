"""Published facts about every network of conf/network: sizes, names in checkpoints, features and initialisation.

A new network needs a row in `FACTS`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from src.models import (
    deep_resnet,
    mobilenet_v1,
    mobilenet_v2,
    resnet,
    shufflenet_v1,
    shufflenet_v2,
    slimnet,
    torchvision_networks,
    vgg,
    wide_resnet,
)
from src.models.mobilenet_v1 import MobileNetV1
from src.models.mobilenet_v2 import InvertedResidualNetwork
from src.models.network import Network, Shapes, measure_shapes
from src.models.shufflenet_v1 import ShuffleNetV1
from src.models.shufflenet_v2 import ShuffleNetV2
from src.models.slimnet import SlimNet
from src.models.vgg import VGG
from src.models.wide_resnet import WideResNet
from tests.helpers.networks import randomise_vectors

CONFIGS = Path(__file__).parents[2] / "conf" / "network"


class Facts(NamedTuple):
    """What published checkpoints imply about a network."""

    make: Callable[..., Network]
    parameters: int
    """Number of parameters for `classes` classes."""
    keys: int
    """Number of names in the state dict."""
    features: str
    """Channels x size of each of the features, for images of `image_size` pixels."""
    pooled: int
    first: str
    """The first five names of the state dict."""
    last: str
    """The last five names of the state dict."""
    classes: int = 100
    image_size: int = 32


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
SHUFFLE_V2_SIZES = "24x32 116x16 232x8 464x4"
WIDE = "32x32 64x32 128x16 256x8"
IMAGENET_NARROW = "64x112 64x56 128x28 256x14 512x7"
IMAGENET_WIDE = "64x112 256x56 512x28 1024x14 2048x7"
MOBILENET_V1_FIRST = "model.0.0.weight model.0.1.weight model.0.1.bias model.0.1.running_mean model.0.1.running_var"


def last(batch_norm: str, head: str) -> str:
    """The names of the last batch norm's buffers and of the classifier."""
    parts = ("running_mean", "running_var", "num_batches_tracked")
    return " ".join(f"{batch_norm}.{part}" for part in parts) + f" {head}.weight {head}.bias"


def resnet_last(batch_norm: str) -> str:
    return last(f"layer3.{batch_norm}", "fc")


WRN_LAST = last("bn1", "fc")
SLIMNET_LAST = last("features.12.bn", "classifier")
FACTS = [
    Facts(resnet.resnet8, 83_892, 56, NARROW, 64, RESNET_FIRST, resnet_last("0.downsample.1")),
    Facts(resnet.resnet14, 181_108, 92, NARROW, 64, RESNET_FIRST, resnet_last("1.bn2")),
    Facts(resnet.resnet20, 278_324, 128, NARROW, 64, RESNET_FIRST, resnet_last("2.bn2")),
    Facts(resnet.resnet32, 472_756, 200, NARROW, 64, RESNET_FIRST, resnet_last("4.bn2")),
    Facts(resnet.resnet44, 667_188, 272, NARROW, 64, RESNET_FIRST, resnet_last("6.bn2")),
    Facts(resnet.resnet56, 861_620, 344, NARROW, 64, RESNET_FIRST, resnet_last("8.bn2")),
    Facts(resnet.resnet110, 1_736_564, 668, NARROW, 64, RESNET_FIRST, resnet_last("17.bn2")),
    Facts(resnet.resnet8x4, 1_233_540, 62, WIDE, 256, RESNET_FIRST, resnet_last("0.downsample.1")),
    Facts(resnet.resnet32x4, 7_433_860, 206, WIDE, 256, RESNET_FIRST, resnet_last("4.bn2")),
    Facts(wide_resnet.wrn_16_1, 180_916, 82, NARROW, 64, WRN_FIRST, WRN_LAST),
    Facts(wide_resnet.wrn_16_2, 703_284, 83, "16x32 32x32 64x16 128x8", 128, WRN_FIRST, WRN_LAST),
    Facts(wide_resnet.wrn_40_1, 569_780, 226, NARROW, 64, WRN_FIRST, WRN_LAST),
    Facts(wide_resnet.wrn_40_2, 2_255_156, 227, "16x32 32x32 64x16 128x8", 128, WRN_FIRST, WRN_LAST),
    Facts(vgg.vgg8, 3_965_028, 37, VGG_SIZES, 512, VGG_FIRST, last("block4.1", "classifier")),
    Facts(vgg.vgg11, 9_277_284, 58, VGG_SIZES, 512, VGG_FIRST, last("block4.4", "classifier")),
    Facts(vgg.vgg13, 9_462_180, 72, VGG_SIZES, 512, VGG_FIRST, last("block4.4", "classifier")),
    Facts(vgg.vgg16, 14_774_436, 93, VGG_SIZES, 512, VGG_FIRST, last("block4.7", "classifier")),
    Facts(vgg.vgg19, 20_086_692, 114, VGG_SIZES, 512, VGG_FIRST, last("block4.10", "classifier")),
    Facts(
        mobilenet_v2.MobileNetV2, 812_836, 320, MOBILENET_SIZES, 1280, MOBILENET_FIRST, last("conv2.1", "classifier.0")
    ),
    Facts(shufflenet_v1.ShuffleV1, 949_258, 296, SHUFFLE_SIZES, 960, RESNET_FIRST, last("layer3.3.bn3", "linear")),
    Facts(shufflenet_v2.ShuffleV2, 1_355_528, 338, SHUFFLE_V2_SIZES, 1024, RESNET_FIRST, last("bn2", "linear")),
    Facts(deep_resnet.ResNet18, 11_220_132, 122, DEEP, 512, RESNET_FIRST, last("layer4.1.bn2", "linear")),
    Facts(deep_resnet.ResNet34, 21_328_292, 218, DEEP, 512, RESNET_FIRST, last("layer4.2.bn2", "linear")),
    Facts(deep_resnet.ResNet50, 23_705_252, 320, DEEP_WIDE, 2048, RESNET_FIRST, last("layer4.2.bn3", "linear")),
    Facts(resnet.resnet20_option_a, 269_722, 116, NARROW, 64, RESNET_FIRST, last("layer3.2.bn2", "linear"), 10),
    Facts(resnet.resnet32_option_a, 464_154, 188, NARROW, 64, RESNET_FIRST, last("layer3.4.bn2", "linear"), 10),
    Facts(resnet.resnet44_option_a, 658_586, 260, NARROW, 64, RESNET_FIRST, last("layer3.6.bn2", "linear"), 10),
    Facts(resnet.resnet56_option_a, 853_018, 332, NARROW, 64, RESNET_FIRST, last("layer3.8.bn2", "linear"), 10),
    Facts(resnet.resnet110_option_a, 1_727_962, 656, NARROW, 64, RESNET_FIRST, last("layer3.17.bn2", "linear"), 10),
    Facts(slimnet.slimnet_600k, 611_911, 93, "40x32 72x32 81x16 120x8", 120, SLIMNET_FIRST, SLIMNET_LAST),
    Facts(slimnet.slimnet_300k, 309_154, 93, "30x32 50x32 58x16 90x8", 90, SLIMNET_FIRST, SLIMNET_LAST),
    *[
        Facts(make, parameters, keys, features, pooled, RESNET_FIRST, last(f"layer4.{norm}", "fc"), 1000, 224)
        for make, parameters, keys, features, pooled, norm in (
            (torchvision_networks.resnet18, 11_689_512, 122, IMAGENET_NARROW, 512, "1.bn2"),
            (torchvision_networks.resnet34, 21_797_672, 218, IMAGENET_NARROW, 512, "2.bn2"),
            (torchvision_networks.resnet50, 25_557_032, 320, IMAGENET_WIDE, 2048, "2.bn3"),
        )
    ],
    Facts(
        mobilenet_v1.mobilenet_v1, 4_231_976, 164, "64x112 128x56 256x28 512x14 1024x7", 1024, MOBILENET_V1_FIRST,
        last("model.13.4", "fc"), 1000, 224,
    ),
]  # fmt: skip


def name_of(facts: Facts) -> str:
    return ("imagenet/" if facts.image_size == 224 else "") + facts.make.__name__


def is_large(facts: Facts) -> bool:
    return facts.parameters > 12_000_000


@pytest.fixture(
    params=[pytest.param(facts, marks=[pytest.mark.slow] * is_large(facts), id=name_of(facts)) for facts in FACTS]
)
def facts(request: pytest.FixtureRequest) -> Facts:
    """Facts of each network in turn. Large networks are slow to compute with."""
    torch.manual_seed(0)
    return request.param


every_network = pytest.mark.parametrize("facts", FACTS, ids=name_of)
"""For tests that allocate no weights, and are therefore quick for large networks too."""


def small_images(facts: Facts) -> Tensor:
    """Two images: 32 pixels, or 64 if the network is made for ImageNet."""
    size = min(facts.image_size, 64)
    return torch.randn(2, 3, size, size)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def steps_of_batch_norms(network: nn.Module) -> set[int]:
    return {int(value) for name, value in network.named_buffers() if name.endswith("num_batches_tracked")}


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_has_a_row_of_facts(file: Path):
    target = OmegaConf.load(file)._target_
    known = {f"{facts.make.__module__}.{facts.make.__name__}" for facts in FACTS}
    assert target in known, (
        f"conf/network/{file.relative_to(CONFIGS)} makes {target}, about which no facts are known: "
        "add a row for it to FACTS in tests/models/test_networks.py."
    )


@every_network
def test_every_network_has_a_config_named_after_it(facts: Facts):
    name = facts.make.__name__
    target = f"{facts.make.__module__}.{name}"
    (file,) = (file for file in CONFIGS.rglob("*.yaml") if OmegaConf.load(file)._target_ == target)
    config = OmegaConf.load(file)
    assert config.name == file.stem
    assert file.stem.replace("_", "") == name.lower().replace("_", "")
    assert file.parent == (CONFIGS / "imagenet" if facts.image_size == 224 else CONFIGS)
    expected = 0.01 if name in ("MobileNetV2", "ShuffleV1", "ShuffleV2") else 0.05
    assert config.learning_rate == (0.2 if facts.image_size == 224 else expected)


# ---------------------------------------------------------------------------------------------------- sizes and outputs


@every_network
def test_sizes_and_names_are_the_published_ones(facts: Facts):
    with torch.device("meta"):
        network = facts.make()
    names = list(network.state_dict())
    assert count_parameters(network) == facts.parameters
    assert len(names) == facts.keys
    assert names[:5] == facts.first.split()
    assert names[-5:] == facts.last.split()

    features = tuple((int(c), int(s), int(s)) for c, s in (size.split("x") for size in facts.features.split()))
    image_shape = (3, facts.image_size, facts.image_size)
    assert measure_shapes(network, image_shape) == Shapes(facts.classes, features, facts.pooled)
    assert network.classifier_layer.in_features == facts.pooled


@every_network
def test_the_documented_number_of_parameters_is_right(facts: Facts):
    assert f"{facts.parameters:,} parameters for {facts.classes} classes" in (facts.make.__doc__ or "")


@every_network
def test_the_number_of_classes_changes_only_the_classifier(facts: Facts):
    with torch.device("meta"):
        hundred, ten = facts.make(num_classes=100), facts.make(num_classes=10)
    before = {name: value.shape for name, value in hundred.state_dict().items()}
    after = {name: value.shape for name, value in ten.state_dict().items()}
    assert list(before) == list(after)
    assert {name for name in before if before[name] != after[name]} == set(facts.last.split()[-2:])
    assert tuple(ten.classifier_layer.weight.shape) == (10, facts.pooled)


def test_a_step_runs_each_batch_norm_once_and_reaches_each_parameter(facts: Facts):
    network = facts.make(num_classes=10).train()
    images = small_images(facts)
    with torch.no_grad():
        network(images)
    assert steps_of_batch_norms(network) == {1}

    output = network.forward_features(images)
    assert steps_of_batch_norms(network) == {2}
    assert output.unpooled is not None
    assert output.unpooled.shape[:2] == output.pooled.shape
    assert torch.equal(network.pool(output.unpooled), output.pooled)
    F.cross_entropy(output.logits, torch.tensor([0, 1])).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    # Batch norm subtracts what a bias before it adds, so the gradient of that bias is zero up to rounding.
    biases = {f"{name}.bias" for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    zero = {name for name, gradient in gradients.items() if gradient is not None and not gradient.any()}
    assert zero - biases == set()


@torch.no_grad()
def test_a_call_returns_the_logits_of_forward_features(facts: Facts):
    network = facts.make().eval()
    images = small_images(facts)
    output = network.forward_features(images)
    assert torch.equal(network(images), output.logits)
    assert torch.equal(network.classifier_layer(output.pooled), output.logits)


@torch.no_grad()
def test_another_image_size_is_accepted(facts: Facts):
    size = 64 if facts.image_size == 32 else 96
    assert facts.make(num_classes=10).eval()(torch.randn(1, 3, size, size)).shape == (1, 10)


# ------------------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def test_features_are_taken_at_the_published_points(facts: Facts):
    network = randomise_vectors(facts.make())
    images = small_images(facts)
    output = network.forward_features(images)
    features, pooled = output.features, output.pooled
    first, last = features[0], features[-1]
    is_activated = [bool(feature.min() >= 0) for feature in features]
    expected = last.mean((2, 3))
    if isinstance(network, WideResNet):
        stem = network.conv1(images)
        assert not any(is_activated), "the features of a wide ResNet are those before batch norm and ReLU"
        expected = F.relu(network.bn1(last)).mean((2, 3))
    elif isinstance(network, InvertedResidualNetwork):
        stem = network.conv1(images)
        assert is_activated == [True, False, False, False, False], "no ReLU follows the stages of MobileNetV2"
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
        elif isinstance(network, MobileNetV1):
            stem = network.model[:2](images)
        else:
            stem = F.relu(network.bn1(network.conv1(images)))
        if isinstance(network, ShuffleNetV2):
            expected = F.relu(network.bn2(network.conv2(last))).mean((2, 3))
    assert torch.equal(first, stem)
    torch.testing.assert_close(pooled, expected)


# ------------------------------------------------------------------------------------------------------- initialisation


def is_uniform(values: Tensor, bound: float) -> bool:
    """Whether values are uniform from -bound to bound: their deviation is bound / sqrt(3), to 5 standard errors."""
    tolerance = 5 * 0.45 / math.sqrt(values.numel())
    return bool(values.abs().max() <= bound) and abs(values.std().item() / bound * math.sqrt(3) - 1) < tolerance


def assert_normal(values: Tensor) -> None:
    """Check for a standard normal distribution: mean, deviation, and the fraction beyond 2."""
    assert values.mean().item() == pytest.approx(0, abs=5 / math.sqrt(values.numel()))
    assert values.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * values.numel()))
    assert values.abs().gt(2).float().mean().item() == pytest.approx(0.0455, abs=0.004), "not a normal distribution"


def test_initialisation_is_the_published_one(facts: Facts):
    network: Any = facts.make()
    scaled = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()
        if not isinstance(module, nn.Conv2d):
            continue
        assert (module.bias is not None) == isinstance(network, SlimNet | VGG)
        if isinstance(network, SlimNet | ShuffleNetV1 | ShuffleNetV2 | MobileNetV1):
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
        assert is_uniform(head.weight.flatten(), 1 / math.sqrt(facts.pooled))
    assert head.bias.eq(0).all().item() == isinstance(network, WideResNet | VGG | InvertedResidualNetwork)
