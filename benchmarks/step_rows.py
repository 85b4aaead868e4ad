"""Rows about a training step: with stored answers, compiled, with Winograd, in Lightning's loop, and larger."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.customary import time_plain_loop, torchvision_loader
from benchmarks.images import CLASSES, write_random_images
from benchmarks.timing import Place, Row, divide, measure_in_turn, milliseconds
from benchmarks.trial import (
    SMALLEST,
    Clock,
    Trial,
    batches_per_epoch,
    fit_timed,
    make_step_timer,
    make_trial,
    step_operations,
)
from src.setup.networks import make_network


def step_stored(place: Place) -> Iterator[Row]:
    """A step with the teacher's answers stored, against the student alone."""
    for model, batch_size in itertools.product(place.options.pairs, place.options.batch_sizes):
        sides = {
            "stored": make_step_timer(place, make_trial(place, "aekt", model, batch_size, stored=True)),
            "alone": make_step_timer(place, make_trial(place, "vanilla", model, batch_size)),
        }
        found = measure_in_turn(sides, place.options.rounds)
        yield Row(
            "a step, answers stored",
            "the student alone",
            f"{model}, {batch_size}",
            divide(found["stored"], found["alone"]),
            "time <= 1.08",
            milliseconds(found),
        )


def compiled(place: Place) -> Iterator[Row]:
    """A step of the student alone with torch.compile, against the same step without it."""
    sizes = place.options.batch_sizes[:1]
    return _with_and_without(place, "compiled", "vanilla", sizes, "a compiled step, alone", "as it is")


def winograd(place: Place) -> Iterator[Row]:
    """A step with nothing stored by Winograd's algorithm, against the same step by direct convolution."""
    sizes = place.options.batch_sizes
    return _with_and_without(place, "winograd", "aekt", sizes, "a step, nothing stored, winograd", "direct")


def _with_and_without(
    place: Place, option: str, method: str, batch_sizes: Sequence[int], what: str, against: str
) -> Iterator[Row]:
    """A step with an option of `make_trial`, against the same step without it."""
    options: dict[str, dict[str, Any]] = {option: {option: True}, against: {}}
    for model, batch_size in itertools.product(place.options.pairs, batch_sizes):
        sides = {
            name: make_step_timer(place, make_trial(place, method, model, batch_size, **chosen))
            for name, chosen in options.items()
        }
        found = measure_in_turn(sides, place.options.rounds)
        ratios = divide(found[option], found[against])
        yield Row(what, against, f"{model}, {batch_size}", ratios, "", milliseconds(found))


class Kind(NamedTuple):
    """A step of ours that is compared with the customary one."""

    stored: bool
    """True if the teacher's answers are stored."""
    precision: str
    target: str
    """The target speed, as a multiple of the customary step's speed."""


KINDS = {
    "nothing stored, float32": Kind(False, "float32", "1.35, 2.0 in the fastest precision"),
    "answers stored, float32": Kind(True, "float32", "3.3"),
    "nothing stored, bfloat16": Kind(False, "bfloat16", "2.0 in the fastest"),
    "answers stored, bfloat16": Kind(True, "bfloat16", "3.3"),
}


def step_plain(place: Place) -> Iterator[Row]:
    """A step with and without stored answers, in float32 and bfloat16, against the customary loop."""
    kinds = {name: kind for name, kind in KINDS.items() if place.options.bfloat16 or kind.precision == "float32"}
    for model, batch_size in itertools.product(place.options.pairs, place.options.batch_sizes):
        yield from _against_customary(place, kinds, model, batch_size)


def _against_customary(place: Place, kinds: Mapping[str, Kind], model: str, batch_size: int) -> Iterator[Row]:
    sides: dict[str, Callable[[], float]] = {}
    for name, kind in kinds.items():
        trial = make_trial(place, "dkd", model, batch_size, stored=kind.stored, precision=kind.precision)
        sides[name] = make_step_timer(place, trial, mixed=kind.precision == "bfloat16")
    sides["customary"], operations = _customary_side(place, trial, batch_size)
    found = measure_in_turn(sides, place.options.rounds)
    for name, kind in kinds.items():
        absolute = milliseconds(found, name, "customary")
        if not place.options.winograd:
            products = operations[kind.stored] / 1e9 / getattr(place.hardware, kind.precision)
            absolute += (
                f"; its matrix products alone would take {1000 * products:.1f} ms, for a ratio of at most "
                f"{statistics.median(found['customary']) / products:.3g}"
            )
        yield Row(
            f"a step, {name}",
            "a customary loop",
            f"{model}, {batch_size}",
            divide(found["customary"], found[name]),
            f"speed >= {kind.target}",
            absolute,
        )


