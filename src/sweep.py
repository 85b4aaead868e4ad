"""What a sweep is going to cost, said before its first run."""

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

from src.assemble import make_data, make_distiller, make_trained_parts, make_trainer
from src.errors import UserError
from src.loading import frozen, make_network
from src.run import needs_teacher, run_folder

SAMPLE = 8
"""How many of a sweep's runs are tried for a few steps."""
STEPS = 3


class Announce(Callback):
    """On Hydra's `on_multirun_start`: how many runs there are, and how long they will take on this machine.

    Chosen by `hydra.callbacks` in an experiment of many runs. It tries some of them, drawn at random, for a few steps
    each with a teacher of random weights, and extrapolates: training alone, without validation and without teachers
    that have to be trained first. Runs that are finished already take no time.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Say it."""
        jobs = jobs_of(config.hydra)
        sample = random.Random(0).sample(jobs, min(SAMPLE, len(jobs)))
        print(f"This is {len(jobs)} runs. How long they take is measured on {len(sample)} of them ...", flush=True)
        try:
            print(estimate([seconds_left(hydra.compose("train", job)) for job in sample], len(jobs)), flush=True)
        except UserError as error:
            print(f"How long that takes cannot be measured: {error}", flush=True)


def jobs_of(node: DictConfig) -> list[list[str]]:
    """Each job's overrides, as Hydra's own sweeper will make them of its parameters and the command line."""
    given = [*(f"{key}={value}" for key, value in (node.sweeper.params or {}).items()), *node.overrides.task]
    parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(given)
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


class Clock(L.Callback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    @property
    def seconds_a_step(self) -> float:
        """Of all but the first, which pays for what is done once."""
        return (self.ends[-1] - self.ends[0]) / max(len(self.ends) - 1, 1)


def seconds_left(cfg: DictConfig) -> float:
    """How long a run's training takes by a few of its steps, 0 where it is finished already.

    Raises `UserError` where the run could not start.
    """
    if (run_folder(cfg) / "result.json").is_file():
        return 0.0
    data = make_data(cfg)
    parts = make_trained_parts(cfg, data)
    teacher = None
    if needs_teacher(cfg):
        network = make_network(cfg.model.teacher, "model.teacher", data.num_classes)
        teacher = frozen(cfg, data, network, {})
    distiller = make_distiller(cfg, data, parts, teacher, {})
    clock = Clock()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = make_trainer(
        cfg, callbacks=[clock], max_epochs=1, limit_train_batches=1 + STEPS, limit_val_batches=0, **quiet
    )
    trainer.fit(distiller, datamodule=data)
    steps = cfg.schedule.epochs * -(-len(data.train_index) // cfg.schedule.batch_size)
    return steps * clock.seconds_a_step


def estimate(seconds: Sequence[float], runs: int) -> str:
    """The time of all runs in words, from those of some of them."""
    error = runs * stdev(seconds) / len(seconds) ** 0.5 if len(seconds) > 1 else 0.0
    parts = f", give or take {in_words(error)}" if error else ""
    return (
        f"About {in_words(runs * mean(seconds))} of training one after another{parts}: {in_words(min(seconds))} to "
        f"{in_words(max(seconds))} a run, by {STEPS} steps of {len(seconds)} of them on this machine; validation and "
        "missing teachers come on top. Interrupt it as you like: the same command goes on."
    )


def in_words(seconds: float) -> str:
    """The largest unit that fits."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
