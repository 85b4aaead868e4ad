"""Figures of finished runs: the values, colours and labels that they show."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from src.analysis import figures
from src.analysis.figures import COLOURS
from src.analysis.predictions import Predictions
from src.analysis.results import Finished, find_runs, group
from src.analysis.statistics import interval_of_mean
from tests.helpers.run_folders import finished, write_run

HOSTILE = "$\\frac{x$ <b>|"


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch: pytest.MonkeyPatch):
    """Draw few pixels, which is faster, and close what a test leaves open."""
    monkeypatch.setitem(figures.STYLE, "figure.dpi", 40)
    yield
    plt.close("all")


def runs_of(method: str, *accuracies: float, **changes: Any) -> list[Finished]:
    return [finished(method=method, seed=seed, accuracy=value, **changes) for seed, value in enumerate(accuracies)]


def answers(classes: list[list[int]], probabilities: list[list[float]], target: list[int]) -> Predictions:
    return Predictions(np.array(classes), np.array(probabilities), np.array(target))


def texts(figure: Figure) -> list[str]:
    """Collect the annotations of a figure, without line breaks."""
    return [" ".join(text.get_text().split()) for axes in figure.axes for text in axes.texts]


def test_accuracies_are_dots_with_a_mean_and_an_interval() -> None:
    values = (0.50, 0.52, 0.57)
    figure = figures.accuracies({"resnet8 by kd": runs_of("kd", *values)})
    interval, dots, mean = figure.axes[0].lines
    assert interval.get_xdata() == pytest.approx(interval_of_mean([100 * value for value in values]))
    assert dots.get_xdata() == pytest.approx([50, 52, 57])
    assert mean.get_xdata() == pytest.approx([53, 53])
    assert texts(figure) == ["53.0"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["resnet8 by kd"]


def test_a_single_run_has_no_interval() -> None:
    assert len(figures.accuracies({"one": runs_of("kd", 0.5)}).axes[0].lines) == 2


def test_an_interval_stays_within_0_and_100_percent() -> None:
    interval: Any = figures.accuracies({"two": runs_of("kd", 0.01, 0.99)}).axes[0].lines[0]
    assert list(interval.get_xdata()) == [0, 100]


def test_learning_curves_have_a_line_per_run_and_a_colour_per_setting(tmp_path: Path) -> None:
    for method, seed in (("vanilla", 0), ("kd", 0), ("kd", 1)):
        write_run(tmp_path, method, seed)
    figure: Any = figures.learning_curves(group(find_runs(tmp_path)[0]))
    assert figure
    lines = figure.axes[0].lines
    assert [line.get_color() for line in lines] == [COLOURS[0], COLOURS[1], COLOURS[1]]
    assert list(lines[0].get_xdata()) == [1, 2, 3]
    assert lines[0].get_ydata() == pytest.approx([30, 40, 50])
    assert texts(figure) == ["resnet8 alone 50.0", "resnet8 by kd 50.0"]


def test_held_out_images_are_preferred_in_learning_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "metrics.csv").write_text("epoch,test/accuracy,val/accuracy\n0,,0.2\n1,0.9,0.4\n")
    held_out = finished(folder, val={"accuracy": 0.4, "top5": 0.8, "nll": 1.0, "ece": 0.1})
    figure = figures.learning_curves({"kd": [held_out]})
    assert figure
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([20, 40])


def test_there_are_no_learning_curves_of_runs_that_were_scored_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "metrics.csv").write_text("epoch,test/accuracy\n0,\n1,\n2,0.5\n")
    assert figures.learning_curves({"kd": [finished(folder)]}) is None
    assert plt.get_fignums() == []


def test_accuracy_is_drawn_against_time_and_multiply_accumulates() -> None:
    groups = {"alone": runs_of("vanilla", 0.4, seconds=8.0), "kd": runs_of("kd", 0.5, 0.6, seconds=10.0)}
    figure: Any = figures.accuracy_by_cost(
        groups, {"alone": 2_000_000, "kd": 2_000_000}, {"resnet20": (41_000_000, 70.0)}
    )
    time, cost = figure.axes
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in time.lines] == [(8, 40), (10, pytest.approx(55))]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in cost.lines]
    assert points == [(2, 40), (2, pytest.approx(55)), (41, 70)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alone", "kd", "resnet20 (teacher)"]


def test_accuracy_is_drawn_against_time_alone_if_no_cost_is_known() -> None:
    figure = figures.accuracy_by_cost({"kd": runs_of("kd", 0.5)}, {}, {"resnet20": (41_000_000, 70.0)})
    assert len(figure.axes) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kd"]


def test_latency_is_relative_to_the_first_network() -> None:
    points = {"teacher": (4.0, (1.0, 1.0, 1.0), 70.0), "student": (1.0, (0.2, 0.25, 0.35), 60.0)}
    figure: Any = figures.accuracy_against_latency(points)
    (axes,) = figure.axes
    bars = [container.lines[2][0].get_segments()[0][:, 0].tolist() for container in axes.containers]
    assert bars == [[1, 1], pytest.approx([0.2, 0.35])]
    assert axes.get_xlabel() == "time for one image, relative to teacher"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["teacher: 4.00 ms", "student: 1.00 ms"]


def test_reliability_has_the_accuracy_of_each_bin() -> None:
    # Bins (0, 0.5] and (0.5, 1]: of three images at 0.5 or below two are right, the one above is wrong.
    said = answers([[0], [1], [0], [1]], [[0.5], [0.3], [0.4], [0.9]], [0, 1, 1, 0])
    figure: Any = figures.reliability({"one": said, "two": said, "three": said}, bins=2)
    assert [patch.get_height() for patch in figure.axes[0].patches[:2]] == pytest.approx([2 / 3, 0])
    assert figure.axes[0].patches[2].get_data().values == pytest.approx([0.75, 0.25])
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]
    figure.canvas.draw()
    labelled = [any(label.get_visible() for label in axes.get_xticklabels()) for axes in figure.axes[:3]]
    assert labelled == [False, True, True]  # the lowest panel of each column


def test_agreement_is_the_share_of_equal_predictions() -> None:
    figure = figures.agreement({"one": np.array([0, 1, 2, 3]), "two": np.array([0, 1, 2, 0]), "three": np.zeros(4)})
    assert texts(figure) == ["75", "25", "75", "50", "25", "50"]


def test_examples_show_the_likeliest_classes_and_mark_the_label() -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    said = answers([[9, 9], [1, 0], [0, 1]], [[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]], [9, 0, 0])
    figure: Any = figures.example_predictions(images, [1, 2], {"student": said}, ["a long class name", "b"], "title")
    first, second, left, right = figure.axes
    assert [first.get_title(), second.get_title()] == ["a long class name"] * 2
    assert [label.get_text() for label in left.get_yticklabels()] == ["b", "a long c."]
    assert [bar.get_width() for bar in left.patches] == [0.7, 0.3]
    green = plt.matplotlib.colors.to_rgba(COLOURS[4])  # type: ignore[attr-defined]
    assert [bar.get_facecolor() == green for bar in left.patches] == [False, True]
    assert [bar.get_facecolor() == green for bar in right.patches] == [True, False]
    assert left.get_ylabel() == "student"


def test_labels_are_moved_apart_in_their_order() -> None:
    heights = figures.separate_labels([1.0, 0.0, 0.01], (0.0, 1.6))
    assert heights == pytest.approx([1.0, 0.0, 0.1])
    assert figures.separate_labels([1.6, 1.6, 1.6], (0.0, 1.6)) == pytest.approx([1.4, 1.5, 1.6])


@pytest.mark.parametrize("count", [1, 16, 40])
def test_labels_stay_beside_their_axis(count: int) -> None:
    heights = figures.separate_labels([0.9] * count, (0.0, 1.0))
    assert heights == sorted(heights)
    assert 0 <= heights[0] <= heights[-1] <= 1
    assert np.diff(heights) == pytest.approx(1 / max(16, count))


def test_figures_of_many_settings_have_room_for_their_labels(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    groups = {f"resnet8 by method {number}": [finished(folder)] for number in range(40)}
    drawn = [figures.accuracies(groups), figures.learning_curves(groups), figures.accuracy_by_cost(groups, {}, {})]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns if the axes have no room
        for number, figure in enumerate(drawn):
            assert figure
            figures.save(figure, tmp_path / f"{number}.png")
            assert figure.axes[0].get_position().height > 0.3


def test_a_saved_figure_is_a_small_png_and_is_closed(tmp_path: Path) -> None:
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    file = figures.save(figure, tmp_path / "figure.png")
    with Image.open(file) as image:
        assert (image.format, image.mode) == ("PNG", "P")
    assert plt.get_fignums() == []


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    groups = {HOSTILE: [finished(write_run(tmp_path))]}
    said = {HOSTILE: answers([[0]], [[0.5]], [0])}
    images = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    drawn = [
        figures.accuracies(groups),
        figures.learning_curves(groups),
        figures.accuracy_by_cost(groups, {HOSTILE: 1}, {HOSTILE: (1, 1.0)}),
        figures.reliability(said),
        figures.agreement({HOSTILE: np.zeros(2), "other": np.zeros(2)}),
        figures.example_predictions(images, [0], said, [HOSTILE], HOSTILE),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of text that it cannot parse
        for number, figure in enumerate(drawn):
            assert figure
            assert figures.save(figure, tmp_path / f"{number}.png").is_file()
