"""The rows of `benchmarks.gpu`."""

import itertools
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch

from benchmarks.card import reset_numerics
from benchmarks.gpu_bench import BFLOAT16, COMPILED, DEFAULT, FLOAT32, Bench, Failure, Finding, Setting, Side
from benchmarks.gpu_sides import Bare, Customary, Lightning
from benchmarks.images import CLASSES
from benchmarks.timing import Row
from benchmarks.trial import SMALLEST, Clock, Trial, assemble, batches_per_epoch, fit_timed
from src.data.array_data import ArrayData
from src.setup.assemble import make_data
from src.setup.teacher import open_store

CUSTOMARY = "a customary loop"
EAGER = ("eager loop, float32", "eager loop, bfloat16")
GRAPH = ("CUDA graph, float32", "CUDA graph, bfloat16")
"""The hand-written loops. The second of each is for settings that are `mixed`."""
SYNC_WARNING = "called a synchronizing CUDA operation"
TRAIN_IMAGES, EPOCHS, MINUTES = 50_000, 240, 6
"""CIFAR-100's training images, its usual number of epochs, and the target time of a whole run."""


def loop(bench: Bench) -> Iterator[Finding | Failure]:
    """The whole loop of AEKT through Lightning, against the customary loop and hand-written loops, for each pair."""
    settings = (DEFAULT, FLOAT32, BFLOAT16)
    return bench.each(bench.sizes.pairs, lambda model, deadline: _loop_of_pair(bench, model, settings, deadline))


def compiled(bench: Bench) -> Iterator[Finding | Failure]:
    """The same with torch.compile, for the first pair."""
    return _loop_of_pair(bench, bench.sizes.pairs[0], (COMPILED,), bench.deadline)


def _loop_of_pair(
    bench: Bench, model: str, settings: Sequence[Setting], deadline: float
) -> Iterator[Finding | Failure]:
    customary = Customary(bench, model)
    loops = {setting.name: Lightning(bench, bench.trial("aekt", model, setting)) for setting in settings}
    bare, failures = _bare_sides(bench, model, settings)
    yield from failures
    found = bench.measure({CUSTOMARY: customary, **loops, **bare}, deadline)
    fastest = min(settings, key=lambda setting: statistics.median(found[setting.name]))
    where = f"{model}, {bench.sizes.batch_size}"
    for setting in settings:
        name, is_fastest = setting.name, setting is fastest
        what = f"whole loop, {name}" + (" (fastest)" if is_fastest else "")
        target = "speed >= 2" if setting is DEFAULT else "speed >= 4" if is_fastest else ""
        rate = customary.operations / statistics.median(found[name])
        facts = {"operations_per_step": customary.operations, "peak_of": loops[name].precision}
        share = rate / bench.peaks[loops[name].precision]
        yield bench.compare(found, (name, CUSTOMARY), (what, CUSTOMARY, where), target, share_of_peak=share, **facts)
        for kind, target in ((GRAPH, "speed >= 0.8" if is_fastest else ""), (EAGER, "")):
            other = kind[setting.mixed]
            if other in found:
                overhead = [1000 * (a - b) for a, b in zip(found[name], found[other], strict=True)]
                yield bench.compare(found, (name, other), (what, other, where), target, overhead_milliseconds=overhead)
    for pair in zip(EAGER, GRAPH, strict=True):
        if pair[0] in found and pair[1] in found:
            yield bench.compare(found, pair, (*pair, where))


def _bare_sides(bench: Bench, model: str, settings: Sequence[Setting]) -> tuple[dict[str, Side], list[Failure]]:
    """Make the hand-written loops in the precisions of the settings, as far as they can be captured in a graph."""
    sides: dict[str, Side] = {}
    failures = []
    for mixed, graph in itertools.product(sorted({setting.mixed for setting in settings}), (False, True)):
        name = (GRAPH if graph else EAGER)[mixed]
        if bench.is_cuda or not graph:
            try:
                sides[name] = Bare(bench, model, BFLOAT16 if mixed else FLOAT32, graph=graph)
            except Exception:
                failures.append(Failure(f"{name}, {model}", traceback.format_exc()))
    return sides, failures


def stored(bench: Bench) -> Iterator[Finding | Failure]:
    """The whole loop with all of the teacher's answers stored, against the student alone, for each pair."""
    # Without padding and flips, an image has one view. All answers are known after the first epoch.
    images = max((bench.sizes.stored_steps + bench.sizes.warm_up + 1) * bench.sizes.batch_size, CLASSES)
    overrides = (
        "data.padding=0",
        "data.flip=false",
        f"data.train_size={images}",
        "teacher.view_store=true",
        "trainer.max_epochs=1",
        f"runs={bench.folder / 'stored'}",
    )
    data = make_data(bench.compose("aekt", SMALLEST, DEFAULT, *overrides))
    assert isinstance(data, ArrayData)
    steps = batches_per_epoch(data) - bench.sizes.warm_up - 1

    def of_pair(model: str, deadline: float) -> Iterator[Finding]:
        trial, alone = (assemble(bench.compose(name, model, DEFAULT, *overrides), data) for name in ("aekt", "vanilla"))
        sides: dict[str, Side] = {"stored": Lightning(bench, trial), "alone": Lightning(bench, alone)}
        _open_store(bench, trial)
        sides["stored"](steps)
        _open_store(bench, trial)  # as a second run does, which finds all answers
        found = bench.measure(sides, deadline, steps)
        what = ("whole loop, answers stored", "the student alone", f"{model}, {bench.sizes.batch_size}")
        yield bench.compare(found, ("stored", "alone"), what, "time <= 1.05")

    return bench.each(bench.sizes.pairs, of_pair)


