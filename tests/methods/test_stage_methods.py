"""OFD, FSP, AB, FT and KD-SVD: each loss against a second statement of its formula, and the stages of training.

The statements are loops over plain Python floats; their gradients are taken by central differences.
"""

import functools
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from src.config import build
from src.data.views import normalise
from src.errors import UserError
from src.methods.ab import AB, boundary_loss
from src.methods.combined import Combined
from src.methods.fsp import FSP, fsp_loss
from src.methods.ft import FT, Paraphrasing, factor_loss
from src.methods.kd import KD
from src.methods.kdsvd import singular_vectors, svd_loss
from src.methods.method import Batch, Method, Networks, Prediction, View
from src.methods.ofd import Transfer, partial_distance
from src.models.checkpoints import read_state_dict, save_weights
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network, Shapes
from src.models.preactivations import forward_features
from src.models.resnet import resnet8, resnet20
from src.models.shufflenet_v1 import ShuffleV1
from src.models.vgg import vgg8
from src.models.wide_resnet import wrn_16_1
from src.train import fit
from tests.commands import run
from tests.methods.test_feature_methods import Move, averaged, channels, flat, mean, pixels, samples, scaled
from tests.tiny import CLASSES, MEAN, STD, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

CONF = Path(__file__).parents[2] / "conf" / "method"
Said = list[Tensor]
Nested = Any

# The formulas, stated once more


def matched(one: Nested, other: Nested) -> tuple[Nested, Nested]:
    """Two samples [channels][rows][columns] at the smaller resolution, each channel flat."""
    size = min(len(one[0]), len(other[0]))
    one, other = ([flat(averaged(c, size)) for c in sample] for sample in (one, other))
    return one, other


MARGIN = [-0.5, -0.1, -1.5]


def stated_ofd(student: Nested, teacher: Nested) -> float:
    def distance(s: float, t: float, margin: float) -> float:
        target = max(t, margin)
        return 0 if s <= target <= 0 else (target - s) ** 2

    return math.fsum(
        distance(a, b, margin)
        for s, t in zip(student[0], teacher[0], strict=True)
        for c, d, margin in zip(s, t, MARGIN, strict=True)
        for a, b in zip(flat(c), flat(d), strict=True)
    ) / len(student[0])


def stated_ab(student: Nested, teacher: Nested) -> float:
    pairs = zip(flat(student), flat(teacher), strict=True)
    return math.fsum(max(0, 1 - s if t > 0 else 1 + s) ** 2 for s, t in pairs) / len(student[0])


def stated_fsp(student: Nested, teacher: Nested) -> float:
    def matrix(first: Nested, last: Nested) -> list[float]:
        first, last = matched(first, last)
        return [mean(a * b for a, b in zip(c, d, strict=True)) for c in first for d in last]

    return math.fsum(
        mean(
            (a - b) ** 2
            for sample in range(len(student[0]))
            for a, b in zip(
                matrix(student[i][sample], student[i + 1][sample]),
                matrix(teacher[i][sample], teacher[i + 1][sample]),
                strict=True,
            )
        )
        for i in range(len(student) - 1)
    )


def stated_ft(student: Nested, teacher: Nested, whole: bool) -> float:
    def factor(sample: list[list[float]]) -> list[float]:
        x = flat(sample) if whole else [mean(a * a for a in pixel) for pixel in zip(*sample, strict=True)]
        return [a / math.sqrt(math.fsum(b * b for b in x)) for a in x]

    samples = [matched(s, t) for s, t in zip(student[0], teacher[0], strict=True)]
    return mean(abs(a - b) for s, t in samples for a, b in zip(factor(s), factor(t), strict=True))


