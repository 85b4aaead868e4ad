"""A distillation small enough for a test: resnet8 on coloured squares of 16 pixels."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from src.data.array_data import ArrayData
from src.data.array_file import save_arrays
from src.methods.dkd import DKD
from src.methods.kd import KD
from src.methods.method import Method, Networks
from src.models.network import Network
from src.models.resnet import resnet8, resnet14
from src.teachers.teacher import Teacher
from src.training.distiller import Distiller, Recipe, Settings
from src.training.serialization import NoSerialization, Serialization

CLASSES, MEAN, STD = 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def write_arrays(file: Path, train: int = 44, test: int = 17) -> Path:
    """Write an array file of noisy squares whose colour is the class."""
    random = np.random.default_rng(0)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60]])
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % CLASSES
        images = colours[labels][:, None, None, :] + random.normal(0, 40, (count, 16, 16, 3))
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8), f"{split}_labels": labels}
    save_arrays(file, class_names=np.array(["red", "green", "blue", "yellow"]), **arrays)
    return file


def tiny_data(
    folder: Path, *, seed: int = 0, workers: int = 0, views: int = 1, batch_size: int = 8, **options: Any
) -> ArrayData:
    """Load the tiny arrays of a folder, 44 training and 17 test images. Writes them if they are missing."""
    file = folder / "tiny.npz"
    data = ArrayData(
        name="tiny", prepare=lambda root: write_arrays(root / "tiny.npz"), root=str(folder),
        path=str(file) if file.is_file() else None, mean=MEAN, std=STD, padding=2, flip=True, split_seed=0,
        workers=workers, batch_size=batch_size, seed=seed, views_per_image=views,
        **{"train_size": None, "val_size": 0, **options},
    )  # fmt: skip
    data.load()
    return data


def tiny_teacher(new_teacher: Callable[..., Network] = resnet14) -> Teacher:
    """Make a teacher with fixed random weights, and with batch norm statistics that differ from their defaults."""
    torch.manual_seed(99)
    network = new_teacher(CLASSES)
    network.train()(torch.randn(16, 3, 16, 16))
    return Teacher(network, MEAN, STD)


def tiny_distiller(
    data: ArrayData,
    method: Method,
    *,
    teacher: Teacher | None = None,
    serialization: Serialization | None = None,
    seed: int = 0,
    new_student: Callable[..., Network] = resnet8,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    standardize_logits: bool = False,
    compiled: bool = False,
) -> Distiller:
    """Make a module that trains a student of the tiny data, by SGD with momentum and a milestone after two epochs."""
    torch.manual_seed(seed)
    student, serialization = new_student(CLASSES), serialization or NoSerialization()
    serialization.allocate(student)
    method.allocate(Networks(student, teacher, data.image_shape, data.trained_labels, partial(new_student, CLASSES)))
    return Distiller(
        student=student,
        method=method,
        serialization=serialization,
        teacher=teacher,
        recipe=Recipe(
            learning_rate=0.05,
            make_optimizer=partial(optimizer, momentum=0.9, weight_decay=5e-4),
            make_scheduler=partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2]),
            interval="epoch",
        ),
        settings=Settings(
            num_classes=CLASSES,
            mean=MEAN,
            std=STD,
            validates_on="test",
            seed=seed,
            standardize_logits=standardize_logits,
            labelled_share=data.labelled_share,
            compiled=compiled,
        ),
        teacher_predictions={"test": torch.zeros(17, dtype=torch.int64)} if teacher else {},
    )


def tiny_trainer(epochs: int = 2, **options) -> L.Trainer:
    """Make a silent trainer on one CPU."""
    defaults = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
        "num_sanity_val_steps": 0, "deterministic": True,
    }  # fmt: skip
    return L.Trainer(max_epochs=epochs, **{**defaults, **options})


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy all parameters and buffers of a module, by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether two copies of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_clock(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the rows of a history without the columns that depend on the time."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "data_wait")} for row in rows]


@contextlib.contextmanager
def by_threads(count: int) -> Iterator[None]:
    """Compute with this number of threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_batch_norm(module: nn.Module) -> None:
    """Replace batch norms by group norms, which compute the same on two devices as on one."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(4, child.num_features))
        else:
            without_batch_norm(child)


def kd() -> KD:
    """Make KD with its published constants."""
    return KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0)


def dkd() -> DKD:
    """Make DKD with a warm-up of one epoch."""
    return DKD(cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=4.0, warmup_epochs=1)
