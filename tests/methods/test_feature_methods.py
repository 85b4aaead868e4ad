"""The methods on features: each loss against a second statement of its formula, and the methods on pairs of networks.

The statements are loops over plain Python floats; their gradients are taken by central differences.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from src.config import build
from src.data.views import normalise
from src.errors import UserError
from src.methods.at import attention_loss
from src.methods.cc import congruence_loss
from src.methods.fitnet import hint_loss
from src.methods.method import Batch, Method, Networks, Prediction, View, at_least_float32
from src.methods.nst import selectivity_loss
from src.methods.pkt import transfer_loss
from src.methods.rkd import angle_loss, distance_loss
from src.methods.sp import similarity_loss
from src.methods.vid import Guess, gaussian_loss
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Shapes
from src.models.shufflenet_v1 import ShuffleV1
from src.models.vgg import vgg8
from src.models.wide_resnet import wrn_16_1
from tests.tiny import CLASSES, MEAN, STD, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

CONF = Path(__file__).parents[2] / "conf" / "method"


# The formulas, stated once more


def mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def dot(x: list[float], y: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def direction(x: list[float]) -> list[float]:
    return [a / math.sqrt(dot(x, x)) for a in x]


def flat(nested: Any) -> list[float]:
    return [x for part in nested for x in flat(part)] if isinstance(nested, list) else [nested]


def averaged(channel: list[list[float]], size: int) -> list[list[float]]:
    """A square map of a multiple of `size` pixels, by means of blocks."""
    step = len(channel) // size
    return [
        [mean(channel[i * step + a][j * step + b] for a in range(step) for b in range(step)) for j in range(size)]
        for i in range(size)
    ]


def matched(student: Any, teacher: Any) -> tuple[Any, Any]:
    size = min(len(student[0][0]), len(teacher[0][0]))
    student, teacher = ([[averaged(c, size) for c in sample] for sample in said] for said in (student, teacher))
    return student, teacher


def stated_fitnet(student: Any, teacher: Any) -> float:
    return mean((a - b) ** 2 for a, b in zip(flat(student), flat(teacher), strict=True))


def stated_at(student: Any, teacher: Any) -> float:
    def attention(sample: Any) -> list[float]:
        return direction([math.fsum(x * x for x in pixel) for pixel in zip(*map(flat, sample), strict=True)])

    pairs = zip(*matched(student, teacher), strict=True)
    return mean((a - b) ** 2 for s, t in pairs for a, b in zip(attention(s), attention(t), strict=True))


def stated_sp(student: Any, teacher: Any) -> float:
    def rows(said: Any) -> list[float]:
        samples = [flat(sample) for sample in said]
        return [x for a in samples for x in direction([dot(a, b) for b in samples])]

    return mean((a - b) ** 2 for a, b in zip(rows(student), rows(teacher), strict=True))


def stated_cc(student: Any, teacher: Any) -> float:
    apart = [[abs(a - b) for a, b in zip(s, t, strict=True)] for s, t in zip(student, teacher, strict=True)]
    return mean(dot(apart[i], apart[i + 1]) for i in range(len(apart) - 1))


VARIANCE = [0.25, 2.0, 5.0]


def stated_vid(guess: Any, teacher: Any) -> float:
    return mean(
        ((b - a) ** 2 / v + math.log(v)) / 2
        for s, t in zip(guess, teacher, strict=True)
        for c, d, v in zip(s, t, VARIANCE, strict=True)
        for a, b in zip(flat(c), flat(d), strict=True)
    )


def huber(a: float) -> float:
    return a * a / 2 if abs(a) < 1 else abs(a) - 1 / 2


def minus(x: list[float], y: list[float]) -> list[float]:
    return [a - b for a, b in zip(x, y, strict=True)]


def stated_distance(student: Any, teacher: Any) -> float:
    def distances(x: Any) -> list[float]:
        found = {(i, j): math.dist(x[i], x[j]) for i in range(len(x)) for j in range(len(x))}
        unit_of_length = mean(d for (i, j), d in found.items() if i != j)
        return [d / unit_of_length for d in found.values()]

    return mean(map(huber, minus(distances(student), distances(teacher))))


def stated_angle(student: Any, teacher: Any) -> float:
    def cosine(x: Any, i: int, j: int, k: int) -> float:
        return 0.0 if j in (i, k) else dot(direction(minus(x[i], x[j])), direction(minus(x[k], x[j])))

    count = range(len(student))
    triples = [(i, j, k) for i in count for j in count for k in count]
    return mean(huber(cosine(student, *triple) - cosine(teacher, *triple)) for triple in triples)


def stated_pkt(student: Any, teacher: Any) -> float:
    def rows(x: Any) -> list[float]:
        kernel = [[(1 + dot(direction(a), direction(b))) / 2 for b in x] for a in x]
        return [k / math.fsum(row) for row in kernel for k in row]

    return mean(q * math.log((q + 1e-7) / (p + 1e-7)) for p, q in zip(rows(student), rows(teacher), strict=True))


def stated_nst(student: Any, teacher: Any) -> float:
    def kernel(x: Any, y: Any) -> float:
        return mean(dot(direction(flat(a)), direction(flat(b))) ** 2 for a in x for b in y)

    pairs = zip(*matched(student, teacher), strict=True)
    return mean(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t) for s, t in pairs)


# The losses


class Case(NamedTuple):
    loss: Callable[[Tensor, Tensor], Tensor]
    stated: Callable[[Any, Any], float]
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    scale_free: bool = True
    """Whether the scale of all features of a network leaves the loss as it is."""


def vid_loss(guess: Tensor, teacher: Tensor) -> Tensor:
    return gaussian_loss(guess, at_least_float32(torch.tensor(VARIANCE, dtype=guess.dtype)), teacher)


CASES = {
    "fitnet": Case(hint_loss, stated_fitnet, (4, 3, 2, 2), (4, 3, 2, 2), scale_free=False),
    "at": Case(partial(attention_loss, power=2.0), stated_at, (3, 3, 2, 2), (3, 2, 2, 2)),
    "at, student larger": Case(partial(attention_loss, power=2.0), stated_at, (3, 2, 4, 4), (3, 3, 2, 2)),
    "at, teacher larger": Case(partial(attention_loss, power=2.0), stated_at, (3, 2, 2, 2), (3, 3, 4, 4)),
    "sp": Case(similarity_loss, stated_sp, (4, 2, 2, 2), (4, 3, 1, 1)),
    "cc": Case(congruence_loss, stated_cc, (4, 3), (4, 3), scale_free=False),
    "vid": Case(vid_loss, stated_vid, (2, 3, 2, 2), (2, 3, 2, 2), scale_free=False),
    "rkd distance": Case(distance_loss, stated_distance, (4, 3), (4, 5)),
    "rkd angle": Case(angle_loss, stated_angle, (4, 3), (4, 5)),
    "pkt": Case(transfer_loss, stated_pkt, (4, 3), (4, 5)),
    "nst": Case(selectivity_loss, stated_nst, (2, 3, 2, 2), (2, 2, 2, 2)),
    "nst, student larger": Case(selectivity_loss, stated_nst, (2, 2, 4, 4), (2, 3, 2, 2)),
    "nst, teacher larger": Case(selectivity_loss, stated_nst, (2, 2, 2, 2), (2, 3, 4, 4)),
}
every_loss = pytest.mark.parametrize("name", CASES)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(name: str) -> tuple[Tensor, Tensor]:
    return drawn(CASES[name].student, 1), drawn(CASES[name].teacher, 2)


def measured(name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = CASES[name].loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def slope(stated: Callable[[Any, Any], float], student: Tensor, teacher: Tensor, step: float = 1e-5) -> Tensor:
    other, found = teacher.tolist(), []
    for i in range(student.numel()):
        move = torch.zeros(student.numel(), dtype=torch.float64)
        move[i] = step
        move = move.view_as(student)
        found.append((stated((student + move).tolist(), other) - stated((student - move).tolist(), other)) / (2 * step))
    return torch.tensor(found, dtype=torch.float64).view_as(student)


@every_loss
def test_value_and_gradient_are_the_stated_ones(name: str):
    student, teacher = inputs(name)
    value, gradient = measured(name, student, teacher)
    assert value.item() == pytest.approx(CASES[name].stated(student.tolist(), teacher.tolist()), rel=1e-12)
    assert value > 0
    wanted = slope(CASES[name].stated, student, teacher)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-8 * wanted.abs().max().item())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_losses_are_computed_in_float32_also_under_autocast(name: str, dtype: torch.dtype):
    student, teacher = (x.to(dtype) for x in inputs(name))
    value, gradient = measured(name, student, teacher)
    exact, exact_gradient = measured(name, student.double(), teacher.double())
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    bound = (4 * torch.finfo(dtype).eps + 1e-5) * exact_gradient.abs().max().item() + torch.finfo(dtype).tiny
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=bound)
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside_value = CASES[name].loss(student, teacher)
    (inside_gradient,) = torch.autograd.grad(inside_value, student)
    assert torch.equal(inside_value, value)
    assert torch.equal(inside_gradient, gradient)


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "one sample zero": lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]),
    "one sample twice": lambda x: torch.cat([x[:1], x[:1], x[2:]]),
    "opposite samples": lambda x: torch.cat([x[:1], -x[:1], x[2:]]),
    "large": lambda x: 1e4 * x,
    "huge": lambda x: 1e30 * x,
    "tiny": lambda x: 1e-30 * x,
    "from tiny to huge": lambda x: x * 10.0 ** torch.linspace(-30, 30, len(x)).view(-1, *[1] * (x.ndim - 1)),
    "far from zero": lambda x: 1e4 + x,
    "one sample": lambda x: x[:1],
}


@pytest.mark.parametrize(
    ("name", "extreme"),
    # a squared distance of features of 1e30 has no place in float32
    [(name, x) for name, case in CASES.items() for x in EXTREMES if case.scale_free or "huge" not in x],
)
def test_losses_and_gradients_are_finite_at_extremes(name: str, extreme: str):
    student, teacher = (x.float() for x in inputs(name))
    moved_student, moved_teacher = EXTREMES[extreme](student), EXTREMES[extreme](teacher)
    pairs = [(moved_student, moved_teacher)]
    if extreme != "one sample":
        pairs += [(moved_student, teacher), (student, moved_teacher)]
    for pair in pairs:
        value, gradient = measured(name, *pair)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


AGREEING = [name for name in CASES if "larger" not in name and name != "vid"]


@pytest.mark.parametrize("name", AGREEING)
def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn(name: str):
    student, _ = inputs(name)
    value, gradient = measured(name, student, student)
    assert abs(value.item()) < 1e-12
    assert gradient.abs().max() < (1e-6 if name == "pkt" else 1e-9)  # as large as PKT's floor


def channels(x: Tensor) -> Tensor:
    return x.flip(1)


def pixels(x: Tensor) -> Tensor:
    return x.flip(2)


def samples(x: Tensor) -> Tensor:
    return x.roll(1, 0)


def backwards(x: Tensor) -> Tensor:
    return x.flip(0)


def rotated(x: Tensor) -> Tensor:
    """One rotation of all features of a sample, the same for all samples."""
    size = x[0].numel()
    rotation, _ = torch.linalg.qr(drawn((size, size), 3))
    return (x.flatten(1) @ rotation).view_as(x)


def scaled(x: Tensor) -> Tensor:
    return 7.0 * x


def each_sample_scaled(x: Tensor) -> Tensor:
    return x * torch.linspace(0.1, 5, len(x), dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))


def each_channel_scaled(x: Tensor) -> Tensor:
    return x * torch.linspace(-3, 5, x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)


def shifted(x: Tensor) -> Tensor:
    return x + drawn(tuple(x.shape[1:]), 4)


Move = Callable[[Tensor], Tensor]
ALONE: dict[str, tuple[Move, ...]] = {
    "at": (channels, scaled, each_sample_scaled),
    "sp": (rotated, scaled),
    "rkd distance": (rotated, scaled, shifted),
    "rkd angle": (rotated, scaled, shifted),
    "pkt": (rotated, scaled, each_sample_scaled),
    "nst": (channels, scaled, each_sample_scaled, each_channel_scaled),
}
"""What may happen to one network's features without the loss changing."""
TOGETHER: dict[str, tuple[Move, ...]] = {
    "fitnet": (channels, pixels, samples, rotated, shifted),
    "at": (pixels, samples),
    "sp": (samples,),
    "cc": (shifted, backwards),
    "vid": (pixels, samples, shifted),
    "rkd distance": (samples,),
    "rkd angle": (samples,),
    "pkt": (samples,),
    "nst": (pixels, samples),
}
"""What may happen to both networks' features without the loss changing, while it does change for one of them."""