def stated_svd(student: Nested, teacher: Nested, count: int) -> float:
    def vectors(sample: Nested, n: int) -> tuple[list[list[float]], list[float]]:
        pixels = np.array([flat(channel) for channel in sample]).T
        n = min(n, *pixels.shape)
        squares, found = np.linalg.eigh(pixels.T @ pixels)
        return found.T[::-1][:n].tolist(), np.sqrt(squares[::-1][:n].clip(0)).tolist()

    def stage(s: Nested, t: Nested) -> tuple[list[list[float]], list[list[float]]]:
        candidates, _ = vectors(s, count + 3)
        targets, values = vectors(t, count)
        aligned = []
        targets = [[x * (1 if sum(v) >= 0 else -1) for x in v] for v in targets]
        for target in targets:
            cosines = [math.fsum(a * b for a, b in zip(c, target, strict=True)) for c in candidates]
            best = max(range(len(cosines)), key=[abs(cosine) for cosine in cosines].__getitem__)
            aligned.append([math.copysign(1, cosines[best]) * x for x in candidates[best]])
        share = [value / math.sqrt(math.fsum(v * v for v in values)) for value in values]
        return tuple([[x * w for x in v] for v, w in zip(said, share, strict=True)] for said in (aligned, targets))  # type: ignore[return-value]

    total = 0.0
    for sample in range(len(student[0])):
        stages = [stage(s[sample], t[sample]) for s, t in zip(student, teacher, strict=True)]
        for (s0, t0), (s1, t1) in itertools.pairwise(stages):
            for k in range(count):
                total += math.fsum(
                    (math.exp(-((s1[k][c] - s0[k][d]) ** 2) / 8) - math.exp(-((t1[k][c] - t0[k][d]) ** 2) / 8)) ** 2
                    for c in range(len(s1[k]))
                    for d in range(len(s0[k]))
                )
    return total / len(student[0])


class Case(NamedTuple):
    loss: Callable[[Said, Said], Tensor]
    stated: Callable[[Nested, Nested], float]
    student: tuple[tuple[int, ...], ...]
    teacher: tuple[tuple[int, ...], ...]
    scale_free: bool = False


ONE = ((3, 3, 2, 2),)
STAGES = ((2, 2, 4, 4), (2, 3, 4, 4), (2, 5, 2, 2))
HALF = ((2, 2, 2, 2), (2, 3, 2, 2), (2, 5, 1, 1))
MATCHING: dict[str, Case] = {
    "ofd": Case(lambda s, t: partial_distance(s[0], t[0], torch.tensor(MARGIN)), stated_ofd, ONE, ONE),
    "ab": Case(lambda s, t: boundary_loss(s[0], t[0], 1.0), stated_ab, ONE, ONE),
    "fsp": Case(fsp_loss, stated_fsp, STAGES, STAGES),
    "fsp, larger student": Case(fsp_loss, stated_fsp, STAGES, HALF),
    "ft": Case(
        lambda s, t: factor_loss(s[0], t[0], False), partial(stated_ft, whole=False), ONE, ((3, 3, 4, 4),), True
    ),
    "ft, whole": Case(
        lambda s, t: factor_loss(s[0], t[0], True), partial(stated_ft, whole=True), ((3, 3, 4, 4),), ONE, True
    ),
    "kdsvd": Case(partial(svd_loss, count=1), partial(stated_svd, count=1), STAGES, STAGES, True),
    "kdsvd, two": Case(partial(svd_loss, count=2), partial(stated_svd, count=2), STAGES, STAGES, True),
}
every_loss = pytest.mark.parametrize("name", MATCHING)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(name: str) -> tuple[Said, Said]:
    case = MATCHING[name]
    return [drawn(x, i) for i, x in enumerate(case.student)], [drawn(x, 10 + i) for i, x in enumerate(case.teacher)]


