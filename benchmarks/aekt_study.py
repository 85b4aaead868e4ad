"""The study of AEKT: a search on held-out training images, and a confirmation on test images.

    python -m benchmarks.aekt_study search --bed cifar10 --rung 1 --teacher FILE --runs FOLDER
    python -m benchmarks.aekt_study choose --bed cifar10
    python -m benchmarks.aekt_study combine --bed cifar10 --teacher FILE --runs FOLDER
    python -m benchmarks.aekt_study confirm --bed cifar10 --teacher FILE --runs FOLDER

A bed is data, a teacher and a student. Every setting gets the same number of trials. Trial number i has the same
learning rate, temperature and weight of the non-target term in all settings that have them, so that settings can be
compared pairwise. Trial 0 has the constants of the literature, or this project's first choice.

The search halves in two rungs. Rung 1 tries all trials with one seed. Rung 2 gives the best trials of each setting
further seeds. `choose` takes the best mean validation accuracy after the last epoch, and writes the frozen settings.
It adds one setting that was not searched: `aekt serial`, with the loss of `aekt` and the layer of `dkd serial`.
`combine` scores it on the held-out images. `confirm` trains the settings with eight seeds, and scores the test images
once, after the last epoch.

Commands resume: finished runs are not trained again. The same command in a second process shares the work: a run that
another process trains is skipped.
"""

import argparse
import csv
import fcntl
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple, TypeVar

from hydra import compose, initialize_config_dir
from scipy.stats.qmc import LatinHypercube

from src.command import set_up_process
from src.runs.lock import BusyError
from src.runs.result import Result
from src.train import train

Value = TypeVar("Value")
ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
STUDY = ROOT / "results" / "aekt_study"
TRIALS_FILE = STUDY / "trials.csv"
FROZEN_FILE = STUDY / "frozen.json"
COMMON = (
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "logger=none",
    "schedule=quick",
    "data.fixed_views=8",
    "teacher.fold=true",
    "teacher.view_store=true",
    "gradients.every=50",
    "trainer.check_val_every_n_epoch=${schedule.epochs}",  # images are scored once, after the last epoch
)
CIFAR10 = ("data=cifar10", "network@model.teacher=resnet20_option_a", "network@model.student=resnet8")
CIFAR100 = ("data=cifar100", "model=slimnet600k_to_resnet8")
BEDS: dict[str, tuple[str, ...]] = {
    "cifar10": (*CIFAR10, "data.train_size=5000", "data.val_size=3000", "schedule.epochs=15", "winograd=true"),
}
"""The overrides of each bed of the search."""
CONFIRMED_IN = "trainer.precision=bf16-mixed"
"""Confirmations are longer than the search, and bfloat16 halves their time on our machine."""
CONFIRMATIONS: dict[str, tuple[str, ...]] = {
    "cifar10": (*CIFAR10, "schedule.epochs=20"),
    "cifar10, 20 % wrong labels": (*CIFAR10, "data.wrong_labels=0.2", "schedule.epochs=20"),
    "cifar100": (*CIFAR100, "data.train_size=10000", "schedule.epochs=20"),
    "cifar100, few images": (*CIFAR100, "data.train_size=2500", "schedule.epochs=40"),
    "cifar100, 60 epochs": (*CIFAR100, "data.train_size=10000", "schedule.epochs=60"),
    "cifar10, 40 epochs": (*CIFAR10, "schedule.epochs=40"),
}
"""The overrides of each bed of the confirmation. All have the settings that were frozen on the bed `cifar10`."""
CONFIRMATION_SEEDS = range(8)
COMBINED = "aekt serial"
"""A setting that is not searched: the loss of `aekt` with the layer of `dkd serial`."""
CONFIRMED = ("vanilla", "kd", "dkd", "dkd serial", "one", "aekt", COMBINED)
"""The settings that are confirmed. `dkd alpha` is not: its best trial has an alpha of 1, so it is `dkd`."""
TRIALS = 12
"""The number of trials of each setting in rung 1."""
KEPT = 3
"""The number of trials of each setting in rung 2."""
SEEDS = {1: (0,), 2: (1, 2, 3)}
"""The seeds of each rung."""
SETTINGS: dict[str, tuple[str, ...]] = {
    "vanilla": ("method=vanilla",),
    "kd": ("method=kd",),
    "dkd": ("method=dkd",),
    "dkd alpha": ("method=dkd",),
    "dkd serial": ("method=dkd", "serialization=serial"),
    "one": ("method=aekt", "method.weighting=one", "serialization=none"),
    "aekt": ("method=aekt",),
}
"""The overrides of each setting. Two are controls for explicit transfer, whose gradient is parallel to TCKD's: `dkd
alpha` searches the weight of TCKD too, and `one` adds plain cross-entropy at temperature T."""


class Job(NamedTuple):
    """One run of the search."""

    setting: str
    trial: int
    seed: int


def log_uniform(draw: float, low: float, high: float) -> float:
    """Map a draw from [0, 1) to a number whose logarithm is uniform, rounded to two significant digits."""
    return float(f"{low * (high / low) ** draw:.2g}")