@pytest.mark.parametrize(("name", "move"), [(name, move) for name, moves in ALONE.items() for move in moves])
def test_what_changes_nothing(name: str, move: Move):
    student, teacher = inputs(name)
    value = CASES[name].loss(student, teacher)
    for pair in ((move(student), teacher), (student, move(teacher))):
        torch.testing.assert_close(CASES[name].loss(*pair), value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("name", "move"), [(name, move) for name, moves in TOGETHER.items() for move in moves])
def test_what_changes_nothing_where_it_happens_to_both(name: str, move: Move):
    student, teacher = inputs(name)
    value = CASES[name].loss(student, teacher)
    torch.testing.assert_close(CASES[name].loss(move(student), move(teacher)), value, rtol=1e-10, atol=1e-14)
    assert not torch.isclose(CASES[name].loss(move(student), teacher), value, rtol=1e-3)


# The methods

PUBLISHED: dict[str, dict[str, float]] = {
    "fitnet": {"hint": 100.0},
    "at": {"attention": 1000.0},
    "sp": {"similarity": 3000.0},
    "cc": {"congruence": 0.02},
    "vid": {"information": 1.0},
    "rkd": {"distance": 25.0, "angle": 50.0},
    "pkt": {"transfer": 30000.0},
    "nst": {"selectivity": 50.0},
}
"""The weights of RepDistiller's run_cifar_distill.sh."""
every_method = pytest.mark.parametrize("method", PUBLISHED)


