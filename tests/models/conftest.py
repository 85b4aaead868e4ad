"""A trained state dict and a file for it, and the real data for the tests that need it."""

import os
from pathlib import Path

import pytest
import torch

from src.models.resnet import resnet8
from tests.helpers.checkpoints import State, trained


@pytest.fixture
def real_data() -> Path:
    """The folder of cifar10.npz, cifar100.npz and published checkpoints (in teachers/). Skips the test without it."""
    folder = Path(os.environ.get("AEKT_DATA", ""))
    if "AEKT_DATA" not in os.environ or not (folder / "teachers").is_dir():
        pytest.skip("AEKT_DATA names no folder with real data and published checkpoints in teachers/")
    return folder


@pytest.fixture(scope="module")
def state() -> State:
    """The state dict of a resnet8 for ten classes."""
    torch.manual_seed(0)
    return trained(resnet8(10)).state_dict()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The path of a checkpoint that does not exist yet."""
    return tmp_path / "network.pth"
