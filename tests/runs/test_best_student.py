"""The student of the best epoch: chosen by validation images, kept beside the last one, and the same after a resume."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from src.methods.vanilla import Vanilla
from src.models.checkpoints import load_weights
from src.models.resnet import resnet8
from src.runs.best_student import FILE, BestStudent
from src.runs.history import read_history
from tests.helpers import commands
from tests.helpers.tiny import CLASSES, same, tiny_data, tiny_distiller, tiny_trainer, write_arrays


class Scored(Callback):
    """Remember the scored weights of each epoch, and their accuracy. It comes after the callback that averages."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.accuracies: list[float] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self.weights.append({name: value.clone() for name, value in module.student.state_dict().items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.accuracies.append(float(trainer.callback_metrics["val/accuracy"]))


@pytest.mark.parametrize("averaged", [False, True])
def test_the_first_best_epoch_is_kept(tmp_path: Path, averaged: bool) -> None:
    data = tiny_data(tmp_path)
    data.val_size = 12
    data.load()
    averaging = [EMAWeightAveraging(decay=0.5)] if averaged else []
    best, scored = BestStudent(), Scored()
    distiller = tiny_distiller(data, Vanilla())
    distiller.settings = dataclasses.replace(distiller.settings, validates_on="val")
    tiny_trainer(6, callbacks=[best, *averaging, scored]).fit(distiller, datamodule=data)
    accuracies = scored.accuracies
    epoch = accuracies.index(max(accuracies))
    assert epoch < 5, accuracies
    assert (best.accuracy, best.epoch) == (accuracies[epoch], epoch)
    assert same(best.weights, scored.weights[epoch])
    assert not same(best.weights, scored.weights[5])
    resumed = BestStudent()
    resumed.load_state_dict(best.state_dict())
    assert same(resumed.weights, best.weights)
    assert (resumed.accuracy, resumed.epoch) == (best.accuracy, best.epoch)


def options(folder: Path, *overrides: str) -> tuple[str, ...]:
    data = folder / "tiny.npz"
    return (
        *("method=vanilla", "network@model.student=resnet8", "data=arrays", f"data.path={write_arrays(data)}"),
        *("schedule=quick", "schedule.epochs=5", "schedule.batch_size=8", "trainer=cpu", "logger=none"),
        *(f"runs={folder / 'runs'}", "keep_best=true", *overrides),
    )


def test_a_run_writes_both_students(tmp_path: Path) -> None:
    ran = commands.run("train", *options(tmp_path, "data.val_size=12"))
    assert ran.code == 0, ran.err
    (file,) = tmp_path.rglob(FILE)
    accuracies = [row["val/accuracy"] for row in read_history(file.parent)]
    epoch = accuracies.index(max(accuracies))
    content = torch.load(file, weights_only=True)
    assert (content["epoch"], content["val_accuracy"]) == (epoch, pytest.approx(accuracies[epoch]))
    assert f"{FILE}: the student after epoch {epoch + 1}, chosen by its validation accuracy of" in ran.out
    network = resnet8(CLASSES)
    load_weights(network, file)
    assert same(network.state_dict(), content["model"])
    assert (file.parent / "student.pth").is_file()


def test_without_a_scored_epoch_there_is_no_best_student(tmp_path: Path) -> None:
    ran = commands.run("train", *options(tmp_path, "data.val_size=12", "trainer.check_val_every_n_epoch=10"))
    assert ran.code == 0, ran.err
    assert not list(tmp_path.rglob(FILE))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ((), "keep_best=true would choose by test images: hold training images out with data.val_size=N."),
        (
            ("data.val_size=12", "trainer.limit_val_batches=0"),
            "keep_best=true needs validation images: leave trainer.limit_val_batches=0 out.",
        ),
    ],
)
def test_a_choice_by_test_images_is_refused(tmp_path: Path, overrides: tuple[str, ...], sentence: str) -> None:
    ran = commands.run("train", *options(tmp_path, *overrides))
    assert (ran.code, ran.err.strip()) == (1, f"error: {sentence}")
    assert not list(tmp_path.rglob("run.json"))
