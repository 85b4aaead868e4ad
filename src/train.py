"""`python -m src.train`: train a student, with a teacher or alone. `--help` is the guide."""

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from src.command import job, run_command
from src.common.errors import UserError
from src.common.secrecy import plain_config
from src.config.names import method_name, needs_teacher
from src.config.schema import TrainOptions, marked
from src.config.validation import check_training
from src.data.image_data import ImageData
from src.data.limits import check_choice, check_limits, final_batches
from src.methods.method import Method
from src.models.checkpoints import save_weights
from src.models.network import Network
from src.models.winograd import check_winograd
from src.runs.best_student import FILE, BestStudent
from src.runs.checkpointing import read_checkpoint
from src.runs.fingerprints import fingerprints, versions
from src.runs.folder import RunFolder
from src.runs.history import read_history
from src.runs.loggers import ForgivingLogger
from src.runs.result import Result, RunRecord, TeacherFacts
from src.runs.time_budget import OutOfTime, TimeBudget, describe_pause, time_budget
from src.setup.assemble import (
    balanced_weights,
    check_training_images,
    make_data_for,
    make_distiller,
    make_method,
    make_parts,
    prepare,
)
from src.setup.dry_run import dry_run
from src.setup.teacher import MeasuredTeacher, find_teacher, measure_teacher, teacher_places
from src.teachers.teacher import Teacher
from src.training.distiller import Distiller
from src.training.fitting import check_batch_norm, fit, make_trainer
from src.training.summary import summarise

log = logging.getLogger(__name__)


def train(cfg: DictConfig, wait: bool = False, budget: TimeBudget | None = None) -> Result:
    """Train the run that a configuration describes, or resume it, and return its result.

    A finished run is not trained again. Raises `BusyError` if another command trains it at the moment. With `wait`,
    wait for that command's result instead. Raises `OutOfTime` if the time budget ends before the run is finished. By
    default, the budget of `trainer.max_time` begins now.
    """
    cfg = prepare(cfg)
    check_training(cfg)
    budget = budget or time_budget(cfg)
    method = make_method(cfg)
    data = make_data_for(cfg, method)
    check_search(cfg, data)
    if cfg.keep_best:
        check_choice(cfg, data, "keep_best=true")
    check_training_images(cfg, data, method)
    parts = make_parts(cfg, data, method, for_training=True)
    # Reports a missing device early. It also measures the teacher, and knows whether this process is rank zero.
    probe = make_trainer(cfg, logger=False, enable_checkpointing=False)
    check_batch_norm(cfg, parts.student.network, probe.world_size)
    if cfg.winograd or (needs_teacher(cfg) and cfg.teacher.winograd):
        check_winograd(probe.strategy.root_device)
    report_data(data, probe)
    report_class_weights(cfg, data)
    check_limits(cfg, data, probe.world_size)
    dry_run(cfg, data, parts)
    folder = RunFolder(cfg, probe.is_global_zero)  # now, because the file of student.path was read just now

    measured = find_or_train_teacher(cfg, data, parts.method, probe, budget) if needs_teacher(cfg) else None
    teacher, facts, predictions = measured or (None, None, {})
    distiller = make_distiller(cfg, data, parts, teacher, predictions)
    distiller.save_hyperparameters(plain_config(cfg))

    record = make_record(cfg, data, teacher, facts)
    with folder.locked(wait):
        finished = folder.begin(record, wait)
        if finished is not None:
            accuracy = 100 * finished.test.accuracy
            log.info("%s is finished already: test accuracy %.2f %% after %s.", folder.path, accuracy, finished.end)
            return finished
        result = train_in_folder(cfg, distiller, data, folder, facts, budget)
    log.info("%s: test accuracy %.2f %% after %s.", folder.path, 100 * result.test.accuracy, result.end)
    return result


