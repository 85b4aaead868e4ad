"""What methods on features share: pairs of stages, averages over pixels, directions at any scale, and last maps."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import UserError
from src.methods.features import (
    at_one_resolution,
    averaged_to,
    bounded,
    connector,
    exact_products,
    last_map_shapes,
    last_maps,
    later_counts_double,
    pooled_pair,
    preactivation_pairs,
    stage_pairs,
    stage_shapes,
    unit,
)
from src.methods.method import Batch, Networks, View
from src.models.network import Network, Output
from src.models.resnet import resnet8
from src.teachers.teacher import Teacher
from tests.helpers.features import drawn
from tests.helpers.methods import changed_batch, configured, networks_of, taught_by
from tests.helpers.tiny import CLASSES, MEAN, STD


def batch_of_stages(student: int, teacher: int) -> Batch:
    """A stem and stages whose values tell their position. Preactivations are negative."""
    outputs = []
    for count in (student, teacher):
        maps = tuple(torch.full((1, 1, 2, 2), float(i)) for i in range(count))
        outputs.append(Output(torch.zeros(1, 3), maps, torch.zeros(1, count), tuple(-x for x in maps)))
    index = torch.zeros(1, dtype=torch.int64)
    return Batch((View(torch.zeros(1, 3, 4, 4), *outputs),), index, index, epoch=0, step=0)


# Pairs


@pytest.mark.parametrize(("student", "teacher"), [(4, 4), (3, 5), (5, 3)])
def test_stages_are_paired_in_order_without_the_stem(student: int, teacher: int):
    batch = batch_of_stages(student, teacher)
    wanted = list(range(1, min(student, teacher)))
    assert [(int(s.mean()), int(t.mean())) for s, t in stage_pairs(batch)] == [(i, i) for i in wanted]
    assert [(int(s.mean()), int(t.mean())) for s, t in preactivation_pairs(batch)] == [(-i, -i) for i in wanted]
    assert [x.shape[1] for x in pooled_pair(batch)] == [student, teacher]


def test_shapes_of_stages_match_the_pairs():
    networks = networks_of()
    batch = changed_batch(networks.student, taught_by())
    wanted = [(tuple(s.shape[1:]), tuple(t.shape[1:])) for s, t in stage_pairs(batch)]
    assert stage_shapes(networks, "at") == wanted


# Averages


SIZES = [((8, 8), (2, 4)), ((4, 4), (4, 4)), ((7, 5), (3, 2)), ((6, 5), (3, 2)), ((8, 7), (7, 4)), ((9, 4), (4, 4))]


@pytest.mark.parametrize(("size", "smaller"), SIZES)
def test_averages_and_their_gradients_match_adaptive_pooling(size: tuple[int, int], smaller: tuple[int, int]):
    features, upstream = drawn((2, 3, *size), 1).requires_grad_(), drawn((2, 3, *smaller), 2)
    found, wanted = averaged_to(features, *smaller), F.adaptive_avg_pool2d(features, smaller)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(averages, features, upstream)[0] for averages in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_two_maps_meet_at_the_smaller_height_and_the_smaller_width():
    one, other = at_one_resolution(torch.zeros(1, 2, 8, 3), torch.zeros(1, 5, 4, 6))
    assert (one.shape, other.shape) == ((1, 2, 4, 3), (1, 5, 4, 3))


def test_maps_of_one_resolution_stay_as_they_are():
    one, other = torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4)
    assert all(a is b for a, b in zip(at_one_resolution(one, other), (one, other), strict=True))


# Directions


@pytest.mark.parametrize("exponent", [-30, 0, 30])
def test_directions_and_their_gradients_are_exact_at_every_scale(exponent: int):
    features = drawn((4, 3), 1)
    scaled = (10.0**exponent * features).float().requires_grad_()
    exact = features.requires_grad_()
    upstream = drawn((4, 3), 2)
    found, wanted = unit(scaled, dim=1), exact / exact.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found, scaled, upstream.float())
    (wanted_gradient,) = torch.autograd.grad(wanted, exact, upstream)
    torch.testing.assert_close(10.0**exponent * gradient.double(), wanted_gradient, rtol=1e-4, atol=1e-5)


def test_zeros_have_no_direction_and_no_gradient():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-42, 0.0]], requires_grad=True)
    found = unit(features, dim=1)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.0, 0.0]]))
    (gradient,) = torch.autograd.grad(found.sum(), features)
    assert (gradient[[0, 2]] == 0).all()
    assert gradient[1].abs().sum() > 0


def test_the_largest_magnitude_counts_as_a_constant():
    features = torch.tensor([[2.0, -8.0]], requires_grad=True)
    found = bounded(features, dim=1)
    assert found.tolist() == [[0.25, -1.0]]
    assert torch.autograd.grad(found.sum(), features)[0].tolist() == [[0.125, 0.125]]


def test_products_are_exact_within_autocast():
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with exact_products(x):
            assert torch.equal(x @ x, torch.mm(x, x))
            assert (x @ x).dtype == torch.float32


# Stages and connectors


def test_a_stage_has_half_of_the_weight_of_the_next():
    assert later_counts_double([torch.tensor(8.0), torch.tensor(4.0), torch.tensor(2.0)]) == 2 + 2 + 2
    assert later_counts_double([torch.tensor(3.0)]) == 3


def test_a_connector_starts_from_the_papers_weights():
    torch.manual_seed(0)
    made = connector(64, 100)
    assert made(torch.zeros(2, 64, 4, 4)).shape == (2, 100, 4, 4)
    (convolution, _) = made.children()
    (weight,) = convolution.parameters()  # no bias
    assert float(weight.detach().std()) == pytest.approx((2 / 100) ** 0.5, rel=0.03)


# Last maps


class Unusual(Network):
    """Classifies by the root of the mean colour. `tells` decides whether it returns a last map."""

    def __init__(self, tells: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(3, CLASSES)
        self.tells = tells

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.fc

    def forward_features(self, images: Tensor) -> Output:
        pooled = images.mean((2, 3)).abs().sqrt()
        return Output(self.fc(pooled), (images,), pooled, unpooled=images if self.tells else None)


def networks_with(student: Network, teacher: Network) -> Networks:
    make = functools.partial(resnet8, CLASSES)
    return Networks(student, Teacher(teacher, MEAN, STD), (3, 16, 16), torch.arange(4), make)


def test_last_maps_are_those_that_are_pooled():
    networks = networks_of()
    batch = changed_batch(networks.student, taught_by())
    maps = last_maps(batch)
    assert last_map_shapes(networks, "simkd") == tuple(tuple(x.shape[1:]) for x in maps)
    for last, pooled in zip(maps, pooled_pair(batch), strict=True):
        torch.testing.assert_close(last.mean((2, 3)), pooled)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_a_last_map_leaves_the_network_as_it_was(training: bool):
    networks = networks_with(resnet8(CLASSES).train(training), resnet8(CLASSES))
    before = {name: x.clone() for name, x in networks.student.state_dict().items()}
    last_map_shapes(networks, "simkd")
    assert networks.student.training == training
    assert all(torch.equal(before[name], x) for name, x in networks.student.state_dict().items())


@pytest.mark.parametrize("method", ["simkd", "catkd", "srrl"])
@pytest.mark.parametrize("tells", [True, False])
def test_networks_whose_classifier_reads_something_else_are_refused(method: str, tells: bool):
    usual, unusual = resnet8(CLASSES), Unusual(tells)
    for whose, student, teacher in (("student", unusual, usual), ("teacher", usual, unusual)):
        with pytest.raises(
            UserError, match=rf"^method={method}: the {whose}'s classifier does not read its pooled last"
        ):
            configured(method).allocate(networks_with(student, teacher))


def test_networks_without_stages_are_refused():
    networks: Any = networks_with(Unusual(True), resnet8(CLASSES))
    with pytest.raises(UserError, match=r"^method=reviewkd .* the student has 1 and the teacher 4 feature maps"):
        configured("reviewkd").allocate(networks)
