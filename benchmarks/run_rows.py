"""Rows about whole runs: the start of a command, a sweep with stored answers, and its memory."""

import itertools
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

import torch

from benchmarks.images import CLASSES
from benchmarks.process_memory import anonymous_peak, read_status
from benchmarks.timing import Place, Row, divide, measure_in_turn, megabytes, milliseconds, seconds_per_call
from benchmarks.trial import (
    BATCH_SIZE,
    ROOT,
    SMALLEST,
    compose_training,
    give_weights,
    make_step_timer,
    make_trial,
    silence,
)
from src.common.allocator import keep_freed_memory
from src.models.checkpoints import save_weights
from src.setup.assemble import make_data
from src.setup.networks import make_network
from src.train import train

Value = TypeVar("Value")
PAIRS = {"wrn40_2_to_wrn16_2": 0.7, "resnet32x4_to_resnet8x4": 0.55}
"""The target time of a sweep with the view store, as a share of its time without the store."""
METHODS = ("kd", "dkd", "aekt", "nkd", "dist")
"""The methods of the sweep."""
UNTIL_FIRST_STEP = """
import os, runpy, sys
sys.argv[0] = "train"
from src.training.distiller import Distiller
Distiller.training_step = lambda *_: os._exit(0)
runpy.run_module("src.train", run_name="__main__")
"""


def startup(place: Place) -> Iterator[Row]:
    """The time from the command to the first training step, against the import of the libraries."""
    teacher = place.folder / "teacher.pth"
    cfg = compose_training("kd", SMALLEST, place.images, 16)
    save_weights(make_network(cfg.model.teacher, "model.teacher", 62), teacher)
    common = ("experiment=quickstart", f"data.root={place.folder}", f"runs={place.folder / 'runs'}", "trainer=cpu")
    commands = {
        "alone": (*common, "method=vanilla"),
        "by kd, teacher at hand": (*common, "method=kd", f"teacher.path={teacher}"),
    }
    sides: dict[str, Callable[[], float]] = {
        name: partial(_time_python, UNTIL_FIRST_STEP, *command) for name, command in commands.items()
    }
    sides["import"] = partial(_time_python, "import torch, lightning, hydra")
    found = measure_in_turn(sides, place.options.rounds)
    for name in commands:
        yield Row(
            "from command to first step",
            "import torch, lightning, hydra",
            f"quickstart, {name}",
            divide(found[name], found["import"]),
            "time <= 2",
            milliseconds(found, name, "import"),
        )


def _time_python(code: str, *arguments: str) -> float:
    """Run code in a new interpreter. Returns the seconds."""
    command = [sys.executable, "-c", code, *arguments]
    return seconds_per_call(lambda: subprocess.run(command, check=True, cwd=ROOT, capture_output=True))


def sweep(place: Place) -> Iterator[Row]:
    """Five methods by several seeds with the view store, against the same runs without it."""
    options = place.options
    for model in options.pairs:
        found: dict[bool, list[float]] = {True: [], False: []}
        for number, (seed, method) in enumerate(itertools.product(range(options.sweep_seeds), METHODS)):
            for stored in (True, False)[:: 1 if number % 2 else -1]:
                runs, epochs = "stored" if stored else "asked", options.sweep_epochs
                found[stored].append(time_run(place, runs, method, model, seed, stored=stored, epochs=epochs))
                print(f"{model}, {method}, seed {seed}, {runs}: {found[stored][-1]:.1f} s", file=sys.stderr)
        yield Row(
            f"{len(METHODS)} methods, {options.sweep_seeds} seeds, stored",
            "without the store",
            f"{model}, {options.sweep_epochs} epochs of {options.sweep_images}",
            [sum(found[True]) / sum(found[False])],
            f"time <= {PAIRS[model]}",
            f"{sum(found[True]):.0f} s, {sum(found[False]):.0f} s",
        )


def memory(place: Place) -> Iterator[Row]:
    """Anonymous memory of training with the view store, against training without it."""
    for model in place.options.pairs:
        sides = {
            "stored": partial(_peak_of_next_run, place, model, True, itertools.count()),
            "asked": partial(_peak_of_next_run, place, model, False, itertools.count()),
        }
        found = measure_in_turn(sides, place.options.rounds)
        yield Row(
            "peak anonymous memory, stored",
            "without the store",
            f"{model}, {BATCH_SIZE}",
            divide(found["stored"], found["asked"]),
            "memory <= 1.1",
            megabytes(found, digits=0),
        )


