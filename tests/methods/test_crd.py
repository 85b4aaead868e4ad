"""Contrastive distillation: steps with a memory against a second statement, and the negatives that it draws."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.methods.crd import CRD, contrast_loss, draw_negatives
from src.methods.method import Batch, View
from src.models.network import Output, Shapes
from tests.helpers.features import direction, dot, drawn
from tests.helpers.methods import assert_published_weights, configured
from tests.helpers.tiny import (
    by_threads,
    tiny_data,
    tiny_distiller,
    tiny_teacher,
    tiny_trainer,
    weights,
    without_batch_norm,
)

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, -1, 0, 1, 2])
"""One image is held out, and each of the others has 6 negatives."""
STUDENT, TEACHER = Shapes(3, ((2, 4, 4),), 5), Shapes(3, ((3, 4, 4),), 7)


def crd(labels: Tensor = LABELS, **options: Any) -> CRD:
    torch.manual_seed(0)
    made = configured("crd", **{"negatives": 6, **options})
    networks: Any = SimpleNamespace(student_shapes=STUDENT, teacher_shapes=TEACHER, train_labels=labels)
    made.allocate(networks)
    return made


def pooled_batch(student: Tensor, teacher: Tensor, index: list[int]) -> Batch:
    outputs = [Output(drawn((len(x), 3), 9), (), x) for x in (student, teacher)]
    positions = torch.tensor(index)
    return Batch((View(torch.zeros(len(index), 3, 4, 4), *outputs),), LABELS[positions], positions, epoch=0, step=0)


def test_published_weights():
    assert_published_weights(configured("crd", "wrn40_2_to_wrn16_2"), cross_entropy=1.0, contrast=0.8)


class Stated:
    """RepDistiller's form with M and Z in it, on lists of floats, against all images of other classes."""

    def __init__(self, method: CRD) -> None:
        self.student, self.teacher = method.student_memory.tolist(), method.teacher_memory.tolist()
        self.z: list[float] = []

    def __call__(self, student: list[list[float]], teacher: list[list[float]], index: list[int]) -> float:
        labels, total, count = LABELS.tolist(), 0.0, len(LABELS)
        for side, (anchors, memory) in enumerate(((student, self.teacher), (teacher, self.student))):
            rows = []
            for anchor, i in zip(anchors, index, strict=True):
                negatives = [j for j in range(count) if labels[j] not in (-1, labels[i])]
                rows.append([math.exp(dot(direction(anchor), memory[j]) / 0.07) for j in [i, *negatives]])
            if len(self.z) == side:
                self.z.append(count * math.fsum(x for row in rows for x in row) / sum(map(len, rows)))
            for row in rows:
                positive, *negative = [x / self.z[side] for x in row]
                noise = len(negative) / count
                total -= math.log(positive / (positive + noise))
                total -= math.fsum(math.log(noise / (x + noise)) for x in negative)
        self.remember(student, teacher, index)
        return total / len(index)

    def remember(self, student: list[list[float]], teacher: list[list[float]], index: list[int]) -> None:
        for memory, embeddings in ((self.student, student), (self.teacher, teacher)):
            for i, embedding in zip(index, embeddings, strict=True):
                both = zip(memory[i], direction(embedding), strict=True)
                memory[i] = direction([0.5 * a + 0.5 * b for a, b in both])


def test_three_steps_are_the_stated_ones():
    method = crd().double()
    stated = Stated(method)
    for step, index in enumerate([[0, 1, 2, 3], [9, 5, 4], [3, 0, 8, 7]]):
        student, teacher = drawn((len(index), 5), step), drawn((len(index), 7), 10 + step)
        embedded = method.student_embedding(student).tolist(), method.teacher_embedding(teacher).tolist()
        value = method.terms(pooled_batch(student, teacher, index))["contrast"]
        assert value.item() == pytest.approx(stated(*embedded, index), rel=1e-12)
        assert value > 0
    torch.testing.assert_close(method.student_memory, torch.tensor(stated.student, dtype=torch.float64))
    torch.testing.assert_close(method.teacher_memory, torch.tensor(stated.teacher, dtype=torch.float64))