def configured(name: str, **options: Any) -> Method:
    return build(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options), "method")  # type: ignore[arg-type]


@every_method
def test_published_weights(method: str):
    made = configured(method)
    assert made.weights(0) == made.weights(239) == {"cross_entropy": 1.0, **PUBLISHED[method]}
    assert made.needs_features
    assert made.needs_teacher
    assert not made.distils_logits


STAGES = Shapes(5, ((2, 8, 8), (3, 8, 8), (4, 4, 4), (5, 2, 2)), 6)
MORE_STAGES = Shapes(5, ((2, 8, 8), (4, 4, 4), (3, 4, 4), (6, 2, 2), (7, 1, 1)), 8)
READS: dict[str, set[str]] = {
    "fitnet": {"2"},
    "at": {"1", "2", "3"},
    "sp": {"3"},
    "cc": {"pooled"},
    "vid": {"1", "2", "3"},
    "rkd": {"pooled"},
    "pkt": {"pooled"},
    "nst": {"1", "2", "3"},
}
"""Of the student's four feature maps and its pooled features ("pooled"), what a method looks at."""


def said(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float32, batch: int = 4) -> Prediction:
    features = tuple(drawn((batch, *shape), seed + i).to(dtype) for i, shape in enumerate(shapes.features))
    logits, pooled = drawn((batch, shapes.logits), seed).to(dtype), drawn((batch, shapes.pooled), seed).to(dtype)
    return Prediction(logits, logits, features, pooled)


