"""Figures of gradients: lines of a run's gradients.csv, and the pull of a loss by confidence."""

import warnings
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from src.analysis.gradient_figures import gradient_anatomy, pull_by_confidence
from src.analysis.gradient_forms import kd_gradient
from src.training.gradient_anatomy import QUANTILES, RATIOS

PANELS = ["target", "others", "own", "agreement", *RATIOS]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def row(step: int, teacher: bool = True) -> dict[str, float]:
    """Make a row of gradients.csv with two terms, one of which does not reach the student's own logits."""
    own = {"cross_entropy/target": -0.5, "cross_entropy/others": 0.5, "cross_entropy/own": 0.7}
    distilled = {"kd/target": 0.1 * step, "kd/others": 0.2, "cross_entropy|kd/cosine": 0.4}
    quantiles = {f"{ratio}/{level}": 0.5 + level for ratio in RATIOS for level in QUANTILES}
    return {"step": step, "epoch": step / 10, **own, **(distilled | quantiles if teacher else {})}


def test_the_anatomy_shows_every_term_in_its_panels() -> None:
    figure = gradient_anatomy([row(step) for step in range(5)], "title")
    panels = dict(zip(PANELS, figure.axes, strict=True))
    labels = {name: [text.get_text() for text in panel.texts] for name, panel in panels.items()}
    assert labels["target"] == labels["others"] == ["cross-entropy", "KD"]
    assert labels["own"] == ["cross-entropy"]
    assert labels["agreement"] == ["cross-entropy \N{MULTIPLICATION SIGN} KD"]
    _zero, cross_entropy, kd = panels["target"].lines
    assert cross_entropy.get_ydata() == pytest.approx([0.5] * 5)  # the pull is the negative gradient
    assert kd.get_ydata() == pytest.approx([0, -0.1, -0.2, -0.3, -0.4])
    for ratio in RATIOS:
        median, _one = panels[ratio].lines
        assert median.get_ydata() == pytest.approx([1.0] * 5)
        assert len(panels[ratio].collections) == 2
    figure.canvas.draw()


def test_long_runs_are_smoothed_to_80_points() -> None:
    figure: Any = gradient_anatomy([row(step) for step in range(800)], "title")
    _, cross_entropy, kd = figure.axes[0].lines
    assert len(cross_entropy.get_xdata()) == 80
    assert kd.get_ydata()[0] == pytest.approx(-0.45)  # the mean of the first ten rows


def test_a_single_row_is_drawn_as_points() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = gradient_anatomy([row(0)], "title")
        figure.canvas.draw()
    assert {line.get_marker() for line in figure.axes[0].lines[1:]} == {"o"}
    assert figure.axes[4].lines[0].get_marker() == "o"


def test_a_run_without_a_teacher_has_no_ratios() -> None:
    figure = gradient_anatomy([row(step, teacher=False) for step in range(3)], "title")
    for panel in figure.axes[4:]:
        assert [text.get_text() for text in panel.texts] == ["no teacher"]
    figure.canvas.draw()


def test_kd_pulls_up_below_the_teachers_confidence_only() -> None:
    figure = pull_by_confidence({"KD": lambda u, v, t: kd_gradient(u, v, 1.0)}, teacher_confidence=0.7)
    line = figure.axes[0].lines[0]
    np.testing.assert_array_equal(np.asarray(line.get_ydata()) > 0, np.asarray(line.get_xdata()) < 0.7)
