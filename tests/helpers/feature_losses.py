"""The losses on features, each beside an independent statement of its formula: the registry of the loss tests.

A new method on features is entered in `FEATURE_LOSSES` under its name in `conf/method`, or "name, part".
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from src.methods.ab import boundary_loss
from src.methods.at import attention_loss
from src.methods.catkd import class_activation_maps, class_attention_loss
from src.methods.cc import congruence_loss
from src.methods.crd import CRD, contrast_loss
from src.methods.features import at_one_resolution, unit
from src.methods.fitnet import hint_loss
from src.methods.fsp import fsp_loss
from src.methods.ft import factor_loss
from src.methods.kdsvd import svd_loss
from src.methods.method import at_least_float32
from src.methods.nst import selectivity_loss
from src.methods.ofd import partial_distance
from src.methods.pkt import transfer_loss
from src.methods.reviewkd import context_loss
from src.methods.rkd import angle_loss, distance_loss
from src.methods.sp import similarity_loss
from src.methods.vid import gaussian_loss
from tests.helpers import feature_statements as stated
from tests.helpers.features import Nested, drawn

Maps = Sequence[Tensor]
Shape = tuple[int, ...]


class FeatureLoss(NamedTuple):
    """A loss, its statement, and the shapes of the features that it is tested on."""

    implementation: Callable[[Maps, Maps], Tensor]
    """Takes the feature maps of student and teacher."""
    statement: Callable[[Nested, Nested], float]
    student: tuple[Shape, ...]
    teacher: tuple[Shape, ...]
    scale_free: bool = False
    """True if the loss does not depend on the scale of all features of a network."""
    exact: bool = True
    """False if a singular value decomposition limits the precision."""


def of_one_map(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Maps, Maps], Tensor]:
    """Turn a loss of two maps into one of two lists of maps."""

    def from_lists(student: Maps, teacher: Maps) -> Tensor:
        return loss(student[0], teacher[0])

    return from_lists


def like(values: list[float], features: Tensor) -> Tensor:
    """Make a tensor in the precision in which the losses compute."""
    return at_least_float32(torch.tensor(values, dtype=features.dtype))


def vid_loss(guess: Tensor, teacher: Tensor) -> Tensor:
    return gaussian_loss(guess, like(stated.VARIANCE, guess), teacher)


def ofd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return partial_distance(student, teacher, like(stated.MARGIN, student))


def simkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute SimKD's loss, averaged in float32. The method averages in the precision of the maps."""
    return hint_loss(*at_one_resolution(at_least_float32(student), at_least_float32(teacher)))


CRITIC = CRD(
    cross_entropy_weight=1.0, contrast_weight=1.0, embedding_size=3, negatives=3, temperature=0.5, momentum=0.5
)
NEGATIVES, MEAN_E = drawn((3, 3), 5), 1.3


def crd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Contrast each student embedding with the teacher's of the same image, and with three others."""
    student, teacher = (unit(at_least_float32(x), dim=1) for x in (student, teacher))
    memory = torch.cat([teacher, unit(NEGATIVES.to(teacher.dtype), dim=1)])
    own, others = torch.arange(len(student)), torch.arange(len(NEGATIVES)) + len(student)
    chosen = torch.cat([own[:, None], others.expand(len(student), -1)], dim=1)
    return contrast_loss(CRITIC.scores(student, memory, chosen), torch.tensor(MEAN_E, dtype=student.dtype).log())


CLASSIFIERS = drawn((5, 2), 3), drawn((5, 3), 4)


def catkd_loss(student: Tensor, teacher: Tensor, normalize: bool) -> Tensor:
    weights = (weight.to(at_least_float32(student).dtype) for weight in CLASSIFIERS)
    maps = [class_activation_maps(*pair) for pair in zip((student, teacher), weights, strict=True)]
    return class_attention_loss(maps[0], maps[1], resolution=2, normalize=normalize)


def stated_catkd(student: Nested, teacher: Nested, normalize: bool) -> float:
    return stated.catkd(student, teacher, (CLASSIFIERS[0].tolist(), CLASSIFIERS[1].tolist()), 2, normalize)


def of_vectors(student: int, teacher: int) -> tuple[tuple[Shape], tuple[Shape]]:
    """Four samples of vectors of the given sizes."""
    return ((4, student),), ((4, teacher),)


def of_maps(student: Shape, teacher: Shape, batch: int = 2) -> tuple[tuple[Shape], tuple[Shape]]:
    """Samples of maps of (channels, size)."""
    (s, n), (t, m) = student, teacher
    return ((batch, s, n, n),), ((batch, t, m, m),)