def test_the_gradient_is_that_of_the_value():
    method = crd().double()
    method.terms(pooled_batch(drawn((2, 5), 1), drawn((2, 7), 2), [0, 1]))
    state = weights(method)
    inputs = (drawn((4, 5), 3).requires_grad_(), *(p.detach().requires_grad_() for p in method.parameters()))

    def loss(student: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(method.named_parameters()), parameters, strict=True))
        batch = pooled_batch(student, drawn((4, 7), 4), [0, 1, 2, 3])
        return torch.func.functional_call(method, {**state, **named}, (batch,))["contrast"]

    method.forward = method.terms
    assert torch.autograd.gradcheck(loss, inputs)


def test_without_knowledge_the_loss_is_that_of_coin_tosses():
    scores = torch.zeros(2, 1 + 4)
    wanted = -math.log(1 / (1 + 4)) - 4 * math.log(4 / (1 + 4))
    assert contrast_loss(scores, torch.zeros(())).item() == pytest.approx(wanted)


@pytest.mark.parametrize("score", [1e4, -1e4, 1 / 0.07])
def test_contrast_is_finite_and_precise_if_the_critic_is_certain(score: float):
    scores = torch.tensor([[score, -score, -score]], requires_grad=True)
    value = contrast_loss(scores, torch.zeros(()))
    (gradient,) = torch.autograd.grad(value, scores)
    exact = contrast_loss(scores.detach().double(), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    assert torch.isfinite(gradient).all()


def test_negatives_are_training_images_of_other_classes_and_none_is_drawn_twice():
    torch.manual_seed(0)
    target = torch.arange(3).repeat(200)
    negatives = draw_negatives(LABELS, target, 4)
    labels = LABELS[negatives]
    assert negatives.shape == (600, 4)
    assert not (labels == target[:, None]).any()
    assert not (labels == -1).any()
    assert all(len(row.unique()) == 4 for row in negatives)
    seen = torch.stack([(negatives[target == 0] == i).sum() for i in range(len(LABELS))])
    expected = 200 * 4 / 6  # six images are of other classes; the deviation of such a count is 6.7
    assert (seen[(LABELS > 0)] - expected).abs().max() < 30
    torch.manual_seed(0)
    assert torch.equal(draw_negatives(LABELS, target, 4), negatives)
    assert not torch.equal(draw_negatives(LABELS, target, 4), negatives)


def test_negatives_repeat_if_there_are_too_few():
    torch.manual_seed(0)
    negatives = draw_negatives(LABELS, torch.tensor([0, 1]), 50)
    for target, row in enumerate(negatives):
        assert sorted(row.unique()) == [i for i, label in enumerate(LABELS) if label not in (-1, target)]


def test_memories_change_only_for_the_images_of_the_batch():
    method = crd(momentum=0.0)
    before = weights(method)
    student, teacher = drawn((2, 5), 1, torch.float32), drawn((2, 7), 2, torch.float32)
    method.terms(pooled_batch(student, teacher, [4, 0]))
    for name, features in (("student", student), ("teacher", teacher)):
        memory = weights(method)[f"{name}_memory"]
        embedding = getattr(method, f"{name}_embedding")(features)
        torch.testing.assert_close(memory[[4, 0]], nn.functional.normalize(embedding.detach()))
        others = [i for i in range(10) if i not in (4, 0)]
        assert torch.equal(memory[others], before[f"{name}_memory"][others])


@pytest.mark.parametrize("labels", [[0, 0, -1], [-1, -1, -1]])
def test_images_of_one_class_are_refused(labels: list[int]):
    with pytest.raises(UserError, match=r"^method=crd contrasts images of different classes"):
        crd(torch.tensor(labels))


@pytest.mark.slow
def test_two_processes_remember_as_one_does(tmp_path: Path):
    with by_threads(1):  # OpenMP's threads do not survive a fork
        states = []
        for options in ({}, {"devices": 2, "strategy": "ddp_fork"}):
            data = tiny_data(tmp_path)
            distiller = tiny_distiller(data, configured("crd", negatives=33), teacher=tiny_teacher())  # all there are
            without_batch_norm(distiller.student)
            tiny_trainer(1, **options).fit(distiller, datamodule=data)
            states.append(weights(distiller.method))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-4, rtol=1e-4, msg=name)
