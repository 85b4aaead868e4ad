"""`python -m src.train`: train a student, with a teacher or alone. `--help` is the guide."""

import copy
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from src.analysis.gradients import GradientAnatomy
from src.assemble import make_data, make_distiller, make_logger, make_trained_parts, make_trainer
from src.command import job, run_command
from src.data.image_data import ImageData
from src.distiller import Distiller
from src.errors import UserError
from src.loading import check_class_order, find_teacher, load_teacher, teacher_places
from src.methods.method import Method
from src.metrics import of_split
from src.models.checkpoints import save_weights
from src.models.winograd import check_winograd
from src.resume import AGAIN, Checkpoints, WholeFiles, checkpoint_file, last_good, read_checkpoint
from src.run import (
    History,
    RunFolder,
    code_digest,
    identity,
    method_name,
    needs_teacher,
    read_history,
    serialization_name,
)
from src.secrecy import plain
from src.teacher import Answers, Teacher, answers_file, view_store_file
from src.view_store import ViewStore

log = logging.getLogger(__name__)


def train(cfg: DictConfig, wait: bool = False) -> dict[str, Any]:
    """Do the run that a configuration describes, or what is left of it; its result.

    Raises `BusyError` where another command does it, unless it shall `wait` for that one's result.
    """
    data = make_data(cfg)
    parts = make_trained_parts(cfg, data)
    trainer = make_trainer(cfg, logger=False, enable_checkpointing=False)  # here, so that its complaints come early
    if cfg.winograd or (needs_teacher(cfg) and cfg.teacher.winograd):
        check_winograd(trainer.strategy.root_device)
    teacher, about_teacher, predictions = ready_teacher(cfg, data, trainer) if needs_teacher(cfg) else (None, None, {})
    if teacher and cfg.teacher.view_store:
        teacher.store = open_store(cfg, data, teacher, parts.method)
    distiller = make_distiller(cfg, data, parts, teacher, predictions)
    distiller.save_hyperparameters(plain(cfg))

    folder = RunFolder(cfg)
    networks = [cfg.model.student] + ([cfg.model.teacher] if teacher else [])
    made = [*networks, cfg.data, cfg.method, cfg.serialization, cfg.schedule.scheduler, *filter(None, [cfg.also])]
    modules = {node._target_.rsplit(".", 1)[0] for node in made if node._target_.startswith("src.")}
    if cfg.also:
        modules.add("src.methods.combined")
    fingerprints = {
        "code": code_digest(["src.distiller", *sorted(modules)]),
        "data": data.source.digest,
        "teacher": teacher.digest if teacher else None,
    }
    facts = {"teacher": about_teacher, "class_names": data.class_names, "train_duplicates": data.train_duplicates}
    first = trainer.is_global_zero
    with folder.kept(first, wait):
        finished = folder.begin(fingerprints, facts, first)
        if finished is not None:
            log.info("%s is finished already: test accuracy %.2f %%.", folder.path, 100 * finished["test"]["accuracy"])
            return finished
        try:
            return _train(cfg, distiller, data, folder, about_teacher)
        except Exception as error:
            folder.fail(error)
            raise


def _train(
    cfg: DictConfig,
    distiller: Distiller,
    data: ImageData,
    folder: RunFolder,
    about_teacher: Mapping[str, Any] | None,
) -> dict[str, Any]:
    log.info("Training %s by %s in %s", cfg.model.student.name, method_name(cfg), folder.path)
    for split, images in (data.train_duplicates or {}).items():
        if images:
            log.info("%d of the %d %s images are training images too.", images, data.split_size(split), split)
    trainer = fit(cfg, distiller, data, folder)
    result = summarise(cfg, distiller, data, folder, trainer, about_teacher)
    if trainer.is_global_zero:
        save_weights(
            distiller.student,
            folder.student_file,
            name=cfg.model.student.name,
            class_names=list(data.class_names),
            mean=list(distiller.mean),
            std=list(distiller.std),
        )
        folder.finish(result)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                from src.wandb_results import publish  # W&B takes 0.6 s to import: not for those who log elsewhere

                distiller.to(trainer.strategy.root_device)
                publish(logger.experiment, distiller, data, result, folder.student_file, cfg.trainer.limit_val_batches)
    trainer.strategy.barrier()
    log.info("%s: test accuracy %.2f %% after the last epoch.", folder.path, 100 * result["test"]["accuracy"])
    return result


