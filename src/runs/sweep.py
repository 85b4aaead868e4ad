"""Sweeps by any launcher of Hydra: preparations before the first job, and one error for all failed jobs."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from src.common.errors import UserError
from src.common.files import write_text
from src.common.gpus import name_visible_gpus
from src.common.secrecy import without_secrets


class JobError(UserError):
    """A job of a sweep failed. It has already reported its own message."""


class SweepError(UserError):
    """Some jobs of a sweep failed. Each of them has already reported its own message."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[list[str]] = []
        self.failed: list[list[str]] = []

    def __str__(self) -> str:
        """List the failed jobs, each by the overrides that not all jobs share."""
        shared = set.intersection(*map(set, self.jobs)) if len(self.jobs) > 1 else set()
        differing = ([override for override in job if override not in shared] for job in self.failed)
        names = [" ".join(override.lstrip("+") for override in job) for job in differing]
        return f"{len(self.failed)} of {len(self.jobs)} jobs failed: {'; '.join(names)}."


class FailedJob(JobReturn):
    """A failed job that raises its error, like Hydra's `JobReturn`, but without a line about it on stderr."""

    @property  # type: ignore[misc]  # without the setter of the base class
    def return_value(self) -> Any:
        """Raise the error."""
        raise self._return_value


class ReportingLauncher(Launcher):
    """A wrapper of any launcher of Hydra. After a sweep, the failed jobs raise one error that lists all of them.

    The list is made from the jobs that the launcher returns, because they may have run in other processes.
    """

    def __init__(self, launcher: Launcher, config: DictConfig, error: SweepError) -> None:
        self.launcher, self.config, self.error = launcher, config, error

    def setup(self, **_: Any) -> None:
        """Do nothing: the launcher is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs, and wait until all of them have ended."""
        _redact(Path(self.config.hydra.sweep.dir) / "multirun.yaml")
        if is_pinned(self.config.hydra):
            name_visible_gpus()
        jobs = self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        return [self._reported(job) for job in jobs]

    def _reported(self, job: JobReturn) -> JobReturn:
        """Note a job in the error. Hydra's sweepers raise the error when they read the result of a failed job."""
        overrides = list(job.overrides or ())
        self.error.jobs.append(overrides)
        if job.status is not JobStatus.FAILED:
            return job
        self.error.failed.append(overrides)
        return FailedJob(**{**vars(job), "_return_value": self.error})


@contextlib.contextmanager
def failures_reported() -> Iterator[None]:
    """Let sweeps in the block raise one `SweepError`. Hydra alone would raise only the error of the first failed job.

    Only the sweeper sees the results of all jobs, and Hydra has no hook there. So this wraps the sweeper's launcher.
    """
    original, error = Plugins.instantiate_launcher, SweepError()

    def instantiate(self: Plugins, *, config: DictConfig, **options: Any) -> Launcher:
        return ReportingLauncher(original(self, config=config, **options), config, error)

    Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Plugins.instantiate_launcher = original  # type: ignore[method-assign]
    if error.failed:  # a search goes on after a failed trial, and does not raise its error
        raise error


def is_pinned(hydra: Any) -> bool:
    """Return whether Hydra's configuration gives each process of a sweep one GPU."""
    return bool(hydra.runtime.choices["hydra/launcher"] == "gpus")


def _redact(file: Path) -> None:
    """Remove secrets from a file to which Hydra has written the command line."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text != (clean := without_secrets(text)):
        write_text(file, clean)
