"""From a configuration to data, networks, method and trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor

from src.config import build, check_ranges
from src.data.image_data import ImageData
from src.distiller import Distiller
from src.errors import UserError
from src.loading import Student, load_student, make_network, place_sources
from src.methods.combined import Combined
from src.methods.method import Method, Networks
from src.models.winograd import use_winograd
from src.serialization import Serialization
from src.teacher import Teacher


class Parts(NamedTuple):
    """What is trained: made before any teacher is looked for, so that bad options end early."""

    student: Student
    method: Method
    serialization: Serialization


def make_data(cfg: DictConfig) -> ImageData:
    """The data module, loaded: the first thing a command does, so options are checked and sources placed here."""
    check_ranges(cfg)
    place_sources(cfg)
    data = hydra.utils.instantiate(cfg.data, batch_size=cfg.schedule.batch_size, seed=cfg.seed)
    data.load()
    return data


def make_parts(cfg: DictConfig, data: ImageData) -> Parts:
    """Student, method and serialization; the student depends on the seed alone, whatever the method.

    Raises `UserError` where serialization or standardization has no logit term to act on.
    """
    make_optimizer(cfg)  # for its complaints
    torch.manual_seed(cfg.seed)
    student = load_student(cfg, data)
    method = build(cfg.method, "method")
    if cfg.also:
        method = Combined(method, build(cfg.also, "also"))
    serialization = build(cfg.serialization, "serialization")
    if type(serialization) is not Serialization and not method.distils_logits:
        raise UserError(
            f"method={cfg.method.name} has no logit term that a serialization could act on: add serialization=none."
        )
    if cfg.standardize_logits and not method.distils_logits:
        raise UserError(f"method={cfg.method.name} has no logit term: standardize_logits=true means nothing to it.")
    data.views = method.views
    return Parts(student, method, serialization)


def make_trained_parts(cfg: DictConfig, data: ImageData) -> Parts:
    """Those of a command that trains: the student's convolutions compute as they shall in training."""
    parts = make_parts(cfg, data)
    if cfg.winograd:
        use_winograd(parts.student.network, frozen=False)
    return parts


def make_distiller(
    cfg: DictConfig,
    data: ImageData,
    parts: Parts,
    teacher: Teacher | None,
    teacher_predictions: Mapping[str, Tensor],
) -> Distiller:
    """The LightningModule; method and serialization are built in the sizes of the networks."""
    (student, mean, std), method, serialization = parts
    if teacher and method.needs_features and not teacher.shapes(data.image_shape).features:
        raise UserError(f"method={cfg.method.name} needs features, and the teacher {cfg.model.teacher.name} has none.")
    torch.manual_seed(cfg.seed + 2**32)  # a second student must not draw the first one's weights
    serialization.build(student)
    method.build(
        Networks(
            student=student,
            teacher=teacher,
            image_shape=data.image_shape,
            new_student=lambda: make_network(cfg.model.student, "model.student", data.num_classes),
            train_labels=data.trained_labels,
        )
    )
    return Distiller(
        student=student,
        method=method,
        serialization=serialization,
        teacher=teacher,
        teacher_predictions=teacher_predictions,
        num_classes=data.num_classes,
        mean=mean,
        std=std,
        learning_rate=cfg.schedule.learning_rate,
        optimizer=make_optimizer(cfg),
        scheduler=hydra.utils.instantiate(cfg.schedule.scheduler),
        interval=cfg.schedule.interval,
        validates_on=data.validates_on,
        seed=cfg.seed,
        channels_last=cfg.channels_last,
        standardize_logits=cfg.standardize_logits,
        compiled=cfg.compile,
    )


def make_optimizer(cfg: DictConfig) -> Any:
    """The optimiser, still to be given its parameters. Raises `UserError` where its options do not fit."""
    partial = hydra.utils.instantiate(cfg.schedule.optimizer)
    try:
        partial([torch.zeros(1)], lr=cfg.schedule.learning_rate)
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule.optimizer does not fit {cfg.schedule.optimizer._target_}: {error}.") from None
    return partial


def make_trainer(cfg: DictConfig, **overrides: Any) -> L.Trainer:
    """Lightning's Trainer as configured.

    Raises `UserError` where the machine lacks the device, or the batch cannot be dealt to the devices.
    """
    try:
        trainer = hydra.utils.instantiate(cfg.trainer, **overrides)
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"This trainer cannot be had here ({cause}): try trainer=auto.") from error
    if cfg.schedule.batch_size % trainer.world_size:
        raise UserError(
            f"schedule.batch_size={cfg.schedule.batch_size} is global and does not divide by "
            f"{trainer.world_size} devices."
        )
    return trainer


def make_logger(cfg: DictConfig, folder: Path) -> Any:
    """The configured logger, or False."""
    return build(cfg.logger, "logger", folder=folder) if cfg.logger else False
