"""Standardization follows the paper's equation, is invariant to scale and shift, and acts on student and teacher."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from src.methods.dkd import DKD
from src.methods.kd import kd_loss
from src.methods.method import Batch, DistillationLogits
from src.training.serialization import Serial
from src.training.standardization import standardize
from tests.helpers.losses import EXTREMES, PRECISIONS, random_case
from tests.helpers.tiny import kd, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer


def definition(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    deviation = (sum((x - mean) ** 2 for x in row) / len(row)) ** 0.5
    return [(x - mean) / deviation for x in row]


def test_values_and_gradients_match_the_equation() -> None:
    logits, weights, _ = random_case(7, torch.float64)
    wanted = torch.tensor([definition(row) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(standardize(logits), wanted)
    torch.testing.assert_close(standardize(logits.float()).double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(lambda u: (standardize(u) * weights).sum(), logits.requires_grad_())


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_scale_and_shift_of_the_logits_have_no_effect(scale: float, shift: float) -> None:
    logits, teacher, _ = random_case(7, torch.float64)
    torch.testing.assert_close(standardize(scale * logits + shift), standardize(logits), rtol=1e-9, atol=1e-9)
    loss = kd_loss(standardize(scale * teacher + shift), standardize(teacher), 2.0)
    assert abs(loss.item()) < 1e-12


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_extreme_logits_have_finite_values_and_gradients(dtype: torch.dtype) -> None:
    """Equal logits give zeros without a gradient. All other rows get mean 0 and deviation 1."""
    logits = torch.tensor([*EXTREMES.values(), [1e-30, 2e-30, 0.0, 0.0, 0.0]]).to(dtype).requires_grad_()
    found = standardize(logits)
    equal = (logits == logits[:, :1]).all(dim=1)
    assert 0 < equal.sum() < len(logits)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert (found[equal] == 0).all()
    torch.testing.assert_close(found[~equal].mean(dim=1), torch.zeros_like(found[~equal, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[~equal].std(dim=1, correction=0), torch.ones_like(found[~equal, 0]))
    (gradient,) = torch.autograd.grad(found.square().sum() + found[:, 0].sum(), logits)
    assert (gradient[equal] == 0).all()
    assert torch.isfinite(gradient[:-1]).all()


class Recorder(DKD):
    """DKD that keeps its last batch."""

    batch: Batch
    logits: DistillationLogits

    def all_terms(self, batch: Batch, logits: DistillationLogits) -> Mapping[str, Tensor]:
        self.batch, self.logits = batch, logits
        return super().all_terms(batch, logits)


def test_logits_for_distillation_are_standardized_after_serialization_and_the_students_own_are_not(
    tmp_path: Path,
) -> None:
    method = Recorder(cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=2.0, warmup_epochs=0)
    data = tiny_data(tmp_path)
    serialization = Serial(0.1)
    distiller = tiny_distiller(
        data, method, teacher=tiny_teacher(), serialization=serialization, standardize_logits=True
    )
    serialization.layer.weight.data.mul_(3)
    tiny_trainer(1, limit_train_batches=1, limit_val_batches=0).fit(distiller, datamodule=data)
    student, teacher = method.batch.student, method.batch.teacher
    for own, found in ((3 * student.logits, method.logits.student), (teacher.logits, method.logits.teacher)):
        torch.testing.assert_close(found, standardize(own), rtol=1e-4, atol=1e-5)
    assert student.logits.detach().std(dim=1).max() < 0.9


def test_standardization_is_off_by_default(tmp_path: Path) -> None:
    distiller = tiny_distiller(tiny_data(tmp_path), kd(), teacher=tiny_teacher())
    logits = torch.randn(2, 4)
    assert distiller.adjust_logits(logits) is logits
