"""Relations between classes: what a matrix knows of a hierarchy, and how it is put in order and drawn."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from src.analysis.class_relations import confusion, hierarchy, likeness, order, relations, strength, strongest
from src.analysis.predictions import Predictions
from src.analysis.relation_figures import relation_matrices, strongest_relations
from src.analysis.results import Finished
from src.errors import UserError
from src.report import Answered, class_numbers, hierarchies

SUPERCLASSES = ["animal", "plant", "vehicle"] * 4
NAMES = [f"{name} {i}" for i, name in enumerate(SUPERCLASSES)]
SAME = np.equal.outer(SUPERCLASSES, SUPERCLASSES)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, SAME.shape)


def by_definition(matrix: np.ndarray, same: np.ndarray) -> float:
    """Pairs of pairs, one by one."""
    pairs = list(itertools.combinations(range(len(matrix)), 2))
    size = {(i, j): abs(matrix[i, j]) + abs(matrix[j, i]) for i, j in pairs}
    inside = [size[i, j] for i, j in pairs if same[i, j]]
    outside = [size[i, j] for i, j in pairs if not same[i, j]]
    won = [(one > other) + (one == other) / 2 for one in inside for other in outside]
    return float(np.mean(won))


@pytest.mark.parametrize("matrix", [noise(), noise(1) - 0.2 * SAME, noise(2).round(1), np.eye(12)])
def test_the_auc_is_what_it_says(matrix: np.ndarray) -> None:
    found = hierarchy(matrix, SUPERCLASSES)
    assert found is not None
    assert found.value == pytest.approx(by_definition(matrix, SAME))


def test_a_hierarchy_is_found_where_there_is_one_and_only_there() -> None:
    there = hierarchy(noise() - 0.5 * SAME, SUPERCLASSES)
    assert there is not None
    assert there.value > 0.95
    assert there.p < 0.001
    chance = [found.p for seed in range(5) if (found := hierarchy(noise(seed), SUPERCLASSES))]
    assert 0.2 < np.mean(chance) < 0.8


def test_few_classes_are_permuted_exactly() -> None:
    """Four classes in two superclasses: of 24 permutations a third keeps both pairs together."""
    of = ["a", "a", "b", "b"]
    found = hierarchy(np.equal.outer(of, of) * 1.0, of)
    assert found is not None
    assert found == pytest.approx((1.0, 1 / 3))


@pytest.mark.parametrize("superclasses", [NAMES, ["all"] * 12])
def test_no_hierarchy_no_measure(superclasses: list[str]) -> None:
    assert hierarchy(noise(), superclasses) is None


def test_likeness() -> None:
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


def test_confusion_counts_mistakes() -> None:
    found = confusion(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 1, 1, 2, 1, 0]), 4)
    expected = np.array([[0.0, 0.5, 0.25, 0.0], [0.5, 0.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4])
    np.testing.assert_allclose(found, expected)


def test_relations_and_strength() -> None:
    matrix = noise() + np.eye(12)
    assert (np.diag(relations(matrix)) == 0).all()
    np.testing.assert_array_equal(strength(matrix), strength(-matrix.T))
    assert strength(matrix)[2, 5] == pytest.approx((abs(matrix[2, 5]) + abs(matrix[5, 2])) / 2)


@pytest.mark.parametrize("superclasses", [None, SUPERCLASSES])
def test_related_classes_stand_beside_each_other(superclasses: list[str] | None) -> None:
    found = order(0.1 * noise() + 0.5 * SAME, superclasses)
    assert sorted(found) == list(range(12))
    assert len(list(itertools.groupby(SUPERCLASSES[i] for i in found))) == 3


def test_superclasses_stay_together_whatever_is_related() -> None:
    found = order(noise(), SUPERCLASSES)
    assert len(list(itertools.groupby(SUPERCLASSES[i] for i in found))) == 3


def test_the_strongest_relations_of_a_class() -> None:
    matrix = np.eye(4) * 9
    matrix[1] = [0.2, 9.0, -0.5, 0.1]
    assert strongest(matrix, 1) == [2, 0, 3]
    assert strongest(matrix, 1, 2) == [2, 0]


@pytest.mark.parametrize("superclasses", [None, SUPERCLASSES])
def test_pictures(superclasses: list[str] | None) -> None:
    weight = np.eye(12) + noise()
    matrices = {"layer": relations(weight), "confusion": np.abs(relations(noise(3)))}
    figure = relation_matrices(matrices, NAMES, superclasses)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    sequence = order(weight, superclasses)
    np.testing.assert_array_equal(shown, relations(weight)[np.ix_(sequence, sequence)])
    bars = strongest_relations(weight, NAMES, superclasses, classes=[7], count=5)
    assert [label.get_text() for label in bars.axes[0].get_yticklabels()] == [NAMES[j] for j in strongest(weight, 7, 5)]
    for drawn in (figure, bars):
        drawn.canvas.draw()
        plt.close(drawn)


# In a report


@pytest.fixture
def run(tmp_path: Path) -> Finished:
    """As much of a run's folder as is read of a layer."""
    weight = torch.from_numpy(np.eye(12) + noise() + 0.5 * SAME)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {"serialization.layer.weight": weight}}, tmp_path / "checkpoints" / "last.ckpt")
    facts = {"serialization": "serial", "class_names": NAMES, "superclasses": SUPERCLASSES}
    return Finished(tmp_path, facts)


def test_a_report_measures_the_hierarchy_beside_the_confusions(run: Finished) -> None:
    target = np.repeat(np.arange(12), 4)
    student = target.copy()
    student[::4] = (target[::4] + 3) % 12  # of the same superclass
    predictions = Predictions(student[:, None], np.ones((48, 1)), target)
    data: Any = None
    answered = Answered(predictions, student, 0, 0, data)
    table = hierarchies({"student": [run], "unasked": [run]}, {"student": answered})
    assert table is not None
    rows = [(row[0], row[1].partition(":")[0], row[2][:4], row[3][:4]) for row in table.rows]
    assert rows == [
        ("student", "Serialization layer", "1.00", "0.59"),
        ("student", "Teacher", "0.83", "-"),
        ("student", "Student", "0.83", "1.00"),
        ("unasked", "Serialization layer", "1.00", "-"),
    ]


def test_what_has_no_readable_layer_has_no_hierarchy(run: Finished) -> None:
    (run.folder / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    assert hierarchies({"student": [run]}, {}) is None
    assert hierarchies({"student": [Finished(run.folder, {"serialization": "none"})]}, {}) is None


def test_classes_are_chosen_by_name() -> None:
    assert class_numbers(NAMES, ["plant 1", "animal 0"]) == [1, 0]
    with pytest.raises(UserError, match=r"relations.classes: plant 2 is no class here; there are animal 0, plant 1"):
        class_numbers(NAMES, ["plant 2"])
