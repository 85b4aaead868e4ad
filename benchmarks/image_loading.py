"""Throughput of FolderData's training loader against torchvision's usual one, on the same photos, side by side.

Both deliver the same kind of batch: normalised float32 [B, 3, 224, 224]. `python -m benchmarks.image_loading --help`.
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


def make_photos(root: Path, count: int, width: int = 500, height: int = 375) -> None:
    """Blurred noise with grain, as JPEGs about as large as ImageNet's."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 2)):
        for i in range(number):
            folder = root / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            grain = rng.normal(0, 12, (height, width, 3))
            photo = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + grain
            Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=92)


def ours(root: Path, workers: int) -> Callable[[], Iterator[Tensor]]:
    """FolderData, normalised as a batch."""
    data = FolderData(
        name="photos", root=str(root), image_size=224, resize=256, scale=(0.08, 1.0), flip=True, mean=MEAN, std=STD,
        train_size=None, val_size=0, split_seed=0, workers=workers, batch_size=BATCH_SIZE, seed=0,
    )  # fmt: skip
    data.load()
    loader = data.train_dataloader()
    return lambda: (normalise(batch.images[0], MEAN, STD) for batch in loader)


def torchvisions(root: Path, workers: int) -> Callable[[], Iterator[Tensor]]:
    """The loader of torchvision's ImageNet reference."""
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


def epoch(batches: Callable[[], Iterator[Tensor]]) -> tuple[int, float, float]:
    """Images, seconds, and seconds of this process's processor."""
    wall, processor = time.perf_counter(), processor_seconds()
    count = sum(len(images) for images in batches())
    return count, time.perf_counter() - wall, processor_seconds() - processor


def processor_seconds() -> float:
    """Of this process, workers apart."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def compare(root: Path, workers: int, repetitions: int) -> None:
    """Print images a second of both, and their ratio as median and range over interleaved repetitions."""
    loaders = {"ours": ours(root, workers), "torchvision": torchvisions(root, workers)}
    walls: dict[str, list[float]] = {name: [] for name in loaders}
    processors: dict[str, list[float]] = {name: [] for name in loaders}
    for repetition in range(repetitions + 1):
        for name in list(loaders)[:: 1 if repetition % 2 else -1]:
            count, wall, processor = epoch(loaders[name])
            if repetition:  # the first warms up
                walls[name].append(count / wall)
                processors[name].append(count / processor)
    print(f"{workers} workers: {', '.join(f'{name} {statistics.median(walls[name]):.0f}' for name in walls)} images/s")
    print(f"  ratio by the clock: {ratio(walls)}")
    if not workers:
        print(f"  ratio by processor time: {ratio(processors)}")


def ratio(rates: dict[str, list[float]]) -> str:
    """Median and range of ours over torchvision's."""
    ratios = sorted(ours / theirs for ours, theirs in zip(rates["ours"], rates["torchvision"], strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, n = {len(ratios)})"


def main() -> None:
    """Compare for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="folder with train/<class>/... and val/<class>/...; default: made")
    parser.add_argument("--images", type=int, default=256, help="how many to make")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        if options.root is None:
            make_photos(Path(folder), options.images)
        for workers in options.workers:
            compare(options.root or Path(folder), workers, options.repetitions)


if __name__ == "__main__":
    main()
