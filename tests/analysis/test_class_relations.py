"""Relations between classes: the measures of a hierarchy, against their definitions, and the order of the classes."""

import itertools

import numpy as np
import pytest

from src.analysis.class_relations import confusion, hierarchy, likeness, order, relations, strength, strongest

SUPERCLASSES = ["animal", "plant", "vehicle"] * 4
NAMES = [f"{name} {i}" for i, name in enumerate(SUPERCLASSES)]
SAME = np.equal.outer(SUPERCLASSES, SUPERCLASSES)


def noise(seed: int = 0) -> np.ndarray:
    """Make relations without a hierarchy."""
    return np.random.default_rng(seed).normal(0, 0.1, SAME.shape)


def auc_by_counting(matrix: np.ndarray, same: np.ndarray) -> float:
    """Compute the AUC by counting, over all pairs of pairs of classes."""
    pairs = list(itertools.combinations(range(len(matrix)), 2))
    size = {(i, j): abs(matrix[i, j]) + abs(matrix[j, i]) for i, j in pairs}
    inside = [size[i, j] for i, j in pairs if same[i, j]]
    outside = [size[i, j] for i, j in pairs if not same[i, j]]
    won = [(one > other) + (one == other) / 2 for one in inside for other in outside]
    return float(np.mean(won))


@pytest.mark.parametrize("matrix", [noise(), noise(1) - 0.2 * SAME, noise(2).round(1), np.eye(12)])
def test_the_auc_equals_its_definition(matrix: np.ndarray) -> None:
    found = hierarchy(matrix, SUPERCLASSES)
    assert found is not None
    assert found.value == pytest.approx(auc_by_counting(matrix, SAME))


def test_a_hierarchy_is_significant_and_noise_is_not() -> None:
    there = hierarchy(noise() - 0.5 * SAME, SUPERCLASSES)
    assert there is not None
    assert there.value > 0.95
    assert there.p < 0.001
    chance = [found.p for seed in range(5) if (found := hierarchy(noise(seed), SUPERCLASSES))]
    assert 0.2 < np.mean(chance) < 0.8


def test_the_p_value_of_few_classes_is_exact() -> None:
    """Of the 24 permutations of four classes in two superclasses, a third keeps both pairs together."""
    of = ["a", "a", "b", "b"]
    found = hierarchy(np.equal.outer(of, of) * 1.0, of)
    assert found is not None
    assert found == pytest.approx((1.0, 1 / 3))


@pytest.mark.parametrize("superclasses", [NAMES, ["all"] * 12])
def test_superclasses_without_pairs_or_without_others_have_no_measure(superclasses: list[str]) -> None:
    assert hierarchy(noise(), superclasses) is None


def test_the_likeness_of_two_matrices() -> None:
    matrix = noise()
    alike, flipped, other = likeness(matrix, matrix**3), likeness(matrix, -matrix.T), likeness(matrix, noise(5))
    assert alike is not None
    assert flipped is not None
    assert other is not None
    assert alike.value > 0.95
    assert alike.p < 0.001
    assert flipped.value == pytest.approx(1.0)
    assert abs(other.value) < 0.4
    assert other.p > 0.01
    assert likeness(matrix, np.ones_like(matrix)) is None


def test_a_confusion_matrix_holds_shares_of_each_class() -> None:
    found = confusion(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 1, 1, 2, 1, 0]), 4)
    expected = np.array([[0.0, 0.5, 0.25, 0.0], [0.5, 0.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4])
    np.testing.assert_allclose(found, expected)


def test_the_strength_ignores_sign_and_direction() -> None:
    matrix = noise() + np.eye(12)
    assert (np.diag(relations(matrix)) == 0).all()
    np.testing.assert_array_equal(strength(matrix), strength(-matrix.T))
    assert strength(matrix)[2, 5] == pytest.approx((abs(matrix[2, 5]) + abs(matrix[5, 2])) / 2)


@pytest.mark.parametrize("superclasses", [None, SUPERCLASSES])
def test_related_classes_are_neighbours(superclasses: list[str] | None) -> None:
    found = order(0.1 * noise() + 0.5 * SAME, superclasses)
    assert sorted(found) == list(range(12))
    assert len(list(itertools.groupby(SUPERCLASSES[i] for i in found))) == 3


def test_superclasses_stay_together_even_if_their_classes_are_unrelated() -> None:
    found = order(noise(), SUPERCLASSES)
    assert len(list(itertools.groupby(SUPERCLASSES[i] for i in found))) == 3


def test_the_strongest_relations_of_a_class() -> None:
    matrix = np.eye(4) * 9
    matrix[1] = [0.2, 9.0, -0.5, 0.1]
    assert strongest(matrix, 1) == [2, 0, 3]
    assert strongest(matrix, 1, 2) == [2, 0]
