"""How fast training is beside what it is measured against: each row both sides in turn in one run, as a Markdown table.

Rows are chosen by name: `python -m benchmarks.speed step_stored data loss`; all without one. Images are CIFAR-100's
where the folder AEKT_DATA holds cifar100.npz, else random ones. A ratio is the median of all rounds, with its range.
"""
# ruff: noqa: B023 (both sides of a row are timed before the loop goes on to the next)

import argparse
import contextlib
import ctypes
import io
import itertools
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.methods import configured, random_images
from src.analysis.predictions import macs
from src.assemble import make_data, make_distiller, make_logger, make_trained_parts, make_trainer
from src.config import build
from src.data.array_data import ArrayData
from src.data.arrays import load_arrays, save_arrays
from src.data.image_data import ImageData, Samples
from src.data.views import normalise
from src.distiller import Distiller
from src.loading import frozen, make_network
from src.methods.method import Batch, Prediction, View
from src.models.checkpoints import load_weights, save_weights
from src.models.network import Network
from src.resume import Checkpoints
from src.run import History, needs_teacher
from src.teacher import Teacher
from src.train import train
from src.view_store import ViewStore

CLASSES = 100
TESTED = 500
"""Test images."""
PAIRS = {"wrn40_2_to_wrn16_2": 0.7, "resnet32x4_to_resnet8x4": 0.55}
"""And how long a sweep with the store may take beside one without it."""
SMALLEST = "resnet20_to_resnet8"
SWEEP = ("kd", "dkd", "aekt", "nkd", "dist")
ROOT = Path(__file__).parents[1]


class Row(NamedTuple):
    """One line of the table."""

    what: str
    against: str
    setting: str
    ratios: list[float]
    target: str
    absolute: str = ""


class Hardware(NamedTuple):
    """What the machine can do, measured now: 10^9 operations and bytes a second."""

    float32: float
    bfloat16: float
    memory: float

    @classmethod
    def measured(cls) -> "Hardware":
        """Products of 1,024 x 1,024 matrices, and copies of 256 MB."""
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        source, copied = torch.zeros(2**26), torch.empty(2**26)
        found = interleaved(
            {
                "float32": lambda: seconds(lambda: a @ b),
                "bfloat16": lambda: seconds(lambda: a.bfloat16() @ b.bfloat16()),
                "copy": lambda: seconds(lambda: copied.copy_(source)),
            },
            5,
        )
        single, half, copy = (min(found[name]) for name in ("float32", "bfloat16", "copy"))
        operations = 2 * 1024**3 / 1e9
        return cls(operations / single, operations / half, 2 * source.nbytes / 1e9 / copy)

    def __str__(self) -> str:
        return (
            f"{torch.get_num_threads()} threads, torch {torch.__version__}; matrix products {self.float32:.0f} GFLOP/s "
            f"in float32, {self.bfloat16:.0f} in bfloat16; memory {self.memory:.1f} GB/s."
        )


class Place(NamedTuple):
    """Where a row may write, its images, the machine and the options."""

    folder: Path
    images: Path
    hardware: Hardware
    options: argparse.Namespace


# How both sides are timed


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side returns, in turn, `rounds` times after one to warm up; the order alternates."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(rounds + 1):
        for name in list(sides)[:: 1 if repetition % 2 else -1]:
            value = sides[name]()
            if repetition:
                found[name].append(value)
    return found


def over(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """The ratio of each round."""
    return [a / b for a, b in zip(one, other, strict=True)]


def seconds(action: Callable[[], Any], times: int = 1) -> float:
    """Of one of so many calls."""
    begin = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - begin) / times


def milliseconds(found: Mapping[str, Sequence[float]]) -> str:
    """The median of each side."""
    return ", ".join(f"{name} {1000 * statistics.median(values):.1f} ms" for name, values in found.items())


# What is timed


