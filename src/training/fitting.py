"""Train a distiller through the stages of its method. Each stage resumes from its newest intact checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from omegaconf import DictConfig

from src.common.errors import UserError
from src.config.instantiate import instantiate
from src.config.names import class_name
from src.data.image_data import ImageData
from src.runs.checkpointing import (
    AtomicCheckpointIO,
    Checkpoints,
    checkpoint_file,
    newest_intact_checkpoint,
    read_checkpoint,
)
from src.runs.history import History
from src.runs.result import START_OVER
from src.training.distiller import Distiller
from src.training.gradient_anatomy import GradientAnatomy

log = logging.getLogger(__name__)


def make_trainer(cfg: DictConfig, **overrides: Any) -> L.Trainer:
    """Make Lightning's Trainer as configured.

    Raises `UserError` if the machine lacks the device, or if the batch size is not divisible by the number of
    devices.
    """
    try:
        trainer: L.Trainer = hydra.utils.instantiate(cfg.trainer, **overrides)
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"This machine cannot run the configured trainer ({cause}): try trainer=auto.") from error
    if cfg.schedule.batch_size % trainer.world_size:
        raise UserError(
            f"schedule.batch_size={cfg.schedule.batch_size} is the global batch size, which is not divisible by "
            f"{trainer.world_size} devices: choose a multiple of {trainer.world_size}."
        )
    return trainer


def make_logger(cfg: DictConfig, folder: Path) -> Any:
    """Make the configured logger. Returns False without one. One log line says whether W&B is on."""
    if not cfg.logger or class_name(cfg.logger) != "wandb_logger":
        log.info("W&B: off.")
    return instantiate(cfg.logger, "logger", folder=folder) if cfg.logger else False


def fit(cfg: DictConfig, distiller: Distiller, data: ImageData, folder: Path) -> L.Trainer:
    """Train the stages of the method, then the main stage. Returns the main stage's trainer."""
    stages = distiller.method.stages()
    options: dict[str, Any] = {}
    if stages and cfg.trainer.strategy in ("ddp", "ddp_fork"):  # DDP must not wait for the parameters of other stages
        options["strategy"] = f"{cfg.trainer.strategy}_find_unused_parameters_true"
    for stage in stages:
        epochs = min(stage.epochs, cfg.trainer.max_epochs)  # one epoch with trainer=debug
        log.info("Stage %s, before the main stage. Epochs: %d", stage.name, epochs)
        place = folder / "stages" / stage.name
        _fit_stage(cfg, distiller.for_stage(stage), data, place, max_epochs=epochs, logger=False, **options)
    averaging = [hydra.utils.instantiate(cfg.averaging)] if cfg.averaging else []
    anatomy = [GradientAnatomy(folder, **cfg.gradients)] if cfg.gradients.every else []
    options |= {"callbacks": [*averaging, *anatomy], "logger": make_logger(cfg, folder)}
    trainer = _fit_stage(cfg, distiller, data, folder, **options)
    # Lightning loads the average only at the end of a training epoch. A run that resumes after its last epoch has none.
    if averaging and (kept := read_checkpoint(folder)):
        distiller.load_state_dict(kept["state_dict"])
    return trainer


def _fit_stage(
    cfg: DictConfig,
    distiller: Distiller,
    data: ImageData,
    folder: Path,
    callbacks: Sequence[L.Callback] = (),
    **trainer_options: Any,
) -> L.Trainer:
    """Call Lightning's fit once, from the newest intact checkpoint in `folder`.

    Raises `UserError` if that checkpoint does not fit the module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, cfg.checkpoint_minutes)
    trainer = make_trainer(cfg, callbacks=[History(folder), *callbacks, checkpoints], **trainer_options)
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    found = newest_intact_checkpoint(folder)
    if found and found[0] != checkpoint_file(folder):
        # A damaged last checkpoint must not replace the intact previous one when the next checkpoint is saved.
        checkpoint_file(folder).unlink(missing_ok=True)
    try:
        trainer.fit(distiller, datamodule=data, ckpt_path=found[0] if found else None, weights_only=True)
    except Exception as error:
        if found is None or checkpoints.started or trainer.world_size > 1 or isinstance(error, UserError):
            raise  # with several processes, this process does not know whether the others had started
        reason = next(iter(str(error).splitlines()), "").rstrip(".:")
        raise UserError(
            f"{found[0]} does not fit this run ({type(error).__name__}: {reason}): {START_OVER}."
        ) from error
    return trainer