def train_in_folder(
    cfg: DictConfig,
    distiller: Distiller,
    data: ImageData,
    folder: RunFolder,
    teacher: TeacherFacts | None,
    budget: TimeBudget,
) -> Result:
    """Train, or resume, and write the student and the result. An error is noted in the folder too."""
    log.info("Training %s by %s in %s", cfg.model.student.name, method_name(cfg), folder.path)
    report_duplicates(data)
    try:
        trainer = fit(cfg, distiller, data, folder.path, budget)
        result = summarise(cfg, distiller, data, folder, trainer, teacher)
        save(cfg, distiller, data, folder, trainer, result)
    except OutOfTime:
        done = len(read_history(folder.path))
        raise OutOfTime(describe_pause(folder.path, done, cfg.trainer.max_epochs)) from None
    except Exception as error:
        folder.fail(error)
        raise
    return result


def make_record(cfg: DictConfig, data: ImageData, teacher: Teacher | None, facts: TeacherFacts | None) -> RunRecord:
    """Collect the facts that `run.json` holds when a run starts."""
    return RunRecord(
        fingerprints=fingerprints(cfg, data.source.digest, teacher.digest if teacher else None),
        versions=versions(),
        seed=cfg.seed,
        teacher=facts,
        class_names=list(data.class_names),
        train_duplicates=data.train_duplicates,
    )


def find_or_train_teacher(
    cfg: DictConfig, data: ImageData, method: Method, trainer: Trainer, budget: TimeBudget
) -> MeasuredTeacher:
    """Find the teacher, train it if it is missing, and measure it."""
    path = find_teacher(cfg)
    is_missing = path is None and cfg.teacher.source is None
    file = train_teacher(cfg, data, budget) if is_missing else path
    return measure_teacher(cfg, data, method, file, trainer, trained_here=is_missing)


def train_teacher(cfg: DictConfig, data: ImageData, budget: TimeBudget) -> Path:
    """Train the missing teacher by the student's recipe, unless it is trained already, and return its checkpoint.

    Raises `UserError` if the teacher of the same name was trained on other data, unless `start_over` is set.
    """
    if not len(data.train_index):
        raise UserError(
            "No training image has a label, so the missing teacher cannot be trained here: give teacher.path=FILE or "
            "teacher.source=timm/NAME."
        )
    alone = teacher_config(cfg)
    folder = RunFolder(alone)
    finished = folder.result_file.is_file()  # a finished teacher is used again, even if the code has changed since
    if finished and folder.data_digest() not in (None, data.labelled_digest):
        if not cfg.start_over:
            raise UserError(
                f"The teacher in {folder.path} was trained on other data that is called {cfg.data.name} too: rename "
                "this data with data.name=NAME, use another folder with runs=..., or add start_over=true to train the "
                "teacher again."
            )
        finished = False
    if not finished:
        log.info(
            "There is no teacher %s for %s: training it first by the same recipe, %d epochs. To avoid this, give "
            "teacher.path=FILE, or put a checkpoint at %s.",
            *(cfg.model.teacher.name, cfg.data.name, cfg.trainer.max_epochs, teacher_places(cfg)[0]),
        )
        train(alone, wait=True, budget=budget)
    return folder.student_file


def teacher_config(cfg: DictConfig) -> DictConfig:
    """Return the configuration that trains the run's teacher.

    It is a copy of the run's configuration, without images that have no label. Options marked `student_only` get their
    defaults. The method, the serialization layer and the seed come from `teacher.*`. Raises `UserError` if that method
    needs a teacher itself.
    """
    alone = copy.deepcopy(cfg)
    defaults = OmegaConf.structured(TrainOptions)
    for option in marked(TrainOptions, "student_only"):
        alone[option] = defaults[option]
    alone.model = {"student": cfg.model.teacher, "teacher": None, "name": cfg.model.teacher.name}
    for option in ("unlabelled", "unlabelled_share"):
        if option in alone.data:
            alone.data[option] = None
    alone.method, alone.serialization, alone.seed = cfg.teacher.method, cfg.teacher.serialization, cfg.teacher.seed
    if needs_teacher(alone):
        raise UserError(
            f"teacher.method={alone.method.name} learns from a teacher itself, so it cannot train a missing teacher: "
            "choose method@teacher.method=vanilla."
        )
    return alone


def report_data(data: ImageData, trainer: Trainer) -> None:
    """Log what is used for what. Raises `UserError` if the images are too few for the trainer's devices."""
    for note in data.notes(trainer.world_size):
        if trainer.is_global_zero:
            log.info("%s", note)


