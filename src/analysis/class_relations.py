"""What the serialization layer learned about classes, and how much of a hierarchy of classes is in it.

The layer is u = W z + b with W starting as the identity, so w_ij, i != j, is what the logit for distillation of class i
came to take from the student's logit of class j (the paper's Figures 3 and 4). Confusions, of teacher and student, are
matrices of the same kind: the share of the images of class i that were taken for class j.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import permutation_test, rankdata

LARGEST = 10**9
"""Matrix entries that one permutation test looks at: fewer permutations for a thousand classes."""


class Found(NamedTuple):
    """A measure and how often a permutation of the classes reaches it."""

    value: float
    p: float


def relations(weight: np.ndarray) -> np.ndarray:
    """The layer's weights [C, C] between different classes; the diagonal is 0."""
    return weight * ~np.eye(len(weight), dtype=bool)


def confusion(target: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Share of the images of class i that were taken for class j, [C, C], from [N] each; the diagonal is 0."""
    counts = np.zeros((classes, classes))
    np.add.at(counts, (target, predicted), 1)
    return relations(counts / counts.sum(axis=1, keepdims=True).clip(min=1))


def strength(matrix: np.ndarray) -> np.ndarray:
    """How strongly two classes are related, whatever the sign and the direction: (|m_ij| + |m_ji|) / 2, [C, C]."""
    size = np.abs(relations(matrix))
    return (size + size.T) / 2


def order(matrix: np.ndarray, superclasses: Sequence[str] | None = None) -> list[int]:
    """Classes with related ones beside each other, by average linkage of the strengths; superclasses stay together."""
    related = strength(matrix)
    distance = squareform(related.max() - related, checks=False)
    place = np.argsort(leaves_list(linkage(distance, "average", optimal_ordering=True)))
    if superclasses is None:
        return np.argsort(place).tolist()
    of = np.asarray(superclasses)
    middle = {name: place[of == name].mean() for name in set(superclasses)}
    return sorted(range(len(of)), key=lambda c: (middle[superclasses[c]], superclasses[c], place[c]))


def strongest(matrix: np.ndarray, row: int, count: int = 20) -> list[int]:
    """The classes j of the largest |m_ij| in a row i, the largest first (the paper's Figure 4)."""
    others = [int(j) for j in np.argsort(-np.abs(matrix[row]), kind="stable") if j != row]
    return others[:count]


def hierarchy(matrix: np.ndarray, superclasses: Sequence[str]) -> Found | None:
    """How much of the superclasses [C] is in the relations: the AUC, with the p of a permutation test.

    The chance that two classes of one superclass are related more strongly than two of different ones: 0.5 where
    relations know nothing of superclasses, 1 where the hierarchy can be read off them. Permuted are the classes'
    superclasses. None where no superclass has two classes, or all have the same.
    """
    _, of = np.unique(superclasses, return_inverse=True)
    upper = np.triu_indices(len(of), 1)
    ranks = rankdata(strength(matrix)[upper])
    inside = int((of[upper[0]] == of[upper[1]]).sum())
    outside = len(ranks) - inside
    if not inside or not outside:
        return None

    def auc(of: np.ndarray) -> float:
        same = of[upper[0]] == of[upper[1]]
        return (ranks[same].sum() - inside * (inside + 1) / 2) / (inside * outside)

    return _permuted(of, auc)


def likeness(matrix: np.ndarray, other: np.ndarray) -> Found | None:
    """Spearman's correlation of the strengths of two matrices, with the p of Mantel's permutation test.

    None where one of them relates all classes alike.
    """
    upper = np.triu_indices(len(matrix), 1)
    ranks = [rankdata(strength(each)[upper]) for each in (matrix, other)]
    if any(np.ptp(each) == 0 for each in ranks):
        return None
    one, second = ((each - each.mean()) / (each.std() * len(each) ** 0.5) for each in ranks)
    square = np.zeros_like(matrix, dtype=np.float64)
    square[upper] = second
    square += square.T
    return _permuted(np.arange(len(matrix)), lambda place: one @ square[place[upper[0]], place[upper[1]]])


def _permuted(classes: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Found:
    """One-sided, exact where there are few permutations."""
    resamples = min(9999, LARGEST // len(classes) ** 2)
    test = permutation_test(
        (classes,), statistic, permutation_type="pairings", n_resamples=resamples, alternative="greater",
        vectorized=False, rng=np.random.default_rng(0),
    )  # fmt: skip
    return Found(float(test.statistic), float(test.pvalue))
