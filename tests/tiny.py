"""A distillation small enough for a test: resnet8 on coloured squares of 16 pixels."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch

from src.data.array_data import ArrayData
from src.data.arrays import save_arrays
from src.distiller import Distiller
from src.methods.method import Method, Networks
from src.models.network import Network
from src.models.resnet import resnet8, resnet14
from src.serialization import Serialization
from src.teacher import Teacher

CLASSES, MEAN, STD = 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def write_arrays(file: Path, train: int = 44, test: int = 17) -> Path:
    """Squares whose colour tells the class."""
    random = np.random.default_rng(0)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60]])
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % CLASSES
        images = colours[labels][:, None, None, :] + random.normal(0, 40, (count, 16, 16, 3))
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8), f"{split}_labels": labels}
    save_arrays(file, class_names=np.array(["red", "green", "blue", "yellow"]), **arrays)
    return file


def tiny_data(folder: Path, *, seed: int = 0, workers: int = 0, views: int = 1, batch_size: int = 8) -> ArrayData:
    file = folder / "tiny.npz"
    data = ArrayData(
        name="tiny", prepare=lambda root: write_arrays(root / "tiny.npz"), root=str(folder),
        path=str(file) if file.is_file() else None, mean=MEAN, std=STD, padding=2, flip=True, train_size=None,
        val_size=0, split_seed=0, workers=workers, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    data.views = views
    data.load()
    return data


def tiny_teacher(new_teacher: Callable[..., Network] = resnet14) -> Teacher:
    torch.manual_seed(99)
    network = new_teacher(CLASSES)
    network.train()(torch.randn(16, 3, 16, 16))  # batch norms that have seen something
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
    torch.manual_seed(seed)
    student, serialization = new_student(CLASSES), serialization or Serialization()
    serialization.build(student)
    method.build(Networks(student, teacher, data.image_shape, data.trained_labels, partial(new_student, CLASSES)))
    return Distiller(
        student=student, method=method, serialization=serialization, teacher=teacher,
        teacher_predictions={"test": torch.zeros(17, dtype=torch.int64)} if teacher else {}, num_classes=CLASSES,
        mean=MEAN, std=STD, learning_rate=0.05, optimizer=partial(optimizer, momentum=0.9, weight_decay=5e-4),
        scheduler=partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2]), interval="epoch",
        validates_on="test", seed=seed, channels_last=True,
        standardize_logits=standardize_logits, compiled=compiled,
    )  # fmt: skip


def tiny_trainer(epochs: int = 2, **options) -> L.Trainer:
    defaults = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
        "num_sanity_val_steps": 0, "deterministic": True,
    }  # fmt: skip
    return L.Trainer(max_epochs=epochs, **{**defaults, **options})


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextlib.contextmanager
def by_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