STAGES = ((2, 2, 4, 4), (2, 3, 4, 4), (2, 5, 2, 2))
HALF = ((2, 2, 2, 2), (2, 3, 2, 2), (2, 5, 1, 1))
attention = of_one_map(partial(attention_loss, power=2.0))
selectivity = of_one_map(selectivity_loss)
FEATURE_LOSSES: dict[str, FeatureLoss] = {
    "fitnet": FeatureLoss(of_one_map(hint_loss), stated.fitnet, *of_maps((3, 2), (3, 2), batch=4)),
    "at": FeatureLoss(attention, stated.at, *of_maps((3, 2), (2, 2), batch=3), scale_free=True),
    "at, student larger": FeatureLoss(attention, stated.at, *of_maps((2, 4), (3, 2), batch=3), scale_free=True),
    "at, teacher larger": FeatureLoss(attention, stated.at, *of_maps((2, 2), (3, 4), batch=3), scale_free=True),
    "sp": FeatureLoss(of_one_map(similarity_loss), stated.sp, *of_maps((2, 2), (3, 1), batch=4), scale_free=True),
    "cc": FeatureLoss(of_one_map(congruence_loss), stated.cc, *of_vectors(3, 3)),
    "vid": FeatureLoss(of_one_map(vid_loss), stated.vid, *of_maps((3, 2), (3, 2))),
    "rkd, distance": FeatureLoss(of_one_map(distance_loss), stated.rkd_distance, *of_vectors(3, 5), scale_free=True),
    "rkd, angle": FeatureLoss(of_one_map(angle_loss), stated.rkd_angle, *of_vectors(3, 5), scale_free=True),
    "pkt": FeatureLoss(of_one_map(transfer_loss), stated.pkt, *of_vectors(3, 5), scale_free=True),
    "nst": FeatureLoss(selectivity, stated.nst, *of_maps((3, 2), (2, 2)), scale_free=True),
    "nst, student larger": FeatureLoss(selectivity, stated.nst, *of_maps((2, 4), (3, 2)), scale_free=True),
    "nst, teacher larger": FeatureLoss(selectivity, stated.nst, *of_maps((2, 2), (3, 4)), scale_free=True),
    "crd": FeatureLoss(
        of_one_map(crd_loss),
        partial(stated.contrast, negatives=NEGATIVES.tolist(), temperature=0.5, mean_e=MEAN_E),
        *of_vectors(3, 3),
        scale_free=True,
    ),
    "simkd": FeatureLoss(of_one_map(simkd_loss), stated.simkd, *of_maps((3, 4), (3, 2))),
    "reviewkd": FeatureLoss(of_one_map(context_loss), stated.context, *of_maps((2, 8), (2, 8))),
    "catkd": FeatureLoss(
        of_one_map(partial(catkd_loss, normalize=True)),
        partial(stated_catkd, normalize=True),
        *of_maps((2, 4), (3, 2)),
        scale_free=True,
    ),
    "catkd, not normalized": FeatureLoss(
        of_one_map(partial(catkd_loss, normalize=False)),
        partial(stated_catkd, normalize=False),
        *of_maps((2, 2), (3, 4)),
    ),
    "srrl": FeatureLoss(of_one_map(hint_loss), stated.fitnet, *of_vectors(3, 3)),
    "ofd": FeatureLoss(of_one_map(ofd_loss), stated.ofd, *of_maps((3, 2), (3, 2), batch=3)),
    "ab": FeatureLoss(of_one_map(partial(boundary_loss, margin=1.0)), stated.ab, *of_maps((3, 2), (3, 2), batch=3)),
    "fsp": FeatureLoss(fsp_loss, stated.fsp, STAGES, STAGES),
    "fsp, student larger": FeatureLoss(fsp_loss, stated.fsp, STAGES, HALF),
    "ft": FeatureLoss(
        of_one_map(partial(factor_loss, whole=False)),
        partial(stated.ft, whole=False),
        *of_maps((3, 2), (3, 4), batch=3),
        scale_free=True,
    ),
    "ft, whole factor": FeatureLoss(
        of_one_map(partial(factor_loss, whole=True)),
        partial(stated.ft, whole=True),
        *of_maps((3, 4), (3, 2), batch=3),
        scale_free=True,
    ),
    "kdsvd": FeatureLoss(
        partial(svd_loss, count=1), partial(stated.kdsvd, count=1), STAGES, STAGES, scale_free=True, exact=False
    ),
    "kdsvd, two vectors": FeatureLoss(
        partial(svd_loss, count=2), partial(stated.kdsvd, count=2), STAGES, STAGES, scale_free=True, exact=False
    ),
}


def inputs(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Draw features in float64 for a loss."""
    loss = FEATURE_LOSSES[name]
    return [drawn(x, 1 + i) for i, x in enumerate(loss.student)], [drawn(x, 11 + i) for i, x in enumerate(loss.teacher)]


def measured(name: str, student: Maps, teacher: Maps, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """Compute a loss and its gradient at the student's features, flat, by the implementation."""
    student = [x.detach().clone().requires_grad_() for x in student]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = FEATURE_LOSSES[name].implementation(student, teacher)
    gradients = torch.autograd.grad(value, student)
    return value.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def slope(name: str, student: Maps, teacher: Maps, step: float = 1e-5) -> Tensor:
    """Compute the gradient of the statement by central differences, flat."""
    statement, other = FEATURE_LOSSES[name].statement, [x.tolist() for x in teacher]
    found = []
    for stage, x in enumerate(student):
        for i in range(x.numel()):
            values = []
            for sign in (1, -1):
                moved = x.clone()
                moved.view(-1)[i] += sign * step
                features = [(moved if j == stage else y).tolist() for j, y in enumerate(student)]
                values.append(statement(features, other))
            found.append((values[0] - values[1]) / (2 * step))
    return torch.tensor(found, dtype=torch.float64)
