"""CRD, SimKD, ReviewKD, CAT-KD and SRRL: each against a second statement of its formula, and on pairs of networks."""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor, nn

from src.config import build
from src.data.views import normalise
from src.errors import UserError
from src.methods.catkd import class_activation_maps, class_attention_loss
from src.methods.crd import CRD, contrast_loss, draw_negatives
from src.methods.method import Batch, Method, Networks, Prediction, View
from src.methods.reviewkd import Fusion, context_loss
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network, Output, Shapes
from src.models.preactivations import forward_features
from src.models.resnet import resnet8, resnet14
from src.models.shufflenet_v1 import ShuffleV1
from src.models.slimnet import slimnet_300k
from src.models.vgg import vgg8
from src.models.wide_resnet import wrn_16_1
from src.teacher import Teacher
from tests.test_devices import without_batch_norm
from tests.tiny import (
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

CONF = Path(__file__).parents[2] / "conf" / "method"


def configured(name: str, pair: str = "", **options: Any) -> Any:
    """A method as `method=name` configures it for a pair, with few negatives."""
    if name == "crd":
        options = {"negatives": 8, "embedding_size": 6, **options}
    node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options)
    schedule = {"distillation_warmup": 20}
    root = {"model": {"name": pair}, "schedule": schedule, "standardize_logits": False, "method": node}
    return build(OmegaConf.create(root).method, "method")


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dot(x: list[float], y: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def direction(x: list[float]) -> list[float]:
    return [a / math.sqrt(dot(x, x)) for a in x]


# CRD

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, -1, 0, 1, 2])  # one image is held out, and each of the others has 6 negatives
STUDENT, TEACHER = Shapes(3, ((2, 4, 4),), 5), Shapes(3, ((3, 4, 4),), 7)


def crd(labels: Tensor = LABELS, **options: Any) -> CRD:
    torch.manual_seed(0)
    made = configured("crd", **{"negatives": 6, **options})
    made.build(SimpleNamespace(student_shapes=STUDENT, teacher_shapes=TEACHER, train_labels=labels))
    return made


def pooled_batch(student: Tensor, teacher: Tensor, index: list[int]) -> Batch:
    said = [Prediction(drawn((len(x), 3), 9), drawn((len(x), 3), 9), (), x) for x in (student, teacher)]
    positions = torch.tensor(index)
    return Batch((View(torch.zeros(len(index), 3, 4, 4), *said),), LABELS[positions], positions, epoch=0, step=0)


class StatedCRD:
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
        for memory, embeddings in ((self.student, student), (self.teacher, teacher)):
            for i, embedding in zip(index, embeddings, strict=True):
                both = zip(memory[i], direction(embedding), strict=True)
                memory[i] = direction([0.5 * a + 0.5 * b for a, b in both])
        return total / len(index)


def test_crd_is_the_stated_one_over_three_steps():
    method = crd().double()
    stated = StatedCRD(method)
    for step, index in enumerate([[0, 1, 2, 3], [9, 5, 4], [3, 0, 8, 7]]):
        student, teacher = drawn((len(index), 5), step), drawn((len(index), 7), 10 + step)
        embedded = method.student_embedding(student).tolist(), method.teacher_embedding(teacher).tolist()
        value = method.terms(pooled_batch(student, teacher, index))["contrast"]
        assert value.item() == pytest.approx(stated(*embedded, index), rel=1e-12)
        assert value > 0
    torch.testing.assert_close(method.student_memory, torch.tensor(stated.student, dtype=torch.float64))
    torch.testing.assert_close(method.teacher_memory, torch.tensor(stated.teacher, dtype=torch.float64))


def test_crd_has_the_gradient_of_its_value():
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


def test_crd_is_as_large_as_coin_tosses_where_nothing_is_known():
    scores = torch.zeros(2, 1 + 4)
    wanted = -math.log(1 / (1 + 4)) - 4 * math.log(4 / (1 + 4))
    assert contrast_loss(scores, torch.zeros(())).item() == pytest.approx(wanted)


