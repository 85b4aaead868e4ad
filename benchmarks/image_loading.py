"""The throughput of FolderData's training loader against torchvision's usual one, on the same photos, in turn.

Both deliver the same kind of batch: normalised float32 [B, 3, 224, 224]. `python -m benchmarks.image_loading --help`
lists the options.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from src.data.folder_data import FolderData
from src.data.views import normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_SIZE = 64


def write_photos(root: Path, count: int, width: int = 500, height: int = 375) -> None:
    """Write blurred noise with grain, as JPEG files about as large as ImageNet's: `count` for training, 2 for test."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 2)):
        for i in range(number):
            folder = root / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            grain = rng.normal(0, 12, (height, width, 3))
            photo = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + grain
            Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=92)


def make_our_loader(root: Path, workers: int) -> Callable[[], Iterator[Tensor]]:
    """Make the function that yields an epoch of FolderData, with each batch normalised at once."""
    data = FolderData(
        name="photos", root=str(root), image_size=224, resize=256, scale=(0.08, 1.0), flip=True, mean=MEAN, std=STD,
        train_size=None, val_size=0, split_seed=0, workers=workers, batch_size=BATCH_SIZE, seed=0,
    )  # fmt: skip
    data.load()
    loader = data.train_dataloader()
    return lambda: (normalise(batch.images[0], MEAN, STD) for batch in loader)


def make_torchvision_loader(root: Path, workers: int) -> Callable[[], Iterator[Tensor]]:
    """Make the function that yields an epoch of the loader in torchvision's ImageNet reference."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = datasets.ImageFolder(str(root / "train"), transform)
    loader = DataLoader(
        images, BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return lambda: (images for images, _ in loader)


def measure_rates(epoch: Callable[[], Iterator[Tensor]]) -> tuple[float, float]:
    """Load an epoch. Returns the images per second, and the images per second of this process's CPU time."""
    begin, begin_cpu = time.perf_counter(), cpu_seconds()
    count = sum(len(images) for images in epoch())
    return count / (time.perf_counter() - begin), count / (cpu_seconds() - begin_cpu)


def cpu_seconds() -> float:
    """Return the CPU time of this process without its workers."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def compare(root: Path, workers: int, repetitions: int) -> None:
    """Print the images per second of both loaders, and their ratio over repetitions in turn."""
    epochs = {"ours": make_our_loader(root, workers), "torchvision": make_torchvision_loader(root, workers)}
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    cpu_rates: dict[str, list[float]] = {name: [] for name in epochs}
    for repetition in range(repetitions + 1):
        for name in list(epochs)[:: 1 if repetition % 2 else -1]:
            rate, cpu_rate = measure_rates(epochs[name])
            if repetition:  # the first warms up
                rates[name].append(rate)
                cpu_rates[name].append(cpu_rate)
    print(f"{workers} workers: {', '.join(f'{name} {statistics.median(rates[name]):.0f}' for name in rates)} images/s")
    print(f"  ratio by the clock: {ratio(rates)}")
    if not workers:
        print(f"  ratio by CPU time: {ratio(cpu_rates)}")


def ratio(rates: dict[str, list[float]]) -> str:
    """Write the median and the range of our rate over torchvision's.

    >>> ratio({"ours": [20.0, 60.0, 30.0], "torchvision": [10.0, 10.0, 10.0]})
    '3.00 (2.00 to 6.00, n = 3)'
    """
    ratios = sorted(ours / theirs for ours, theirs in zip(rates["ours"], rates["torchvision"], strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, n = {len(ratios)})"


def main() -> None:
    """Compare both loaders for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="folder of train/CLASS/... and val/CLASS/...; default: random photos")
    parser.add_argument("--images", type=int, default=256, help="number of random photos")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of workers to compare")
    parser.add_argument("--repetitions", type=int, default=5, help="timed epochs of each loader")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        if options.root is None:
            write_photos(Path(folder), options.images)
        for workers in options.workers:
            compare(options.root or Path(folder), workers, options.repetitions)


if __name__ == "__main__":
    main()
