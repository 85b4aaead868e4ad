"""Training stops before a checkpoint with a damaged student or a changed teacher is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from src.common.errors import UserError
from src.methods.method import LogitMethod
from tests.helpers.tiny import same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer


class Damaging(LogitMethod):
    """A method that damages something in epoch 1."""

    student_weight: Any

    def __init__(self, damage: str) -> None:
        super().__init__()
        self.damage = damage

    def allocate(self, networks):
        self.teacher: Any = networks.teacher

    def weights(self, epoch):
        return {"cross_entropy": 1.0, "match": 0.1}

    def distillation(self, logits, batch):
        match = F.mse_loss(logits.student, logits.teacher)
        if batch.step == 8 and self.damage in ("nan", "inf"):  # 44 images in batches of 8: the third batch of epoch 1
            match = match * float(self.damage)
        if batch.step == 8 and self.damage == "teacher":
            self.teacher.network.classifier_layer.bias[0] += 1e-3
        if batch.step == 8 and self.damage == "statistics":
            next(m for m in self.teacher.network.modules() if hasattr(m, "running_var")).running_var.mul_(1.01)
        self.last = batch.step == 11
        return {"match": match}

    def backward(self, loss, weighted_terms):
        loss.backward()
        if self.last and self.damage == "gradient":
            self.student_weight.grad[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("nan", r"The loss is not finite in epoch 1, batch 2 \(cross_entropy [\d.]+, match nan\)"),
        ("inf", r"The loss is not finite in epoch 1, batch 2 \(cross_entropy [\d.]+, match inf\)"),
        ("gradient", r"student\.fc\.weight is not finite in epoch 1: try a lower .* The last checkpoint is kept"),
        ("teacher", "The method changed the teacher's weights, so nothing more is saved: correct the method"),
        ("statistics", "The method changed the teacher's weights, so nothing more is saved: correct the method"),
    ],
)
def test_training_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, damage: str, sentence: str) -> None:
    data, method = tiny_data(tmp_path), Damaging(damage)
    distiller = tiny_distiller(data, method, teacher=tiny_teacher())
    method.__dict__["student_weight"] = distiller.student.classifier_layer.weight  # not a parameter of the method
    kept: dict[str, torch.Tensor] = {}

    class Copy(ModelCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            kept.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    checkpoint = Copy(dirpath=tmp_path, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    with pytest.raises(UserError, match=sentence) as caught:
        tiny_trainer(3, enable_checkpointing=True, callbacks=[checkpoint]).fit(distiller, datamodule=data)
    assert "teacher" in str(caught.value) or "try a lower schedule.learning_rate" in str(caught.value)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 0
    assert same(saved["state_dict"], kept)
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_training_without_damage_continues(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    trainer = tiny_trainer(2)
    trainer.fit(tiny_distiller(data, Damaging("nothing"), teacher=tiny_teacher()), datamodule=data)
    assert trainer.current_epoch == 2
