"""Every loss on logits against an independent statement of its formula, and which logits every method reads."""

from typing import Any

import pytest
import torch

from tests.helpers.logit_losses import LOGIT_LOSSES, LogitLoss, difference_quotients, value_and_gradient
from tests.helpers.losses import PRECISIONS, extreme_pairs, observed, random_case, three_logits
from tests.helpers.methods import LOGIT_METHODS, method_of, on_ten_classes

CASES: dict[str, dict[str, Any]] = {name: {} for name in LOGIT_METHODS} | {"ctkd, instance": {"instance": True}}
WITHOUT_TEACHER = {"tfkd", "dml"}

every_loss = pytest.mark.parametrize("loss", LOGIT_LOSSES.values(), ids=LOGIT_LOSSES)
every_method = pytest.mark.parametrize("case", CASES)


# The losses


@every_loss
@pytest.mark.parametrize("classes", [3, 7])
def test_value_and_gradient_match_the_statement(loss: LogitLoss, classes: int):
    student, teacher, target = random_case(classes, torch.float64, batch=5)
    wanted = loss.statement(student.tolist(), student.tolist(), teacher.tolist(), target.tolist())
    value, gradient = value_and_gradient(loss, student, teacher, target)
    assert value.item() == pytest.approx(wanted, rel=1e-12, abs=1e-13)
    quotients = difference_quotients(loss, student, teacher, target)
    torch.testing.assert_close(gradient, quotients, rtol=1e-6, atol=1e-8)
    assert gradient.abs().max() > 1e-3

    in_float32, gradient_in_float32 = value_and_gradient(loss, student.float(), teacher.float(), target)
    assert in_float32.item() == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(gradient_in_float32.double(), gradient, rtol=1e-4, atol=1e-5)


@every_loss
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_extreme_logits_give_finite_losses_and_gradients(loss: LogitLoss, dtype: torch.dtype):
    """Each student meets each teacher, in one batch, and in one batch for each student."""
    student, teacher, target = extreme_pairs(dtype)
    size = int(len(student) ** 0.5)
    singly = zip(student.split(size), teacher.split(size), target.split(size), strict=True)
    for batch in ((student, teacher, target), *singly):
        value, gradient = value_and_gradient(loss, *batch)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_losses_of_half_precision_logits_are_computed_in_float32(loss: LogitLoss, dtype: torch.dtype):
    student, teacher, target = random_case(10, dtype)
    value, gradient = value_and_gradient(loss, student, teacher, target)
    wanted, gradient_in_float32 = value_and_gradient(loss, student.float(), teacher.float(), target)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(value, wanted)
    assert torch.equal(gradient, gradient_in_float32.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.implementation(student, teacher, target), value)


# The methods


@every_method
def test_terms_read_their_own_logits(case: str):
    """Cross-entropy reads the student's own logits, every other term those for distillation, in the first view.

    The terms of a peer read neither.
    """
    own, distilled, teacher, target = three_logits()
    made = on_ten_classes(method_of(case), **CASES[case]).double()
    terms = made.all_terms(*observed(distilled, teacher, target, own=own, views=2))
    assert set(terms) == set(made.weights(0))
    assert len(terms) > 1
    for name, term in terms.items():
        of_own, of_distilled = torch.autograd.grad(term, (own, distilled), retain_graph=True, allow_unused=True)
        if name.startswith("peer_"):
            assert of_own is None
            assert of_distilled is None
            continue
        read, unread = (of_own, of_distilled) if name == "cross_entropy" else (of_distilled, of_own)
        assert read.abs().sum() > 0
        assert unread is None


@every_method
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_terms_are_float32_scalars_in_every_precision_of_the_network(case: str, dtype: torch.dtype):
    own, distilled, teacher, target = three_logits(dtype)
    made = on_ten_classes(method_of(case), **CASES[case])
    for name, term in made.all_terms(*observed(distilled, teacher, target, own=own)).items():
        assert term.dtype == torch.float32, name
        assert term.shape == (), name


@every_method
def test_methods_on_logits_ask_for_nothing_but_logits(case: str):
    made = on_ten_classes(method_of(case), **CASES[case])
    assert made.needs_teacher == (case not in WITHOUT_TEACHER)
    assert made.distils_logits
    assert not made.needs_features
    assert not made.needs_preactivations
    assert made.views_per_image == 1
