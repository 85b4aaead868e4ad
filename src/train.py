"""`python -m src.train`: train a student, with a teacher or alone. `--help` is the guide."""

import copy
import logging
import os
from pathlib import Path

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
from src.data.image_data import ImageData
from src.methods.method import Method
from src.models.checkpoints import save_weights
from src.models.winograd import check_winograd
from src.runs.fingerprints import fingerprints, versions
from src.runs.folder import RunFolder
from src.runs.result import Result, RunRecord, TeacherFacts
from src.setup.assemble import make_data, make_distiller, make_method, make_parts, prepare
from src.setup.dry_run import dry_run
from src.setup.teacher import MeasuredTeacher, find_teacher, measure_teacher, teacher_places
from src.teachers.teacher import Teacher
from src.training.distiller import Distiller
from src.training.fitting import fit, make_trainer
from src.training.summary import summarise

log = logging.getLogger(__name__)


def train(cfg: DictConfig, wait: bool = False) -> Result:
    """Train the run that a configuration describes, or resume it, and return its result.

    A finished run is not trained again. Raises `BusyError` if another command trains it at the moment. With `wait`,
    wait for that command's result instead.
    """
    cfg = prepare(cfg)
    method = make_method(cfg)
    data = make_data(cfg, method.views_per_image)
    parts = make_parts(cfg, data, method, for_training=True)
    # Reports a missing device early. It also measures the teacher, and knows whether this process is rank zero.
    probe = make_trainer(cfg, logger=False, enable_checkpointing=False)
    if cfg.winograd or (needs_teacher(cfg) and cfg.teacher.winograd):
        check_winograd(probe.strategy.root_device)
    dry_run(cfg, data, parts)

    measured = find_or_train_teacher(cfg, data, parts.method, probe) if needs_teacher(cfg) else None
    teacher, facts, predictions = measured or (None, None, {})
    distiller = make_distiller(cfg, data, parts, teacher, predictions)
    distiller.save_hyperparameters(plain_config(cfg))

    folder = RunFolder(cfg, probe.is_global_zero)
    record = make_record(cfg, data, teacher, facts)
    with folder.locked(wait):
        finished = folder.begin(record)
        if finished is not None:
            log.info("%s is finished already: test accuracy %.2f %%.", folder.path, 100 * finished.test.accuracy)
            return finished
        try:
            log.info("Training %s by %s in %s", cfg.model.student.name, method_name(cfg), folder.path)
            report_duplicates(data)
            trainer = fit(cfg, distiller, data, folder.path)
            result = summarise(cfg, distiller, data, folder, trainer, facts)
            save(cfg, distiller, data, folder, trainer, result)
        except Exception as error:
            folder.fail(error)
            raise
    log.info("%s: test accuracy %.2f %% after the last epoch.", folder.path, 100 * result.test.accuracy)
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


def find_or_train_teacher(cfg: DictConfig, data: ImageData, method: Method, trainer: Trainer) -> MeasuredTeacher:
    """Find the teacher, train it if it is missing, and measure it."""
    path = find_teacher(cfg)
    is_missing = path is None and cfg.teacher.source is None
    return measure_teacher(
        cfg, data, method, train_teacher(cfg) if is_missing else path, trainer, trained_here=is_missing
    )


def train_teacher(cfg: DictConfig) -> Path:
    """Train the missing teacher by the student's recipe, unless it is trained already, and return its checkpoint."""
    alone = teacher_config(cfg)
    folder = RunFolder(alone)
    if not folder.result_file.is_file():  # a finished teacher is used again, even if the code has changed since
        log.info(
            "There is no teacher %s for %s: training it first by the same recipe, %d epochs. To avoid this, give "
            "teacher.path=FILE, or put a checkpoint at %s.",
            *(cfg.model.teacher.name, cfg.data.name, cfg.trainer.max_epochs, teacher_places(cfg)[0]),
        )
        train(alone, wait=True)
    return folder.student_file


def teacher_config(cfg: DictConfig) -> DictConfig:
    """Return the configuration that trains the run's teacher.

    It is a copy of the run's configuration. Options marked `student_only` get their defaults. The method, the
    serialization layer and the seed come from `teacher.*`. Raises `UserError` if that method needs a teacher itself.
    """
    alone = copy.deepcopy(cfg)
    defaults = OmegaConf.structured(TrainOptions)
    for option in marked(TrainOptions, "student_only"):
        alone[option] = defaults[option]
    alone.model = {"student": cfg.model.teacher, "teacher": None, "name": cfg.model.teacher.name}
    alone.method, alone.serialization, alone.seed = cfg.teacher.method, cfg.teacher.serialization, cfg.teacher.seed
    if needs_teacher(alone):
        raise UserError(
            f"teacher.method={alone.method.name} learns from a teacher itself, so it cannot train a missing teacher: "
            "choose method@teacher.method=vanilla."
        )
    return alone


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
        save_weights(
            distiller.student,
            folder.student_file,
            name=cfg.model.student.name,
            class_names=list(data.class_names),
            mean=list(distiller.settings.mean),
            std=list(distiller.settings.std),
        )
        folder.finish(result)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                from src.analysis.wandb_results import publish  # here, because importing W&B takes 0.6 s

                distiller.to(trainer.strategy.root_device)
                publish(logger.experiment, distiller, data, result, folder.student_file, cfg.trainer.limit_val_batches)
    trainer.strategy.barrier()


def check_search(cfg: DictConfig) -> None:
    """Raise `UserError` if a search, by a sweeper of Hydra or by W&B, would choose settings by their test accuracy."""
    job_cfg = HydraConfig.get()
    searches = job_cfg.mode is RunMode.MULTIRUN and not job_cfg.sweeper._target_.endswith(".BasicSweeper")
    if (searches or os.environ.get("WANDB_SWEEP_ID")) and not cfg.data.val_size:
        raise UserError(
            "A search with data.val_size=0 would choose by test images: hold out training images with data.val_size=N."
        )


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
@job
def main(cfg: DictConfig) -> float | None:
    """Train one run. Return its validation accuracy to a sweeper, or None if no images are held out."""
    check_search(cfg)
    if "fork" in str(cfg.trainer.strategy):
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: the child would wait for them forever
    result = train(cfg)
    return result.val.accuracy if result.val else None


if __name__ == "__main__":
    run_command(main)
