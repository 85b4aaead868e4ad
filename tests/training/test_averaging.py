"""With a moving average of the weights, the average is evaluated and saved, and training uses the current weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from tests.helpers import commands
from tests.helpers.tiny import MEAN, STD, kd, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

DECAY = 0.9


class AveragedByHand(EMAWeightAveraging):
    """Compute the average also by its definition: w = decay w + (1 - decay) new, from the first weights."""

    average: dict[str, Tensor]

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        now = weights(pl_module.student)
        if trainer.global_step == 1:
            self.average = now  # torch's AveragedModel starts with the first weights that it is given
        for name, value in now.items():
            if value.is_floating_point():
                self.average[name] = DECAY * self.average[name] + (1 - DECAY) * value


def test_the_average_is_evaluated_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, teacher = tiny_data(tmp_path), tiny_teacher()
    distiller, teacher_before = tiny_distiller(data, kd(), teacher=teacher), weights(teacher.network)
    evaluated: list[dict[str, Tensor]] = []
    score = distiller._score

    def remember(*arguments: Any) -> None:
        evaluated.append(weights(distiller.student))
        score(*arguments)

    monkeypatch.setattr(distiller, "_score", remember)
    averaging = AveragedByHand(decay=DECAY)
    tiny_trainer(1, callbacks=[averaging]).fit(distiller, datamodule=data)
    for found in (weights(distiller.student), evaluated[-1]):
        for name, value in averaging.average.items():
            if value.is_floating_point():
                torch.testing.assert_close(found[name], value, msg=name)
    assert same(weights(teacher.network), teacher_before)
    assert torch.equal(distiller.normalisation, torch.tensor([MEAN, STD]))
    assert averaging._average_model is not None
    assert not any("teacher" in name for name in averaging._average_model.state_dict())


def test_the_average_survives_an_interruption(tmp_path: Path, array_file: Path) -> None:
    """A run that ends between its last checkpoint and its result saves the average, not the current weights."""
    options = (
        "method=vanilla", "network@model.student=resnet8", "data=arrays", f"data.path={array_file}", "logger=none",
        "trainer=cpu", "schedule=quick", "schedule.epochs=2", "schedule.batch_size=50", "averaging=ema",
        "averaging.decay=0.5", f"runs={tmp_path}",
    )  # fmt: skip
    assert commands.run("train", *options).code == 0
    (result,) = tmp_path.rglob("result.json")
    student = torch.load(result.with_name("student.pth"), weights_only=True)["model"]
    last = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    in_training = {name: value for name, value in last["current_model_state"].items() if name.startswith("student.")}
    assert not same(student, {name.removeprefix("student."): value for name, value in in_training.items()})
    result.unlink()
    result.with_name("student.pth").unlink()
    ran = commands.run("train", *options)
    assert ran.code == 0, ran.err
    assert same(torch.load(result.with_name("student.pth"), weights_only=True)["model"], student)
