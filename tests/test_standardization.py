"""Standardized logits: the paper's equation, what it cannot see, and both sides of every method with a logit term."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from src.methods.dkd import DKD
from src.methods.kd import KD, kd_loss
from src.methods.method import Batch
from src.serialization import Serial
from src.standardization import standardized
from tests.methods.test_losses import EXTREMES, PRECISIONS, random_case
from tests.tiny import tiny_data, tiny_distiller, tiny_teacher, tiny_trainer


def statement(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    deviation = (sum((x - mean) ** 2 for x in row) / len(row)) ** 0.5
    return [(x - mean) / deviation for x in row]


def test_value_and_gradient():
    logits, weights, _ = random_case(7, torch.float64)
    wanted = torch.tensor([statement(row) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(standardized(logits), wanted)
    torch.testing.assert_close(standardized(logits.float()).double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(lambda u: (standardized(u) * weights).sum(), logits.requires_grad_())


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_neither_scale_nor_shift_of_a_network_counts(scale: float, shift: float):
    logits, teacher, _ = random_case(7, torch.float64)
    torch.testing.assert_close(standardized(scale * logits + shift), standardized(logits), rtol=1e-9, atol=1e-9)
    said = kd_loss(standardized(scale * teacher + shift), standardized(teacher), 2.0)
    assert abs(said.item()) < 1e-12


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_extreme_logits(dtype: torch.dtype):
    """All equal stay equal, without a gradient; everything else gets mean 0 and deviation 1."""
    logits = torch.tensor([*EXTREMES.values(), [1e-30, 2e-30, 0.0, 0.0, 0.0]]).to(dtype).requires_grad_()
    said = standardized(logits)
    equal = (logits == logits[:, :1]).all(dim=1)
    assert 0 < equal.sum() < len(logits)
    assert said.dtype == torch.promote_types(dtype, torch.float32)
    assert (said[equal] == 0).all()
    torch.testing.assert_close(said[~equal].mean(dim=1), torch.zeros_like(said[~equal, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(said[~equal].std(dim=1, correction=0), torch.ones_like(said[~equal, 0]))
    (gradient,) = torch.autograd.grad(said.square().sum() + said[:, 0].sum(), logits)
    assert (gradient[equal] == 0).all()
    assert torch.isfinite(gradient[:-1]).all()


class SeenByDKD(DKD):
    """Keeps what it saw."""

    seen: Batch

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        self.seen = batch
        return super().terms(batch)


def test_both_sides_are_standardized_after_serialization_and_cross_entropy_is_not(tmp_path):
    method = SeenByDKD(cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=2.0, warmup_epochs=0)
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(data, method, teacher=tiny_teacher(), serialization=Serial(0.1), standardize_logits=True)
    distiller.serialization.layer.weight.data.mul_(3)
    tiny_trainer(1, limit_train_batches=1, limit_val_batches=0).fit(distiller, datamodule=data)
    student, teacher = method.seen.student, method.seen.teacher
    for own, said in ((3 * student.logits, student.distillation_logits), (teacher.logits, teacher.distillation_logits)):
        torch.testing.assert_close(said, standardized(own), rtol=1e-4, atol=1e-5)
    assert student.logits.detach().std(dim=1).max() < 0.9


def test_off_by_default(tmp_path):
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(
        data, KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0), teacher=tiny_teacher()
    )
    logits = torch.randn(2, 4)
    assert distiller.for_distillation(logits) is logits
