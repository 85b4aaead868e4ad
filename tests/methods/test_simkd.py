"""SimKD: the projected map against a second statement, and the predictor with the teacher's classifier."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.data.views import normalise
from src.models.checkpoints import read_facts
from src.models.resnet import resnet8, resnet14
from src.models.slimnet import slimnet_300k
from src.models.vgg import vgg8
from src.models.wide_resnet import wrn_16_1
from tests.helpers.commands import run
from tests.helpers.features import drawn, mean_square, smaller
from tests.helpers.interruption import SMALL, write_sources
from tests.helpers.maps import batch_of_maps
from tests.helpers.methods import NewNetwork, assert_published_weights, configured, networks_of, some_images
from tests.helpers.tiny import (
    CLASSES,
    MEAN,
    STD,
    by_threads,
    same,
    tiny_data,
    tiny_distiller,
    tiny_teacher,
    tiny_trainer,
    weights,
)


def test_published_weights():
    assert_published_weights(configured("simkd", "resnet32x4_to_resnet8x4"), feature=1.0)


@pytest.mark.parametrize(("student", "teacher"), [(4, 4), (4, 2), (2, 4)])
def test_the_projected_map_is_compared_at_the_smaller_resolution(student: int, teacher: int):
    method = configured("simkd")
    method.size, method.projector = (min(student, teacher),) * 2, nn.Conv2d(2, 3, 1, bias=False).double()
    ours, theirs = drawn((2, 2, student, student), 1), drawn((2, 3, teacher, teacher), 2)
    kernel = method.projector.weight.flatten(1).tolist()
    pixels = range(method.size[0])
    projected = [
        [
            [[math.fsum(w * c[i][j] for w, c in zip(row, x, strict=True)) for j in pixels] for i in pixels]
            for row in kernel
        ]
        for x in smaller(ours.tolist(), len(pixels))
    ]
    value = method.terms(batch_of_maps(ours, theirs))["feature"]
    assert value.item() == pytest.approx(mean_square(projected, smaller(theirs.tolist(), len(pixels))), rel=1e-12)


class ConstantMap(nn.Module):
    """Returns the same map for every input."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _: Tensor) -> Tensor:
        return self.answer


@pytest.mark.parametrize("new_teacher", [resnet14, wrn_16_1, vgg8, slimnet_300k], ids=lambda make: make.__name__)
def test_a_perfect_projector_answers_as_the_teacher_does(new_teacher: NewNetwork):
    networks, method = networks_of(new_teacher, student=resnet8(CLASSES).eval()), configured("simkd")
    method.allocate(networks)
    images = some_images()
    answer = networks.required_teacher(images)
    assert answer.unpooled is not None
    method.projector = ConstantMap(answer.unpooled)
    predictor = method.predictor(networks.student)
    torch.testing.assert_close(predictor(normalise(images, MEAN, STD)), answer.logits)
    assert set(dict(predictor.named_children())) == {"student", "projector", "classifier"}


def test_the_predictor_is_scored_and_both_classifiers_are_not_trained(tmp_path: Path):
    data, method, teacher = tiny_data(tmp_path), configured("simkd"), tiny_teacher()
    distiller = tiny_distiller(data, method, teacher=teacher)
    before = weights(distiller.student.classifier_layer)
    trainer = tiny_trainer(1)
    trainer.fit(distiller, datamodule=data)
    assert same(before, weights(distiller.student.classifier_layer))
    assert same(weights(method.classifier), weights(teacher.network.classifier_layer))
    images, predictor = data.arrays.test_images, method.predictor(distiller.student).eval()
    with torch.no_grad():
        logits = predictor(normalise(images, MEAN, STD))
    accuracy = (logits.argmax(dim=1) == data.arrays.test_labels).float().mean()
    assert float(trainer.callback_metrics["test/accuracy"]) == pytest.approx(float(accuracy))
    distiller.student.classifier_layer.weight.data.fill_(float("nan"))
    torch.testing.assert_close(distiller.eval().predict_logits(images), logits)


@pytest.mark.slow
def test_it_trains_on_two_processes(tmp_path: Path):
    with by_threads(1):
        distiller = tiny_distiller(tiny_data(tmp_path), configured("simkd"), teacher=tiny_teacher())
        trainer = tiny_trainer(1, devices=2, strategy="ddp_fork")
        trainer.fit(distiller, datamodule=tiny_data(tmp_path))
    assert torch.isfinite(trainer.callback_metrics["train/loss_epoch"])


def test_its_student_alone_is_marked(tmp_path: Path):
    options = (*SMALL, *write_sources(tmp_path), "method=simkd", "schedule.epochs=1", "logger=none")
    ran = run("train", *options, f"runs={tmp_path / 'runs'}")
    assert ran.code == 0, ran.err
    (file,) = tmp_path.rglob("student.pth")
    assert read_facts(file)["classifies"] is False
