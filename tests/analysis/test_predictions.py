"""Predictions of a student for the test images, and the cost of one image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from src.analysis.predictions import Predictions, count_macs, predict, student_and_teacher_macs
from src.data.array_data import ArrayData
from src.methods.vanilla import Vanilla
from src.training.distiller import Distiller
from tests.helpers.tiny import CLASSES, kd, tiny_data, tiny_distiller, tiny_teacher


@pytest.fixture
def data(tmp_path: Path) -> ArrayData:
    return tiny_data(tmp_path)


@pytest.fixture
def distiller(data: ArrayData) -> Distiller:
    return tiny_distiller(data, Vanilla())


def test_the_first_of_the_likeliest_classes_is_the_prediction() -> None:
    said = Predictions(np.array([[2, 0], [1, 2]]), np.array([[0.7, 0.2], [0.5, 0.4]]), np.array([2, 2]))
    assert said.predicted.tolist() == [2, 1]
    assert said.confidence.tolist() == [0.7, 0.5]
    assert said.correct.tolist() == [True, False]


def test_all_test_images_are_predicted_in_order(data: ArrayData, distiller: Distiller) -> None:
    said = predict(distiller, data)
    size = data.split_size("test")
    distiller.eval()
    with torch.no_grad():
        expected = distiller.predict_logits(data.test_images(list(range(size)))).softmax(dim=1).numpy()
    assert said.classes.shape == said.probabilities.shape == (size, 3)
    np.testing.assert_array_equal(said.predicted, expected.argmax(axis=1))
    np.testing.assert_allclose(said.probabilities, -np.sort(-expected, axis=1)[:, :3], rtol=1e-5)
    np.testing.assert_array_equal(said.target, np.arange(size) % CLASSES)


def test_prediction_does_not_change_batch_norm(data: ArrayData, distiller: Distiller) -> None:
    distiller.train()
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    predict(distiller, data)
    assert all(torch.equal(before[name], value) for name, value in distiller.state_dict().items())
    assert not distiller.training


def test_no_more_classes_are_kept_than_there_are(data: ArrayData, distiller: Distiller) -> None:
    said = predict(distiller, data, likeliest=99)
    assert said.classes.shape == (data.split_size("test"), CLASSES)
    np.testing.assert_allclose(said.probabilities.sum(axis=1), 1, rtol=1e-5)


def test_the_number_of_batches_can_be_limited(data: ArrayData, distiller: Distiller) -> None:
    first = len(next(iter(data.evaluation_loader("test"))).target)
    assert len(predict(distiller, data, batches=1).target) == min(first, data.split_size("test"))


def test_a_multiply_accumulate_counts_once() -> None:
    image = torch.zeros(1, 3, 8, 8)
    convolution = nn.Conv2d(3, 5, kernel_size=3, padding=1, bias=False)
    assert count_macs(convolution, image) == 5 * 3 * 3 * 3 * 8 * 8
    assert count_macs(nn.Sequential(nn.Flatten(), nn.Linear(192, 7, bias=False)), image) == 192 * 7


def test_attention_is_counted() -> None:
    tokens, width = 10, 8
    attention = nn.MultiheadAttention(width, 2, bias=False, batch_first=True).eval()
    macs = count_macs(lambda x: attention(x, x, x, need_weights=False)[0], torch.zeros(1, tokens, width))
    assert macs == 4 * tokens * width**2 + 2 * tokens**2 * width
    assert torch.backends.mha.get_fastpath_enabled()


def test_student_and_teacher_have_costs_of_their_own(data: ArrayData) -> None:
    image = data.test_images([0])
    alone = tiny_distiller(data, Vanilla())
    student = count_macs(alone.eval().predict_logits, image)
    assert student_and_teacher_macs(alone, data) == (student, None)
    teacher = tiny_teacher()
    taught = tiny_distiller(data, kd(), teacher=teacher)
    assert student_and_teacher_macs(taught, data) == (student, count_macs(teacher.logits, image))