def measured(name: str, student: Said, teacher: Said, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, flat."""
    student = [x.detach().clone().requires_grad_() for x in student]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = MATCHING[name].loss(student, teacher)
    gradients = torch.autograd.grad(value, student)
    return value.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def slope(stated: Callable[[Nested, Nested], float], student: Said, teacher: Said, step: float = 1e-5) -> Tensor:
    other, found = [x.tolist() for x in teacher], []
    for stage, x in enumerate(student):
        for i in range(x.numel()):
            values = []
            for sign in (1, -1):
                moved = x.clone()
                moved.view(-1)[i] += sign * step
                said = [(moved if j == stage else y).tolist() for j, y in enumerate(student)]
                values.append(stated(said, other))
            found.append((values[0] - values[1]) / (2 * step))
    return torch.tensor(found, dtype=torch.float64)


@every_loss
def test_value_and_gradient_are_the_stated_ones(name: str):
    student, teacher = inputs(name)
    value, gradient = measured(name, student, teacher)
    stated = MATCHING[name].stated
    assert value.item() == pytest.approx(stated([x.tolist() for x in student], [x.tolist() for x in teacher]), rel=1e-9)
    assert value > 0
    wanted = slope(stated, student, teacher)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_losses_are_computed_in_float32_also_under_autocast(name: str, dtype: torch.dtype):
    student, teacher = ([x.to(dtype) for x in said] for said in inputs(name))
    value, gradient = measured(name, student, teacher)
    exact, exact_gradient = measured(name, [x.double() for x in student], [x.double() for x in teacher])
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)
    bound = (4 * torch.finfo(dtype).eps + 1e-4) * exact_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=bound)
    inside, inside_gradient = measured(name, student, teacher, autocast=True)
    assert torch.equal(inside, value)
    assert torch.equal(inside_gradient, gradient)


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "one sample zero": lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]),
    "one channel": lambda x: x * torch.eye(x.shape[1])[0].view(1, -1, 1, 1),
    "equal singular values": lambda x: (
        torch.eye(x.shape[1], x[0, 0].numel()).view(1, *x.shape[1:]).expand_as(x).contiguous()
    ),
    "large": lambda x: 1e4 * x,
    "huge": lambda x: 1e30 * x,
    "tiny": lambda x: 1e-30 * x,
    "far from zero": lambda x: 1e4 + x,
    "one sample": lambda x: x[:1],
}


@pytest.mark.parametrize(
    ("name", "extreme"),
    [(name, x) for name, case in MATCHING.items() for x in EXTREMES if case.scale_free or x != "huge"],
)
def test_losses_and_gradients_are_finite_at_extremes(name: str, extreme: str):
    student, teacher = ([x.float() for x in said] for said in inputs(name))
    moved_student, moved_teacher = ([EXTREMES[extreme](x) for x in said] for said in (student, teacher))
    pairs = [(moved_student, moved_teacher)]
    if extreme != "one sample":
        pairs += [(moved_student, teacher), (student, moved_teacher)]
    for pair in pairs:
        value, gradient = measured(name, *pair)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["fsp", "ft", "ft, whole", "kdsvd", "kdsvd, two"])
def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn(name: str):
    student, _ = inputs(name)
    value, gradient = measured(name, student, student)
    assert value.item() < 1e-20 if "ft" not in name else value.item() == 0
    assert gradient.abs().max() < 1e-9


def negated(x: Tensor) -> Tensor:
    return -x


ALONE: dict[str, tuple[Move, ...]] = {
    "ft": (channels, scaled, negated),
    "ft, whole": (scaled,),
    "fsp": (pixels, negated),
    "kdsvd": (pixels, scaled, negated),
}
"""What may happen to one network's features without the loss changing."""
TOGETHER: dict[str, tuple[Move, ...]] = {
    "ab": (channels, pixels, samples, negated),
    "ofd": (pixels, samples),
    "ft": (pixels, samples),
    "fsp": (channels, samples),
    "kdsvd": (channels, samples),
}
"""What may happen to both networks' features without the loss changing, while it does change for one of them."""


@pytest.mark.parametrize(("name", "move"), [(name, move) for name, moves in ALONE.items() for move in moves])
def test_what_changes_nothing(name: str, move: Move):
    student, teacher = inputs(name)
    value = MATCHING[name].loss(student, teacher)
    for pair in (([move(x) for x in student], teacher), (student, [move(x) for x in teacher])):
        torch.testing.assert_close(MATCHING[name].loss(*pair), value, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("name", "move"), [(name, move) for name, moves in TOGETHER.items() for move in moves])
def test_what_changes_nothing_where_it_happens_to_both(name: str, move: Move):
    student, teacher = inputs(name)
    moved, value = [move(x) for x in student], MATCHING[name].loss(student, teacher)
    torch.testing.assert_close(MATCHING[name].loss(moved, [move(x) for x in teacher]), value, rtol=1e-9, atol=1e-14)
    assert not torch.isclose(MATCHING[name].loss(moved, teacher), value, rtol=1e-3)


def test_the_strength_of_the_teachers_neurons_does_not_matter_to_ab():
    student, teacher = inputs("ab")
    value = boundary_loss(student[0], teacher[0], 1.0)
    assert torch.equal(boundary_loss(student[0], teacher[0] * torch.rand(3, 3, 2, 2), 1.0), value)


# Singular vectors


def test_a_vectors_gradient_is_exact_where_only_other_singular_values_are_equal():
    def first(x: Tensor) -> Tensor:
        """Its projector, which has no sign."""
        vectors, _ = singular_vectors(x, 1)
        return vectors @ vectors.transpose(1, 2)

    one = (drawn((1, 3, 1, 1), 1) * drawn((1, 1, 2, 3), 2)).requires_grad_()  # of rank 1
    torch.autograd.gradcheck(first, (one,))
    equal = torch.diag_embed(torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64)).view(1, 3, 1, 3).requires_grad_()
    torch.autograd.gradcheck(first, (equal,))


