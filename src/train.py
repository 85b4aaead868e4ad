"""`python -m src.train`: train a student, with a teacher or alone. `--help` is the guide."""

import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from src.assemble import make_data, make_distiller, make_logger, make_parts, make_trainer
from src.config import job, run_command
from src.data.image_data import ImageData
from src.distiller import Distiller
from src.errors import UserError
from src.loading import check_class_order, find_teacher, load_teacher, teacher_places
from src.metrics import of_split
from src.models.checkpoints import save_weights
from src.run import (
    History,
    RunFolder,
    checkpoint_file,
    code_digest,
    identity,
    method_name,
    needs_teacher,
    read_checkpoint,
    read_history,
    serialization_name,
)
from src.teacher import Answers, Teacher, ViewStore, answers_file, view_store_file

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Do the run that a configuration describes, or what is left of it; its result."""
    data = make_data(cfg)
    parts = make_parts(cfg, data)
    trainer = make_trainer(cfg, logger=False, enable_checkpointing=False)  # here, so that its complaints come early
    teacher, about_teacher, predictions = ready_teacher(cfg, data, trainer) if needs_teacher(cfg) else (None, None, {})
    distiller = make_distiller(cfg, data, parts, teacher, predictions)
    distiller.save_hyperparameters(OmegaConf.to_container(cfg, resolve=True))

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
    finished = folder.begin(fingerprints, {"teacher": about_teacher, "class_names": data.class_names})
    if finished is not None:
        log.info("%s is finished already: test accuracy %.2f %%.", folder.path, 100 * finished["test"]["accuracy"])
        return finished

    log.info("Training %s by %s in %s", cfg.model.student.name, method_name(cfg), folder.path)
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
        log.warning("This is more than one point off: check the checkpoint's normalisation and class order.")
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
    if cfg.teacher.view_store:
        teacher.store = open_store(cfg, data, teacher)
    predictions = {split: said.predictions(data.split_size(split)) for split, said in answers.items()}
    return teacher, about, predictions


def open_store(cfg: DictConfig, data: ImageData, teacher: Teacher) -> ViewStore:
    """The view store. Raises `UserError` where views cannot be numbered."""
    if data.view_count is None:
        raise UserError(f"teacher.view_store=true: views of {cfg.data.name} are too many to store; set it to false.")
    return ViewStore(
        view_store_file(cfg, teacher, data), len(data.source.train_labels), data.view_count, data.num_classes
    )


def teacher_answers(cfg: DictConfig, data: ImageData, teacher: Teacher, split: str, trainer: L.Trainer) -> Answers:
    """The teacher's answers to an evaluation split, asked once for all runs under one root."""
    file = answers_file(cfg, Path(cfg.runs).expanduser(), teacher.key, data, split)
    answers = Answers.load(file)
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
    alone.serialization, alone.also = cfg.teacher.serialization, None
    alone.student.update(path=None, source=None)
    folder = RunFolder(alone)
    if not folder.result_file.is_file():  # one that is finished is as good as any other checkpoint
        log.info(
            "No teacher %s for %s: training it first by the same recipe, %d epochs; "
            "to avoid this give teacher.path=FILE or put one at %s.",
            *(cfg.model.teacher.name, cfg.data.name, cfg.trainer.max_epochs, teacher_places(cfg)[0]),
        )
        train(alone)
    return folder.student_file


def fit(cfg: DictConfig, distiller: Distiller, data: ImageData, folder: RunFolder) -> L.Trainer:
    """Train through the method's stages and then the main one, each from its last checkpoint where there is one."""
    main = distiller.method
    for stage in main.stages():
        distiller.method = stage.method
        fit_stage(cfg, distiller, data, folder.path / "stages" / stage.name, max_epochs=stage.epochs, logger=False)
    distiller.method = main
    return fit_stage(cfg, distiller, data, folder.path, logger=make_logger(cfg, folder.path))


def fit_stage(
    cfg: DictConfig, distiller: Distiller, data: ImageData, folder: Path, **trainer_options: Any
) -> L.Trainer:
    """One call of Lightning's fit, checkpointed every epoch."""
    checkpoint = ModelCheckpoint(
        dirpath=folder / "checkpoints", filename="last", enable_version_counter=False, save_on_train_epoch_end=True
    )
    trainer = make_trainer(cfg, callbacks=[History(folder), checkpoint], **trainer_options)
    resumed = checkpoint_file(folder) if read_checkpoint(folder) else None
    trainer.fit(distiller, datamodule=data, ckpt_path=resumed)
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
            "student": count(distiller.student),
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


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
@job
def main(cfg: DictConfig) -> float | None:
    """One job; a sweeper gets the validation accuracy, or nothing where only test data could tell."""
    if "fork" in str(cfg.trainer.strategy):
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: a child would wait for them forever
    return train(cfg).get("val", {}).get("accuracy")


if __name__ == "__main__":
    run_command(main)