def choice(draw: float, options: Sequence[Value]) -> Value:
    """Map a draw from [0, 1) to one of the options."""
    return options[int(draw * len(options))]


def draws(name: str, trial: int) -> list[float]:
    """Draw five numbers from [0, 1) for a trial. A Latin hypercube spreads each of them evenly over all trials."""
    cube = LatinHypercube(5, rng=zlib.crc32(name.encode()))
    return [float(draw) for draw in cube.random(TRIALS)[trial]]


def constants(setting: str, trial: int) -> dict[str, str | float]:
    """Draw the options of a trial. They are a function of the setting and the trial's number."""
    shared, own = draws("shared", trial), draws(setting, trial)
    found: dict[str, str | float] = {"schedule.learning_rate": log_uniform(shared[0], 0.01, 0.2) if trial else 0.1}
    if setting == "vanilla":
        return found
    found["method.temperature"] = choice(shared[1], (2.0, 4.0, 8.0)) if trial else 4.0
    if setting == "kd":
        share = round(0.5 + 0.45 * own[0], 2) if trial else 0.9
        return {**found, "method.kd_weight": share, "method.cross_entropy_weight": round(1 - share, 2)}
    found["method.beta"] = log_uniform(shared[2], 0.5, 8.0) if trial else 2.0
    if setting == "dkd alpha":
        found["method.alpha"] = log_uniform(own[0], 0.5, 8.0) if trial else 1.0
    if setting in ("one", "aekt"):
        found["method.gamma"] = log_uniform(own[0], 0.1, 4.0) if trial else 0.4
    if setting == "aekt":
        weightings = ("ratio", "relative", "excess", "log_ratio")
        found["method.weighting"] = choice(own[1], weightings) if trial else "ratio"
        found["method.max_weight"] = choice(own[2], (2.0, 3.0, 5.0, 10.0)) if trial else 10.0
        found["serialization"] = choice(own[3], ("none", "serial")) if trial else "serial"
    if setting == "dkd serial" or found.get("serialization") == "serial":
        found["serialization.lr_scale"] = log_uniform(own[4], 0.003, 1.0) if trial else 0.1
    return found


def overrides_of(setting: str, trial: int) -> list[str]:
    """List the overrides of a trial of a setting."""
    drawn = constants(setting, trial)
    groups_first = sorted(drawn.items(), key=lambda item: "." in item[0])
    return [*SETTINGS[setting], *(f"{name}={value}" for name, value in groups_first)]


def jobs_of_rung(rung: int, rows: Sequence[Mapping[str, str]]) -> Iterator[Job]:
    """List the runs of a rung. Rung 2 has the trials that are best in the rows of rung 1."""
    for seed in SEEDS[rung]:
        trials = {setting: list(range(TRIALS)) if rung == 1 else best_trials(rows, setting) for setting in SETTINGS}
        for place in range(max(map(len, trials.values()))):
            for setting, numbers in trials.items():
                yield Job(setting, numbers[place], seed)


def best_trials(rows: Sequence[Mapping[str, str]], setting: str) -> list[int]:
    """List the trials of a setting with the highest mean validation accuracy in rung 1, best first."""
    accuracies = defaultdict(list)
    for row in rows:
        if row["setting"] == setting and int(row["seed"]) in SEEDS[1]:
            accuracies[int(row["trial"])].append(float(row["val_accuracy"]))
    if len(accuracies) < TRIALS:
        raise SystemExit(f"Rung 1 of {setting} has {len(accuracies)} of {TRIALS} trials: finish it first.")
    return sorted(accuracies, key=lambda trial: -mean(accuracies[trial]))[:KEPT]


