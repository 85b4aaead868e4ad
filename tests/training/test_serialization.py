"""A serialization layer starts as plain distillation, fits the student's sizes, and passes gradients on."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from src.methods.kd import KD, kd_loss
from src.models.network import Network, Output
from src.models.resnet import resnet8
from src.training.serialization import NoSerialization, Parallel, Serial, Serialization, relations_of_classes
from tests.helpers import tiny
from tests.helpers.tiny import tiny_data, tiny_distiller, tiny_teacher, tiny_trainer

CLASSES, POOLED = 7, 3


class ColourNetwork(Network):
    """A network that classifies by the mean of each colour: three pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(POOLED, CLASSES)

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.fc

    def forward_features(self, images: Tensor) -> Output:
        pooled = images.mean(dim=(2, 3))
        return Output(self.fc(pooled), (images,), pooled)


@pytest.fixture
def student() -> ColourNetwork:
    torch.manual_seed(0)
    return ColourNetwork()


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.cat([torch.randn(4, CLASSES, generator=generator), 1e4 * torch.randn(2, CLASSES, generator=generator)])


def allocated(serialization: Serialization, student: Network) -> Serialization:
    serialization.allocate(student)
    return serialization


def test_none_passes_the_logits_through(student: ColourNetwork, logits: Tensor) -> None:
    serialization = allocated(NoSerialization(), student)
    assert serialization(logits, None) is logits
    assert list(serialization.parameters()) == []


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_serial_starts_as_the_identity(
    student: ColourNetwork, logits: Tensor, dtype: torch.dtype, autocast: bool
) -> None:
    """The identity is exact and in float32, even if the rest of the network runs in bfloat16."""
    serialization = allocated(Serial(lr_scale=0.1), student)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = serialization(logits.to(dtype), None)
    assert output.dtype == torch.float32
    assert torch.equal(output, logits.to(dtype).float())


@pytest.mark.parametrize("autocast", [False, True])
def test_parallel_starts_as_the_students_classifier(student: ColourNetwork, autocast: bool) -> None:
    serialization = allocated(Parallel(lr_scale=0.1), student)
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = student.forward_features(images)
        output = serialization(expected.logits, expected.pooled)
    assert torch.equal(output, expected.logits)


def test_layers_have_the_students_sizes(student: ColourNetwork) -> None:
    sizes = {
        kind: [tuple(parameter.shape) for parameter in allocated(kind(lr_scale=1.0), student).parameters()]
        for kind in (Serial, Parallel)
    }
    assert sizes == {Serial: [(CLASSES, CLASSES), (CLASSES,)], Parallel: [(CLASSES, POOLED), (CLASSES,)]}


def test_learning_rates_and_weight_decays() -> None:
    """Weight decay would pull the serial layer off the identity. The other layers have the optimiser's."""
    assert (NoSerialization().lr_scale, NoSerialization().weight_decay) == (1.0, None)
    assert (Serial(lr_scale=0.1).lr_scale, Serial(lr_scale=0.1).weight_decay) == (0.1, 0.0)
    assert (Parallel(lr_scale=0.3).lr_scale, Parallel(lr_scale=0.3).weight_decay) == (0.3, None)


def test_serial_training_starts_as_plain_distillation(student: ColourNetwork, logits: Tensor) -> None:
    serialization = allocated(Serial(lr_scale=0.1), student)
    teacher = logits.flip(0)
    plain, serial = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(plain, teacher, 4.0), plain)
    loss = kd_loss(serialization(serial, None), teacher, 4.0)
    through, *of_layer = torch.autograd.grad(loss, (serial, *serialization.parameters()))
    assert gradient.any()
    assert torch.equal(through, gradient)
    assert all(of_parameter.any() for of_parameter in of_layer)