@pytest.mark.parametrize("second", [1.0, 1.0 - 1e-16, 1.0 - 1e-10])
def test_vectors_of_equal_singular_values_have_a_finite_gradient(second: float):
    x = torch.diag_embed(torch.tensor([[1.0, second, 0.5]], dtype=torch.float64)).view(1, 3, 1, 3).requires_grad_()
    vectors, _ = singular_vectors(x, 3)
    (gradient,) = torch.autograd.grad((vectors * drawn((1, 3, 3), 1)).sum(), x)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


# OFD's margin


def test_the_margin_is_the_mean_of_the_negative_responses_that_were_seen():
    transfer = Transfer(2, 3)
    seen = [drawn((4, 3, 2, 2), i).float() * scale for i, scale in enumerate((1.0, 100.0, 0.01))]
    for x in seen:
        x[:, 2] = x[:, 2].abs()
        transfer(torch.randn(4, 2, 4, 4), x)
    everything = torch.cat(seen)
    wanted = [everything[:, c][everything[:, c] < 0].mean() for c in (0, 1)]
    torch.testing.assert_close(transfer.margin, torch.stack([*wanted, torch.tensor(0.0)]))
    assert {"margin", "count"} <= transfer.state_dict().keys()


# The methods

NAMES = ["ofd", "fsp", "ab", "ft", "kdsvd"]
TWO_STAGES = ["fsp", "ab", "ft"]
SAME_CHANNELS = ["fsp", "kdsvd"]
every_method = pytest.mark.parametrize("method", NAMES)
two_stages = pytest.mark.parametrize("method", TWO_STAGES)


def configured(name: str, pair: str = "", epochs: int = 240, **options: Any) -> Any:
    node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options)
    root = {"model": {"name": pair}, "schedule": {"epochs": epochs}, "standardize_logits": False, "method": node}
    return build(OmegaConf.create(root).method, "method")


PUBLISHED = {"ofd": {"distance": 1e-3}, "fsp": {}, "ab": {}, "ft": {"factor": 200.0}, "kdsvd": {"relation": 1.0}}
FIRST = {"fsp": {"flow": 1.0}, "ab": {"boundary": 3e-3}, "ft": {"reconstruction": 1.0}}


@every_method
def test_published_weights(method: str):
    made = configured(method)
    assert made.weights(0) == made.weights(239) == {"cross_entropy": 1.0, **PUBLISHED[method]}
    assert made.needs_teacher
    assert not made.distils_logits


def test_ofd_weighs_less_on_imagenet():
    assert configured("ofd", "resnet50_to_mobilenetv1").weights(0)["distance"] == 1e-4


def networks_of(new_teacher: Callable[..., Network], new_student: Callable[..., Network]) -> Networks:
    student = new_student(CLASSES)
    return Networks(student, taught_by(new_teacher), (3, 16, 16), torch.arange(4), partial(new_student, CLASSES))


taught_by = functools.cache(tiny_teacher)


@two_stages
def test_the_first_stage_lasts_an_eighth_of_the_main_one_and_at_least_an_epoch(method: str):
    for epochs, wanted in ((240, 30), (16, 2), (2, 1)):
        made = configured(method, epochs=epochs)
        made.build(networks_of(resnet20, resnet8))
        (stage,) = made.stages()
        assert stage.epochs == wanted
        assert stage.method.weights(0) == FIRST[method]


def whole_batch(networks: Networks) -> Batch:
    """One batch of four images, seen by networks that tell all."""
    assert networks.teacher is not None
    images, index = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), torch.arange(4)
    inputs, answer = normalise(images, MEAN, STD), networks.teacher(images, preactivations=True)
    said = forward_features(networks.student, inputs, preactivations=True)
    view = View(
        inputs,
        *(Prediction(x.logits, x.logits, x.features, x.pooled, x.preactivations) for x in (said, answer)),
    )
    return Batch((view,), index % CLASSES, index, epoch=0, step=0)


TRAINS = {"ofd": {"student", "transfers"}, "fsp": {"student"}, "ab": {"student", "connectors"}, "kdsvd": {"student"}}
"""What the distillation terms train; of FT the two stages have their own."""