def images_file(folder: Path, count: int) -> Path:
    """An array file of so many training images: CIFAR-100's first, or random ones."""
    file, real = folder / "images.npz", real_images()
    if real is None:
        random_images(file, max(count, TESTED), CLASSES, TESTED)
        return file
    arrays = load_arrays(real)
    chosen, tested = _balanced(arrays.train_labels.numpy(), count), _balanced(arrays.test_labels.numpy(), TESTED)
    save_arrays(
        file,
        train_images=arrays.train_images[chosen].permute(0, 2, 3, 1).numpy(),
        train_labels=arrays.train_labels[chosen].numpy(),
        test_images=arrays.test_images[tested].permute(0, 2, 3, 1).numpy(),
        test_labels=arrays.test_labels[tested].numpy(),
    )
    return file


def real_images() -> Path | None:
    """CIFAR-100 where AEKT_DATA has it."""
    file = Path(os.environ.get("AEKT_DATA", "")) / "cifar100.npz"
    return file if "AEKT_DATA" in os.environ and file.is_file() else None


def _balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Places of the first `count` images, as many of each class."""
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    return np.sort(np.argsort(rank, kind="stable")[:count])


def make(
    place: Place,
    method: str,
    model: str,
    batch_size: int,
    *,
    stored: bool = False,
    precision: str | None = None,
    train_size: int | None = None,
    compiled: bool = False,
    winograd: bool = False,
) -> tuple[DictConfig, Distiller, Any]:
    """What `python -m src.train` would train by this method, with networks of fresh weights."""
    cfg = configured(method, model, place.images, batch_size)
    cfg.data.train_size = train_size or max(place.options.batches * batch_size, CLASSES)
    cfg.winograd = cfg.teacher.winograd = winograd or place.options.winograd
    data = make_data(cfg)
    parts = make_trained_parts(cfg, data)
    teacher = None
    if needs_teacher(cfg):
        cfg.teacher.precision, cfg.teacher.fold = precision, True
        teacher = frozen(cfg, data, make_network(cfg.model.teacher, "model.teacher", data.num_classes), {})
        teacher.to(torch.device("cpu"), torch.channels_last)
        if stored:
            images, views = len(data.source.train_labels), data.view_count(1)
            file = place.folder / f"{model}-{batch_size}-{place.images.stem}-{precision}.views"
            teacher.store = ViewStore(file, images, views, data.num_classes)
    cfg.compile = compiled
    distiller = make_distiller(cfg, data, parts, teacher, {})
    distiller.student.to(memory_format=torch.channels_last)
    return cfg, distiller, data


def endless(data: ArrayData, batches: int) -> Iterator[Samples]:
    """The first batches of the first epoch, as views, again and again."""
    loader = data.train_dataloader()
    while True:
        for batch in itertools.islice(loader, batches):
            yield data.augment(batch, 0)


def training(place: Place, distiller: Distiller, data: ArrayData, mixed: bool = False) -> Callable[[], float]:
    """Seconds of one of so many steps in a bare loop, each call from the next batch on."""
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    batches = endless(data, place.options.batches)

    def step() -> None:
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = distiller.training_step(batch, 0)
        optimizer.zero_grad()
        distiller.method.backward(loss, distiller.weighted_terms)
        optimizer.step()

    for _ in range(place.options.batches):  # what can be stored is
        step()
    return lambda: seconds(step, place.options.steps)


def epoch_length(data: ArrayData) -> int:
    """Batches of an epoch."""
    return len(data.train_dataloader())


# The customary code


def masked_dkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """DKD as it is usually written: masks, softmax and a logit of -1000 (mdistiller's), alpha 1, beta 8."""
    mask = torch.zeros_like(student).scatter_(1, target[:, None], 1).bool()
    p, q = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    p, q = (torch.cat([(x * mask).sum(1, keepdim=True), (x * ~mask).sum(1, keepdim=True)], dim=1) for x in (p, q))
    tckd = F.kl_div(torch.log(p), q, reduction="batchmean") * temperature**2
    others = F.log_softmax(student / temperature - 1000.0 * mask, dim=1)
    nckd = F.kl_div(others, F.softmax(teacher / temperature - 1000.0 * mask, dim=1), reduction="batchmean")
    return F.cross_entropy(student, target) + tckd + 8 * nckd * temperature**2


def torchvision_loader(data: ArrayData, batch_size: int, times: int = 1) -> DataLoader[Any]:
    """torchvision's CIFAR100 of the same images, each `times` an epoch, with the usual transforms and 2 workers."""
    dataset: Any = datasets.CIFAR100.__new__(datasets.CIFAR100)  # without its archive
    rows = data.train_index.repeat(times)
    dataset.data = data.arrays.train_images[rows].permute(0, 2, 3, 1).contiguous().numpy()
    dataset.targets = data.source.train_labels[rows].tolist()
    dataset.target_transform = None
    dataset.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=2, drop_last=True)


