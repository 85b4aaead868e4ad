"""The blocks of SlimNet, and the accuracy of published checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from src.models.checkpoints import load_weights
from src.models.network import Network
from src.models.slimnet import SlimNet, slimnet_300k, slimnet_600k
from tests.helpers.networks import accuracy_on_test_images, randomise_vectors

PUBLISHED = [(slimnet_600k, "slimnet_600k_cifar100.pth", 71.74), (slimnet_300k, "slimnet_300k_cifar100.pth", 68.47)]


@torch.no_grad()
def test_max_pooling_follows_the_fifth_and_the_tenth_block():
    network = randomise_vectors(SlimNet(tuple(range(4, 17)), num_classes=5))
    images = torch.randn(2, 3, 16, 16)
    x, outputs = images, []
    for number, block in enumerate(network.features, start=1):
        x = F.relu(block.bn(block.conv(x)))
        outputs.append(x)
        if number in (5, 10):
            x = F.max_pool2d(x, 2)
    expected = (outputs[0], outputs[4], outputs[9], outputs[12])
    features = network.forward_features(images).features
    assert all(torch.equal(one, other) for one, other in zip(features, expected, strict=True))


def test_the_last_map_is_pooled_by_its_maximum():
    maps = torch.tensor([[[[1.0, 5.0], [2.0, 0.0]], [[-1.0, -2.0], [-3.0, -4.0]]]])
    assert torch.equal(SlimNet.pool(maps), torch.tensor([[5.0, -1.0]]))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name", "published"), PUBLISHED, ids=["600k", "300k"])
def test_published_networks_reach_their_accuracy(
    make: Callable[[], Network], name: str, published: float, real_data: Path
):
    network = make()
    load_weights(network, real_data / "teachers" / name)
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    accuracy = accuracy_on_test_images(network, real_data / "cifar100.npz", mean, std)
    assert accuracy == pytest.approx(published, abs=3)