def report_class_weights(cfg: DictConfig, data: ImageData) -> None:
    """Log the smallest and the largest weight that cross-entropy gives to an image, if classes have weights."""
    if not cfg.class_weights:
        return
    if not len(data.train_index):
        raise UserError("class_weights=balanced needs training images with labels: leave it out.")
    weights = balanced_weights(data.trained_labels, data.num_classes)
    by_weight = sorted((weight, name) for weight, name in zip(weights, data.class_names, strict=True) if weight)
    (low, first), (high, last) = by_weight[0], by_weight[-1]
    log.info("Cross-entropy weighs each image by its class: from %.3g (%s) to %.3g (%s).", low, first, high, last)


def report_duplicates(data: ImageData) -> None:
    """Log how many images of each evaluation split are training images too."""
    for split, images in (data.train_duplicates or {}).items():
        if images:
            log.info("%d of the %d %s images are training images too.", images, data.split_size(split), split)


def save(
    cfg: DictConfig, distiller: Distiller, data: ImageData, folder: RunFolder, trainer: Trainer, result: Result
) -> None:
    """Write the student and the result, and publish them to W&B. Only rank zero does this."""
    if trainer.is_global_zero:
        facts = {
            "name": cfg.model.student.name,
            "class_names": list(data.class_names),
            "mean": list(distiller.settings.mean),
            "std": list(distiller.settings.std),
            "data": data.source.digest,
        }
        _, height, width = data.image_shape
        if height == width:
            facts["image_size"] = height
        if not distiller.predicts_alone:
            facts["classifies"] = False
        save_weights(distiller.student, folder.student_file, **facts)
        save_best(distiller.student, folder, trainer, facts)
        folder.finish(result)
        for logger in trainer.loggers:
            if isinstance(logger, ForgivingLogger) and isinstance(logger.inner, WandbLogger):
                from src.analysis.wandb_results import publish  # here, because importing W&B takes 0.6 s

                distiller.to(trainer.strategy.root_device)
                publish(logger.experiment, distiller, data, result, folder.student_file, final_batches(cfg, data))
    trainer.strategy.barrier()


def save_best(student: Network, folder: RunFolder, trainer: Trainer, facts: Mapping[str, Any]) -> None:
    """Write the student of the best epoch, if the run has kept it."""
    for best in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(best, BestStudent):
            continue
        if not best.weights and (checkpoint := read_checkpoint(folder.path)):  # forked processes have trained
            best.load_state_dict(checkpoint["callbacks"][best.state_key])
        if not best.weights:  # no epoch was scored
            continue
        network = copy.deepcopy(student)
        network.load_state_dict(best.weights)
        save_weights(network, folder.path / FILE, **facts, epoch=best.epoch, val_accuracy=best.accuracy)
        accuracy, epoch = 100 * best.accuracy, best.epoch + 1
        log.info("%s: the student after epoch %d, chosen by its validation accuracy of %.2f %%.", FILE, epoch, accuracy)


def check_search(cfg: DictConfig, data: ImageData) -> None:
    """Raise `UserError` if a search, by a sweeper of Hydra or by W&B, cannot choose settings by validation images."""
    job_cfg = HydraConfig.get() if HydraConfig.initialized() else None
    searches = job_cfg and job_cfg.mode is RunMode.MULTIRUN and not job_cfg.sweeper._target_.endswith(".BasicSweeper")
    if not searches and not os.environ.get("WANDB_SWEEP_ID"):
        return
    check_choice(cfg, data, "A search")
    if searches and cfg.trainer.get("max_time"):
        raise UserError(
            "A search cannot use the result of a run that trainer.max_time has paused: leave it out. If the search is "
            "stopped, the same command resumes it."
        )


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
@job
def main(cfg: DictConfig) -> float | None:
    """Train one run. Return its validation accuracy to a sweeper, or None without validation images."""
    if "fork" in str(cfg.trainer.strategy):
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: the child would wait for them forever
    try:
        result = train(cfg)
    except OutOfTime as pause:
        log.info("%s", pause)
        return None
    return result.val.accuracy if result.val else None


if __name__ == "__main__":
    run_command(main)