@pytest.mark.parametrize("autocast", [False, True])
def test_serial_computes_w_z_plus_b_and_its_gradients(student: ColourNetwork, logits: Tensor, autocast: bool) -> None:
    """With the gradient g at u, it is W' g at z. Summed over the batch, it is g z' at W and g at b."""
    serialization = allocated(Serial(lr_scale=0.1), student)
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(size, generator=generator) for size in ((CLASSES, CLASSES), (CLASSES,)))
    serialization.load_state_dict({"layer.weight": weight, "layer.bias": bias})
    z, g = logits[:4].clone().requires_grad_(), torch.randn(4, CLASSES, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        u = serialization(z, None)
    of_z, of_weight, of_bias = torch.autograd.grad(u, (z, *serialization.parameters()), g)
    torch.testing.assert_close(u, torch.einsum("ij,bj->bi", weight, z) + bias)
    torch.testing.assert_close(of_z, torch.einsum("ij,bi->bj", weight, g))
    torch.testing.assert_close(of_weight, torch.einsum("bi,bj->ij", g, z.detach()))
    torch.testing.assert_close(of_bias, g.sum(dim=0))


def test_parallel_learns_apart_from_the_students_classifier(student: ColourNetwork) -> None:
    """Distillation has gradients at the features and at its own classifier, but none at the student's."""
    serialization = allocated(Parallel(lr_scale=1.0), student)
    pooled = torch.rand(5, POOLED, generator=torch.Generator().manual_seed(4), requires_grad=True)
    teacher = torch.eye(CLASSES)[:5]
    loss = kd_loss(serialization(student.fc(pooled), pooled), teacher, 4.0)
    reached = (pooled, *serialization.parameters())
    gradients = torch.autograd.grad(loss, (*reached, *student.parameters()), allow_unused=True)
    assert all(gradient is not None and gradient.any() for gradient in gradients[: len(reached)])
    assert all(gradient is None for gradient in gradients[len(reached) :])
    with torch.no_grad():
        for parameter in serialization.parameters():
            parameter.add_(1.0)
    assert not torch.equal(next(serialization.parameters()), student.fc.weight)


def test_a_learnt_factor_multiplies_the_layer_s_output(student: ColourNetwork, logits: Tensor) -> None:
    serialization = Serial(lr_scale=0.1, factor=True)
    serialization.allocate(student)
    assert serialization.factor is not None
    assert torch.equal(serialization(logits, None), logits)
    assert dict(serialization.named_parameters())["factor"] == 1
    serialization.load_state_dict({**serialization.state_dict(), "factor": torch.tensor(2.5)})
    output = serialization(logits, None)
    assert torch.equal(output, 2.5 * logits)
    (slope,) = torch.autograd.grad(output.sum(), serialization.factor)
    torch.testing.assert_close(slope, logits.sum())


def test_without_a_factor_checkpoints_hold_the_layer_alone(student: ColourNetwork) -> None:
    assert list(allocated(Serial(lr_scale=0.1), student).state_dict()) == ["layer.weight", "layer.bias"]


def test_the_decay_pulls_the_layer_towards_the_identity(student: ColourNetwork) -> None:
    assert allocated(Serial(lr_scale=0.1), student).penalties() == {}
    serialization = allocated(Serial(lr_scale=0.1, decay=0.3), student)
    assert serialization.penalties()["layer_decay"] == 0
    weight = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(5))
    serialization.load_state_dict({"layer.weight": weight, "layer.bias": torch.ones(CLASSES)})
    term = serialization.penalties()["layer_decay"]
    away = weight - torch.eye(CLASSES)
    torch.testing.assert_close(term, 0.15 * away.square().sum())
    gradients = torch.autograd.grad(term, list(serialization.parameters()), allow_unused=True)
    torch.testing.assert_close(gradients[0], 0.3 * away)
    assert gradients[1] is None


def test_the_decay_is_a_term_of_the_loss(tmp_path: Path) -> None:
    def trained(decay: float) -> tuple[Tensor, list[str]]:
        data, layer = tiny_data(tmp_path), Serial(lr_scale=1.0, decay=decay)
        kd = KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0)
        distiller = tiny_distiller(data, kd, teacher=tiny_teacher(), serialization=layer)
        tiny_trainer(1, limit_train_batches=3, limit_val_batches=0).fit(distiller, datamodule=data)
        weight = layer.layer.weight.detach()
        return (weight - torch.eye(len(weight))).norm(), list(distiller.weighted_terms)

    (free, terms), (held, terms_with_decay) = trained(0.0), trained(50.0)
    assert terms_with_decay == [*terms, "layer_decay"]
    assert 0 < held < 0.5 * free


def test_the_layer_can_start_from_the_relations_of_the_teacher_s_classes() -> None:
    """Classes 0 and 1 are near each other, and class 2 is apart. A common offset of all classes changes nothing."""
    weight = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-4.0, 0.0]], dtype=torch.float64)
    with FakeTensorMode():
        assert relations_of_classes(torch.empty(4, 3, device="cuda")).is_cuda
    found = relations_of_classes(weight + torch.tensor([3.0, -7.0]))
    products = torch.tensor([[5.0, 3.0, -8.0], [3.0, 5.0, -8.0], [-8.0, -8.0, 16.0]], dtype=torch.float64)
    others = torch.tensor([-2.5, -2.5, -8.0], dtype=torch.float64)
    torch.testing.assert_close(found, (products - others) / (products.diagonal() - others))
    assert found.diagonal().tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(found.sum(dim=0), torch.ones(3, dtype=torch.float64))


def test_a_layer_starts_from_its_own_teacher() -> None:
    teacher, network = tiny_teacher(), resnet8(tiny.CLASSES)
    assert Serial(lr_scale=0.1, start="teacher").needs_teacher
    assert not Serial(lr_scale=0.1).needs_teacher
    layer = Serial(lr_scale=0.1, start="teacher")
    layer.allocate(network, teacher)
    assert torch.equal(layer.layer.weight, relations_of_classes(teacher.classifier().weight))
    teacher.select_classes(list(reversed(range(tiny.CLASSES))))
    turned = Serial(lr_scale=0.1, start="teacher")
    turned.allocate(network, teacher)
    torch.testing.assert_close(turned.layer.weight, layer.layer.weight.flip(0, 1))