def ready_teacher(
    cfg: DictConfig, data: ImageData, trainer: L.Trainer
) -> tuple[Teacher, dict[str, Any], dict[str, Tensor]]:
    """Find or train the teacher, load it and measure it on the trainer's device and in its precision.

    Returns it with what the result says of it, and its predictions by split.
    """
    path = find_teacher(cfg)
    trained_here = path is None and cfg.teacher.source is None
    if trained_here:
        path = train_teacher(cfg)
    node = cfg.model.teacher
    teacher = load_teacher(cfg, data, path)

    teacher.to(trainer.strategy.root_device, torch.channels_last if cfg.channels_last else torch.contiguous_format)
    splits: set[str] = {data.validates_on, "test"}
    answers = {split: teacher_answers(cfg, data, teacher, split, trainer) for split in splits}
    measured = answers["test"].scores()
    published = node.published_accuracy.get(cfg.data.name)
    beside = "" if published is None else f" (published: {published:.2f} %)"
    came_from = path or cfg.teacher.source
    log.info("Teacher %s from %s: test accuracy %.2f %%%s.", node.name, came_from, 100 * measured["accuracy"], beside)
    check_class_order(answers["test"], node.name)
    whole = cfg.trainer.limit_val_batches is None
    if published is not None and not trained_here and whole and abs(100 * measured["accuracy"] - published) > 1:
        log.warning(
            "This is more than one point off: check the normalisation it is fed by, teacher.mean=%s teacher.std=%s, "
            "and its class order.",
            *(str(list(numbers)).replace(" ", "") for numbers in (teacher.mean, teacher.std)),
        )
    about = {
        "name": node.name,
        "source": str(came_from),
        "sha256": teacher.digest,
        "key": teacher.key,
        "mean": list(teacher.mean),
        "std": list(teacher.std),
        "image_size": teacher.image_size,
        "class_index": teacher.class_index,
        "published_accuracy": published,
        **measured,
    }
    predictions = {split: said.predictions(data.split_size(split)) for split, said in answers.items()}
    return teacher, about, predictions


def open_store(cfg: DictConfig, data: ImageData, teacher: Teacher, method: Method) -> ViewStore | None:
    """The view store, where the method can use one. Raises `UserError` where there is no room for it."""
    if method.needs_features:
        log.info("method=%s needs the teacher's features: it is asked at every step, stored or not.", cfg.method.name)
        return None
    epochs = cfg.trainer.max_epochs
    return ViewStore(
        view_store_file(cfg, teacher, data),
        len(data.source.train_labels),
        data.view_count(epochs),
        data.num_classes,
        dtype=teacher.answer_dtype,
        asked=epochs * data.views * len(data.train_index),
        gigabytes=cfg.teacher.store_gigabytes,
    )


def teacher_answers(cfg: DictConfig, data: ImageData, teacher: Teacher, split: str, trainer: L.Trainer) -> Answers:
    """The teacher's answers to an evaluation split, asked once for all runs under one root."""
    file = answers_file(cfg, Path(cfg.runs).expanduser(), teacher.key, data, split)
    answers = Answers.load(file, data.split_size(split), data.num_classes)
    if answers is None:
        batches = itertools.islice(data.evaluation_loader(split), cfg.trainer.get("limit_val_batches"))
        answers = teacher.answer_all(batches, trainer.precision_plugin.forward_context())
        answers.save(file)
    return answers


def train_teacher(cfg: DictConfig) -> Path:
    """Train the missing teacher alone, by the same recipe; its checkpoint."""
    alone = copy.deepcopy(cfg)
    alone.model = {"student": cfg.model.teacher, "teacher": None, "name": cfg.model.teacher.name}
    alone.method, alone.seed = cfg.teacher.method, cfg.teacher.seed
    alone.serialization, alone.also, alone.standardize_logits = cfg.teacher.serialization, None, False
    alone.student.update(path=None, source=None)
    alone.averaging = None
    if "delta" in alone.schedule.optimizer:  # DOT with nothing to distil is SGD: one teacher for both
        with open_dict(alone.schedule):
            del alone.schedule.optimizer["delta"]
        alone.schedule.optimizer._target_ = "torch.optim.SGD"
    folder = RunFolder(alone)
    if not folder.result_file.is_file():  # one that is finished is as good as any other checkpoint
        log.info(
            "No teacher %s for %s: training it first by the same recipe, %d epochs; "
            "to avoid this give teacher.path=FILE or put one at %s.",
            *(cfg.model.teacher.name, cfg.data.name, cfg.trainer.max_epochs, teacher_places(cfg)[0]),
        )
        train(alone, wait=True)
    return folder.student_file


