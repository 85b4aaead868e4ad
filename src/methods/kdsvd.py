"""Knowledge distillation by singular value decomposition (KD-SVD): Lee et al., "Self-supervised Knowledge Distillation
Using Singular Value Decomposition", ECCV 2018, arXiv 1807.06819, in RepDistiller's form.

Features of a sample, as a matrix of pixels by channels, are compressed to their first k right singular vectors. To each
of the teacher's, v_t, belongs that of the student's first k + 3 of the largest |cosine|, v_s, with the sign of the
cosine; both are weighted by the teacher's singular values, brought to length 1 as a vector. Between a stage i and the
one before it stands the matrix R_cd = exp(-(v_i,c - v_(i-1),d)^2 / 8) over pairs of channels (for each of the k
vectors); the loss is the sum of (R_s - R_t)^2, averaged over the batch, summed over the stages but the first.

Singular vectors have no sign of their own, and R depends on it: here each v_t has a sum that is not negative (what the
solver returns elsewhere). Vectors of singular value zero are zero. The gradient of a vector is exact; between equal
singular values, where it does not exist, the part that only turns the vectors among themselves is left out, so that it
is finite everywhere (elsewhere what is not finite is set to zero, in values too).
"""

import itertools
from collections.abc import Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor

from src.errors import UserError
from src.methods.features import bounded, exact_products, stage_pairs, stage_shapes, unit
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def singular_vectors(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors [B, C, n] and values [B, n] of features [B, C, H, W] as [B, H * W, C].

    n is `count` or all that there are. Values are relative to the largest magnitude of a sample's features, and without
    gradient.
    """
    matrix = bounded(at_least_float32(features), (1, 2, 3)).flatten(2).transpose(1, 2)
    with exact_products(matrix):
        _, values, rows = torch.linalg.svd(matrix.detach(), full_matrices=False)
        vectors = rows.transpose(1, 2)
        chosen = vectors[:, :, :count]
        turned = matrix.transpose(1, 2) @ (matrix @ chosen)
        turned = turned - turned.detach()  # zero, with the gradient of G v, G = X^T X, v as a constant
        moved = _moved(turned, vectors, values.square())
    return torch.where(values[:, None, :count] > 0, chosen + moved, 0), values[:, :count]


def _moved(turned: Tensor, vectors: Tensor, eigenvalues: Tensor) -> Tensor:
    """First order change of the first n eigenvectors of G [B, C, C], given `turned`, dG v of each, [B, C, n].

    dv_i = sum over j != i of v_j (v_j . dG v_i) / (l_i - l_j): over `vectors` [B, C, r] with `eigenvalues` [B, r] and,
    with l_j = 0, over what they leave of the space. Pairs that are equal up to rounding are left out.
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
    """v_s and v_t of one stage, both [B, C, n] and weighted, of features [B, C, H, W] of any resolution.

    The teacher's carry no gradient.
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
    """R [B, C_later, C_earlier, n] of vectors [B, C, n] of two stages; of as many vectors as both have."""
    count = min(later.shape[2], earlier.shape[2])
    return (-(later[:, :, None, :count] - earlier[:, None, :, :count]).square() / 8).exp()


def svd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], count: int) -> Tensor:
    """KD-SVD of the features of the stages, each [B, C, H, W]; channels must agree, resolutions need not."""
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

    def build(self, networks: Networks) -> None:
        """Nothing of its own. Raises `UserError` where channels differ, or there is one stage only."""
        shapes = stage_shapes(networks, "kdsvd")
        student, teacher = ([pair[i][0] for pair in shapes] for i in (0, 1))
        if student != teacher or len(shapes) < 2:
            raise UserError(
                f"method=kdsvd compares stages of the same channels, two or more, but the student's have {student} and "
                f"the teacher's {teacher}: choose two networks of one family and width."
            )

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "relation": self.relation_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, KD-SVD of the stages behind the stem."""
        student, teacher = zip(*stage_pairs(batch), strict=True)
        return {
            "cross_entropy": cross_entropy(batch),
            "relation": svd_loss(student, teacher, self.vectors),
        }