def plain_window(student: nn.Module, teacher: nn.Module, loader: DataLoader[Any], steps: int) -> float:
    """Seconds a step of the customary loop; the loader's workers have started, and fetch ahead."""
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    batches = iter(loader)
    next(batches)

    def step() -> None:
        images, target = next(batches)
        with torch.no_grad():
            said = teacher(images)
        loss = masked_dkd(student(images), said, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return seconds(step, steps)


# The rows


def step_stored(place: Place) -> Iterator[Row]:
    """A step with the teacher's answers stored, against the student alone."""
    for model, batch_size in itertools.product(place.options.pairs, place.options.batch_sizes):
        sides = {
            "stored": training(place, *make(place, "aekt", model, batch_size, stored=True)[1:]),
            "alone": training(place, *make(place, "vanilla", model, batch_size)[1:]),
        }
        found = interleaved(sides, place.options.rounds)
        ratios = over(found["stored"], found["alone"])
        yield Row(
            "a step, answers stored",
            "the student alone",
            f"{model}, {batch_size}",
            ratios,
            "time <= 1.08",
            milliseconds(found),
        )


def compiled(place: Place) -> Iterator[Row]:
    """A step of the student alone by torch.compile, against the same without."""
    sizes = place.options.batch_sizes[:1]
    return with_and_without(place, "compiled", "vanilla", sizes, "a compiled step, alone", "as it is")


def winograd(place: Place) -> Iterator[Row]:
    """A step with nothing stored by Winograd's algorithm, against the same by direct convolution."""
    sizes = place.options.batch_sizes
    return with_and_without(place, "winograd", "aekt", sizes, "a step, nothing stored, winograd", "direct")


def with_and_without(
    place: Place, option: str, method: str, batch_sizes: Sequence[int], what: str, against: str
) -> Iterator[Row]:
    """A step with one of `make`'s options, against the same without."""
    with_it: dict[str, dict[str, Any]] = {option: {option: True}, against: {}}
    for model, batch_size in itertools.product(place.options.pairs, batch_sizes):
        sides = {
            name: training(place, *make(place, method, model, batch_size, **on)[1:]) for name, on in with_it.items()
        }
        found = interleaved(sides, place.options.rounds)
        ratios = over(found[option], found[against])
        yield Row(what, against, f"{model}, {batch_size}", ratios, "", milliseconds(found))


def step_plain(place: Place) -> Iterator[Row]:
    """A step with nothing stored and with the answers stored, in float32 and bfloat16, against the customary loop."""
    kinds = {
        "nothing stored, float32": (False, "float32", "1.35, 2.0 in the fastest precision"),
        "answers stored, float32": (True, "float32", "3.3"),
    }
    if place.options.bfloat16:
        kinds |= {
            "nothing stored, bfloat16": (False, "bfloat16", "2.0 in the fastest"),
            "answers stored, bfloat16": (True, "bfloat16", "3.3"),
        }
    for model, batch_size in itertools.product(place.options.pairs, place.options.batch_sizes):
        sides: dict[str, Callable[[], float]] = {}
        for name, (stored, precision, _) in kinds.items():
            cfg, distiller, data = make(place, "dkd", model, batch_size, stored=stored, precision=precision)
            sides[name] = training(place, distiller, data, mixed=precision == "bfloat16")
        student, teacher = (make_network(cfg.model[role], "model", CLASSES) for role in ("student", "teacher"))
        loader = torchvision_loader(data, batch_size, 2 + place.options.steps // epoch_length(data))
        sides["customary"] = lambda: plain_window(student.train(), teacher.eval(), loader, place.options.steps)
        found = interleaved(sides, place.options.rounds)
        taught, asked = (macs(network.eval(), torch.zeros(1, 3, 32, 32)) for network in (student, teacher))
        for name, (stored, precision, target) in kinds.items():
            operations = 2 * batch_size * (3 * taught + (0 if stored else asked))  # backward is twice forward
            products = operations / 1e9 / getattr(place.hardware, precision)
            limit = (
                f"; its products alone at the machine's rate {1000 * products:.1f} ms: at most "
                f"{statistics.median(found['customary']) / products:.3g}"
            )
            yield Row(
                f"a step, {name}",
                "a customary loop",
                f"{model}, {batch_size}",
                over(found["customary"], found[name]),
                f"speed >= {target}",
                milliseconds({side: found[side] for side in (name, "customary")})
                + ("" if place.options.winograd else limit),
            )


class Clock(L.Callback):
    """Seconds a step between the ends of two batches of a fit."""

    def __init__(self, first: int) -> None:
        self.first, self.begin, self.seconds = first, 0.0, 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Start or read the clock."""
        if batch_idx == self.first:
            self.begin = time.perf_counter()
        elif batch_idx > self.first:
            self.seconds = (time.perf_counter() - self.begin) / (batch_idx - self.first)


def loop(place: Place) -> Iterator[Row]:
    """Lightning's loop as the command runs it, with CSV logger and progress bar, against a bare one."""
    for model, batch_size in itertools.product((*place.options.pairs, SMALLEST), place.options.batch_sizes[:1]):
        cfg, distiller, data = make(place, "aekt", model, batch_size, stored=True)
        bare = training(place, *make(place, "aekt", model, batch_size, stored=True)[1:])
        warm_up = epoch_length(data)
        cfg.logger = OmegaConf.load(ROOT / "conf" / "logger" / "csv.yaml")
        # every epoch shows the views of the first: all are stored, as in the bare loop
        augment = data.augment
        data.augment = lambda batch, epoch: augment(batch, 0)
        data.train_index = data.train_index.repeat(2 + place.options.steps // warm_up)

        def through_lightning() -> float:
            clock = Clock(warm_up)
            with tempfile.TemporaryDirectory() as folder, quiet():
                trainer = make_trainer(
                    cfg,
                    max_epochs=1,
                    limit_train_batches=warm_up + 1 + place.options.steps,
                    limit_val_batches=0,
                    enable_progress_bar=True,
                    logger=make_logger(cfg, Path(folder)),
                    callbacks=[clock, History(Path(folder)), Checkpoints(Path(folder), cfg.checkpoint_minutes)],
                )
                trainer.fit(distiller, datamodule=data)
            return clock.seconds

        found = interleaved({"Lightning": through_lightning, "bare": bare}, place.options.rounds)
        yield Row(
            "the loop through Lightning",
            "a bare loop",
            f"{model}, {batch_size}",
            over(found["Lightning"], found["bare"]),
            f"time <= {1.10 if model == SMALLEST else 1.05}",
            milliseconds(found),
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The progress bar is drawn, but not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def data(place: Place) -> Iterator[Row]:
    """Images through gather, crop, flip and normalise, against torchvision."""
    for batch_size in place.options.batch_sizes:
        source = make(place, "vanilla", SMALLEST, batch_size)[2]
        ours = endless(source, place.options.batches)
        batches = 20
        loader = torchvision_loader(source, batch_size, 2 + 2 * batches // epoch_length(source))

        def theirs() -> float:
            delivered = iter(loader)
            for _ in range(5):  # what the workers fetched ahead while they started
                next(delivered)
            return seconds(lambda: next(delivered), batches)

        sides = {
            "ours": lambda: seconds(lambda: normalise(next(ours).images[0], source.mean, source.std), batches),
            "torchvision": theirs,
        }
        found = interleaved(sides, place.options.rounds)
        ratios = over(found["torchvision"], found["ours"])
        yield Row(
            "the data path", "torchvision, 2 workers", f"batch {batch_size}", ratios, "speed >= 10", milliseconds(found)
        )


def loss(place: Place) -> Iterator[Row]:
    """AEKT's loss with its gradient, against CE and DKD by masks: time and memory."""
    method = build(configured("aekt", SMALLEST, place.images, 64).method, "method")
    for classes in (1000, 21_841):
        torch.manual_seed(0)
        student, teacher = (3 * torch.randn(512, classes)).requires_grad_(), 3 * torch.randn(512, classes)
        target = torch.randint(classes, (512,))

        def ours() -> None:
            said = Prediction(student, student, (), None), Prediction(teacher, teacher, (), None)
            batch = Batch((View(torch.empty(0), *said),), target, target, epoch=1000, step=0)
            terms, weights = method.terms(batch), method.weights(batch.epoch)
            torch.stack([weights[name] * term for name, term in terms.items()]).sum().backward()
            student.grad = None

        def theirs() -> None:
            masked_dkd(student, teacher, target).backward()
            student.grad = None

        found = interleaved(
            {"ours": lambda: seconds(ours), "masked": lambda: seconds(theirs)}, 3 * place.options.rounds
        )
        setting = f"B=512, C={classes:,}"
        ratios = over(found["ours"], found["masked"])
        yield Row("the AEKT loss with gradient", "DKD by masks", setting, ratios, "time <= 0.5", milliseconds(found))
        peaks = interleaved(
            {"ours": lambda: peak_bytes(ours), "masked": lambda: peak_bytes(theirs)}, place.options.rounds
        )
        sizes = ", ".join(f"{name} {statistics.median(values) / 1e6:.1f} MB" for name, values in peaks.items())
        yield Row(
            "its peak memory", "DKD by masks", setting, over(peaks["ours"], peaks["masked"]), "memory <= 0.7", sizes
        )


def peak_bytes(action: Callable[[], None]) -> float:
    """By how much this process grows meanwhile (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def status(key: str) -> float:
    """A size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


UNTIL_FIRST_STEP = """
import os, runpy, sys
sys.argv[0] = "train"
from src.distiller import Distiller
Distiller.training_step = lambda *_: os._exit(0)
runpy.run_module("src.train", run_name="__main__")
"""


def startup(place: Place) -> Iterator[Row]:
    """From the command to the first training step, against the libraries' import."""
    network = make_network(configured("kd", SMALLEST, place.images, 16).model.teacher, "model", 62)
    save_weights(network, place.folder / "teacher.pth")
    common = ("experiment=quickstart", f"data.root={place.folder}", f"runs={place.folder / 'runs'}", "trainer=cpu")
    commands = {
        "alone": (*common, "method=vanilla"),
        "by kd, teacher at hand": (*common, "method=kd", f"teacher.path={place.folder / 'teacher.pth'}"),
    }

    def run(code: str, *arguments: str) -> float:
        return seconds(
            lambda: subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT, capture_output=True)
        )

    sides = {name: lambda command=command: run(UNTIL_FIRST_STEP, *command) for name, command in commands.items()}
    found = interleaved({**sides, "import": lambda: run("import torch, lightning, hydra")}, place.options.rounds)
    for name in commands:
        yield Row(
            "from command to first step",
            "import torch, lightning, hydra",
            f"quickstart, {name}",
            over(found[name], found["import"]),
            "time <= 2",
            milliseconds({key: found[key] for key in (name, "import")}),
        )


def trained(place: Place, runs: str, method: str, model: str, seed: int, *, stored: bool, epochs: int) -> float:
    """Seconds of a run like any other."""
    cfg = configured(method, model, place.images, 64)
    file = place.folder / f"{model}.pth"
    if not file.is_file():
        network = make_network(cfg.model.teacher, "model", CLASSES)
        settle(network, cfg.model.teacher, make_data(cfg))
        save_weights(network, file)
    cfg.seed, cfg.runs, cfg.logger = seed, str(place.folder / runs), None
    cfg.schedule.epochs, cfg.data.train_size = epochs, place.options.sweep_images
    cfg.schedule.learning_rate = 1e-3  # at the published one some students of a teacher that knows nothing diverge
    cfg.teacher.path, cfg.teacher.view_store, cfg.teacher.fold = str(file), stored, True
    cfg.trainer.accelerator, cfg.trainer.enable_progress_bar = "cpu", False
    cfg.trainer.precision = place.options.precision
    cfg.winograd = cfg.teacher.winograd = place.options.winograd
    return seconds(lambda: train(cfg))


def sweep(place: Place) -> Iterator[Row]:
    """Five methods by three seeds with the store, against the same runs without it."""
    options = place.options
    for model in options.pairs:
        found: dict[bool, list[float]] = {True: [], False: []}
        for number, (seed, method) in enumerate(itertools.product(range(options.sweep_seeds), SWEEP)):
            for stored in (True, False)[:: 1 if number % 2 else -1]:
                runs = "stored" if stored else "asked"
                epochs = options.sweep_epochs
                found[stored].append(trained(place, runs, method, model, seed, stored=stored, epochs=epochs))
                print(f"{model}, {method}, seed {seed}, {runs}: {found[stored][-1]:.1f} s", file=sys.stderr)
        yield Row(
            f"{len(SWEEP)} methods, {options.sweep_seeds} seeds, stored",
            "without the store",
            f"{model}, {options.sweep_epochs} epochs of {options.sweep_images}",
            [sum(found[True]) / sum(found[False])],
            f"time <= {PAIRS[model]}",
            f"{sum(found[True]):.0f} s, {sum(found[False]):.0f} s",
        )


def anonymous_peak(place: Place, number: int, model: str, stored: bool) -> float:
    """Of one run: called in a process of its own, which looks at itself every few milliseconds."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(place.options.threads)
    peak, over_now = 0.0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not over_now.wait(0.005):
            peak = max(peak, status("RssAnon"))

    watcher = threading.Thread(target=look)
    watcher.start()
    trained(place, f"memory-{stored}-{number}", "aekt", model, number, stored=stored, epochs=1)
    over_now.set()
    watcher.join()
    return peak


def memory(place: Place) -> Iterator[Row]:
    """Anonymous memory of training with the store, against without it."""
    for model in place.options.pairs:
        counts = {stored: itertools.count() for stored in (True, False)}

        def measured(stored: bool) -> float:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return pool.submit(anonymous_peak, place, next(counts[stored]), model, stored).result()

        found = interleaved({"stored": lambda: measured(True), "asked": lambda: measured(False)}, place.options.rounds)
        sizes = ", ".join(f"{name} {statistics.median(values) / 1e6:.0f} MB" for name, values in found.items())
        ratios = over(found["stored"], found["asked"])
        yield Row("peak anonymous memory, stored", "without the store", f"{model}, 64", ratios, "memory <= 1.1", sizes)


def teacher(place: Place) -> Iterator[Row]:
    """The teacher's answers in each precision and form, against float32 as it was loaded."""
    for model in place.options.pairs:
        cfg, _, source = make(place, "kd", model, 64)
        network = make_network(cfg.model.teacher, "model", CLASSES)
        known = settle(network, cfg.model.teacher, source)
        forms = {
            f"{precision}{', folded' * fold}{', contiguous' * contiguous}{', winograd' * winograd}": (
                precision, fold, contiguous, winograd,
            )
            for precision in ("float32", "bfloat16")[: 1 + place.options.bfloat16]
            for fold in (False, True)
            for contiguous in (False, True)
            for winograd in (False, True)[: 1 + (precision == "float32" and not contiguous)]
        }  # fmt: skip
        images = source.evaluation_loader("test")
        views = next(iter(images)).images[0][:256]
        sides, answers = {}, {}
        for name, (precision, fold, contiguous, winograd) in forms.items():
            made = make_network(cfg.model.teacher, "model", CLASSES)
            made.load_state_dict(network.state_dict())
            asked = Teacher(made, source.mean, source.std, precision=precision)
            if fold:
                asked.fold(source.image_shape)
            if winograd:
                asked.use_winograd()
            asked.to(torch.device("cpu"), torch.contiguous_format if contiguous else torch.channels_last)
            answers[name] = asked.logits(views)
            sides[name] = lambda asked=asked: seconds(lambda: asked._asked(views[:64]))
        found = interleaved(sides, 3 * place.options.rounds)
        reference = "float32, contiguous"
        expected = answers[reference]
        kept = {name: (answers[name].argmax(1) == expected.argmax(1)).double().mean().item() for name in forms}
        fastest = min((name for name in forms if kept[name] == 1), key=lambda name: statistics.median(found[name]))
        for name in forms:
            off = (answers[name] - expected).abs().max() / expected.abs().max()
            note = f"{100 * kept[name]:.1f} % of top-1 answers kept, logits within {off:.1g} of the largest"
            note += ", recommended" if name == fastest else ""
            yield Row(
                f"the teacher, {name}",
                reference,
                f"{model}, 64, {known}",
                over(found[name], found[reference]),
                "keeps top-1",
                note,
            )


def settle(network: Network, node: DictConfig, data: ImageData) -> str:
    """Give a teacher its published weights where AEKT_DATA has them, else statistics of the images."""
    architecture = node._target_.rsplit(".", 1)[-1]
    stores = Path(os.environ.get("AEKT_DATA", "")) / "teachers"
    if "AEKT_DATA" in os.environ and (files := sorted(stores.rglob(f"*{architecture}*/*.pth"))):
        load_weights(network, files[0])
        return "trained"
    with torch.no_grad():
        for batch in data.evaluation_loader("test"):
            network.train()(normalise(batch.images[0][:64], data.mean, data.std))
    return "random weights"


def scale(place: Place) -> Iterator[Row]:
    """A step of AEKT as data, classes and teacher grow, against the smallest of each."""
    batch_size = place.options.batch_sizes[0]

    def side(model: str, count: int, classes: int, stored: bool) -> Callable[[], float]:
        there = place._replace(images=place.folder / f"{count}-{classes}.npz")
        random_images(there.images, count, classes, classes)
        return training(place, *make(there, "aekt", model, batch_size, stored=stored, train_size=count)[1:])

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
        found = interleaved(sides, place.options.rounds)
        first, *others = sides
        for name in others:
            ratios = over(found[name], found[first])
            yield Row(f"a step as it grows: {axis}", first, name, ratios, "", milliseconds(found))


ROWS: dict[str, Callable[[Place], Iterator[Row]]] = {
    row.__name__: row
    for row in (step_stored, step_plain, compiled, winograd, loop, data, loss, startup, sweep, memory, teacher, scale)
}


def line(row: Row) -> str:
    """A row of the Markdown table; its range where there were several rounds."""
    ratio = f"{statistics.median(row.ratios):.3g}"
    if len(row.ratios) > 1:
        ratio += f" ({min(row.ratios):.3g} to {max(row.ratios):.3g}, n={len(row.ratios)})"
    return f"| {row.what} | {row.against} | {row.setting} | {ratio} | {row.target} | {row.absolute} |"


def main() -> None:
    """Print the table as Markdown, and add it to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], default=[], help="all without one")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS, help="of conf/model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=5, help="of each side, in turn")
    parser.add_argument("--steps", type=int, default=8, help="in each round")
    parser.add_argument("--batches", type=int, default=8, help="of the epoch that is repeated")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--bfloat16", action="store_true", help="too: a step takes minutes where the CPU lacks it")
    parser.add_argument("--winograd", action="store_true", help="teacher and student compute by Winograd's algorithm")
    parser.add_argument("--precision", default="32-true", help="trainer.precision of the sweep and of memory")
    parser.add_argument("--sweep-images", type=int, default=500, help="2000 for the full one")
    parser.add_argument("--sweep-epochs", type=int, default=2, help="20 for the full one")
    parser.add_argument("--sweep-seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file to which the table is added, under its command")
    options = parser.parse_args()
    if options.winograd and options.bfloat16:
        parser.error("--winograd computes in float32: leave --bfloat16 out")
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("src").setLevel(logging.WARNING)
    command = " ".join(["python -m benchmarks.speed", *sys.argv[1:]])
    shown = "CIFAR-100's images" if real_images() else "random images"
    head = "| what | against | setting | ratio | target | |\n|---|---|---|---|---|---|"
    machine = Hardware.measured()
    say(f"`{command}`: {shown}, {machine}\n\n{head}", options)
    largest = max(options.sweep_images, options.batches * max(options.batch_sizes), CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        images = images_file(Path(folder), largest)
        for name in options.rows or ROWS:
            (Path(folder) / name).mkdir()
            for row in ROWS[name](Place(Path(folder) / name, images, machine, options)):
                say(line(row), options)


def say(text: str, options: argparse.Namespace) -> None:
    """Print and, where a file is named, keep it."""
    print(text, flush=True)
    if options.out:
        with options.out.open("a") as file:
            file.write(f"{text}\n")


if __name__ == "__main__":
    main()
