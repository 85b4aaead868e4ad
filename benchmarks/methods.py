"""The table of all methods: what each uses, what it trains beside the student, and what a step costs beside one of KD.

Steps of both are timed in turn on random images of CIFAR's size; nothing is stored, so every method that has a teacher
asks it. Of methods with several stages the main one is timed. `python -m benchmarks.methods --help`.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.progress import track

from src.assemble import make_data, make_distiller, make_parts
from src.data.arrays import save_arrays
from src.data.image_data import ImageData
from src.distiller import Distiller
from src.errors import UserError
from src.loading import frozen, make_network
from src.run import needs_teacher
from src.train import count

CONF = Path(__file__).parents[1] / "conf"
CLASSES = 100
TRAIN_SIZE = 50_000
"""CIFAR-100's: a memory bank has as many rows."""


def random_images(file: Path, count: int, classes: int, tested: int) -> None:
    """Write an array file of so many training images of CIFAR's size; the first of them are the test images."""
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(count) % classes
    test: dict[str, np.ndarray] = {"test_images": images[:tested], "test_labels": labels[:tested]}
    save_arrays(file, train_images=images, train_labels=labels, **test)


def configured(method: str, model: str, file: Path, batch_size: int) -> DictConfig:
    """What `python -m src.train` would do by this method."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            "train",
            [
                f"method={method}",
                f"model={model}",
                "data=arrays",
                f"data.path={file}",
                f"schedule.batch_size={batch_size}",
            ],
        )


def distiller_of(cfg: DictConfig, data: ImageData) -> tuple[Distiller, Any]:
    """Networks with fresh weights, and a batch."""
    parts = make_parts(cfg, data)
    teacher = None
    if needs_teacher(cfg):
        teacher = frozen(cfg, data, make_network(cfg.model.teacher, "model.teacher", CLASSES), {})
        teacher.to(torch.device("cpu"), torch.channels_last)
    distiller = make_distiller(cfg, data, parts, teacher, {})
    distiller.student.to(memory_format=torch.channels_last)
    return distiller, data.augment(next(iter(data.train_dataloader())), 0)


def step_of(distiller: Distiller, batch: Any) -> Callable[[], float]:
    """One step of training; its seconds."""
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step() -> float:
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = distiller.training_step(batch, 0)
        distiller.method.backward(loss, distiller.weighted_terms)
        optimizer.step()
        return time.perf_counter() - begin

    return step


def rows(methods: list[str], model: str, batch_size: int, rounds: int) -> Iterator[list[str]]:
    """A row a method: name, year, uses, extra parameters, cost, settings."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.npz"
        random_images(file, TRAIN_SIZE, CLASSES, CLASSES)
        kd_cfg = configured("kd", model, file, batch_size)
        data = make_data(kd_cfg)
        kd = step_of(*distiller_of(kd_cfg, data))
        kd()
        for method in track(methods, transient=True):
            cfg = configured(method, model, file, batch_size)
            node = cfg.method
            facts = [method, str(node.year or "-"), node.uses]
            try:
                distiller, batch = distiller_of(cfg, data)
            except UserError as error:
                yield [*facts, "-", f"refused: {error}", node.settings]
                continue
            step = step_of(distiller, batch)
            step()
            ratios = sorted(step() / kd() for _ in range(rounds))
            extra = count(distiller.method) + count(distiller.serialization)
            cost = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            yield [*facts, f"{extra:,}" if extra else "-", cost, node.settings]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("methods", nargs="*", default=sorted(file.stem for file in (CONF / "method").glob("*.yaml")))
    parser.add_argument("--model", default="resnet20_to_resnet8", help="a pair of conf/model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each, in turn with steps of KD")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*self.log.*")
    print(f"| method | year | uses | extra parameters | a step over KD's, {options.model} | settings |")
    print("|---|---|---|---|---|---|")
    for row in rows(options.methods, options.model, options.batch_size, options.rounds):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
