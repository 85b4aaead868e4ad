"""A teacher's answers to evaluation images, computed once and cached for all runs below one folder."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from src.common.files import atomic_write, list_members
from src.common.metrics import evaluation_metrics
from src.data.limits import evaluation_batches, scored_batches
from src.teachers.teacher import Teacher

if TYPE_CHECKING:
    from src.data.image_data import ImageData, Samples


class Answers(NamedTuple):
    """A teacher's logits [N, C] for the first N images of a split, and the images' targets [N]."""

    logits: Tensor
    target: Tensor

    @classmethod
    def compute(cls, teacher: Teacher, batches: Iterable[Samples], precision: AbstractContextManager[None]) -> Answers:
        """Compute the teacher's answers to all batches of an evaluation loader."""
        device = next(teacher.network.parameters()).device
        with precision:
            rows = [(teacher.logits(batch.images[0].to(device)).float().cpu(), batch.target) for batch in batches]
        return cls(torch.cat([logits for logits, _ in rows]), torch.cat([target for _, target in rows]))

    def metrics(self) -> dict[str, float]:
        """Compute the metrics of every evaluation."""
        metrics = evaluation_metrics(self.logits.shape[1])
        metrics.update(self.logits, self.target)
        return {name: float(value) for name, value in metrics.compute().items()}

    def predictions(self, size: int) -> Tensor:
        """Return the predicted class of each image of a split, [size] int64, or -1 if the image has no answer."""
        predicted = torch.full((size,), -1)
        predicted[: len(self.logits)] = self.logits.argmax(dim=1)
        return predicted

    def save(self, file: Path) -> None:
        """Write the answers atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            np.savez(partial, logits=self.logits.numpy(), target=self.target.numpy())

    @classmethod
    def load(cls, file: Path, size: int, num_classes: int) -> Answers | None:
        """Read the saved answers for a split of `size` images.

        Returns None if the file is missing or damaged, or if its content does not fit: the caller then computes the
        answers again.
        """
        if not file.is_file():
            return None
        try:
            list_members(file)
            with np.load(file, allow_pickle=False) as arrays:
                answers = cls(torch.from_numpy(arrays["logits"]), torch.from_numpy(arrays["target"]))
            return answers if answers._is_valid(size, num_classes) else None
        except Exception:  # on a damaged file, zipfile, zlib and numpy may raise nearly anything
            return None

    def _is_valid(self, size: int, num_classes: int) -> bool:
        logits, target = self
        shaped = logits.ndim == 2 and logits.shape == (len(target), num_classes) and target.ndim == 1
        typed = (logits.dtype, target.dtype) == (torch.float32, torch.int64) and len(target) <= size
        if not (shaped and typed):
            return False
        return bool(logits.isfinite().all() and (target >= 0).all() and (target < num_classes).all())


def answers_file(cfg: DictConfig, runs: Path, key: str, data: ImageData, split: str) -> Path:
    """Return the path of the answers to a split by the teacher with this cache key, below the folder of all runs."""
    part = "test" if split == "test" else f"val-{data.val_digest}"
    scored = scored_batches(cfg, data, split)
    limit = "all" if scored == evaluation_batches(data, split) else scored
    return runs / "teachers" / f"{cache_key(cfg, key, data)}-{part}-{limit}.npz"


def view_store_file(cfg: DictConfig, teacher: Teacher, data: ImageData) -> Path:
    """Return the path of the teacher's view store for this data and precision, below the folder of all runs."""
    layout = "channels_last" if cfg.channels_last else "contiguous"
    kernels = "-compiled" if teacher.is_compiled else ""
    name = f"{cache_key(cfg, teacher.key, data)}-{layout}{kernels}-{cfg.teacher.answer_dtype}-{data.views_name}.views"
    return Path(cfg.runs).expanduser() / "teachers" / name


def cache_key(cfg: DictConfig, teacher_key: str, data: ImageData) -> str:
    """Return the part of a cache's file name that identifies the answers: teacher, images and precision."""
    precision = cfg.trainer.precision if cfg.tf32 else f"{cfg.trainer.precision}-ieee"
    return f"{teacher_key[:16]}-{data.source.digest[:12]}-{precision}"
