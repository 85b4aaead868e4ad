"""Every loss on features against an independent statement of its formula, and what every method on features reads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from src.common.errors import UserError
from src.models.network import Shapes
from src.models.resnet import resnet8, resnet14
from src.models.vgg import vgg8
from tests.helpers.feature_losses import FEATURE_LOSSES, inputs, measured, slope
from tests.helpers.features import (
    Move,
    negate,
    reverse_channels,
    reverse_rows,
    reverse_samples,
    rotate_features,
    rotate_samples,
    scale,
    scale_each_channel,
    scale_each_sample,
    shift,
)
from tests.helpers.methods import (
    FEATURE_METHODS,
    STEPS,
    NewNetwork,
    changed_batch,
    configured,
    leaves,
    networks_of,
    on_shapes,
    taught_by,
)
from tests.helpers.tiny import CLASSES

every_loss = pytest.mark.parametrize("name", FEATURE_LOSSES)
every_method = pytest.mark.parametrize("method", FEATURE_METHODS)


# The losses


@every_loss
def test_value_and_gradient_match_the_statement(name: str):
    loss, (student, teacher) = FEATURE_LOSSES[name], inputs(name)
    value, gradient = measured(name, student, teacher)
    wanted = loss.statement([x.tolist() for x in student], [x.tolist() for x in teacher])
    assert value.item() == pytest.approx(wanted, rel=1e-12 if loss.exact else 1e-9)
    assert value > 0
    quotients = slope(name, student, teacher)
    rtol, atol = (1e-6, 1e-8) if loss.exact else (1e-5, 1e-6)
    torch.testing.assert_close(gradient, quotients, rtol=rtol, atol=atol * quotients.abs().max().item())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_losses_are_computed_in_float32_also_under_autocast(name: str, dtype: torch.dtype):
    student, teacher = ([x.to(dtype) for x in maps] for maps in inputs(name))
    value, gradient = measured(name, student, teacher)
    exact, exact_gradient = measured(name, [x.double() for x in student], [x.double() for x in teacher])
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    rounding = 1e-5 if FEATURE_LOSSES[name].exact else 1e-4
    torch.testing.assert_close(value.double(), exact, rtol=rounding, atol=0)
    bound = (4 * torch.finfo(dtype).eps + rounding) * exact_gradient.abs().max().item() + torch.finfo(dtype).tiny
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=bound)
    inside_value, inside_gradient = measured(name, student, teacher, autocast=True)
    assert torch.equal(inside_value, value)
    assert torch.equal(inside_gradient, gradient)


def each_sample(x: Tensor, factors: Tensor) -> Tensor:
    return x * factors.view(-1, *[1] * (x.ndim - 1))


EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "one sample zero": lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]),
    "one sample twice": lambda x: torch.cat([x[:1], x[:1], x[2:]]),
    "opposite samples": lambda x: torch.cat([x[:1], -x[:1], x[2:]]),
    "one channel": lambda x: x * torch.eye(x.shape[1])[0].view(1, -1, *[1] * (x.ndim - 2)),
    "equal singular values": lambda x: (
        torch.eye(x.shape[1], x[0, 0].numel()).view(1, *x.shape[1:]).expand_as(x).contiguous()
    ),
    "large": lambda x: 1e4 * x,
    "huge": lambda x: 1e30 * x,
    "tiny": lambda x: 1e-30 * x,
    "from tiny to huge": lambda x: each_sample(x, 10.0 ** torch.linspace(-30, 30, len(x))),
    "far from zero": lambda x: 1e4 + x,
    "one sample": lambda x: x[:1],
}


@pytest.mark.parametrize(
    ("name", "extreme"),
    # float32 cannot hold a squared distance of features of 1e30
    [(name, x) for name, loss in FEATURE_LOSSES.items() for x in EXTREMES if loss.scale_free or "huge" not in x],
)
def test_losses_and_gradients_are_finite_at_extremes(name: str, extreme: str):
    student, teacher = ([x.float() for x in maps] for maps in inputs(name))
    moved_student, moved_teacher = ([EXTREMES[extreme](x) for x in maps] for maps in (student, teacher))
    pairs = [(moved_student, moved_teacher)]
    if extreme != "one sample":
        pairs += [(moved_student, teacher), (student, moved_teacher)]
    for pair in pairs:
        value, gradient = measured(name, *pair)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


AT_THE_TEACHER = dict.fromkeys(
    ("fitnet", "at", "sp", "cc", "rkd, distance", "rkd, angle", "pkt", "nst", "reviewkd", "srrl"), 1e-12
)
AT_THE_TEACHER |= dict.fromkeys(("fsp", "kdsvd", "kdsvd, two vectors"), 1e-20) | {"ft": 0.0, "ft, whole factor": 0.0}
"""How far from zero rounding may bring a loss where the student's features are the teacher's."""
FLOOR = {"pkt": 1e-6}
"""The same for the gradient, where the loss has a floor."""


@pytest.mark.parametrize("name", AT_THE_TEACHER)
def test_a_student_with_the_features_of_its_teacher_has_nothing_to_learn(name: str):
    student, _ = inputs(name)
    value, gradient = measured(name, student, student)
    assert abs(value.item()) <= AT_THE_TEACHER[name]
    assert gradient.abs().max() < FLOOR.get(name, 1e-9)


ALONE: dict[str, tuple[Move, ...]] = {
    "at": (reverse_channels, scale, scale_each_sample),
    "sp": (rotate_features, scale),
    "rkd, distance": (rotate_features, scale, shift),
    "rkd, angle": (rotate_features, scale, shift),
    "pkt": (rotate_features, scale, scale_each_sample),
    "nst": (reverse_channels, scale, scale_each_sample, scale_each_channel),
    "crd": (scale, scale_each_sample),
    "catkd": (scale, scale_each_sample),
    "ft": (reverse_channels, scale, negate),
    "ft, whole factor": (scale,),
    "fsp": (reverse_rows, negate),
    "kdsvd": (reverse_rows, scale, negate),
}
"""Changes of one network's features that leave the loss as it is."""
TOGETHER: dict[str, tuple[Move, ...]] = {
    "fitnet": (reverse_channels, reverse_rows, rotate_samples, rotate_features, shift),
    "at": (reverse_rows, rotate_samples),
    "sp": (rotate_samples,),
    "cc": (shift, reverse_samples),
    "vid": (reverse_rows, rotate_samples, shift),
    "rkd, distance": (rotate_samples,),
    "rkd, angle": (rotate_samples,),
    "pkt": (rotate_samples,),
    "nst": (reverse_rows, rotate_samples),
    "crd": (rotate_samples,),
    "simkd": (reverse_channels, reverse_rows, rotate_samples),
    "reviewkd": (reverse_channels, reverse_rows, rotate_samples, shift),
    "catkd": (reverse_rows, rotate_samples),
    "catkd, not normalized": (reverse_rows, rotate_samples),
    "srrl": (reverse_channels, rotate_samples, rotate_features, shift),
    "ab": (reverse_channels, reverse_rows, rotate_samples, negate),
    "ofd": (reverse_rows, rotate_samples),
    "ft": (reverse_rows, rotate_samples),
    "ft, whole factor": (reverse_channels, reverse_rows, rotate_samples),
    "fsp": (reverse_channels, rotate_samples),
    "kdsvd": (reverse_channels, rotate_samples),
}
"""Changes of both networks' features that leave the loss as it is, while a change of one of them does not."""