@pytest.mark.parametrize("score", [1e4, -1e4, 1 / 0.07])
def test_contrast_is_finite_and_precise_where_the_critic_is_certain(score: float):
    scores = torch.tensor([[score, -score, -score]], requires_grad=True)
    value = contrast_loss(scores, torch.zeros(()))
    (gradient,) = torch.autograd.grad(value, scores)
    exact = contrast_loss(scores.detach().double(), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    assert torch.isfinite(gradient).all()


def test_negatives_are_of_other_classes_and_of_training_images_and_none_twice():
    torch.manual_seed(0)
    target = torch.arange(3).repeat(200)
    negatives = draw_negatives(LABELS, target, 4)
    labels = LABELS[negatives]
    assert negatives.shape == (600, 4)
    assert not (labels == target[:, None]).any()
    assert not (labels == -1).any()
    assert all(len(row.unique()) == 4 for row in negatives)
    seen = torch.stack([(negatives[target == 0] == i).sum() for i in range(len(LABELS))])
    expected = 200 * 4 / 6  # of six images of other classes; the deviation of such a count is 6.7
    assert (seen[(LABELS > 0)] - expected).abs().max() < 30
    torch.manual_seed(0)
    assert torch.equal(draw_negatives(LABELS, target, 4), negatives)
    assert not torch.equal(draw_negatives(LABELS, target, 4), negatives)


def test_negatives_repeat_where_there_are_too_few():
    torch.manual_seed(0)
    negatives = draw_negatives(LABELS, torch.tensor([0, 1]), 50)
    for target, row in enumerate(negatives):
        assert sorted(row.unique()) == [i for i, label in enumerate(LABELS) if label not in (-1, target)]


def test_crd_memories_hold_what_was_seen_and_nothing_of_images_that_were_not():
    method = crd(momentum=0.0)
    before = weights(method)
    student, teacher = drawn((2, 5), 1, torch.float32), drawn((2, 7), 2, torch.float32)
    method.terms(pooled_batch(student, teacher, [4, 0]))
    for name, said in (("student", student), ("teacher", teacher)):
        memory = weights(method)[f"{name}_memory"]
        embedding = getattr(method, f"{name}_embedding")(said)
        torch.testing.assert_close(memory[[4, 0]], nn.functional.normalize(embedding.detach()))
        others = [i for i in range(10) if i not in (4, 0)]
        assert torch.equal(memory[others], before[f"{name}_memory"][others])


@pytest.mark.parametrize("labels", [[0, 0, -1], [-1, -1, -1]])
def test_crd_refuses_images_of_one_class(labels: list[int]):
    with pytest.raises(UserError, match=r"^method=crd contrasts images of different classes"):
        crd(torch.tensor(labels))


@pytest.mark.slow
def test_crd_on_two_processes_remembers_as_on_one(tmp_path: Path):
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


# Statements of the others


def averaged(channel: list[list[float]], size: int) -> list[list[float]]:
    """A square map of a multiple of `size` pixels, by means of blocks."""
    step, of = len(channel) // size, range(len(channel) // size)
    rows = range(size)
    return [
        [math.fsum(channel[i * step + a][j * step + b] for a in of for b in of) / step**2 for j in rows] for i in rows
    ]


def flat(nested: Any) -> list[float]:
    return [x for part in nested for x in flat(part)] if isinstance(nested, list) else [nested]


def mean_square(one: Any, other: Any) -> float:
    pairs = list(zip(flat(one), flat(other), strict=True))
    return math.fsum((a - b) ** 2 for a, b in pairs) / len(pairs)


def smaller(maps: Any, size: int) -> Any:
    return [[averaged(channel, size) for channel in sample] for sample in maps]


@pytest.mark.parametrize(("student", "teacher"), [(4, 4), (4, 2), (2, 4)])
def test_simkd_compares_the_projected_map_at_the_smaller_resolution(student: int, teacher: int):
    method = configured("simkd")
    method.size, method.projector = (min(student, teacher),) * 2, nn.Conv2d(2, 3, 1, bias=False).double()
    ours, theirs = drawn((2, 2, student, student), 1), drawn((2, 3, teacher, teacher), 2)
    kernel = method.projector.weight.flatten(1).tolist()
    at = range(method.size[0])
    projected = [
        [[[math.fsum(w * c[i][j] for w, c in zip(row, x, strict=True)) for j in at] for i in at] for row in kernel]
        for x in smaller(ours.tolist(), len(at))
    ]
    value = method.terms(batch_of_maps(ours, theirs))["feature"]
    assert value.item() == pytest.approx(mean_square(projected, smaller(theirs.tolist(), len(at))), rel=1e-12)


def batch_of_maps(student: Tensor, teacher: Tensor, teacher_logits: Tensor | None = None) -> Batch:
    """Last maps and the means of them; three classes."""
    said = [
        Prediction(drawn((len(x), 3), 9), drawn((len(x), 3), 9), (), x.mean((2, 3)), (), x) for x in (student, teacher)
    ]
    if teacher_logits is not None:
        said[1] = said[1]._replace(logits=teacher_logits)
    index = torch.arange(len(student))
    return Batch((View(torch.zeros(len(index), 3, 4, 4), *said),), index % 3, index, epoch=0, step=0)


def stated_class_attention(student: Any, teacher: Any, weights: tuple[Any, Any], size: int, normalize: bool) -> float:
    found = []
    for maps, weight in zip((student, teacher), weights, strict=True):
        of_all = []
        for sample in maps:
            pixels = range(len(sample[0]))
            for row in weight:
                cam = [
                    [math.fsum(w * channel[i][j] for w, channel in zip(row, sample, strict=True)) for j in pixels]
                    for i in pixels
                ]
                pooled = flat(averaged(cam, size))
                of_all.append(direction(pooled) if normalize else pooled)
        found.append(of_all)
    return mean_square(*found)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("student", "teacher"), [(4, 4), (2, 4), (4, 2)])
