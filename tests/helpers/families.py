"""One small network of each family, for tests that every family must pass."""

import pytest

from src.models.deep_resnet import ResNet18
from src.models.mobilenet_v1 import mobilenet_v1
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network
from src.models.resnet import resnet8, resnet20_option_a
from src.models.shufflenet_v1 import ShuffleV1
from src.models.shufflenet_v2 import ShuffleV2
from src.models.slimnet import slimnet_300k
from src.models.sources import architecture
from src.models.torchvision_networks import resnet18
from src.models.vgg import vgg8
from src.models.wide_resnet import wrn_16_1


def timm_network(num_classes: int) -> Network:
    """Make a network of timm. Skips the test if timm is not installed."""
    pytest.importorskip("timm")
    return architecture("timm/mobilenetv3_small_050", num_classes)


FAMILIES = [
    resnet8, wrn_16_1, vgg8, MobileNetV2, ShuffleV1, ShuffleV2, ResNet18, slimnet_300k, resnet20_option_a, mobilenet_v1,
    resnet18, timm_network,
]  # fmt: skip
