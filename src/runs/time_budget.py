"""The time that a command may train, `trainer.max_time`. The same command goes on where the time was over."""

import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from src.common.duration import duration


class OutOfTime(Exception):  # noqa: N818  # not an error: the run is not finished, and the same command resumes it
    """A run has reached its time limit and has saved a checkpoint."""


class TimeBudget:
    """The time until which a command may train. It begins when the object is made."""

    def __init__(self, seconds: float | None = None) -> None:
        """Begin a budget. None means no limit."""
        self.seconds = seconds
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def is_limited(self) -> bool:
        """Return whether there is a limit."""
        return self.end is not None

    @property
    def is_over(self) -> bool:
        """Return whether the time is over."""
        return self.end is not None and time.monotonic() >= self.end


def time_budget(cfg: DictConfig) -> TimeBudget:
    """Begin the time budget of a configuration."""
    given = cfg.trainer.get("max_time")
    limit = duration(OmegaConf.to_container(given) if OmegaConf.is_config(given) else given)
    return TimeBudget(limit.total_seconds() if limit else None)


def describe_pause(folder: Path, done: int, epochs: int) -> str:
    """Say how far a run has come, and how it goes on."""
    return f"{folder}: the time of trainer.max_time is over after {done} of {epochs} epochs. The same command resumes."