def run(options: argparse.Namespace, *overrides: str) -> Result | None:
    """Train a run, or return the result of the finished one. Returns None if another process trains it."""
    places = (f"teacher.path={options.teacher}", f"runs={options.runs}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*COMMON, *overrides, *places])
    try:
        return train(cfg)
    except BusyError as error:
        print(error, flush=True)
        return None


def append_row(file: Path, row: Mapping[str, object]) -> None:
    """Append a row to a CSV file that two processes may write."""
    with file.open("a+", newline="") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        rows = list(csv.DictReader(stream))
        key = ("bed", "setting", "trial", "seed")
        if any(all(old[name] == str(row[name]) for name in key) for old in rows):
            return
        writer = csv.DictWriter(stream, row)
        if not rows:
            writer.writeheader()
        writer.writerow(row)


def search(options: argparse.Namespace) -> None:
    """Run a rung of the search, and append its trials to the CSV file."""
    jobs = list(jobs_of_rung(options.rung, read_trials(options.bed)))
    for number, job in enumerate(jobs):
        if any((row["setting"], int(row["trial"]), int(row["seed"])) == job for row in read_trials(options.bed)):
            continue
        print(f"{number + 1} of {len(jobs)}: {job}", flush=True)
        try_out(options, job, overrides_of(job.setting, job.trial))


def try_out(options: argparse.Namespace, job: Job, overrides: Sequence[str]) -> None:
    """Train a run of the search, and append its scores on held-out images to the CSV file."""
    result = run(options, *BEDS[options.bed], *overrides, f"seed={job.seed}")
    if result is None:
        return
    assert result.val is not None
    row = {
        "bed": options.bed,
        **job._asdict(),
        "val_accuracy": round(result.val.accuracy, 5),
        "val_nll": round(result.val.nll, 4),
        "val_ece": round(result.val.ece, 4),
        "options": " ".join(override for override in overrides if override not in SETTINGS.get(job.setting, ())),
    }
    append_row(TRIALS_FILE, row)


def read_trials(bed: str) -> list[dict[str, str]]:
    """Read the trials of a bed so far."""
    rows = csv.DictReader(TRIALS_FILE.read_text().splitlines()) if TRIALS_FILE.exists() else []
    return [row for row in rows if row["bed"] == bed]


def choose(options: argparse.Namespace) -> None:
    """Write the overrides of the best trial of each setting to the file of frozen settings."""
    rows = read_trials(options.bed)
    frozen = json.loads(FROZEN_FILE.read_text()) if FROZEN_FILE.exists() else {}
    frozen[options.bed] = {}
    for setting in SETTINGS:
        accuracies = {
            trial: [
                float(row["val_accuracy"]) for row in rows if (row["setting"], row["trial"]) == (setting, str(trial))
            ]
            for trial in best_trials(rows, setting)
        }
        if any(len(found) < len(SEEDS[1]) + len(SEEDS[2]) for found in accuracies.values()):
            raise SystemExit(f"Rung 2 of {setting} is not finished.")
        best = max(accuracies, key=lambda trial: mean(accuracies[trial]))
        frozen[options.bed][setting] = overrides_of(setting, best)
        print(f"{setting}: trial {best}, {100 * mean(accuracies[best]):.2f} % of the held-out images")
    frozen[options.bed][COMBINED] = with_layer_of(frozen[options.bed]["dkd serial"], frozen[options.bed]["aekt"])
    FROZEN_FILE.write_text(json.dumps(frozen, indent=2) + "\n")


def with_layer_of(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Combine the serialization layer of one setting with all else of another."""
    return [
        *(override for override in other if not override.startswith("serialization")),
        *(override for override in one if override.startswith("serialization")),
    ]


def combine(options: argparse.Namespace) -> None:
    """Train the combined setting with all seeds of the search."""
    overrides = json.loads(FROZEN_FILE.read_text())[options.bed][COMBINED]
    for seed in (*SEEDS[1], *SEEDS[2]):
        try_out(options, Job(COMBINED, 0, seed), overrides)


def confirm(options: argparse.Namespace) -> None:
    """Train frozen settings with all seeds, and copy the result files. Runs with a copy are not trained again."""
    frozen = json.loads(FROZEN_FILE.read_text())["cifar10"]
    jobs = [(seed, setting) for seed in CONFIRMATION_SEEDS for setting in options.settings]
    for number, (seed, setting) in enumerate(jobs):
        file = STUDY / result_file(options.bed, setting, seed)
        if file.exists():
            continue
        print(f"{number + 1} of {len(jobs)}: {setting}, seed {seed}", flush=True)
        result = run(options, CONFIRMED_IN, *CONFIRMATIONS[options.bed], *frozen[setting], f"seed={seed}")
        if result:
            file.parent.mkdir(parents=True, exist_ok=True)
            without_folder(result).write(file)


def result_file(bed: str, setting: str, seed: int | str) -> str:
    """Name the result file of a confirmation, relative to the study's folder. `src.report` reads these files.

    >>> result_file("cifar10, 20 % wrong labels", "dkd serial", 3)
    'cifar10_20_percent_wrong_labels/dkd_serial-seed3/result.json'
    """
    folder = bed.replace(",", "").replace("%", "percent").replace(" ", "_")
    return f"{folder}/{setting.replace(' ', '_')}-seed{seed}/result.json"


def without_folder(result: Result) -> Result:
    """Reduce the path of the teacher to the name of its file."""
    if result.teacher is None or result.teacher.source is None:
        return result
    teacher = result.teacher.model_copy(update={"source": Path(result.teacher.source).name})
    return result.model_copy(update={"teacher": teacher})


def main() -> None:
    """Read the command line."""
    set_up_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    for action in (search, choose, combine, confirm):
        command = commands.add_parser(action.__name__, help=action.__doc__, description=action.__doc__)
        command.set_defaults(action=action)
        command.add_argument("--bed", choices=CONFIRMATIONS if action is confirm else BEDS, required=True)
        if action is search:
            command.add_argument("--rung", type=int, choices=SEEDS, default=1)
        if action is confirm:
            command.add_argument("--settings", nargs="+", choices=CONFIRMED, default=CONFIRMED)
        if action is not choose:
            command.add_argument("--teacher", required=True, help="the teacher's checkpoint")
            command.add_argument("--runs", required=True, help="the folder of run folders")
    options = parser.parse_args()
    options.action(options)


if __name__ == "__main__":
    main()
