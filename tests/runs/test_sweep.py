"""After a sweep, one error lists all failed jobs, wherever they ran. Real launchers: tests/test_launchers.py."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from src.common.gpus import VISIBLE
from src.runs.sweep import JobError, ReportingLauncher, SweepError, failures_reported, is_pinned


def config(folder: Path, launcher: str = "basic") -> DictConfig:
    """The part of Hydra's configuration that a sweep reads."""
    return OmegaConf.create(
        {"hydra": {"sweep": {"dir": str(folder)}, "runtime": {"choices": {"hydra/launcher": launcher}}}}
    )


class Elsewhere(Launcher):
    """A launcher whose jobs return copies from another process: odd seeds fail."""

    seen: str | None = None

    def setup(self, **_) -> None: ...

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        self.seen = os.environ.get(VISIBLE)
        jobs = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            job = JobReturn(overrides=overrides, status=JobStatus.FAILED if number % 2 else JobStatus.COMPLETED)
            job.return_value = JobError() if number % 2 else number / 10
            jobs.append(job)
        return jobs


def test_failed_jobs_are_named_by_the_overrides_that_not_all_jobs_share() -> None:
    error = SweepError()
    error.jobs = [["method=kd", "seed=0"], ["method=kd", "seed=1"], ["method=kd", "seed=2", "data.flip=false"]]
    error.failed = [error.jobs[1], error.jobs[2]]
    assert str(error) == "2 of 3 jobs failed: seed=1; seed=2 data.flip=false."
    error.jobs = error.failed = [["method=kd", "++epochs=5"]]
    assert str(error) == "1 of 1 jobs failed: method=kd epochs=5."


def test_all_batches_of_a_sweep_are_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = ReportingLauncher(Elsewhere(), config(tmp_path), SweepError())
    first = launcher.launch([["seed=0"], ["seed=1"]], initial_job_idx=0)
    assert first[0].return_value == 0.0
    second = launcher.launch([["seed=2"], ["seed=3"]], initial_job_idx=2)
    for job in (first[1], second[1]):
        with pytest.raises(SweepError, match=r"^2 of 4 jobs failed: seed=1; seed=3\.$"):
            _ = job.return_value
    assert capsys.readouterr().err == "", "Hydra would add a line for each failed job"


def test_hydra_gets_the_reporting_launcher_and_then_its_own_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Elsewhere()
    monkeypatch.setattr(Plugins, "instantiate_launcher", original := lambda self, **options: inner)
    with failures_reported():
        launcher = Plugins.instance().instantiate_launcher(config=config(tmp_path))  # type: ignore[call-arg]
    assert isinstance(launcher, ReportingLauncher)
    assert launcher.launcher is inner
    assert Plugins.instantiate_launcher is original


def test_secrets_are_removed_from_the_command_line_that_hydra_writes(tmp_path: Path) -> None:
    file = tmp_path / "multirun.yaml"
    file.write_text("task: [data.root=https://user:password@host/path]\n")
    ReportingLauncher(Elsewhere(), config(tmp_path), SweepError()).launch([], initial_job_idx=0)
    assert file.read_text() == "task: [data.root=https://host/path]\n"


@pytest.mark.parametrize(("name", "seen"), [("gpus", "0,1"), ("joblib", None)])
def test_workers_are_told_the_visible_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seen: str | None
) -> None:
    monkeypatch.setenv(VISIBLE, "")  # so that the variable is restored
    monkeypatch.delenv(VISIBLE)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    inner, cfg = Elsewhere(), config(tmp_path, name)
    assert is_pinned(cfg.hydra) == (name == "gpus")
    ReportingLauncher(inner, cfg, SweepError()).launch([["seed=0"]], initial_job_idx=0)
    assert inner.seen == seen
