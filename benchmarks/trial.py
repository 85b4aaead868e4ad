"""A distillation with networks of fresh weights, as `python -m src.train` would train it, and timers of its steps."""

import contextlib
import io
import itertools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig
from torch import nn

from benchmarks.images import CLASSES
from benchmarks.timing import Place, seconds_per_call
from src.analysis.predictions import count_macs
from src.config.names import class_name, needs_teacher
from src.data.array_data import ArrayData
from src.data.image_data import ImageData, Samples
from src.data.views import normalise
from src.methods.method import Method
from src.models.checkpoints import load_weights
from src.models.network import Network
from src.setup.assemble import make_data_for, make_distiller, make_method, make_parts, prepare
from src.setup.teacher import make_untrained_teacher
from src.teachers.view_store import ViewStore
from src.training.distiller import Distiller
from src.training.fitting import fit

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
SMALLEST = "resnet20_to_resnet8"
"""The cheapest pair."""
BATCH_SIZE = 64
"""The batch size of rows that do not take it from the command line."""


class Trial(NamedTuple):
    """A module that is ready to train, its data, and the configuration that they come from."""

    cfg: DictConfig
    distiller: Distiller
    data: ArrayData


def compose_training(method: str, model: str, images: Path, batch_size: int, *overrides: str) -> DictConfig:
    """Compose the configuration that trains a pair of `conf/model` with a method, on an array file."""
    chosen = (f"method={method}", f"model={model}", "data=arrays", f"data.path={images}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*chosen, f"schedule.batch_size={batch_size}", *overrides])


def make_trial(
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
    overrides: Sequence[str] = (),
) -> Trial:
    """Make the training that a row times.

    `stored` gives the teacher a view store. `precision` is the teacher's precision (None: the student's). The epoch has
    `train_size` images (None: the images of `--batches` batches). `compiled` compiles the student. `winograd` is for
    student and teacher. `overrides` are further options.
    """
    cfg = compose_training(method, model, place.images, batch_size, *overrides)
    cfg.data.train_size = train_size or max(place.options.batches * batch_size, CLASSES)
    cfg.winograd = cfg.teacher.winograd = winograd or place.options.winograd
    cfg.teacher.precision, cfg.teacher.fold = precision, True
    cfg = prepare(cfg)
    cfg.compile = compiled  # only now, because validation refuses it beside winograd
    _, distiller, data = trial = assemble(cfg)
    if stored and distiller.teacher is not None:
        file = place.folder / f"{model}-{batch_size}-{place.images.stem}-{precision}.views"
        distiller.teacher.view_store = ViewStore(
            file, len(data.source.train_labels), data.view_count(1), data.num_classes
        )
    return trial


def assemble(cfg: DictConfig, data: ArrayData | None = None) -> Trial:
    """Make the module of a configuration, and its data if none are given."""
    method = make_method(cfg)
    if data is None:
        made = make_data_for(cfg, method)
        assert isinstance(made, ArrayData)
        data = made
    return Trial(cfg, make_untrained_distiller(cfg, data, method), data)


def make_untrained_distiller(cfg: DictConfig, data: ImageData, method: Method) -> Distiller:
    """Make the module of a configuration on the CPU, with networks of fresh weights."""
    parts = make_parts(cfg, data, method, for_training=True)
    teacher = make_untrained_teacher(cfg, data) if needs_teacher(cfg) else None
    if teacher is not None:
        teacher.to(torch.device("cpu"), torch.channels_last)
    distiller = make_distiller(cfg, data, parts, teacher)
    distiller.student.to(memory_format=torch.channels_last)
    return distiller


def give_weights(network: Network, node: DictConfig, data: ImageData) -> str:
    """Give a teacher its published weights, or adapt the batch norms of random weights to the data's images.

    `node` is its configuration. Returns the origin of the weights. Published weights are read from the folder
    AEKT_DATA/teachers.
    """
    store = Path(os.environ.get("AEKT_DATA", "")) / "teachers"
    if "AEKT_DATA" in os.environ and (files := sorted(store.rglob(f"*{class_name(node)}*/*.pth"))):
        load_weights(network, files[0])
        return "trained"
    with torch.no_grad():
        for batch in data.evaluation_loader("test"):
            network.train()(normalise(batch.images[0][:64], data.mean, data.std))
    return "random weights"


def silence() -> None:
    """Hide warnings, and the messages that Lightning and the project log about every run."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "src"):
        logging.getLogger(name).setLevel(logging.WARNING)


def repeat_views(data: ImageData, batches: int) -> Iterator[Samples]:
    """Yield the first batches of the first epoch, as views, over and over."""
    loader = data.train_dataloader()
    while True:
        for batch in itertools.islice(loader, batches):
            yield data.augment(batch, 0)


def batches_per_epoch(data: ImageData) -> int:
    """Return the number of batches of an epoch."""
    return len(data.train_dataloader())


def make_step(distiller: Distiller, *, mixed: bool = False) -> Callable[[Samples], None]:
    """Make the function that trains a module on one batch of views, without Lightning. `mixed` is bfloat16 autocast."""
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step(batch: Samples) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = distiller.training_step(batch, 0)
        optimizer.zero_grad()
        distiller.method.backward(loss, distiller.weighted_terms)
        optimizer.step()

    return step


def make_step_timer(place: Place, trial: Trial, *, mixed: bool = False) -> Callable[[], float]:
    """Make the function that trains `--steps` steps in a bare loop and returns the seconds per step.

    `--batches` batches are repeated, and each call continues with the next one. All of them are trained on once before
    this function returns, so that a view store holds all answers.
    """
    train_on, batches = make_step(trial.distiller, mixed=mixed), repeat_views(trial.data, place.options.batches)

    def step() -> None:
        train_on(next(batches))

    for _ in range(place.options.batches):
        step()
    return lambda: seconds_per_call(step, place.options.steps)


def step_operations(student: nn.Module, teacher: nn.Module, batch_size: int) -> dict[bool, float]:
    """Count the operations of a step's matrix products, with (True) and without (False) stored answers."""
    image = torch.zeros(1, 3, 32, 32)
    trained, asked = (count_macs(network.eval(), image) for network in (student, teacher))
    macs = {True: 3 * trained, False: 3 * trained + asked}  # a backward pass costs two forward passes
    return {stored: 2.0 * batch_size * count for stored, count in macs.items()}


class Clock(L.Callback):
    """Note the time at the end of the given batches of each epoch. `wait` waits for the device."""

    def __init__(self, *batches: int, wait: Callable[[], Any] = lambda: None) -> None:
        self.batches, self.wait = batches, wait
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time if this is one of the batches."""
        if batch_idx in self.batches:
            self.wait()
            self.times.append(time.perf_counter())


def csv_logger(folder: Path) -> CSVLogger:
    """Make the logger of `logger=csv`, on a machine without W&B too."""
    return CSVLogger(folder, name="steps")


def fit_timed(trial: Trial, callback: L.Callback, root: Path | None = None, **limits: int | None) -> None:
    """Train as the command does, with progress bar, CSV logger and checkpoints, in an empty folder inside `root`.

    `limits` are options of the trainer.
    """
    cfg, distiller, data = trial
    cfg.trainer.update(limits)
    cfg.trainer.enable_progress_bar, cfg.logger = True, {"_target_": "benchmarks.trial.csv_logger"}
    distiller.configure_callbacks = lambda: [callback]  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir=root) as folder, hidden_output():
        fit(cfg, distiller, data, Path(folder))


@contextlib.contextmanager
def hidden_output() -> Iterator[None]:
    """Hide the output, such as a progress bar. The bar is still drawn, because drawing it is part of the cost."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
