"""A moving average of the weights, by Lightning's callback: what it averages, what is scored, and what is kept."""

from pathlib import Path

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from src.distiller import Distiller
from src.methods.kd import KD
from tests import commands
from tests.tiny import same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

DECAY = 0.9


def distiller_of(tmp_path: Path) -> Distiller:
    method = KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0)
    return tiny_distiller(tiny_data(tmp_path), method, teacher=tiny_teacher())


class AveragedByHand(EMAWeightAveraging):
    """Beside Lightning's average, the same by its definition: w = decay w + (1 - decay) new, from the first weights."""

    average: dict[str, Tensor]

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        now = weights(pl_module.student)
        if trainer.global_step == 1:
            self.average = now  # torch's AveragedModel starts with the first weights that it is given
        for name, value in now.items():
            if value.is_floating_point():
                self.average[name] = DECAY * self.average[name] + (1 - DECAY) * value


def test_the_average_is_what_is_scored_and_kept(tmp_path):
    data, distiller, teacher_before = tiny_data(tmp_path), distiller_of(tmp_path), weights(tiny_teacher().network)
    scored: list[dict[str, Tensor]] = []
    score = distiller._score
    distiller._score = lambda *args: (scored.append(weights(distiller.student)), score(*args))[1]
    averaging = AveragedByHand(decay=DECAY)
    tiny_trainer(1, callbacks=[averaging]).fit(distiller, datamodule=data)
    for kept in (weights(distiller.student), scored[-1]):
        for name, value in averaging.average.items():
            if value.is_floating_point():
                torch.testing.assert_close(kept[name], value, msg=name)
    assert distiller.teacher is not None
    assert same(weights(distiller.teacher.network), teacher_before)
    assert not any("teacher" in name for name in averaging._average_model.state_dict())


def test_it_survives_an_interruption(tmp_path, array_file: Path):
    """Stopped after its last checkpoint, before its result was written: the average is kept, not the last weights."""
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