def test_catkd_is_the_stated_one(student: int, teacher: int, normalize: bool):
    ours, theirs = drawn((2, 2, student, student), 1), drawn((2, 3, teacher, teacher), 2)
    weight = drawn((5, 2), 3), drawn((5, 3), 4)

    def loss(ours: Tensor, ours_weight: Tensor) -> Tensor:
        maps = class_activation_maps(ours, ours_weight), class_activation_maps(theirs, weight[1])
        return class_attention_loss(*maps, resolution=2, normalize=normalize)

    lists = ours.tolist(), theirs.tolist(), (weight[0].tolist(), weight[1].tolist())
    assert loss(ours, weight[0]).item() == pytest.approx(stated_class_attention(*lists, 2, normalize), rel=1e-12)
    assert torch.autograd.gradcheck(loss, (ours.requires_grad_(), weight[0].requires_grad_()))


def test_what_changes_no_class_attention():
    ours, theirs = drawn((2, 5, 4, 4), 1), drawn((2, 5, 2, 2), 2)
    scales = torch.linspace(0.1, 9, 10, dtype=torch.float64).view(2, 5, 1, 1)
    normalized = partial(class_attention_loss, resolution=2, normalize=True)
    torch.testing.assert_close(normalized(scales * ours, theirs), normalized(ours, 1e30 * theirs))
    plain = partial(class_attention_loss, resolution=2, normalize=False)
    assert not torch.isclose(plain(2 * ours, theirs), plain(ours, theirs))


def test_a_class_activation_map_is_what_its_logit_is_the_mean_of():
    network = resnet8(CLASSES)
    said = network.forward_features(torch.randn(2, 3, 16, 16))
    assert said.unpooled is not None
    maps = class_activation_maps(said.unpooled, network.classifier_layer.weight)
    torch.testing.assert_close(maps.mean((2, 3)) + network.classifier_layer.bias, said.logits)


def test_catkd_teaches_the_students_classifier_and_neither_owns_nor_saves_it(tmp_path: Path):
    method = configured("catkd", cross_entropy_weight=0.0)
    distiller = tiny_distiller(tiny_data(tmp_path), method, teacher=tiny_teacher())
    assert {name.split(".")[0] for name in method.state_dict()} == {"teacher_classifier"}
    for whole in (distiller, copy.deepcopy(distiller)):
        before = weights(whole.student.classifier_layer)
        tiny_trainer(1, max_steps=2, limit_val_batches=0).fit(whole, datamodule=tiny_data(tmp_path))
        assert not torch.equal(before["weight"], whole.student.classifier_layer.weight)