def _customary_side(place: Place, trial: Trial, batch_size: int) -> tuple[Callable[[], float], dict[bool, float]]:
    """Make the timer of the customary loop on a trial's data.

    Also returns the operations of a step's matrix products, with (True) and without (False) stored answers.
    """
    student, teacher = (make_network(trial.cfg.model[role], "model", CLASSES) for role in ("student", "teacher"))
    steps = place.options.steps
    loader = torchvision_loader(trial.data, batch_size, 2 + steps // batches_per_epoch(trial.data))
    operations = step_operations(student, teacher, batch_size)
    return lambda: time_plain_loop(student.train(), teacher.eval(), loader, steps), operations


def loop(place: Place) -> Iterator[Row]:
    """Lightning's loop as the command runs it, with CSV logger and progress bar, against a bare loop."""
    for model, batch_size in itertools.product((*place.options.pairs, SMALLEST), place.options.batch_sizes[:1]):
        trial = make_trial(place, "aekt", model, batch_size, stored=True)
        bare = make_step_timer(place, make_trial(place, "aekt", model, batch_size, stored=True))
        found = measure_in_turn(
            {"Lightning": _lightning_side(trial, place.options.steps), "bare": bare}, place.options.rounds
        )
        yield Row(
            "the loop through Lightning",
            "a bare loop",
            f"{model}, {batch_size}",
            divide(found["Lightning"], found["bare"]),
            f"time <= {1.10 if model == SMALLEST else 1.05}",
            milliseconds(found),
        )


def _lightning_side(trial: Trial, steps: int) -> Callable[[], float]:
    """Make the function that times `steps` steps of a fit, after one epoch to warm up."""
    data, warm_up = trial.data, batches_per_epoch(trial.data)
    # All answers are stored, as in the bare loop, because the epoch repeats the first one's images and views.
    augment = data.augment
    data.augment = lambda batch, epoch: augment(batch, 0)  # type: ignore[method-assign]
    data.train_index = data.train_index.repeat(2 + steps // warm_up)

    def time_fit() -> float:
        clock = Clock(warm_up, warm_up + steps)
        fit_timed(trial, clock, max_epochs=1, limit_train_batches=warm_up + 1 + steps, limit_val_batches=0)
        begin, end = clock.times
        return (end - begin) / steps

    return time_fit


def scale(place: Place) -> Iterator[Row]:
    """A step of AEKT as data, classes and teacher grow, against the smallest of each."""
    batch_size = place.options.batch_sizes[0]

    def side(model: str, count: int, classes: int, stored: bool) -> Callable[[], float]:
        there = place._replace(images=place.folder / f"{count}-{classes}.npz")
        write_random_images(there.images, count, classes, classes)
        return make_step_timer(place, make_trial(there, "aekt", model, batch_size, stored=stored, train_size=count))

    images, classes, teachers = (1_000, 10_000, 50_000), (10, 100, 1_000), (56, 110)
    axes = {
        "images, answers stored": {f"{count:,}": side(SMALLEST, count, 100, True) for count in images},
        "classes, answers stored": {f"{count:,}": side(SMALLEST, 5_000, count, True) for count in classes},
        **{
            f"teacher, {'answers' if stored else 'nothing'} stored": {
                f"resnet{depth}": side(f"resnet{depth}_to_resnet20", 1_000, 100, stored) for depth in teachers
            }
            for stored in (True, False)
        },
    }
    for axis, sides in axes.items():
        found = measure_in_turn(sides, place.options.rounds)
        first, *others = sides
        for name in others:
            ratios = divide(found[name], found[first])
            yield Row(f"a step as it grows: {axis}", first, name, ratios, "", milliseconds(found))
