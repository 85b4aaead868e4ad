"""Relations between classes that the serialization layer learned, and how far they follow a hierarchy of classes.

The layer is u = W z + b, where W starts as the identity. The weight w_ij, i != j, says how much the logit for
distillation of class i takes from the student's logit of class j (the paper's Figures 3 and 4). A confusion matrix, of
teacher or student, has the same form: its entry ij is the share of the images of class i that were taken for class j.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import permutation_test, rankdata

LARGEST = 10**9
"""Maximum number of matrix entries that one permutation test reads: a thousand classes get fewer permutations."""


class Found(NamedTuple):
    """The value of a measure, and the share of permutations of the classes that reach it."""

    value: float
    p: float


def relations(weight: np.ndarray) -> np.ndarray:
    """Return the layer's weights [C, C] with a diagonal of 0: the relations between different classes.

    >>> relations(np.array([[1.0, 0.2], [-0.1, 1.0]])).tolist()
    [[0.0, 0.2], [-0.1, 0.0]]
    """
    return weight * ~np.eye(len(weight), dtype=bool)


def confusion(target: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Compute the share of the images of class i that were taken for class j, [C, C], with a diagonal of 0.

    `target` and `predicted` are the classes of N images, [N] each. The row of a class without images is 0.
    """
    counts = np.zeros((classes, classes))
    np.add.at(counts, (target, predicted), 1)
    return relations(counts / counts.sum(axis=1, keepdims=True).clip(min=1))


def strength(matrix: np.ndarray) -> np.ndarray:
    """Compute how strongly two classes are related, in any sign and direction: (|m_ij| + |m_ji|) / 2, [C, C]."""
    size = np.abs(relations(matrix))
    both: np.ndarray = (size + size.T) / 2
    return both


def order(matrix: np.ndarray, superclasses: Sequence[str] | None = None) -> list[int]:
    """Order the classes by average linkage of their strengths, so that related classes are neighbours.

    With `superclasses` [C], the classes of each superclass stay together.
    """
    related = strength(matrix)
    distance = squareform(related.max() - related, checks=False)
    place = np.argsort(leaves_list(linkage(distance, "average", optimal_ordering=True)))
    if superclasses is None:
        return [int(i) for i in np.argsort(place)]
    of = np.asarray(superclasses)
    middle = {name: place[of == name].mean() for name in set(superclasses)}
    return sorted(range(len(of)), key=lambda c: (middle[superclasses[c]], superclasses[c], place[c]))


def strongest(matrix: np.ndarray, row: int, count: int = 20) -> list[int]:
    """Return the classes j with the largest |m_ij| in row i, the largest first (the paper's Figure 4).

    >>> strongest(np.array([[9.0, 0.1, -0.5], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]), row=0)
    [2, 1]
    """
    others = [int(j) for j in np.argsort(-np.abs(matrix[row]), kind="stable") if j != row]
    return others[:count]


def hierarchy(matrix: np.ndarray, superclasses: Sequence[str]) -> Found | None:
    """Measure how well the relations predict the superclasses [C]: the AUC, and the p-value of a permutation test.

    The AUC is the probability that two classes of one superclass are related more strongly than two classes of
    different superclasses. It is 0.5 at chance level, and 1 if the strengths separate the two kinds of pairs. The test
    permutes the superclasses of the classes. Returns None if no superclass has two classes, or if there is only one
    superclass.
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
        return float((ranks[same].sum() - inside * (inside + 1) / 2) / (inside * outside))

    return _permuted(of, auc)


def likeness(matrix: np.ndarray, other: np.ndarray) -> Found | None:
    """Correlate the strengths of two matrices (Spearman), with the p-value of Mantel's permutation test.

    Returns None if one of the matrices relates all pairs of classes equally.
    """
    upper = np.triu_indices(len(matrix), 1)
    ranks = [rankdata(strength(each)[upper]) for each in (matrix, other)]
    if any(np.ptp(each) == 0 for each in ranks):
        return None
    first, second = ((each - each.mean()) / (each.std() * len(each) ** 0.5) for each in ranks)
    square = np.zeros_like(matrix, dtype=np.float64)
    square[upper] = second
    square += square.T
    return _permuted(np.arange(len(matrix)), lambda place: first @ square[place[upper[0]], place[upper[1]]])


def _permuted(classes: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Found:
    """Run a one-sided permutation test. It is exact if there are few permutations."""
    resamples = min(9999, LARGEST // len(classes) ** 2)
    test = permutation_test(
        (classes,), statistic, permutation_type="pairings", n_resamples=resamples, alternative="greater",
        vectorized=False, rng=np.random.default_rng(0),
    )  # fmt: skip
    return Found(float(test.statistic), float(test.pvalue))