def stated_context(student: Any, teacher: Any) -> float:
    height, total, weight = len(student[0][0]), mean_square(student, teacher), 1.0
    halves = 1.0
    for size in (4, 2, 1):
        if size < height:
            halves /= 2
            total += halves * mean_square(smaller(student, size), smaller(teacher, size))
            weight += halves
    return total / weight


@pytest.mark.parametrize("size", [8, 4, 2, 1])
def test_context_loss_is_the_stated_one(size: int):
    student, teacher = drawn((2, 3, size, size), 1), drawn((2, 3, size, size), 2)
    wanted = stated_context(student.tolist(), teacher.tolist())
    assert context_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(context_loss, (student.requires_grad_(), teacher))
    assert context_loss(teacher, teacher) == 0


def standardised(x: Tensor) -> Tensor:
    """Batch norm as it begins, of float64 [B, channels, height, width]."""
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / ((x - mean).square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def enlarged(x: Tensor, size: int) -> Tensor:
    """The nearest pixel, of square maps."""
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
    kernel, out = (
        state["expand.0.weight"],
        torch.zeros(len(x), len(state["expand.0.weight"]), size, size, dtype=x.dtype),
    )
    for i, j in itertools.product(range(3), range(3)):
        out += torch.einsum("oc,bchw->bohw", kernel[:, :, i, j], framed[:, :, i : i + size, j : j + size])
    return standardised(out), x


def test_reviewkd_fuses_from_the_deepest_level_up():
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
        total += stated_context(compared.tolist(), teacher.tolist())
    assert method.review(levels).item() == pytest.approx(total, rel=1e-10)


def test_reviewkd_warms_up():
    method = configured("reviewkd", "resnet32x4_to_shufflev2")
    assert method.weights(0) == {"cross_entropy": 1.0, "review": 8.0 / 20}
    assert method.weights(19) == method.weights(239) == {"cross_entropy": 1.0, "review": 8.0}


def test_srrl_is_the_stated_one():
    method = configured("srrl")
    torch.manual_seed(0)
    method.connector, method.classifier = nn.Conv2d(2, 4, 1).double(), nn.Linear(4, 3).double()
    method.pool = Network.pool
    ours, theirs, logits = drawn((3, 2, 4, 4), 1), drawn((3, 4, 2, 2), 2), drawn((3, 3), 3)
    connected = [[math.fsum(flat(channel)) / 16 for channel in sample] for sample in method.connector(ours).tolist()]
    weight, bias = method.classifier.weight.tolist(), method.classifier.bias.tolist()
    answers = [[dot(row, x) + b for row, b in zip(weight, bias, strict=True)] for x in connected]
    terms = method.terms(batch_of_maps(ours, theirs, logits))
    wanted = [[math.fsum(flat(channel)) / 4 for channel in sample] for sample in theirs.tolist()]
    assert terms["feature"].item() == pytest.approx(mean_square(connected, wanted), rel=1e-12)
    assert terms["regression"].item() == pytest.approx(mean_square(answers, logits.tolist()), rel=1e-12)


# The methods

OWN: dict[str, set[str]] = {
    "crd": {"student_embedding", "teacher_embedding"},
    "simkd": {"projector"},
    "reviewkd": {"fusions"},
    "catkd": set(),
    "srrl": {"connector"},
}
"""What a method trains beside the student."""
PUBLISHED: list[tuple[str, str, dict[str, float]]] = [
    ("crd", "wrn40_2_to_wrn16_2", {"cross_entropy": 1.0, "contrast": 0.8}),
    ("simkd", "resnet32x4_to_resnet8x4", {"feature": 1.0}),
    ("reviewkd", "wrn40_2_to_wrn16_2", {"cross_entropy": 1.0, "review": 5.0}),
    ("reviewkd", "resnet34_to_resnet18", {"cross_entropy": 1.0, "review": 1.0}),
    ("catkd", "wrn40_2_to_wrn16_2", {"cross_entropy": 1.0, "class_attention": 12.0}),
    ("catkd", "wrn40_2_to_shufflev1", {"cross_entropy": 1.0, "class_attention": 80.0}),
    ("srrl", "resnet34_to_resnet18", {"cross_entropy": 1.0, "feature": 1.0, "regression": 1.0}),
]
every_method = pytest.mark.parametrize("method", OWN)


@pytest.mark.parametrize(("name", "pair", "wanted"), PUBLISHED)
def test_published_weights(name: str, pair: str, wanted: dict[str, float]):
    made = configured(name, pair)
    assert made.weights(100) == wanted
    assert made.needs_features
    assert made.needs_teacher
    assert not made.distils_logits


taught_by = functools.cache(tiny_teacher)
PAIRS = [(resnet14, resnet8), (wrn_16_1, ShuffleV1), (vgg8, MobileNetV2)]


@every_method
@pytest.mark.parametrize(("new_teacher", "new_student"), PAIRS, ids=lambda make: make.__name__)
def test_two_steps_train_all_that_a_method_adds(method: str, new_teacher: Any, new_student: Any, tmp_path: Path):
    """The pairs of other families differ in width, resolution and number of stages."""
    made = configured(method) if method == "simkd" else configured(method, cross_entropy_weight=0.0)
    distiller = tiny_distiller(tiny_data(tmp_path), made, teacher=taught_by(new_teacher), new_student=new_student)
    before, frozen = weights(distiller), {name for name, p in made.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name, _ in made.named_parameters() if name not in frozen} == OWN[method]
    trainer = tiny_trainer(1, max_steps=2, limit_val_batches=1)
    trainer.fit(distiller, datamodule=tiny_data(tmp_path))
    assert trainer.global_step == 2
    after = weights(distiller)
    assert all(torch.isfinite(x).all() for x in after.values())
    for name, _ in made.named_parameters():
        assert torch.equal(before[f"method.{name}"], after[f"method.{name}"]) == (name in frozen), name
    names = [f"student.{name}" for name, _ in distiller.student.named_parameters()]
    assert not all(torch.equal(before[name], after[name]) for name in names)


@every_method
def test_an_interrupted_run_goes_on_to_the_same_bits(method: str, tmp_path: Path):
    states = []
    for epochs, resumed in ((1, None), (2, str(tmp_path / "last.ckpt")), (2, None)):
        distiller = tiny_distiller(tiny_data(tmp_path), configured(method), teacher=taught_by())
        checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
        options = {"enable_checkpointing": True, "callbacks": [checkpoint]} if epochs == 1 else {}
        trainer = tiny_trainer(epochs, limit_val_batches=0, **options)
        trainer.fit(distiller, datamodule=tiny_data(tmp_path), ckpt_path=resumed)
        states.append(weights(distiller))
    first, resumed_state, whole = states
    assert same(resumed_state, whole)
    assert not same(first, whole)


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "large": lambda x: 1e4 * x,
    "tiny": lambda x: 1e-30 * x,
    "one sample": lambda x: x[:1],
}


