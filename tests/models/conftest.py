"""Real images and published checkpoints, for the tests of networks that need them."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def real_data() -> Path:
    """The folder of cifar10.npz, cifar100.npz and published checkpoints (in teachers/). Skips the test without it."""
    folder = Path(os.environ.get("AEKT_DATA", ""))
    if "AEKT_DATA" not in os.environ or not (folder / "teachers").is_dir():
        pytest.skip("AEKT_DATA names no folder with real data and published checkpoints in teachers/")
    return folder
