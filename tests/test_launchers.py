"""Sweeps whose jobs run in other processes: the same messages, results and end as one after another."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from joblib.externals.loky import get_reusable_executor

import tests.helpers.launched  # noqa: F401  # so that the forks need not import its imports
from tests.helpers.commands import Ran
from tests.helpers.place import ROOT

TOKEN = "s3cr3t-t0ken-of-mine"


def python(module: str, *arguments: str, **variables: str) -> Ran:
    """Run `python -m <module> <arguments>` with environment variables."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def sweep(folder: Path, *arguments: str, gpus: str = "3,5") -> Ran:
    """Sweep over jobs of `tests/helpers/launched.py` on fake GPUs.

    The command runs in a fork of this process, because imports would take most of its time.
    """
    files = folder / "out.txt", folder / "err.txt"
    here = (f"hydra.sweep.dir={folder}", "hydra.output_subdir=null", f"folder={folder}", "hydra/launcher=gpus")

    def command() -> None:
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        sys.argv = ["launched", "-m", *here, *arguments]
        os.environ.update(TMPDIR=str(folder), MY_TOKEN=TOKEN, CUDA_VISIBLE_DEVICES=gpus)
        try:
            runpy.run_module("tests.helpers.launched", run_name="__main__", alter_sys=True)
        finally:
            get_reusable_executor(reuse=True).shutdown()  # a fork would wait for the workers before it ends them

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    process.join()
    assert process.exitcode is not None
    return Ran(process.exitcode, *(file.read_text() for file in files))


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    """A sweep of four jobs in two processes. Jobs 1 and 2 fail."""
    folder = tmp_path_factory.mktemp("failed")
    url = f"url=https://user:{TOKEN}@host"
    return sweep(folder, "jobs=2", "number=0,1,2,3", url), folder


def test_a_sweep_in_other_processes_ends_with_one_error(failed: tuple[Ran, Path]) -> None:
    ran, folder = failed
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert ran.code == 1
    assert errors == [
        "error: number=1 is a mistake, ${oc.env:MY_TOKEN}.",
        "error: 2 of 4 jobs failed: number=1; number=2.",
    ]
    assert ran.err.count("Traceback") == 1  # of the bug
    assert "RuntimeError: a bug" in ran.err
    assert {file.stem for file in folder.glob("*.gpus")} == {"0", "1", "2", "3"}  # the others have run


def test_other_processes_hide_secrets(failed: tuple[Ran, Path]) -> None:
    ran, folder = failed
    assert "The log of job 0 tells ${oc.env:MY_TOKEN}." in ran.out
    assert "The stderr of job 0 tells ${oc.env:MY_TOKEN}." in ran.err
    assert TOKEN not in ran.out + ran.err
    assert "https://host" in (folder / "multirun.yaml").read_text()
    assert not [file for file in folder.rglob("*") if file.is_file() and TOKEN in file.read_text(errors="ignore")]


def test_lightning_is_quiet_in_other_processes(failed: tuple[Ran, Path]) -> None:
    ran, _ = failed
    assert "chatter" not in ran.out + ran.err


def test_each_process_keeps_its_own_gpu(failed: tuple[Ran, Path]) -> None:
    _, folder = failed
    seen = {file.stem: file.read_text().split() for file in folder.glob("*.gpus")}
    assert {gpu for _, gpu in (seen["0"], seen["1"])} == {"3", "5"}  # these two have waited for one another
    assert len(set(map(tuple, seen.values()))) == 2  # pairs of process and GPU


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_sweep_with_one_sentence(tmp_path: Path) -> None:
    ran = sweep(tmp_path, "number=0,9")
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("error: A process of the sweep was killed, perhaps for lack of memory")


@pytest.mark.slow
def test_without_gpus_nothing_is_pinned(tmp_path: Path) -> None:
    ran = sweep(tmp_path, "number=0,3", "jobs=2", "hydra.launcher.n_jobs=2", gpus="")
    assert ran.code == 0, ran.err
    assert {file.read_text().partition(" ")[2] for file in tmp_path.glob("*.gpus")} == {""}


def results(runs: Path) -> dict[str, dict[str, Any]]:
    """Read the result.json of all runs, without the time and the path of the runs."""
    files = runs.rglob("result.json")
    read = {str(file.relative_to(runs)): json.loads(file.read_text().replace(str(runs), "")) for file in files}
    return {name: {**result, "seconds": 0.0} for name, result in read.items()}


@pytest.mark.slow
def test_runs_side_by_side_have_the_results_of_runs_one_after_another(tmp_path: Path) -> None:
    """Both runs miss their teacher, which only one of them trains."""
    options = (
        "-m", "data=glyphs", "schedule=quick", "schedule.epochs=1", "data.train_size=620", "trainer=cpu",
        "model=resnet20_to_resnet8", "method=kd,dkd", "logger=none", f"teacher.store={tmp_path}",
    )  # fmt: skip
    launcher = ("hydra/launcher=gpus", "hydra.launcher.n_jobs=2")
    side_by_side = python("src.train", *options, *launcher, f"runs={tmp_path / 'both'}")
    one_by_one = python("src.train", *options, f"runs={tmp_path / 'one'}")
    assert (side_by_side.code, side_by_side.err) == (one_by_one.code, one_by_one.err) == (0, "")
    assert side_by_side.out.count("Training resnet20 by vanilla") == 1
    assert len(results(tmp_path / "one")) == 3
    assert results(tmp_path / "both") == results(tmp_path / "one")
