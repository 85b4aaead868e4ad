"""compile=true trains the same student, in compiled kernels."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from src.methods.fitnet import FitNet
from src.methods.method import (
    Batch,
    DistillationLogits,
    LogitMethod,
    LogitPair,
    Method,
    View,
    WithoutPreactivations,
    logits_only,
    weighted,
)
from src.training.acceleration import compiled_terms
from src.training.gradient_anatomy import anatomy
from tests.helpers.methods import LOGIT_METHODS, STEPS, made_for_steps, networks_of
from tests.helpers.tiny import kd, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


@pytest.mark.slow
@pytest.mark.parametrize("method", [kd(), FitNet(cross_entropy_weight=1.0, hint_weight=1.0, hint_layer=1)])
def test_a_compiled_student_learns_the_same_and_is_saved_under_the_same_names(tmp_path: Path, method: Method) -> None:
    data = tiny_data(tmp_path, batch_size=40)  # more steps would multiply the rounding
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (
        tiny_distiller(data, copy.deepcopy(method), teacher=tiny_teacher(), compiled=compiled)
        for compiled in (False, True)
    )
    assert compiled.teacher is not None
    compiled.teacher.compile()
    for distiller in (plain, compiled):
        assert not counters["stats"]["unique_graphs"]
        tiny_trainer(1).fit(distiller, datamodule=data)
    # The student, the terms, and the features of the teacher see batches of 40 and 4. Its logits see batches of 16.
    assert counters["stats"]["unique_graphs"] == (5 if method.distils_logits else 4)
    expected, found = weights(plain), weights(compiled)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def observed(method: Method) -> tuple[Tensor, Batch, DistillationLogits]:
    """Make logits with a history, as behind a serialization layer, and the batch of a method on them."""
    generator = torch.Generator().manual_seed(0)
    own, teacher = (torch.randn(8, 4, generator=generator) for _ in range(2))
    own.requires_grad_()
    images = torch.rand(8, 3, 16, 16, generator=generator)
    view = View(images, logits_only(own), logits_only(teacher))
    pair = LogitPair(1.5 * own, teacher)
    batch = Batch((view,) * method.views_per_image, torch.arange(8) % 4, torch.arange(8), epoch=3, step=7)
    return own, batch, DistillationLogits((pair,) * method.views_per_image)


@pytest.mark.parametrize(
    "case",
    [
        case if case == "aekt" else pytest.param(case, marks=pytest.mark.slow)
        for case in STEPS
        if case.split(",")[0] in LOGIT_METHODS
    ],
)
def test_compiled_terms_have_the_same_values_gradients_and_anatomy(case: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    method = made_for_steps(case)
    method.allocate(networks_of())
    method.eval()  # the peer of DML must not change its statistics between the two
    found: list[Any] = []
    for all_terms in (method.all_terms, compiled_terms(method)):
        own, batch, logits = observed(method)
        terms = weighted(all_terms(batch, logits), dict.fromkeys(all_terms(batch, logits), 1.0))
        rows = anatomy(terms, batch, logits, 4.0)
        torch.stack(list(terms.values())).sum().backward()
        found.append((terms, own.grad, rows))
    assert bool(counters["stats"]["unique_graphs"]) == method.can_be_compiled
    (terms, gradient, rows), (compiled, compiled_gradient, compiled_rows) = found
    assert compiled.keys() == terms.keys()
    torch.testing.assert_close(list(compiled.values()), list(terms.values()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-4, atol=1e-6)
    assert compiled_rows.keys() == rows.keys()
    assert list(compiled_rows.values()) == pytest.approx(list(rows.values()), rel=1e-4, abs=1e-6)


class PullsFeatures(LogitMethod):
    """A method with a term on logits and one on features."""

    needs_features = True

    def weights(self, epoch: int) -> dict[str, float]:
        return {"cross_entropy": 1.0, "kd": 1.0, "features": 1.0}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        difference = batch.student.pooled - batch.teacher.pooled
        return {"kd": logits.student.square().mean(), "features": difference.square().mean()}


def test_compiled_terms_read_the_features_that_the_method_asks_for() -> None:
    torch._dynamo.reset()
    method = PullsFeatures()
    _, batch, logits = observed(method)
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        WithoutPreactivations(each.logits, (), torch.randn(8, 16, generator=generator))
        for each in (batch.student, batch.teacher)
    )
    batch = dataclasses.replace(batch, views=(batch.views[0]._replace(student=student, teacher=teacher),))
    expected, found = method.all_terms(batch, logits), compiled_terms(method)(batch, logits)
    torch.testing.assert_close(dict(found), dict(expected))


def test_a_method_on_features_is_not_compiled() -> None:
    method = FitNet(cross_entropy_weight=1.0, hint_weight=1.0, hint_layer=1)
    assert compiled_terms(method) == method.all_terms


@pytest.mark.slow
def test_terms_are_compiled_once_for_all_epochs_and_steps() -> None:
    torch._dynamo.reset()
    counters.clear()
    method = made_for_steps("dkd")
    all_terms = compiled_terms(method)
    for step in range(4):
        _, batch, logits = observed(method)
        all_terms(dataclasses.replace(batch, epoch=step, step=step), logits)
    assert counters["stats"]["unique_graphs"] == 1
