"""Every family of networks can be a teacher and a student."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from src.methods.aekt import AEKT
from src.training.serialization import Serial
from tests.helpers.families import FAMILIES
from tests.helpers.tiny import same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


@pytest.mark.parametrize(
    ("new_teacher", "new_student"), list(pairwise([*FAMILIES, FAMILIES[0]])), ids=lambda make: make.__name__
)
def test_two_steps_train_the_whole_student_and_leave_the_teacher_unchanged(new_teacher, new_student, tmp_path: Path):
    data, teacher = tiny_data(tmp_path), tiny_teacher(new_teacher)
    method = AEKT(
        cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=4.0, warmup_epochs=1, gamma=0.4, weighting="ratio",
        max_weight=10.0, weight_temperature=4.0, confidence_term=True,
    )  # fmt: skip
    distiller = tiny_distiller(data, method, teacher=teacher, serialization=Serial(0.1), new_student=new_student)
    before, teacher_before = weights(distiller.student), weights(teacher.network)
    tiny_trainer(1, limit_train_batches=2, limit_val_batches=0).fit(distiller, datamodule=data)
    after = weights(distiller.student)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all(value.isfinite().all() for value in after.values())
    assert {name for name, _ in distiller.student.named_parameters()} <= changed
    assert same(teacher_before, weights(teacher.network))
