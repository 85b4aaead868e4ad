import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from src.data.array_file import save_arrays
from tests.helpers.arrays import colour_arrays
from tests.helpers.commands import run
from tests.helpers.gpu import REHEARSAL
from tests.helpers.place import RUNS, Place

torch.set_num_threads(1)  # tests run side by side
CACHE = tempfile.TemporaryDirectory(prefix="aekt-tests-")
os.environ["AEKT_CACHE"] = CACHE.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests with the marker `gpu` on a machine without a GPU, unless they are rehearsed on the CPU."""
    if torch.cuda.is_available() or REHEARSAL:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, or AEKT_TEST_DEVICE=cpu for a rehearsal"))


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


@pytest.fixture
def place(tmp_path: Path, array_file: Path) -> Place:
    """An empty folder for runs and teachers."""
    return Place(tmp_path, array_file)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, array_file: Path) -> Place:
    """A folder with short runs of several methods and of their teacher. Tests only read it."""
    place = Place(tmp_path_factory.mktemp("finished"), array_file)
    for method, layer in RUNS:
        ran = place.train(f"method={method}", f"serialization={layer}")
        assert (ran.code, ran.err) == (0, ""), ran.err
    return place


@pytest.fixture
def copies(finished: Place, tmp_path: Path) -> Place:
    """Copies of the finished runs, which a test may change."""
    shutil.copytree(finished.runs, tmp_path / "runs")
    return Place(tmp_path, finished.data)