def _open_store(bench: Bench, trial: Trial) -> None:
    """Open the teacher's view store, after all answers so far have been written."""
    cfg, distiller, data = trial
    teacher = distiller.teacher
    assert teacher is not None
    teacher.finish_writing()
    teacher.view_store = open_store(cfg, data, teacher, distiller.method, bench.device)


def epochs(bench: Bench) -> Iterator[Finding | Failure]:
    """The minutes of 240 epochs of CIFAR-100, extrapolated from a few short epochs with their evaluations."""
    return bench.each((DEFAULT, BFLOAT16), lambda setting, _: _epochs_of_setting(bench, setting))


def _epochs_of_setting(bench: Bench, setting: Setting) -> Iterator[Finding]:
    last = bench.sizes.epoch_steps
    clock = Clock(0, last, wait=bench.wait)
    trial = bench.trial("aekt", bench.sizes.long_pair, setting)
    begin = time.perf_counter()
    limits = {"max_epochs": 3, "limit_train_batches": last + 1, "limit_val_batches": None}
    reset_numerics()
    fit_timed(trial, clock, bench.folder, **limits)
    whole = time.perf_counter() - begin
    step, between = epoch_times(clock.times, last)
    steps = -(-TRAIN_IMAGES // bench.sizes.batch_size)
    start = max(0.0, whole - 3 * (last * step + between))
    minutes = (EPOCHS * (steps * step + between) + start) / 60
    row = Row(
        f"{EPOCHS} epochs of CIFAR-100, {setting.name}",
        "absolute",
        f"{bench.sizes.long_pair}, {bench.sizes.batch_size}",
        [minutes],
        f"minutes <= {MINUTES}",
        f"extrapolated from {1000 * step:.3g} ms a step and {between:.2g} s between two epochs",
    )
    yield Finding(row, {"extrapolated": True, "step": step, "between_epochs": between, "start": start})


def epoch_times(times: Sequence[float], steps: int) -> tuple[float, float]:
    """Compute the seconds of a step and between two epochs, as medians without the first epoch's steps.

    `times` are those after the first step of each epoch and after `steps` further ones.

    >>> epoch_times([0.0, 40.0, 55.0, 75.0, 90.0, 110.0], 10)
    (2.0, 13.0)
    """
    pairs = list(zip(times[::2], times[1::2], strict=True))
    step = statistics.median((end - begin) / steps for begin, end in pairs[1:])
    gaps = [begin - end for (_, end), (begin, _) in itertools.pairwise(pairs)]
    return step, max(0.0, statistics.median(gaps) - step)


class Waits(L.Callback):
    """Count the warnings of torch's sync debug mode from the end of batch `first` to the end of batch `last`."""

    def __init__(self, first: int, last: int, seen: Sequence[warnings.WarningMessage]) -> None:
        self.first, self.last, self.seen = first, last, seen
        self.span = slice(0, 0)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Switch the mode on or off."""
        if batch_idx == self.first:
            torch.cuda.synchronize()
            self.span = slice(len(self.seen), None)
            torch.cuda.set_sync_debug_mode("warn")
        elif batch_idx == self.last:
            self.stop()

    def stop(self) -> None:
        """Switch the mode off, if it is on."""
        if self.span.stop is None:
            torch.cuda.set_sync_debug_mode("default")
            self.span = slice(self.span.start, len(self.seen))

    def places(self) -> Mapping[str, int]:
        """Count the warnings by the line of Python code that waited."""
        found = [warning for warning in self.seen[self.span] if SYNC_WARNING in str(warning.message)]
        return Counter(f"{warning.filename}:{warning.lineno}" for warning in found)


def waits(bench: Bench) -> Iterator[Finding | Failure]:
    """The times that the host waits for the device in a step of each setting, between two steps that log."""
    if not bench.is_cuda:
        raise NotImplementedError("torch counts the host's waits on a GPU only")
    return bench.each((DEFAULT, BFLOAT16), lambda setting, _: _waits_of_setting(bench, setting))


def _waits_of_setting(bench: Bench, setting: Setting) -> Iterator[Finding]:
    trial = bench.trial("aekt", SMALLEST, setting)
    every = trial.cfg.trainer.log_every_n_steps
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        counter = Waits(every + 2, 2 * every - 4, seen)
        try:
            limits = {"max_epochs": 1, "limit_train_batches": 2 * every, "limit_val_batches": 0}
            fit_timed(trial, counter, bench.folder, **limits)
        finally:
            counter.stop()
    places, steps = counter.places(), counter.last - counter.first
    row = Row(
        f"waits of the host per step, {setting.name}",
        "absolute",
        f"{SMALLEST}, {bench.sizes.batch_size}",
        [sum(places.values()) / steps],
        "waits <= 0",
        ", ".join(f"{place} ({count})" for place, count in places.items()),
    )
    yield Finding(row, {"places": dict(places), "steps": steps})
