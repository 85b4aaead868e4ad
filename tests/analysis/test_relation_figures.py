"""Figures of relations between classes: what they show, in which order, and with which labels."""

from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from src.analysis.class_relations import order, relations, strength, strongest
from src.analysis.relation_figures import relation_matrices, strongest_relations

SUPERCLASSES = ["farm_animal", "plant", "vehicle"] * 4
NAMES = [f"class {i}" for i in range(12)]
WEIGHT = np.eye(12) + np.random.default_rng(0).normal(0, 0.1, (12, 12))


@pytest.mark.parametrize("superclasses", [None, SUPERCLASSES])
def test_matrices_share_the_order_of_the_first(superclasses: list[str] | None) -> None:
    confused = np.abs(relations(np.random.default_rng(3).normal(0, 0.1, (12, 12))))
    figure = relation_matrices({"layer": relations(WEIGHT), "confusion": confused}, NAMES, superclasses)
    sequence = order(WEIGHT, superclasses)
    for axes, matrix in zip(figure.axes[:2], (relations(WEIGHT), confused), strict=True):
        shown = np.asarray(axes.images[0].get_array())
        np.testing.assert_array_equal(shown, matrix[np.ix_(sequence, sequence)])
    figure.canvas.draw()
    plt.close(figure)


def test_signed_matrices_have_a_scale_around_zero() -> None:
    figure = relation_matrices({"signed": relations(WEIGHT), "shares": np.abs(relations(WEIGHT))}, NAMES, None)
    (low, high), (zero, _) = (axes.images[0].get_clim() for axes in figure.axes[:2])
    assert low == -high
    assert zero == 0
    plt.close(figure)


def test_superclasses_are_labelled_once_and_separated_by_lines() -> None:
    figure = relation_matrices({"one": WEIGHT, "two": WEIGHT}, NAMES, SUPERCLASSES)
    first, second = figure.axes[:2]
    assert sorted(label.get_text() for label in first.get_yticklabels()) == ["farm animal", "plant", "vehicle"]
    assert {label.get_text() for label in second.get_yticklabels()} == {""}
    assert len(first.lines) == 4  # two between the superclasses, in each direction
    plt.close(figure)


def test_at_most_62_of_many_classes_are_labelled() -> None:
    figure = relation_matrices({"many": np.eye(130)}, [str(i) for i in range(130)], None)
    assert len(figure.axes[0].get_yticks()) == 44  # every third
    plt.close(figure)


@pytest.mark.parametrize("superclasses", [None, SUPERCLASSES])
def test_bars_are_the_strongest_weights_of_a_class(superclasses: list[str] | None) -> None:
    figure: Any = strongest_relations(WEIGHT, NAMES, superclasses, classes=[7], count=5)
    (axes,) = figure.axes
    chosen = strongest(WEIGHT, 7, 5)
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == [NAMES[j] for j in chosen]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx(WEIGHT[7, chosen].tolist())
    bold = [NAMES[j] for j in chosen if superclasses and superclasses[j] == superclasses[7]]
    assert [label.get_text() for label in labels if label.get_fontweight() == "bold"] == bold
    figure.canvas.draw()
    plt.close(figure)


def test_the_classes_with_the_strongest_relations_are_drawn_by_default() -> None:
    figure = strongest_relations(WEIGHT, NAMES)
    strongest_first = np.argsort(-strength(WEIGHT).max(axis=1))[:3]
    assert [axes.get_title(loc="left") for axes in figure.axes] == [NAMES[i] for i in strongest_first]
    plt.close(figure)