def changes(table: dict[str, tuple[Move, ...]]) -> pytest.MarkDecorator:
    pairs = [(name, move) for name, moves in table.items() for move in moves]
    return pytest.mark.parametrize(("name", "move"), pairs, ids=[f"{name}-{move.__name__}" for name, move in pairs])


def tolerance(name: str) -> float:
    return 1e-10 if FEATURE_LOSSES[name].exact else 1e-9


@changes(ALONE)
def test_changes_of_one_network_that_do_not_matter(name: str, move: Move):
    loss, (student, teacher) = FEATURE_LOSSES[name].implementation, inputs(name)
    value = loss(student, teacher)
    for pair in (([move(x) for x in student], teacher), (student, [move(x) for x in teacher])):
        torch.testing.assert_close(loss(*pair), value, rtol=tolerance(name), atol=1e-14)


@changes(TOGETHER)
def test_changes_of_both_networks_that_do_not_matter(name: str, move: Move):
    loss, (student, teacher) = FEATURE_LOSSES[name].implementation, inputs(name)
    moved, value = [move(x) for x in student], loss(student, teacher)
    torch.testing.assert_close(loss(moved, [move(x) for x in teacher]), value, rtol=tolerance(name), atol=1e-14)
    assert not torch.isclose(loss(moved, teacher), value, rtol=1e-3)


def test_the_tables_of_this_file_name_losses_that_exist():
    for table in (AT_THE_TEACHER, ALONE, TOGETHER, FLOOR):
        assert not set(table) - set(FEATURE_LOSSES)


# The methods