@pytest.mark.parametrize(("new_teacher", "new_student"), [(wrn_16_1, ShuffleV1), (vgg8, MobileNetV2)])
@pytest.mark.parametrize("method", [name for name in NAMES if name not in SAME_CHANNELS])
def test_methods_take_networks_of_different_families(method: str, new_teacher: Any, new_student: Any):
    options = {"whole_factor": True} if method == "ft" else {}  # MobileNetV2 ends in one pixel
    assert_trains_finitely(method, networks_of(new_teacher, new_student), **options)


@every_method
def test_methods_take_networks_of_one_family(method: str):
    assert_trains_finitely(method, networks_of(resnet20, resnet8))


def assert_trains_finitely(method: str, networks: Networks, **options: Any) -> None:
    made = configured(method, **options)
    made.build(networks)
    for part in [*(stage.method for stage in made.stages()), made]:
        made.zero_grad()
        networks.student.zero_grad()
        terms = part.terms(whole_batch(networks))
        assert terms.keys() == part.weights(0).keys()
        total: Any = sum(part.weights(0)[name] * term for name, term in terms.items())
        total.backward()
        gradients = {
            name: p.grad
            for name, p in [*networks.student.named_parameters(prefix="student"), *made.named_parameters()]
            if p.grad is not None
        }
        assert gradients
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        trained = {name.split(".")[0] for name, gradient in gradients.items() if gradient.abs().max() > 0}
        if method == "ft":
            assert trained == ({"student", "translator"} if part is made else {"paraphraser", "decoder"})
        elif part is made and made.stages():
            assert trained == {"student"}
        else:
            assert trained == TRAINS[method]


@pytest.mark.parametrize("method", SAME_CHANNELS)
def test_other_channels_are_refused(method: str):
    with pytest.raises(UserError, match=rf"^method={method} compares stages of the same channels, .* \[.*240.*\]"):
        configured(method).build(networks_of(wrn_16_1, ShuffleV1))


@every_method
def test_networks_without_stages_are_refused(method: str):
    class Sized(NamedTuple):
        student_shapes: Shapes
        teacher_shapes: Shapes

    stem = Shapes(5, ((2, 8, 8),), 6)
    with pytest.raises(UserError, match=rf"^method={method} compares "):
        configured(method).build(Sized(stem, stem))


def test_a_map_of_one_pixel_is_refused_because_all_of_length_one_are_the_same():
    with pytest.raises(UserError, match=r"^method=ft compares maps .* method\.whole_factor=true"):
        configured("ft").build(networks_of(vgg8, MobileNetV2))


def test_a_factor_has_half_of_the_teachers_channels():
    made = configured("ft")
    made.build(networks_of(vgg8, resnet8))
    assert made.paraphraser(torch.randn(2, 512, 4, 4)).shape == made.translator(torch.randn(2, 64, 4, 4)).shape
    assert made.paraphraser(torch.randn(2, 512, 4, 4)).shape == (2, 256, 4, 4)
    assert made.decoder(torch.randn(2, 256, 4, 4)).shape == (2, 512, 4, 4)


# Training


@pytest.mark.parametrize("method", ["ofd", "kdsvd"])
def test_a_run_trains_the_student_and_what_the_method_adds(method: str, tmp_path: Path):
    data, made = tiny_data(tmp_path), configured(method)
    distiller = tiny_distiller(data, made, teacher=taught_by(resnet20))
    before = weights(distiller)
    tiny_trainer(1, max_steps=2, limit_val_batches=0).fit(distiller, datamodule=data)
    after = weights(distiller)
    assert all(not torch.equal(before[name], after[name]) for name in before if "method." in name)
    assert not same(before, after)
    assert all(torch.isfinite(x).all() for x in after.values())


MOVES = {
    "fsp": ({"student"}, {"student"}),
    "ab": ({"student", "connectors"}, {"student"}),
    "ft": ({"paraphraser", "decoder"}, {"student", "translator"}),
}
"""Whose parameters the first stage changes, and whose the main one."""


@two_stages
def test_each_stage_trains_what_it_should_and_the_main_one_goes_on_from_the_first(method: str, tmp_path: Path):
    data, made = tiny_data(tmp_path), configured(method)
    distiller = tiny_distiller(data, made, teacher=taught_by(resnet20))
    (stage,) = made.stages()
    for part, wanted in zip((stage.method, made), MOVES[method], strict=True):
        distiller.method = part
        parameters = [*distiller.student.named_parameters(prefix="student"), *made.named_parameters()]
        before = {name: p.detach().clone() for name, p in parameters}
        trainer = tiny_trainer(1, max_steps=2, limit_val_batches=0)
        trainer.fit(distiller, datamodule=data)
        moved = {name for name, p in parameters if not torch.equal(before[name], p)}
        assert {name.split(".")[0] for name in moved} == wanted
        assert ("student.fc.weight" in moved) == (part is made)
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05
    names = {name for name, _ in parameters}
    assert {name for name in names if name.split(".")[0] in set.union(*MOVES[method])} == names


