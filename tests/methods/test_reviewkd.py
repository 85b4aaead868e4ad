"""ReviewKD: its context loss and its fusions against a second statement, and which features it reads."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.methods.reviewkd import Fusion, context_loss
from src.models.resnet import resnet8
from tests.helpers import feature_statements as stated
from tests.helpers.features import drawn
from tests.helpers.methods import changed_batch, configured, networks_of, taught_by
from tests.helpers.tiny import CLASSES, weights


def test_published_weights_and_warm_up():
    made = configured("reviewkd", "resnet32x4_to_shufflev2")
    assert made.weights(0) == {"cross_entropy": 1.0, "review": 8.0 / 20}
    assert made.weights(19) == made.weights(239) == {"cross_entropy": 1.0, "review": 8.0}


@pytest.mark.parametrize(("pair", "weight"), [("wrn40_2_to_wrn16_2", 5.0), ("resnet34_to_resnet18", 1.0)])
def test_published_weights_of_other_pairs(pair: str, weight: float):
    made = configured("reviewkd", pair)
    assert made.weights(100) == {"cross_entropy": 1.0, "review": weight}
    assert made.needs_features
    assert made.needs_teacher
    assert not made.distils_logits


@pytest.mark.parametrize("size", [8, 4, 2, 1])
def test_the_context_loss_is_the_stated_one(size: int):
    student, teacher = drawn((2, 3, size, size), 1), drawn((2, 3, size, size), 2)
    wanted = stated.context([student.tolist()], [teacher.tolist()])
    assert context_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(context_loss, (student.requires_grad_(), teacher))
    assert context_loss(teacher, teacher) == 0


def standardised(x: Tensor) -> Tensor:
    """Batch norm with its first parameters, of float64 [B, channels, height, width]."""
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / ((x - mean).square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def enlarged(x: Tensor, size: int) -> Tensor:
    """The nearest pixel of square maps."""
    nearest = [i * x.shape[2] // size for i in range(size)]
    return x[:, :, nearest][:, :, :, nearest]


def stated_fusion(fusion: Fusion, student: Tensor, below: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    state = weights(fusion)
    x = standardised(torch.einsum("oc,bchw->bohw", state["reduce.0.weight"].flatten(1), student))
    if below is not None:
        y = enlarged(below, x.shape[2])
        kernel, bias = state["attention.0.weight"].flatten(1), state["attention.0.bias"]
        logits = torch.einsum("oc,bchw->bohw", kernel, torch.cat([x, y], dim=1)) + bias.view(1, 2, 1, 1)
        first, second = (1 / (1 + torch.exp(-logits[:, i : i + 1])) for i in range(2))
        x = first * x + second * y
    x = enlarged(x, size)
    framed = torch.zeros(*x.shape[:2], size + 2, size + 2, dtype=x.dtype)
    framed[:, :, 1:-1, 1:-1] = x
    kernel = state["expand.0.weight"]
    out = torch.zeros(len(x), len(kernel), size, size, dtype=x.dtype)
    for i, j in itertools.product(range(3), range(3)):
        out += torch.einsum("oc,bchw->bohw", kernel[:, :, i, j], framed[:, :, i : i + size, j : j + size])
    return standardised(out), x


def test_levels_are_fused_from_the_deepest_up():
    method = configured("reviewkd")
    ours, theirs = [(2, 4), (3, 4), (5, 1)], [(3, 8), (4, 2), (6, 1)]  # channels and pixels of each level
    torch.manual_seed(0)
    method.fusions = nn.ModuleList(
        Fusion(s[0], 4, t[0], fuses=s[1] > 1) for s, t in zip(ours, theirs, strict=True)
    ).double()
    levels = [
        (drawn((3, s[0], s[1], s[1]), i), drawn((3, t[0], t[1], t[1]), 9 + i))
        for i, (s, t) in enumerate(zip(ours, theirs, strict=True))
    ]
    below, total = None, 0.0
    for fusion, (student, teacher) in reversed(list(zip(method.fusions, levels, strict=True))):
        compared, below = stated_fusion(fusion, student, below, teacher.shape[2])
        total += stated.context([compared.tolist()], [teacher.tolist()])
    assert method.review(levels).item() == pytest.approx(total, rel=1e-10)


def test_one_sample_has_the_loss_of_two_copies_of_it():
    torch.manual_seed(0)
    networks, made = networks_of(student=resnet8(CLASSES)), []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(configured("reviewkd"))
        made[-1].allocate(networks)
    one, two = (
        changed_batch(networks.student, taught_by(), change) for change in (lambda x: x[:1], lambda x: x[[0, 0]])
    )
    torch.testing.assert_close(made[0].terms(one)["review"], made[1].terms(two)["review"])


@pytest.mark.parametrize("before_relu", [False, True])
def test_the_teacher_is_read_before_its_relu_and_the_student_as_configured(before_relu: bool):
    torch.manual_seed(0)
    student, made = resnet8(CLASSES), configured("reviewkd", student_preactivations=before_relu)
    made.allocate(networks_of(student=student))
    batch = changed_batch(student, taught_by())
    before, after = batch.student.preactivations, batch.student.features
    leaves = [x.requires_grad_() for x in (*before, *after)]
    value = made.terms(batch)["review"]
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    read = [gradient is not None for gradient in gradients]
    stages = [False, True, True, True]
    assert read == (stages + [False] * 4 if before_relu else [False] * 4 + stages)
    (view,) = batch.views
    assert view.teacher is not None
    for changed, matters in (("features", False), ("preactivations", True)):
        changes: dict[str, Any] = {changed: tuple(2 * x for x in getattr(view.teacher, changed))}
        other = view._replace(teacher=view.teacher._replace(**changes))
        assert torch.equal(made.terms(dataclasses.replace(batch, views=(other,)))["review"], value) != matters