def seen(student: Network, teacher: Teacher, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Batch:
    """What both say of four images, each feature changed, the student's as leaves for gradients."""
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [forward_features(student, normalise(images, MEAN, STD), True), teacher(images, True)]
    said = []
    for output in outputs:
        features, before = ([change(x).to(dtype) for x in maps] for maps in (output.features, output.preactivations))
        assert output.unpooled is not None
        pooled, unpooled, logits = (change(x).to(dtype) for x in (output.pooled, output.unpooled, output.logits))
        said.append(Prediction(logits, logits, tuple(features), pooled, tuple(before), unpooled))
    index = torch.arange(len(said[0].logits))
    return Batch((View(change(images.float()), *said),), index % CLASSES, index, epoch=0, step=0)


def made_for(method: str, student: Network, teacher: Teacher) -> Method:
    torch.manual_seed(0)
    made = configured(method)
    labels = torch.arange(12) % CLASSES
    made.build(Networks(student, teacher, (3, 16, 16), labels, partial(resnet8, CLASSES)))
    return made


@every_method
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_terms_and_gradients_are_finite_at_extremes(method: str, extreme: str, dtype: torch.dtype):
    torch.manual_seed(0)
    student, teacher = resnet8(CLASSES), taught_by()
    made = made_for(method, student, teacher)
    batch = seen(student, teacher, EXTREMES[extreme], dtype)
    leaves = [batch.student.pooled, batch.student.unpooled, *batch.student.features]
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        terms = {name: term for name, term in made.terms(batch).items() if name != "cross_entropy"}
    assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values())
    trained = [p for p in made.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(terms.values()), [*leaves, *trained], allow_unused=True)  # type: ignore[arg-type]
    assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient is not None for gradient in gradients[: len(leaves)])
    assert all(gradient is not None for gradient in gradients[len(leaves) :])