@pytest.mark.parametrize("method", ["ab", "fsp"])
@pytest.mark.parametrize("also", [False, True])
def test_a_main_stage_that_does_not_read_its_teacher_does_not_ask_it(method: str, also: bool, tmp_path: Path):
    made: Method = configured(method)
    if also:
        made = Combined(made, KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0))
    data, teacher = tiny_data(tmp_path), tiny_teacher(resnet20)
    distiller = tiny_distiller(data, made, teacher=teacher)
    with patch.object(teacher, "view_logits", wraps=teacher.view_logits) as asked:
        tiny_trainer(1, max_steps=1, limit_val_batches=0).fit(distiller, datamodule=data)
    assert asked.called == also


@pytest.mark.parametrize(("method", "scale"), [("ft", 0.2), ("ab", 1.0)])
def test_a_stage_has_a_learning_rate_of_its_own(method: str, scale: float, tmp_path: Path):
    made = configured(method)
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(data, made, teacher=taught_by(resnet20))
    cfg: Any = OmegaConf.create(
        {"trainer": {"strategy": "auto", "max_epochs": 9}, "averaging": None, "gradients": {"every": 0}, "logger": None}
    )
    rates: list[tuple[bool, float]] = []
    with patch(
        "src.train.fit_stage", lambda *_, **__: rates.append((distiller.method is made, distiller.learning_rate))
    ):
        fit(cfg, distiller, data, SimpleNamespace(path=tmp_path))  # type: ignore[arg-type]
    assert rates == [(False, pytest.approx(0.05 * scale)), (True, 0.05)]


def test_combined_with_kd_the_stage_stays_and_the_main_stage_has_both(tmp_path: Path):
    made = Combined(configured("ab"), KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0))
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(data, made, teacher=taught_by(resnet20))
    assert [stage.name for stage in made.stages()] == ["boundaries"]
    assert made.weights(0) == {"cross_entropy": 1.0, "kd": 0.9}
    trainer = tiny_trainer(1, max_steps=1, limit_val_batches=0)
    trainer.fit(distiller, datamodule=data)
    assert "train/kd_step" in trainer.callback_metrics
    assert Combined(configured("ofd"), configured("ab")).needs_preactivations


class Killed(BaseException):
    """As a signal would."""


def failing(terms: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
    def second_epoch(self: Any, batch: Batch) -> Any:
        if batch.epoch == 1:
            raise Killed
        return terms(self, batch)

    return second_epoch


@pytest.mark.slow
@pytest.mark.parametrize("method", TWO_STAGES)
def test_a_run_goes_on_where_it_was_killed_in_either_stage(method: str, tmp_path: Path, array_file: Path):
    teacher = tmp_path / "teacher.pth"
    torch.manual_seed(1)
    save_weights(resnet20(10), teacher)

    def train(folder: str) -> str:
        return run(
            "train", "data=cifar10", f"data.path={array_file}", "model=resnet20_to_resnet8", f"method={method}",
            "trainer=debug", "trainer.max_epochs=2", "schedule=quick", "schedule.epochs=2", "method.initial_epochs=2",
            "schedule.batch_size=8", "logger=none", f"teacher.path={teacher}", f"runs={tmp_path / folder}",
        ).err  # fmt: skip

    def student(folder: str) -> dict[str, Tensor]:
        (file,) = (tmp_path / folder).glob("*/*/*/*/student.pth")
        return dict(read_state_dict(file))

    assert train("whole") == ""
    main: type[Method] = {"fsp": FSP, "ab": AB, "ft": FT}[method]
    first = type(stage_of(method))
    for part in (first, main):
        with patch.object(part, "terms", failing(part.terms)):
            assert "Killed" in train("killed")
        assert list((tmp_path / "killed").glob("*/*/*/*/stages/*/checkpoints/last.ckpt"))
    assert train("killed") == ""
    assert same(student("whole"), student("killed"))


def stage_of(method: str) -> Method:
    made = configured(method)
    made.build(networks_of(resnet20, resnet8))
    return made.stages()[0].method


def test_the_stage_of_ft_is_its_paraphraser():
    assert isinstance(stage_of("ft"), Paraphrasing)
