"""A serialization layer starts as plain distillation, fits the student's sizes, and passes gradients on."""

import pytest
import torch
from torch import Tensor, nn

from src.methods.kd import kd_loss
from src.models.network import Network, Output
from src.training.serialization import NoSerialization, Parallel, Serial, Serialization

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
