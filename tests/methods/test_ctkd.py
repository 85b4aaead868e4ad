"""Curriculum temperature: the student descends, the temperature ascends by the curriculum."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from src.methods.ctkd import ctkd_loss, curriculum, reverse_gradient
from src.methods.kd import kd_loss
from tests.helpers.logit_losses import TEMPERATURE, kd
from tests.helpers.losses import observed, random_case, three_logits
from tests.helpers.methods import configured, on_ten_classes
from tests.helpers.tiny import same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

on_both_kinds = pytest.mark.parametrize("instance", [False, True])


def ctkd(**options: Any) -> Any:
    """CTKD for the ten classes of `three_logits`."""
    return on_ten_classes("ctkd", **options)


def test_published_weights():
    assert configured("ctkd").weights(0) == configured("ctkd").weights(239) == {"cross_entropy": 0.1, "kd": 0.9}
    assert configured("ctkd", "resnet34_to_resnet18").weights(0) == {"cross_entropy": 1.0, "kd": 1.0}
    assert configured("ctkd", epochs=240).curriculum_epochs == 10
    assert configured("ctkd", epochs=120).curriculum_epochs == 5


@pytest.mark.parametrize("epochs", [10, 5])
def test_the_curriculum_is_that_of_the_released_code(epochs: int):
    """There the factor of the gradient falls from 0 to -1 with epochs counted from 1."""
    for epoch in range(20):
        factor = (math.cos(min(epoch + 1, epochs) * math.pi / epochs) + 1) / 2 * (0 - -1) + -1
        assert curriculum(epoch, epochs) == pytest.approx(-factor)
    assert curriculum(0, 10) == pytest.approx(0.0245, abs=1e-4)
    assert curriculum(0, 0) == 1


def test_a_reversed_gradient_leaves_the_value():
    value = torch.tensor(3.0, requires_grad=True)
    reversed_value = reverse_gradient(value, 0.25)
    assert reversed_value == 3
    assert torch.autograd.grad(reversed_value, value)[0] == -0.25


def test_the_temperature_has_the_gradient_of_the_loss():
    student, teacher, target = random_case(6, torch.float64)
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ctkd_loss(student, teacher, temperature), temperature)
    rows = (student.tolist(), student.tolist(), teacher.tolist(), target.tolist())
    quotient = (kd(*rows, TEMPERATURE + 1e-5) - kd(*rows, TEMPERATURE - 1e-5)) / 2e-5
    assert gradient.item() == pytest.approx(quotient, rel=1e-6)


def test_each_sample_may_have_its_own_temperature():
    student, teacher, _ = random_case(6, torch.float64)
    temperatures = torch.linspace(1, 20, len(student), dtype=torch.float64)
    singly = zip(student.split(1), teacher.split(1), temperatures.tolist(), strict=True)
    wanted = torch.stack([kd_loss(u, v, temperature) for u, v, temperature in singly]).mean()
    torch.testing.assert_close(ctkd_loss(student, teacher, temperatures), wanted)


@on_both_kinds
def test_the_temperature_starts_where_the_released_code_does(instance: bool):
    _, distilled, teacher, _ = three_logits(torch.float32)
    temperature = ctkd(instance=instance).temperature(distilled, teacher, 1.0)
    assert temperature.shape == ((len(teacher),) if instance else ())
    torch.testing.assert_close(temperature, torch.full_like(temperature, 1 + 20 / (1 + math.exp(-1))))


@on_both_kinds
@pytest.mark.parametrize("theta", [1.0, -3.0])
def test_the_temperature_ascends(instance: bool, theta: float):
    """A step of descent on the method's own parameters raises the loss, one on the student's logits lowers it."""
    made = ctkd(instance=instance, theta=theta)
    own, distilled, teacher, target = three_logits(torch.float32)
    batch, logits = observed(distilled, teacher, target, own=own)
    loss, parameters = made.all_terms(batch, logits)["kd"], list(made.parameters())
    of_student, *gradients = torch.autograd.grad(loss, [distilled, *parameters])
    slope = torch.stack([gradient.abs().sum() for gradient in gradients]).sum()
    assert slope > 0
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(1e-2 / slope * gradient)
        ascended = made.all_terms(batch, logits)["kd"]
        descended = made.all_terms(*observed(distilled - 1e-2 * of_student, teacher, target, own=own))["kd"]
    assert ascended > loss
    assert descended < ascended


def test_the_ascent_grows_with_the_curriculum():
    own, distilled, teacher, target = three_logits()
    gradients = []
    for epoch in (0, 4, 9, 100):
        made = ctkd().double()
        loss = made.all_terms(*observed(distilled, teacher, target, own=own, epoch=epoch))["kd"]
        gradients.append(torch.autograd.grad(loss, made.theta)[0].item())
    wanted = [gradients[-1] * curriculum(epoch, 10) for epoch in (0, 4, 9, 100)]
    assert gradients == pytest.approx(wanted)


def test_the_student_does_not_learn_through_the_temperature():
    """Instance-wise, its gradient is that of KD at the temperatures that the perceptron gives."""
    made = ctkd(instance=True).double()
    torch.nn.init.normal_(made.perceptron[-1].weight)
    own, distilled, teacher, target = three_logits()
    loss = made.all_terms(*observed(distilled, teacher, target, own=own))["kd"]
    (gradient,) = torch.autograd.grad(loss, distilled)
    temperatures = made.temperature(distilled, teacher, 1.0).detach()
    assert temperatures.std() > 0
    (wanted,) = torch.autograd.grad(ctkd_loss(distilled, teacher, temperatures), distilled)
    torch.testing.assert_close(gradient, wanted)


@on_both_kinds
def test_the_temperature_survives_a_checkpoint(instance: bool, tmp_path: Path):
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(data, configured("ctkd", instance=instance), teacher=tiny_teacher())
    fresh = weights(distiller.method)
    tiny_trainer(1, limit_train_batches=2, limit_val_batches=0).fit(distiller, datamodule=data)
    learned = weights(distiller.method)
    assert fresh
    assert not same(fresh, learned)
    loaded = tiny_distiller(data, configured("ctkd", instance=instance), teacher=tiny_teacher())
    loaded.load_state_dict(distiller.state_dict())
    assert same(weights(loaded.method), learned)