def test_reviewkd_of_one_sample_is_that_of_it_twice():
    torch.manual_seed(0)
    student, teacher = resnet8(CLASSES), taught_by()
    once, twice = made_for("reviewkd", student, teacher), made_for("reviewkd", student, teacher)
    one, two = (seen(student, teacher, change, torch.float32) for change in (lambda x: x[:1], lambda x: x[[0, 0]]))
    torch.testing.assert_close(once.terms(one)["review"], twice.terms(two)["review"])


@pytest.mark.parametrize("before_relu", [False, True])
def test_reviewkd_reads_the_teacher_before_its_relu_and_the_student_as_it_is_told(before_relu: bool):
    torch.manual_seed(0)
    student, teacher = resnet8(CLASSES), taught_by()
    made = configured("reviewkd", student_preactivations=before_relu)
    made.build(Networks(student, teacher, (3, 16, 16), torch.arange(4), partial(resnet8, CLASSES)))
    batch = seen(student, teacher, torch.clone, torch.float32)
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


# SimKD's predictor


class Answer(nn.Module):
    """Says the same map whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, _: Tensor) -> Tensor:
        return self.answer


@pytest.mark.parametrize("new_teacher", [resnet14, wrn_16_1, vgg8, slimnet_300k], ids=lambda make: make.__name__)
def test_a_perfect_projector_answers_as_the_teacher_does(new_teacher: Any):
    teacher, student, method = tiny_teacher(new_teacher), resnet8(CLASSES).eval(), configured("simkd")
    method.build(Networks(student, teacher, (3, 16, 16), torch.arange(4), partial(resnet8, CLASSES)))
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    answer = teacher(images)
    assert answer.unpooled is not None
    method.projector = Answer(answer.unpooled)
    predictor = method.predictor(student)
    torch.testing.assert_close(predictor(normalise(images, MEAN, STD)), answer.logits)
    assert set(dict(predictor.named_children())) == {"student", "projector", "classifier"}


def test_simkd_scores_its_predictor_and_leaves_both_classifiers_as_they_were(tmp_path: Path):
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
def test_simkd_trains_on_two_processes(tmp_path: Path):
    with by_threads(1):
        distiller = tiny_distiller(tiny_data(tmp_path), configured("simkd"), teacher=tiny_teacher())
        trainer = tiny_trainer(1, devices=2, strategy="ddp_fork")
        trainer.fit(distiller, datamodule=tiny_data(tmp_path))
    assert torch.isfinite(trainer.callback_metrics["train/loss_epoch"])


# What is refused


class Unusual(Network):
    """Classifies by the root of the mean colour, with or without telling the map."""

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


@pytest.mark.parametrize("method", ["simkd", "catkd", "srrl"])
@pytest.mark.parametrize("tells", [True, False])
def test_networks_whose_classifier_sees_something_else_are_refused(method: str, tells: bool):
    usual, unusual = resnet8(CLASSES), Unusual(tells)
    for whose, student, teacher in (("student", unusual, usual), ("teacher", usual, unusual)):
        networks = Networks(
            student, Teacher(teacher, MEAN, STD), (3, 16, 16), torch.arange(4), partial(resnet8, CLASSES)
        )
        with pytest.raises(UserError, match=rf"^method={method}: the {whose}'s classifier does not see its last"):
            configured(method).build(networks)


def test_reviewkd_refuses_networks_without_stages():
    networks = Networks(Unusual(True), taught_by(), (3, 16, 16), torch.arange(4), partial(resnet8, CLASSES))
    with pytest.raises(UserError, match=r"^method=reviewkd .* the student has 1 and the teacher 4 feature maps"):
        configured("reviewkd").build(networks)