@every_method
@pytest.mark.parametrize("teacher", [STAGES, MORE_STAGES], ids=["as many stages", "more stages"])
@pytest.mark.parametrize("batch", [4, 1])
def test_terms_read_what_they_should(method: str, teacher: Shapes, batch: int):
    torch.manual_seed(0)
    made = configured(method)
    made.build(SimpleNamespace(student_shapes=STAGES, teacher_shapes=teacher))  # type: ignore[arg-type]
    student = said(STAGES, 10, batch=batch)
    leaves = {str(i): x.requires_grad_() for i, x in enumerate(student.features)}
    assert student.pooled is not None
    leaves |= {"pooled": student.pooled.requires_grad_(), "logits": student.logits.requires_grad_()}
    view = View(torch.zeros(batch, 3, 8, 8), student, said(teacher, 20, batch=batch))
    target = torch.arange(batch)
    terms = made.terms(Batch((view,), target, target, epoch=0, step=0))
    assert set(terms) == set(made.weights(0))
    for name, term in terms.items():
        assert term.shape == ()
        assert torch.isfinite(term)
        gradients = torch.autograd.grad(term, list(leaves.values()), retain_graph=True, allow_unused=True)
        read = {leaf for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
        assert read == ({"logits"} if name == "cross_entropy" else READS[method])


OWN: dict[str, set[str]] = {
    "fitnet": {"regressor"},
    "cc": {"student_embedding", "teacher_embedding"},
    "vid": {"guesses"},
}
"""What a method trains beside the student."""


taught_by = functools.cache(tiny_teacher)


@every_method
def test_a_run_trains_the_student_and_what_the_method_adds(method: str, tmp_path: Path):
    data, made = tiny_data(tmp_path), configured(method)
    distiller = tiny_distiller(data, made, teacher=taught_by())
    student, own = weights(distiller.student), {k: v.detach().clone() for k, v in made.named_parameters()}
    assert {name.split(".")[0] for name in own} == OWN.get(method, set())
    trainer = tiny_trainer(1, max_steps=2, limit_val_batches=0)
    trainer.fit(distiller, datamodule=data)
    assert trainer.global_step == 2
    assert all(torch.isfinite(x).all() for x in distiller.state_dict().values())
    assert any(not torch.equal(student[name], x) for name, x in distiller.student.named_parameters())
    for name, parameter in made.named_parameters():
        assert not torch.equal(own[name], parameter), name
        assert torch.equal(distiller.state_dict()[f"method.{name}"], parameter)


@pytest.mark.parametrize(("new_teacher", "new_student"), [(wrn_16_1, ShuffleV1), (vgg8, MobileNetV2)])
def test_every_method_takes_networks_of_different_families(new_teacher: Any, new_student: Any):
    """None is refused, though WRN and ShuffleNetV1 differ in resolution at every stage, VGG and MobileNetV2 at one."""
    teacher, student = tiny_teacher(new_teacher), new_student(CLASSES)
    images, index = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8), torch.arange(4)
    inputs, answer, output = normalise(images, MEAN, STD), teacher(images), student.forward_features
    for method in PUBLISHED:
        made = configured(method)
        made.build(Networks(student, teacher, (3, 16, 16), torch.arange(4), partial(new_student, CLASSES)))
        said = output(inputs)
        view = View(
            inputs,
            Prediction(said.logits, said.logits, said.features, said.pooled),
            Prediction(answer.logits, answer.logits, answer.features, answer.pooled),
        )
        terms = made.terms(Batch((view,), index % CLASSES, index, epoch=0, step=0))
        student.zero_grad()
        total: Any = sum(made.weights(0)[name] * term for name, term in terms.items() if name != "cross_entropy")
        total.backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert any(gradient.abs().max() > 0 for gradient in gradients), method
        assert all(torch.isfinite(gradient).all() for gradient in gradients), method
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters()), method


