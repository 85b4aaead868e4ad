"""DIST's correlations: they ignore scale and shift, count classes that nobody predicts, and vanish for constants."""

import pytest
import torch

from src.methods.dist import correlation, inter_class_loss, intra_class_loss
from tests.helpers.logit_losses import LOGIT_LOSSES, TEMPERATURE, value_and_gradient
from tests.helpers.losses import observed, random_case, three_logits
from tests.helpers.methods import configured


def test_published_weights():
    assert configured("dist").weights(0) == {"cross_entropy": 1.0, "inter_class": 2.0, "intra_class": 2.0}
    assert configured("dist").temperature == 4.0
    assert configured("dist", "resnet34_to_resnet18").temperature == 1.0


def test_terms_are_both_relations():
    own, distilled, teacher, target = three_logits()
    terms = configured("dist").all_terms(*observed(distilled, teacher, target, own=own))
    assert terms["inter_class"] == inter_class_loss(distilled, teacher, 4.0)
    assert terms["intra_class"] == intra_class_loss(distilled, teacher, 4.0)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_correlation_ignores_scale_and_shift(dim: int):
    """Of each row (dim 1) or each column (dim 0) of probabilities. A negative scale changes the sign."""
    student, teacher, _ = random_case(6, torch.float64)
    p, q = student.softmax(1), teacher.softmax(1)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 6) if dim == 0 else (len(p), 1)
    scale, shift = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    relation = correlation(p.log(), q.log(), dim)
    torch.testing.assert_close(correlation((scale * p + shift).log(), q.log(), dim), relation)
    torch.testing.assert_close(correlation((2 - p).log(), q.log(), dim), -relation)
    assert relation.shape == (p.shape[1 - dim],)
    assert not torch.allclose(
        correlation((scale * p + shift).log(), q.log(), 1 - dim), correlation(p.log(), q.log(), 1 - dim)
    )


@pytest.mark.parametrize("dim", [0, 1])
def test_a_student_at_its_teacher_has_no_loss(dim: int):
    _, teacher, _ = random_case(6, torch.float64)
    torch.testing.assert_close(
        correlation(teacher.log_softmax(1), teacher.log_softmax(1), dim).sum(), torch.tensor(6.0).double()
    )


def test_columns_of_classes_that_nobody_predicts_count():
    """The squares of their probabilities, 1e-22 and less, underflow in float32."""
    student, teacher, _ = random_case(6, torch.float64, spread=1.0)
    student[:, 0] -= 200.0
    teacher[:, 0] -= 200.0
    exact = correlation(student.log_softmax(1), teacher.log_softmax(1), 0)
    in_float32 = correlation(student.float().log_softmax(1), teacher.float().log_softmax(1), 0)
    torch.testing.assert_close(in_float32.double(), exact, rtol=1e-3, atol=1e-3)
    assert exact[0].abs() > 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_constant_student_has_neither_correlation_nor_gradient(dtype: torch.dtype):
    _, teacher, target = random_case(6, dtype)
    for name in ("dist, inter-class", "dist, intra-class"):
        value, gradient = value_and_gradient(LOGIT_LOSSES[name], torch.full_like(teacher, 0.3), teacher, target)
        assert value == TEMPERATURE**2
        assert (gradient == 0).all()
