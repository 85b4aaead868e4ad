"""The blocks of the residual networks for CIFAR, and the accuracy of published checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from src.models import resnet
from src.models.checkpoints import load_weights
from src.models.resnet import BasicBlock, CifarResNet, PaddedShortcut
from tests.helpers.networks import accuracy_on_test_images, randomise_vectors

CONFIGS = Path(__file__).parents[2] / "conf" / "network"


@torch.no_grad()
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 2)])
def test_the_shortcut_is_the_identity_or_a_convolution(channels: int, stride: int):
    block = randomise_vectors(BasicBlock(8, channels, stride))
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    nn.init.zeros_(block.bn2.running_mean)
    x = torch.randn(2, 8, 6, 6)
    shortcut = x if channels == 8 else block.downsample(x)
    assert torch.equal(block(x), F.relu(shortcut))
    assert (block.downsample is None) == (channels == 8)


def test_the_shortcut_of_option_a_pads_channels_on_both_sides_and_has_no_parameters():
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


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_the_name_states_the_depth(depth: int):
    with torch.device("meta"):
        network: CifarResNet = getattr(resnet, f"resnet{depth}")()
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len([name for name in layers if "downsample" not in name]) == depth


@pytest.mark.slow
@pytest.mark.parametrize("depth", [20, 56])
def test_published_networks_of_option_a_reach_their_accuracy(depth: int, real_data: Path):
    facts: Any = OmegaConf.load(CONFIGS / f"resnet{depth}_option_a.yaml")
    network = getattr(resnet, f"resnet{depth}_option_a")()
    load_weights(network, real_data / "teachers" / f"resnet{depth}_cifar10_option_a.th")
    accuracy = accuracy_on_test_images(network, real_data / "cifar10.npz", facts.mean, facts.std)
    assert accuracy == pytest.approx(facts.published_accuracy.cifar10, abs=2)
