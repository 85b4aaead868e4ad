from pathlib import Path

import numpy as np
import pytest
import torch

from src.data.arrays import save_arrays
from tests.commands import run

torch.set_num_threads(1)  # tests run side by side


def colour_arrays(train: int = 200, test: int = 60, classes: int = 10) -> dict[str, np.ndarray]:
    """Contents of a small array file of 32 x 32 images: each class has a colour of its own under noise."""
    random = np.random.default_rng(0)
    colours = random.permutation(np.array(np.meshgrid([30, 125, 220], [30, 125, 220], [30, 125, 220])).reshape(3, -1).T)
    arrays: dict[str, np.ndarray] = {"class_names": np.array([f"colour {i}" for i in range(classes)])}
    for split, count in (("train", train), ("test", test)):
        labels = (np.arange(count) % classes).astype(np.uint8)
        images = colours[labels][:, None, None, :] + random.normal(0, 12, (count, 32, 32, 3))
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8), f"{split}_labels": labels}
    return arrays


@pytest.fixture(scope="session")
def array_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small array file of 10 classes that training can tell apart."""
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    save_arrays(path, **colour_arrays())
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, array_file: Path) -> Path:
    """The folder of a short run by AEKT with a serial layer, its teacher trained beside it; read only."""
    folder = tmp_path_factory.mktemp("run")
    ran = run(
        "train", "data=cifar10", "model=resnet20_to_resnet8", "method=aekt", "trainer=debug", "logger=none",
        "schedule.batch_size=8", f"data.path={array_file}", f"runs={folder / 'runs'}",
        f"teacher.store={folder / 'teachers'}",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    (file,) = (folder / "runs").glob("*/*/aekt/*/result.json")
    return file.parent