def fit(cfg: DictConfig, distiller: Distiller, data: ImageData, folder: RunFolder) -> L.Trainer:
    """Train through the method's stages and then the main one, each from its last checkpoint where there is one."""
    main, learning_rate = distiller.method, distiller.learning_rate
    options: dict[str, Any] = {}
    if main.stages() and cfg.trainer.strategy in ("ddp", "ddp_fork"):  # each stage leaves parameters of others alone
        options["strategy"] = f"{cfg.trainer.strategy}_find_unused_parameters_true"
    for stage in main.stages():
        distiller.method, distiller.learning_rate = stage.method, stage.learning_rate_scale * learning_rate
        epochs = min(stage.epochs, cfg.trainer.max_epochs)  # trainer=debug: one
        log.info("Stage %s before the main one, epochs: %d", stage.name, epochs)
        fit_stage(cfg, distiller, data, folder.path / "stages" / stage.name, max_epochs=epochs, logger=False, **options)
    distiller.method, distiller.learning_rate = main, learning_rate
    averaging = [hydra.utils.instantiate(cfg.averaging)] if cfg.averaging else []
    looking = [GradientAnatomy(folder.path, **cfg.gradients)] if cfg.gradients.every else []
    options |= {"callbacks": [*averaging, *looking], "logger": make_logger(cfg, folder.path)}
    trainer = fit_stage(cfg, distiller, data, folder.path, **options)
    if averaging and (kept := read_checkpoint(folder.path)):  # where nothing was left to train, Lightning does not
        distiller.load_state_dict(kept["state_dict"])
    return trainer


def fit_stage(
    cfg: DictConfig,
    distiller: Distiller,
    data: ImageData,
    folder: Path,
    callbacks: Sequence[L.Callback] = (),
    **trainer_options: Any,
) -> L.Trainer:
    """One call of Lightning's fit, from the last good checkpoint on."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, cfg.checkpoint_minutes)
    trainer = make_trainer(cfg, callbacks=[History(folder), *callbacks, checkpoints], **trainer_options)
    trainer.strategy.checkpoint_io = WholeFiles()
    found = last_good(folder)
    if found and found[0] != checkpoint_file(folder):
        checkpoint_file(folder).unlink(missing_ok=True)  # a damaged one must not take the place of the good one
    try:
        trainer.fit(distiller, datamodule=data, ckpt_path=found[0] if found else None, weights_only=True)
    except Exception as error:
        if found is None or checkpoints.started or trainer.world_size > 1 or isinstance(error, UserError):
            raise  # of other processes it is not known here whether they had started
        raise UserError(f"{found[0]} does not fit this run ({type(error).__name__}): {AGAIN}.") from error
    return trainer


def summarise(
    cfg: DictConfig,
    distiller: Distiller,
    data: ImageData,
    folder: RunFolder,
    trainer: L.Trainer,
    about_teacher: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The run's result: the last epoch first, the best beside it and named so; fractions of 1, NLL in nats, seconds."""
    rows = read_history(folder.path)
    split = data.validates_on
    scores: dict[str, Any] = {split: of_split(rows[-1], split)}
    if not scores.get("test"):  # validation was on held-out images, or skipped in the last epoch
        tested = trainer.test(distiller, datamodule=data, verbose=False)[0]
        scores = {"test": of_split(tested, "test"), **({"val": scores["val"]} if split == "val" else {})}
    return {
        **scores,
        "best_epoch": best_epoch(rows, split),
        "seconds": sum(row["seconds"] for row in rows),
        "parameters": {
            "student": count(distiller.method.predictor(distiller.student)),
            "teacher": count(distiller.teacher.network) if distiller.teacher else None,
            "training_only": count(distiller.serialization) + count(distiller.method),
        },
        "data": cfg.data.name,
        "method": method_name(cfg),
        "serialization": serialization_name(cfg),
        "teacher": about_teacher,
        "student": cfg.model.student.name,
        "seed": cfg.seed,
        "epochs": len(rows),
        "train_images": len(data.train_index),
        "train_duplicates": data.train_duplicates,
        "class_names": list(data.class_names),
        "superclasses": data.superclasses,
        "settings": {key: value for key, value in identity(cfg).items() if key != "seed"},
    }


def best_epoch(rows: Sequence[Mapping[str, float]], split: str) -> dict[str, Any] | None:
    """The epoch of the highest accuracy on a split, chosen with hindsight; None where no epoch was scored."""
    scored = [row for row in rows if f"{split}/accuracy" in row]
    if not scored:
        return None
    best = max(scored, key=lambda row: row[f"{split}/accuracy"])
    return {"split": split, "epoch": int(best["epoch"]), "accuracy": best[f"{split}/accuracy"]}


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def check_search(cfg: DictConfig) -> None:
    """Raise `UserError` where a search (Hydra's sweepers but the plain one, or W&B's) would choose by test images."""
    job_cfg = HydraConfig.get()
    searches = job_cfg.mode is RunMode.MULTIRUN and not job_cfg.sweeper._target_.endswith(".BasicSweeper")
    if (searches or os.environ.get("WANDB_SWEEP_ID")) and not cfg.data.val_size:
        raise UserError("A search with data.val_size=0 would choose by test images: hold some out, data.val_size=N.")


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
@job
def main(cfg: DictConfig) -> float | None:
    """One job; a sweeper gets the validation accuracy, or nothing where only test data could tell."""
    check_search(cfg)
    if "fork" in str(cfg.trainer.strategy):
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: a child would wait for them forever
    return train(cfg).get("val", {}).get("accuracy")


if __name__ == "__main__":
    run_command(main)