STAGES = {f"features {i}" for i in (1, 2, 3)}
BEFORE_RELU = {f"preactivations {i}" for i in (1, 2, 3)}
READS: dict[str, set[str]] = {
    "fitnet": {"features 2"},
    "at": STAGES,
    "sp": {"features 3"},
    "cc": {"pooled"},
    "vid": STAGES,
    "rkd": {"pooled"},
    "pkt": {"pooled"},
    "nst": STAGES,
    "crd": {"pooled"},
    "simkd": {"unpooled"},
    "reviewkd": STAGES | {"pooled"},
    "catkd": {"unpooled"},
    "srrl": {"unpooled"},
    "ofd": BEFORE_RELU,
    "ab": BEFORE_RELU,
    "fsp": STAGES | {"features 0"},
    "ft": {"features 3"},
    "kdsvd": STAGES,
}
"""What of the student's output a method reads, beside the logits for cross-entropy. "features 0" are the stem's."""


def test_the_table_of_what_is_read_has_every_method():
    assert set(READS) == set(FEATURE_METHODS), "enter the method in READS in tests/methods/test_every_feature_method.py"


TEACHERS: dict[str, NewNetwork] = {"as many stages": resnet14, "more stages": vgg8}


@pytest.mark.parametrize(
    ("method", "teacher"),
    [(method, name) for method in FEATURE_METHODS for name in TEACHERS if len(STEPS[method].pairs) > 1 or "as" in name],
)
@pytest.mark.parametrize("batch_size", [4, 1])
def test_terms_read_what_they_should(method: str, teacher: str, batch_size: int):
    """Methods that need networks of one family see the first teacher only."""
    new_teacher = TEACHERS[teacher]
    torch.manual_seed(0)
    student, made = resnet8(CLASSES), configured(method)
    made.allocate(networks_of(new_teacher, student=student))
    batch = changed_batch(student, taught_by(new_teacher), lambda x: x[:batch_size])
    read = set()
    named = leaves(batch.student)
    for part in (made, *(stage.method for stage in made.stages())):
        terms = part.terms(batch)
        assert set(terms) == set(part.weights(0))
        for name, term in terms.items():
            assert term.shape == ()
            assert torch.isfinite(term)
            if not term.requires_grad:
                continue
            gradients = torch.autograd.grad(term, list(named.values()), retain_graph=True, allow_unused=True)
            found = {leaf for leaf, gradient in zip(named, gradients, strict=True) if gradient is not None}
            if name == "cross_entropy":
                assert found == {"logits"}
            else:
                read |= found
    assert read == READS[method]


@every_method
def test_methods_ask_for_the_features_that_they_read(method: str):
    """The main stages of FSP and AB read none. Their first stages are tested with the steps of every method."""
    made = configured(method)
    assert made.needs_features == (method not in {"fsp", "ab"})
    assert made.needs_preactivations == (method in {"ofd", "reviewkd"})
    assert made.needs_teacher
    assert not made.distils_logits


MODULE_EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    name: EXTREMES[name] for name in ("zero", "constant", "large", "tiny", "one sample")
}


@every_method
@pytest.mark.parametrize("extreme", MODULE_EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_terms_and_gradients_are_finite_at_extremes(method: str, extreme: str, dtype: torch.dtype):
    """All that the networks compute is extreme, and gradients reach the features and the method's own parameters."""
    torch.manual_seed(0)
    student, made = resnet8(CLASSES), configured(method)
    made.allocate(networks_of(student=student))
    batch = changed_batch(student, taught_by(resnet14), MODULE_EXTREMES[extreme], dtype)
    named = list(leaves(batch.student).values())
    stages = zip((stage.method for stage in made.stages()), STEPS[method].first, strict=True)
    for part, trains in ((made, STEPS[method].trains), *stages):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            terms = {name: term for name, term in part.terms(batch).items() if name != "cross_entropy"}
        assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values())
        if not terms:
            continue
        trained = [p for name, p in made.named_parameters() if name.split(".")[0] in trains]
        gradients = torch.autograd.grad(sum(terms.values()), [*named, *trained], allow_unused=True)
        assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)
        assert ("student" not in trains) == all(gradient is None for gradient in gradients[: len(named)])
        assert all(gradient is not None for gradient in gradients[len(named) :])


# Refusals

STEM = Shapes(5, ((2, 8, 8),), 6)
FOUR_MAPS = Shapes(5, ((2, 8, 8), (3, 8, 8), (4, 4, 4), (5, 2, 2)), 6)


@pytest.mark.parametrize("method", ["at", "sp", "vid", "nst", "reviewkd", "ofd", "ab", "ft", "kdsvd"])
def test_networks_without_stages_are_refused(method: str):
    with pytest.raises(UserError, match=rf"^method={method} .* the student has 1 and the teacher 4 feature maps"):
        on_shapes(method, STEM, FOUR_MAPS)


@pytest.mark.parametrize("method", ["ofd", "fsp", "ab", "ft", "kdsvd"])
def test_two_networks_without_stages_are_refused(method: str):
    with pytest.raises(UserError, match=rf"^method={method} compares "):
        on_shapes(method, STEM, STEM)
