"""Knowledge distillation by singular value decomposition (KD-SVD): Lee et al., "Self-supervised Knowledge Distillation
Using Singular Value Decomposition", ECCV 2018, arXiv 1807.06819, in RepDistiller's form.

    R_cd = exp(-(v_i,c - v_(i-1),d)^2 / 8) for each of the k vectors
    loss = sum of (R_s - R_t)^2, averaged over the batch, summed over all stages but the first

Notation: v_i are the first k right singular vectors of the features of stage i, as a matrix of pixels by channels. R
relates the channels c of stage i to the channels d of the stage before it.

Each of the teacher's vectors v_t is paired with a vector v_s out of the student's first k + 3: the one with the largest
|cosine|, with the sign of the cosine. Both are weighted by the teacher's singular values, which are scaled to length 1
as a vector.

Singular vectors have no sign of their own, but R depends on the sign. Here the sum of the elements of each v_t is not
negative. Other code takes the solver's sign. Vectors of singular value zero are zero.

The gradient of a vector is exact. It does not exist between equal singular values. There, the part that only rotates
the vectors among themselves is left out, which makes the gradient finite everywhere. Other code sets NaN and
infinity to zero, in values too.
"""

import itertools
from collections.abc import Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor

from src.common.errors import UserError
from src.methods.features import bounded, exact_products, stage_pairs, stage_shapes, unit
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def singular_vectors(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute the first right singular vectors [B, C, n] and values [B, n] of features [B, C, H, W], as [B, H * W, C].

    n is `count`, or less if there are fewer vectors. The values are relative to the largest magnitude of a sample's
    features and have no gradient.
    """
    matrix = bounded(at_least_float32(features), (1, 2, 3)).flatten(2).transpose(1, 2)
    with exact_products(matrix):
        _, values, rows = torch.linalg.svd(matrix.detach(), full_matrices=False)
        vectors = rows.transpose(1, 2)
        chosen = vectors[:, :, :count]
        turned = matrix.transpose(1, 2) @ (matrix @ chosen)
        turned = turned - turned.detach()  # zero, with the gradient of G v at constant v, where G = X^T X
        moved = _moved(turned, vectors, values.square())
    return torch.where(values[:, None, :count] > 0, chosen + moved, 0), values[:, :count]


def _moved(turned: Tensor, vectors: Tensor, eigenvalues: Tensor) -> Tensor:
    """Compute the first-order change of the first n eigenvectors of G [B, C, C].

        dv_i = sum over j != i of v_j (v_j . dG v_i) / (l_i - l_j)

    `turned` [B, C, n] is dG v of each eigenvector. The sum runs over `vectors` [B, C, r] with `eigenvalues` [B, r], and
    over the rest of the space with l_j = 0. Pairs whose eigenvalues are equal up to rounding are left out.
    """
    first = eigenvalues[:, None, : turned.shape[2]]
    rounding = max(vectors.shape[1:]) * torch.finfo(vectors.dtype).eps * eigenvalues[:, :1, None]
    within = vectors.transpose(1, 2) @ turned
    outside = turned - vectors @ within
    return vectors @ _divided(within, first - eigenvalues[:, :, None], rounding) + _divided(outside, first, rounding)


def _divided(change: Tensor, gap: Tensor, rounding: Tensor) -> Tensor:
    apart = gap.abs() > rounding
    return torch.where(apart, change / torch.where(apart, gap, 1), 0)


def compressed(student: Tensor, teacher: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute the weighted vectors v_s and v_t of one stage, both [B, C, n], of features [B, C, H, W].

    The two resolutions may differ. The teacher's vectors have no gradient.
    """
    vectors, values = singular_vectors(teacher.detach(), count)
    candidates, _ = singular_vectors(student, count + 3)
    vectors = torch.where(vectors.sum(1, keepdim=True) < 0, -vectors, vectors)
    with exact_products(vectors):
        cosine = candidates.detach().transpose(1, 2) @ vectors
    best = cosine.abs().argmax(dim=1, keepdim=True)
    sign = cosine.gather(1, best).sign()
    aligned = candidates.gather(2, best.expand(-1, candidates.shape[1], -1)) * sign
    weight = unit(values, dim=1)[:, None]
    return aligned * weight, vectors * weight


def relation(later: Tensor, earlier: Tensor) -> Tensor:
    """Compute R [B, C_later, C_earlier, n] of vectors [B, C, n] of two stages.

    n is the smaller number of vectors.
    """
    count = min(later.shape[2], earlier.shape[2])
    return (-(later[:, :, None, :count] - earlier[:, None, :, :count]).square() / 8).exp()


def svd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], count: int) -> Tensor:
    """Compute KD-SVD of the features of the stages, each [B, C, H, W].

    Channels of student and teacher must agree, resolutions need not.
    """
    stages = [compressed(s, t, count) for s, t in zip(student, teacher, strict=True)]
    losses = [
        (relation(later[0], earlier[0]) - relation(later[1], earlier[1])).square().sum() / len(later[0])
        for earlier, later in itertools.pairwise(stages)
    ]
    return torch.stack(losses).sum()


class KDSVD(Method):
    """cross_entropy_weight * CE + relation_weight * KD-SVD of the stages."""

    needs_features = True

    def __init__(self, *, cross_entropy_weight: float, relation_weight: float, vectors: PositiveInt) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.relation_weight = relation_weight
        self.vectors = vectors

    def allocate(self, networks: Networks) -> None:
        """Allocate nothing. Raises `UserError` if channels differ, or if there is only one stage."""
        shapes = stage_shapes(networks, "kdsvd")
        student, teacher = ([pair[i][0] for pair in shapes] for i in (0, 1))
        if student != teacher or len(shapes) < 2:
            raise UserError(
                f"method=kdsvd compares stages of the same channels and needs two or more, but the student's have "
                f"{student} and the teacher's {teacher}: choose two networks of one family and width."
            )

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "relation": self.relation_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and KD-SVD of the stages after the stem."""
        student, teacher = zip(*stage_pairs(batch), strict=True)
        return {
            "cross_entropy": cross_entropy(batch),
            "relation": svd_loss(student, teacher, self.vectors),
        }