def _peak_of_next_run(place: Place, model: str, stored: bool, seeds: Iterator[int]) -> float:
    """Train with the next seed in a new process. Returns the process's peak anonymous memory in bytes."""
    return _in_new_process(partial(_peak_of_run, place, model, stored, next(seeds)), place.options.threads)


def _in_new_process(measure: Callable[[], Value], threads: int) -> Value:
    """Call `measure` in a new process, in which torch uses so many threads."""
    with ProcessPoolExecutor(1, get_context("spawn"), _set_up, (threads,)) as pool:
        return pool.submit(measure).result()


def _set_up(threads: int) -> None:
    silence()
    torch.set_num_threads(threads)


def _peak_of_run(place: Place, model: str, stored: bool, seed: int) -> float:
    runs = f"memory-{stored}-{seed}"
    return anonymous_peak(lambda: time_run(place, runs, "aekt", model, seed, stored=stored, epochs=1))


class Usage(NamedTuple):
    """Time and memory of a training step, measured in a process of its own."""

    seconds: float
    """Processor time of a step."""
    faults: float
    """Page faults of a step."""
    peak: float
    """Peak resident memory of the process, in bytes."""


def allocator(place: Place) -> Iterator[Row]:
    """Processor time of a student's step with freed memory kept in the process, against glibc's defaults."""
    for model in (SMALLEST, *place.options.pairs):
        usages: dict[str, list[Usage]] = {"kept": [], "returned": []}
        sides = {name: partial(_keep_usage, place, model, name, found) for name, found in usages.items()}
        seconds = measure_in_turn(sides, place.options.rounds)
        facts = ", ".join(
            f"{name} {statistics.median(one.faults for one in found):.0f} page faults and a peak of "
            f"{statistics.median(one.peak for one in found) / 1e6:.0f} MB"
            for name, found in usages.items()
        )
        yield Row(
            "processor time of a step, freed memory kept",
            "returned to the system",
            f"{model}, {BATCH_SIZE}, alone",
            divide(seconds["kept"], seconds["returned"]),
            "time <= 1",
            f"{milliseconds(seconds)}; {facts}",
        )


def _keep_usage(place: Place, model: str, name: str, found: list[Usage]) -> float:
    """Measure in a new process, because the setting cannot be undone."""
    measure = partial(_usage_of_steps, place, model, name == "kept")
    found.append(_in_new_process(measure, place.options.threads))
    return found[-1].seconds


def _usage_of_steps(place: Place, model: str, kept: bool) -> Usage:
    if kept:
        keep_freed_memory()
    steps = make_step_timer(place, make_trial(place, "vanilla", model, BATCH_SIZE))
    steps()
    before, first = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    steps()
    after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.process_time() - first
    count = place.options.steps
    return Usage(seconds / count, (after.ru_minflt - before.ru_minflt) / count, read_status("VmHWM"))


def time_run(place: Place, runs: str, method: str, model: str, seed: int, *, stored: bool, epochs: int) -> float:
    """Train like `python -m src.train`, with a teacher from `give_weights`. Returns the seconds.

    `runs` is the folder for the run folder, inside the folder of the row.
    """
    options, file = place.options, place.folder / f"{model}.pth"
    cfg = compose_training(method, model, place.images, BATCH_SIZE)
    if not file.is_file():
        network = make_network(cfg.model.teacher, "model.teacher", CLASSES)
        give_weights(network, cfg.model.teacher, make_data(cfg))
        save_weights(network, file)
    cfg.seed, cfg.runs, cfg.logger = seed, str(place.folder / runs), None
    cfg.schedule.epochs, cfg.data.train_size = epochs, options.sweep_images
    cfg.schedule.learning_rate = 1e-3  # some students of a teacher of random weights diverge at the published rate
    cfg.teacher.path, cfg.teacher.view_store, cfg.teacher.fold = str(file), stored, True
    cfg.trainer.accelerator, cfg.trainer.enable_progress_bar = "cpu", False
    cfg.trainer.precision = options.precision
    cfg.winograd = cfg.teacher.winograd = options.winograd
    return seconds_per_call(lambda: train(cfg))
