"""The result of a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
from omegaconf import DictConfig
from torch import nn

from src.common.metrics import metrics_of_split
from src.config.names import method_name, serialization_name
from src.data.image_data import ImageData
from src.data.limits import final_batches, validated_batches
from src.runs.checkpointing import read_checkpoint
from src.runs.folder import RunFolder
from src.runs.history import read_history
from src.runs.result import BestEpoch, Metrics, Parameters, Result, TeacherFacts
from src.training.distiller import Distiller


def summarise(
    cfg: DictConfig,
    distiller: Distiller,
    data: ImageData,
    folder: RunFolder,
    trainer: L.Trainer,
    teacher: TeacherFacts | None,
) -> Result:
    """Collect a run's result from its history. If the history lacks metrics of the last weights, score them now."""
    rows = read_history(folder.path)
    split = data.validates_on
    metrics = {split: metrics_of_split(rows[-1], split)}
    if split == "val" and not metrics["val"] and validated_batches(cfg, data):
        metrics["val"] = metrics_of_split(trainer.validate(distiller, datamodule=data, verbose=False)[0], "val")
    is_partial = split == "test" and validated_batches(cfg, data) < final_batches(cfg, data)
    if is_partial or not metrics.get("test"):  # validation was on other images, or the last epoch skipped it
        tested = trainer.test(distiller, datamodule=data, verbose=False)[0]
        metrics["test"] = metrics_of_split(tested, "test")
    return Result(
        **{split: Metrics(**values) for split, values in metrics.items() if values},
        best_epoch=best_epoch(rows, split),
        seconds=sum(row["seconds"] for row in rows),
        parameters=Parameters(
            student=parameter_count(distiller.method.predictor(distiller.student)),
            teacher=distiller.teacher.parameters if distiller.teacher else None,
            training_only=parameter_count(distiller.serialization) + parameter_count(distiller.method),
        ),
        data=cfg.data.name,
        method=method_name(cfg),
        serialization=serialization_name(cfg),
        teacher=teacher,
        student=cfg.model.student.name,
        seed=cfg.seed,
        epochs=len(rows),
        epochs_wanted=cfg.trainer.max_epochs,
        steps=trained_steps(cfg, folder.path),
        train_images=len(data.train_index),
        unlabelled_images=len(data.unlabelled_index),
        train_duplicates=data.train_duplicates,
        class_names=list(data.class_names),
        superclasses=data.superclasses,
        settings={key: value for key, value in folder.identity.items() if key != "seed"},
    )


def trained_steps(cfg: DictConfig, folder: Path) -> int | None:
    """Read the number of optimiser steps from the last checkpoint. Returns None if `trainer.max_steps` sets no limit.

    The trainer does not know the number if the steps were made in forked processes.
    """
    if (cfg.trainer.get("max_steps") or -1) < 0:
        return None
    checkpoint = read_checkpoint(folder)
    return int(checkpoint["global_step"]) if checkpoint else None


def best_epoch(rows: Sequence[Mapping[str, float]], split: str) -> BestEpoch | None:
    """Find the epoch of the highest accuracy on a split. Returns None if no epoch was scored.

    >>> best_epoch([{"epoch": 0, "val/accuracy": 0.4}, {"epoch": 1, "val/accuracy": 0.3}], "val")
    BestEpoch(split='val', epoch=0, accuracy=0.4)
    """
    scored = [row for row in rows if f"{split}/accuracy" in row]
    if not scored:
        return None
    best = max(scored, key=lambda row: row[f"{split}/accuracy"])
    return BestEpoch(split=split, epoch=int(best["epoch"]), accuracy=best[f"{split}/accuracy"])


def parameter_count(module: nn.Module) -> int:
    """Count the parameters of a module, trained or frozen. Buffers do not count.

    >>> parameter_count(nn.Linear(3, 4))
    16
    """
    return sum(parameter.numel() for parameter in module.parameters())