def built(method: str, student: Shapes, teacher: Shapes, **options: Any) -> Method:
    made = configured(method, **options)
    made.build(SimpleNamespace(student_shapes=student, teacher_shapes=teacher))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (4, 4), (9, 11), (16, 9)])
def test_a_regressor_leads_from_size_to_size(size: tuple[int, int]):
    student, teacher = Shapes(5, ((2, *size),), 6), Shapes(5, ((3, 8, 8),), 6)
    made: Any = built("fitnet", student, teacher, hint_layer=0)
    assert made.regressor(torch.randn(2, 2, *size)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("size", "layer", "message"),
    [
        ((3, 3), 0, r"^method=fitnet cannot lead the student's features of 3x3 pixels to the teacher's 8x8: .*"),
        ((4, 8), 0, r"^method=fitnet cannot lead the student's features of 4x8 pixels to the teacher's 8x8: .*"),
        ((8, 8), 1, r"^method\.hint_layer=1 is too deep, the student has 1 and the teacher 1 feature maps: .*"),
    ],
)
def test_fitnet_refuses_what_it_cannot_lead(size: tuple[int, int], layer: int, message: str):
    with pytest.raises(UserError, match=message):
        built("fitnet", Shapes(5, ((2, *size),), 6), Shapes(5, ((3, 8, 8),), 6), hint_layer=layer)


@pytest.mark.parametrize("method", ["at", "sp", "vid", "nst"])
def test_methods_on_stages_refuse_networks_without(method: str):
    with pytest.raises(UserError, match=rf"^method={method} .* the student has 1 and the teacher 4 feature maps"):
        built(method, Shapes(5, ((2, 8, 8),), 6), STAGES)


@pytest.mark.parametrize(("initial", "minimum"), [(5.0, 1e-5), (0.1, 1e-5), (100.0, 1.0)])
def test_a_variance_starts_where_it_should_and_keeps_its_floor(initial: float, minimum: float):
    guess = Guess(2, 3, initial, minimum)
    torch.testing.assert_close(guess.variance, torch.full((3,), initial))
    student, teacher = torch.randn(4, 2, 4, 4), torch.randn(4, 3, 2, 2)
    for extreme in (-1e4, 1e4):
        guess.variance_logit.data.fill_(extreme)
        loss = guess(student, teacher)
        gradients = torch.autograd.grad(loss, list(guess.parameters()))
        assert torch.isfinite(loss)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert guess.variance.min() >= torch.tensor(minimum)


def test_sizes_that_do_not_divide_are_averaged_down_too():
    value, gradient = measured("at", drawn((2, 3, 7, 5), 1), drawn((2, 2, 3, 8), 2))
    assert value > 0
    assert torch.isfinite(gradient).all()
