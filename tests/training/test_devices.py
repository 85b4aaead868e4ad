"""Two processes on the CPU train on the same views and the same global batch, and evaluate every image once."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.runs.history import read_history
from src.training.serialization import Serial
from tests.helpers.interruption import SMALL, Place, write_sources
from tests.helpers.tiny import (
    by_threads,
    dkd,
    tiny_data,
    tiny_distiller,
    tiny_teacher,
    tiny_trainer,
    weights,
    without_batch_norm,
    without_clock,
)

ROOT = Path(__file__).parents[2]
METHODS = sorted(file.stem for file in (ROOT / "conf" / "method").glob("*.yaml"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    with by_threads(1):  # OpenMP's threads do not survive a fork
        data = tiny_data(tmp_path)
        one = tiny_distiller(data, dkd(), teacher=tiny_teacher(), serialization=Serial(0.1))
        without_batch_norm(one.student)
        two = copy.deepcopy(one)
        alone = tiny_trainer(2)
        alone.fit(one, datamodule=data)
        both = tiny_trainer(2, devices=2, strategy="ddp_fork")
        both.fit(two, datamodule=tiny_data(tmp_path))
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, atol=1e-5, rtol=1e-4, msg=name)
    for name in ("test/accuracy", "test/agreement"):  # of 17 images, which two devices cannot share equally
        assert float(both.callback_metrics[name]) == pytest.approx(float(alone.callback_metrics[name]))
    for name in ("test/nll", "train/loss_epoch"):
        assert float(both.callback_metrics[name]) == pytest.approx(float(alone.callback_metrics[name]), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_two_devices(tmp_path: Path, sources: tuple[str, ...], method: str) -> None:
    short = ("trainer=ddp_cpu", "trainer.limit_train_batches=2", "schedule.epochs=1", "checkpoint_minutes=10")
    pair = ("network@model.student=resnet20",) if method == "fsp" else ()
    place = Place(
        tmp_path / "here", *SMALL, *short, *pair, *sources, f"method={method}", "trainer.check_val_every_n_epoch=1"
    )
    ran = place.train()
    assert ran["code"] == 0, ran["err"]
    (folder,) = (file.parent for file in place.runs.rglob("result.json"))
    assert all(value == value for row in read_history(folder) for value in row.values())


def python(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m` in a new folder."""
    place.mkdir()
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", *command], cwd=place, env=variables, capture_output=True, text=True)


def histories(place: Path) -> dict[str, list[dict[str, float]]]:
    """Return the rows of each finished run below a folder, without their times."""
    rows = {str(file.parent.relative_to(place)): read_history(file.parent) for file in place.rglob("result.json")}
    return {name: without_clock(history) for name, history in rows.items()}


@pytest.mark.slow
def test_processes_of_every_launcher_train_the_same_runs(tmp_path: Path, sources: tuple[str, ...]) -> None:
    """A sweep of two methods, each trained by two processes: forked, started by Lightning, or started by torchrun."""
    two = (*SMALL, *sources, "trainer=ddp_cpu", "schedule.epochs=2", "logger=none", "method=vanilla,kd")
    forked = python(tmp_path / "forked", "src.train", "-m", *two)
    started = python(tmp_path / "started", "src.train", "-m", *two, "trainer.strategy=ddp")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "src.train")
    torchran = python(tmp_path / "torchrun", *torchrun, "-m", *two, "trainer.strategy=ddp")
    for ran in (forked, started, torchran):
        assert ran.returncode == 0, ran.stderr
    expected = histories(tmp_path / "forked")
    assert len(expected) == 2
    assert histories(tmp_path / "started") == expected
    assert histories(tmp_path / "torchrun") == expected
    strays = {path.name for name in ("forked", "started", "torchrun") for path in (tmp_path / name).iterdir()}
    assert strays == {"runs"}
    assert {path.name for path in (tmp_path / "started" / "runs").iterdir()} == {"multirun.yaml", "teachers", "tiny"}


def test_a_time_budget_ends_all_processes_after_the_same_step(tmp_path: Path, sources: tuple[str, ...]) -> None:
    """The time is over at once, so the command trains to the next step at which the processes wait for each other."""
    two = (*SMALL, *sources, "trainer=ddp_cpu", "schedule.epochs=3", "logger=none", "method=vanilla")
    budget = "+trainer.max_time={milliseconds: 1}"
    paused = python(tmp_path / "paused", "src.train", *two, budget)
    assert paused.returncode == 0
    # torch names a process that the end of the other one leaves behind.
    assert all("Terminating process" in line for line in paused.stderr.splitlines())
    assert paused.stdout.splitlines()[-1].endswith("of 3 epochs. The same command resumes.")
    assert not list(tmp_path.rglob("result.json"))
    assert not list(tmp_path.rglob("failure.txt"))


def test_forked_processes_keep_the_best_student(tmp_path: Path, sources: tuple[str, ...]) -> None:
    options = ("trainer=ddp_cpu", "logger=none", "method=vanilla", "data.val_size=12", "keep_best=true")
    ran = python(tmp_path / "best", "src.train", *SMALL, *sources, *options, "schedule.epochs=2")
    assert ran.returncode == 0, ran.stderr
    assert "student_best.pth: the student after epoch" in ran.stdout
    assert len(list(tmp_path.rglob("student_best.pth"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "ray"])
def test_a_sweep_by_the_launcher_of_a_cluster(tmp_path: Path, sources: tuple[str, ...], launcher: str) -> None:
    package = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    two = (*SMALL, *sources, "schedule.epochs=1", "logger=none", "method=vanilla,kd")
    by_launcher = python(tmp_path / "launcher", "src.train", "-m", *two, f"hydra/launcher={launcher}")
    if "node timed out during startup" in by_launcher.stderr:
        pytest.skip("Ray does not start here")
    assert by_launcher.returncode == 0, by_launcher.stderr
    assert python(tmp_path / "alone", "src.train", "-m", *two).returncode == 0
    assert len(histories(tmp_path / "alone")) == 2
    assert histories(tmp_path / "launcher") == histories(tmp_path / "alone")
