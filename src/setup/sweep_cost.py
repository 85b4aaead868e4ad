"""Announce the number of runs and the cost of a sweep before its first run."""

import random
import time
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import hydra
import lightning as L
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from src.common.errors import UserError
from src.config.names import needs_teacher
from src.runs.identity import run_path
from src.setup.assemble import make_data_for, make_distiller, make_method, make_parts, prepare
from src.setup.teacher import make_untrained_teacher
from src.training.fitting import make_trainer

SAMPLE = 8
"""The largest number of runs of a sweep that are tried."""
STEPS = 3
"""The number of timed steps in each of these runs."""


class Announce(Callback):
    """A callback of Hydra that prints how many runs a sweep has, and how long they will take on this machine.

    Experiments with many runs add it to `hydra.callbacks`. It tries a random sample of the runs for a few steps each,
    with a teacher of random weights, and extrapolates. Validation and the training of missing teachers are not
    included. Finished runs take no time.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the number of runs and the estimate."""
        jobs = jobs_of_sweep(config.hydra)
        sample = random.Random(0).sample(jobs, min(SAMPLE, len(jobs)))
        print(f"This sweep has {len(jobs)} runs. Measuring {len(sample)} of them for an estimate ...", flush=True)
        try:
            print(estimate([seconds_left(hydra.compose("train", job)) for job in sample], len(jobs)), flush=True)
        except UserError as error:
            print(f"There is no estimate: {error}", flush=True)


def jobs_of_sweep(node: DictConfig) -> list[list[str]]:
    """List the overrides of each job, as Hydra's sweeper makes them from its parameters and the command line."""
    given = [*(f"{key}={value}" for key, value in (node.sweeper.params or {}).items()), *node.overrides.task]
    parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(given)
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


class Clock(L.Callback):
    """Record the time at the end of each training step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of all steps but the first, which includes work that is done once."""
        return (self.ends[-1] - self.ends[0]) / max(len(self.ends) - 1, 1)


def seconds_left(cfg: DictConfig) -> float:
    """Estimate how long a run's training takes from a few of its steps. Returns 0 for a finished run.

    Raises `UserError` if the run cannot start.
    """
    cfg = prepare(cfg)
    method = make_method(cfg)
    if (run_path(cfg) / "result.json").is_file():
        return 0.0
    data = make_data_for(cfg, method)
    parts = make_parts(cfg, data, method, for_training=True)
    teacher = make_untrained_teacher(cfg, data) if needs_teacher(cfg) else None
    distiller = make_distiller(cfg, data, parts, teacher)
    clock = Clock()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = make_trainer(
        cfg, callbacks=[clock], max_epochs=1, limit_train_batches=1 + STEPS, limit_val_batches=0, **quiet
    )
    trainer.fit(distiller, datamodule=data)
    steps: int = cfg.schedule.epochs * len(data.train_dataloader())
    return steps * clock.seconds_per_step


def estimate(seconds: Sequence[float], runs: int) -> str:
    """Describe the time of all `runs` runs, from the seconds of a sample of runs."""
    error = runs * stdev(seconds) / len(seconds) ** 0.5 if len(seconds) > 1 else 0.0
    margin = f", give or take {in_words(error)}" if error else ""
    return (
        f"About {in_words(runs * mean(seconds))} of training, one run after another{margin}. A run takes "
        f"{in_words(min(seconds))} to {in_words(max(seconds))}, estimated from {STEPS} steps of {len(seconds)} runs on "
        "this machine. Validation and missing teachers are not included. You may interrupt the sweep at any time: the "
        "same command resumes it."
    )


def in_words(seconds: float) -> str:
    """Write a time in the largest unit of which it contains at least two.

    >>> in_words(7500)
    '2.1 hours'
    """
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
