"""Train a distiller through the stages of its method. Each stage resumes from its newest intact checkpoint."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from torch import Tensor, nn

from src.common.errors import UserError
from src.config.instantiate import bind, find_target, options_of, report_misfit
from src.config.names import class_name
from src.data.image_data import ImageData
from src.methods.method import Method
from src.runs.best_student import BestStudent
from src.runs.checkpointing import (
    AtomicCheckpointIO,
    Checkpoints,
    checkpoint_file,
    newest_intact_checkpoint,
    read_checkpoint,
)
from src.runs.history import History
from src.runs.identity import setting_digest
from src.runs.loggers import ForgivingLogger, describe_failure
from src.runs.result import START_OVER
from src.runs.time_budget import OutOfTime, TimeBudget
from src.training.distiller import Distiller
from src.training.dot import DOT
from src.training.gradient_anatomy import GradientAnatomy
from src.training.term_log import TermLog

log = logging.getLogger(__name__)

NO_DEVICE = re.compile(r"not available|none are available|[Nn]o supported|only has")
"""How Lightning says that the machine lacks a device, in an exception that also reports options that do not fit."""


def make_trainer(cfg: DictConfig, **overrides: Any) -> L.Trainer:
    """Make Lightning's Trainer as configured.

    Raises `UserError` if its options do not fit, if the machine lacks the device, if the batch size is not divisible by
    the number of devices, or if these have no strategy or cannot synchronise batch norm.
    """
    torch.backends.cudnn.allow_tf32 = cfg.tf32
    # Under deterministic=true, torch fills all memory before it is used. Nothing here reads memory before writing it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    overrides = {"max_time": None, **overrides}  # Lightning's own would count the time of earlier commands too
    try:
        trainer: L.Trainer = hydra.utils.instantiate(cfg.trainer, **overrides)
    except Exception as error:
        cause = error.__cause__ or error
        if nested := re.search(r"full_key: (trainer\..+)", str(error)):
            option = re.sub(r"(\d+)$", r"[\1]", nested[1])
            raise UserError(f"The options of {option} do not fit its _target_: {cause}.") from error
        text = str(cause).rstrip(".")
        if isinstance(cause, (TypeError, ValueError, MisconfigurationException)) and not NO_DEVICE.search(text):
            raise UserError(f"The options of trainer do not fit Lightning's Trainer: {text}.") from error
        raise UserError(f"This machine cannot run the configured trainer ({text}): try trainer=auto.") from error
    if cfg.schedule.batch_size % trainer.world_size:
        raise UserError(
            f"schedule.batch_size={cfg.schedule.batch_size} is the global batch size, which is not divisible by "
            f"{trainer.world_size} devices: choose a multiple of {trainer.world_size}."
        )
    if trainer.world_size > 1 and cfg.trainer.strategy == "auto":
        raise UserError(f"{trainer.world_size} devices need a strategy: use trainer=ddp, or trainer=ddp_cpu on CPUs.")
    if trainer.world_size > 1 and cfg.trainer.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise UserError("Batch norm cannot be synchronised on CPUs: add trainer.sync_batchnorm=false.")
    return trainer


def strategy_options(cfg: DictConfig, method: Method) -> dict[str, Any]:
    """Return the trainer's option `strategy` with what the method needs or allows, if it differs from `cfg`.

    With stages, DDP must not wait for the parameters that only another stage trains. Without them, every step has the
    same graph if the same terms have a weight in all epochs.
    """
    strategy, has_stages = cfg.trainer.strategy, bool(method.stages())
    if isinstance(strategy, str):
        needs_more = has_stages and strategy in ("ddp", "ddp_fork")
        return {"strategy": f"{strategy}_find_unused_parameters_true"} if needs_more else {}
    weights = [method.weights(epoch) for epoch in range(cfg.trainer.max_epochs)]
    is_static = len({tuple(name for name, weight in each.items() if weight) for each in weights}) == 1
    if (cfg.trainer.get("accumulate_grad_batches") or 1) > 1:  # DDP fails with both
        is_static = False
    options = {"find_unused_parameters": True} if has_stages else {"static_graph": is_static}
    return {"strategy": hydra.utils.instantiate(strategy, **options)}


def check_batch_norm(cfg: DictConfig, student: nn.Module, world_size: int) -> None:
    """Raise `UserError` if synchronising batch norm would change the student.

    torch replaces every batch norm by one of its own. Those of timm contain an activation, which would be lost.
    """
    if world_size == 1 or not cfg.trainer.get("sync_batchnorm"):
        return
    norms = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    foreign = next((norm for norm in norms if not type(norm).__module__.startswith("torch.")), None)
    if foreign is not None:
        raise UserError(
            f"trainer.sync_batchnorm=true would replace {type(foreign).__name__} in {cfg.model.student.name} by a "
            "plain batch norm, and lose its activation: add trainer.sync_batchnorm=false."
        )


def make_logger(cfg: DictConfig, folder: Path) -> Any:
    """Make the configured logger. Returns False without one, and after a warning for one that cannot start.

    One log line says whether W&B is on.
    """
    if not cfg.logger or class_name(cfg.logger) != "wandb_logger":
        log.info("W&B: off.")
    try:
        if not cfg.logger:
            return False
        takes = options_of(find_target(cfg.logger, "logger")) or ()
        setting = {"setting": setting_digest(cfg)} if "setting" in takes else {}
        return bind(cfg.logger, "logger", ["folder", *setting])(folder=folder, **setting)
    except UserError:
        raise
    except Exception as error:  # a logger may raise anything, and training must not end because of it
        log.warning("%s", describe_failure(error))
        return False


def make_averaging(cfg: DictConfig) -> L.Callback | None:
    """Make the callback that averages weights, or return None. Raises `UserError` if its options do not fit."""
    if not cfg.averaging:
        return None
    with report_misfit(cfg.averaging, "averaging"):
        averaging: L.Callback = hydra.utils.instantiate(cfg.averaging)
    return averaging


def try_options(cfg: DictConfig, distiller: Distiller, weighted_terms: Mapping[str, Tensor]) -> None:
    """Compute the gradients, and make what `fit` makes from the configuration, for a trial module and its terms.

    Raises `UserError` if options do not fit.
    """
    distiller.student.to(memory_format=distiller.memory_format)
    node, option = cfg.optimizer or cfg.schedule.optimizer, "optimizer" if cfg.optimizer else "schedule.optimizer"
    with report_misfit(node, option):
        optimizer = distiller.recipe.make_optimizer(distiller.parameter_groups())
    if isinstance(optimizer, DOT):
        optimizer.check_trainer(cfg.trainer)
        optimizer.keep_task_gradients(weighted_terms, lambda gradients: gradients)
    if "fork" not in str(cfg.trainer.strategy):  # beside a GPU, autograd's threads do not survive a fork
        distiller.method.backward(torch.stack(list(weighted_terms.values())).sum(), weighted_terms)
    with report_misfit(node, option):
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(lambda: 0.0)
    averaging = make_averaging(cfg)
    if isinstance(averaging, WeightAveraging):  # makes its model now, and passes some options on to it
        with report_misfit(cfg.averaging, "averaging"):
            averaging.setup(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), distiller, "fit")
    if cfg.logger:
        bind(cfg.logger, "logger", ["folder"])


def fit(
    cfg: DictConfig, distiller: Distiller, data: ImageData, folder: Path, budget: TimeBudget | None = None
) -> L.Trainer:
    """Train the stages of the method, then the main stage. Returns the main stage's trainer.

    Raises `OutOfTime` if the budget ends first. All checkpoints are saved then.
    """
    for stage in distiller.method.stages():
        epochs = min(stage.epochs, cfg.trainer.max_epochs)  # one epoch with trainer=debug
        log.info("Stage %s, before the main stage. Epochs: %d", stage.name, epochs)
        place = folder / "stages" / stage.name
        options = {"max_epochs": epochs, "logger": False, **strategy_options(cfg, distiller.method)}
        _fit_stage(cfg, distiller.for_stage(stage), data, place, budget, **options)
    best = [BestStudent()] if cfg.keep_best else []
    averaging = [made] if (made := make_averaging(cfg)) else []
    anatomy = [GradientAnatomy(folder, **cfg.gradients)] if cfg.gradients.every else []
    own = [hydra.utils.instantiate(callback) for callback in cfg.trainer.get("callbacks") or ()]
    logger = make_logger(cfg, folder)
    options = {
        "callbacks": [*best, *averaging, *anatomy, *own],
        "logger": ForgivingLogger(logger) if isinstance(logger, Logger) else logger,
    }
    trainer = _fit_stage(cfg, distiller, data, folder, budget, **options, **strategy_options(cfg, distiller.method))
    # Lightning loads the average only at the end of a training epoch. A run that resumes after its last epoch has none.
    if averaging and (kept := read_checkpoint(folder)):
        distiller.load_state_dict(kept["state_dict"])
    return trainer


def _fit_stage(
    cfg: DictConfig,
    distiller: Distiller,
    data: ImageData,
    folder: Path,
    budget: TimeBudget | None,
    callbacks: Sequence[L.Callback] = (),
    **trainer_options: Any,
) -> L.Trainer:
    """Call Lightning's fit once, from the newest intact checkpoint in `folder`.

    Raises `UserError` if that checkpoint does not fit the module, and `OutOfTime` if the budget ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, cfg.checkpoint_minutes, cfg.check_loss_every_n_steps, budget)
    # The term log comes first, because the history reads its means.
    all_callbacks = [TermLog(cfg.check_loss_every_n_steps), History(folder), *callbacks, checkpoints]
    trainer = make_trainer(cfg, callbacks=all_callbacks, **trainer_options)
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    found = newest_intact_checkpoint(folder)
    if found and found[0] != checkpoint_file(folder):
        # A damaged last checkpoint must not replace the intact previous one when the next checkpoint is saved.
        checkpoint_file(folder).unlink(missing_ok=True)
    try:
        trainer.fit(distiller, datamodule=data, ckpt_path=found[0] if found else None, weights_only=True)
    except OutOfTime:
        raise
    except Exception as error:
        if OutOfTime.__name__ in str(error) and budget is not None and budget.is_over:
            raise OutOfTime from None  # a forked process passes on the text of an exception only
        if found is None or checkpoints.started or trainer.world_size > 1 or isinstance(error, UserError):
            raise  # with several processes, this process does not know whether the others had started
        reason = next(iter(str(error).splitlines()), "").rstrip(".:")
        raise UserError(
            f"{found[0]} does not fit this run ({type(error).__name__}: {reason}): {START_OVER}."
        ) from error
    return trainer
