"""Figures of finished runs, their predictions and their costs."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from src.analysis.predictions import Predictions
from src.analysis.results import Finished
from src.analysis.statistics import interval_of_mean

COLOURS = ("#555555", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""
LABELS = 16
"""The number of labels that fit beside an axis of a usual height."""
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 10,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # the name of a class may contain a dollar sign
}


def accuracies(groups: Mapping[str, Sequence[Finished]]) -> Figure:
    """Draw the test accuracy after the last epoch: one dot per run, the mean of each setting, and its 95 % interval.

    A setting has no interval if `interval_of_mean` has none for its runs.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 1 + 0.5 * len(groups)))
        for row, (colour, runs) in enumerate(zip(cycle(COLOURS), groups.values(), strict=False)):
            values = [run.accuracy for run in runs]
            interval = interval_of_mean(values)
            if interval:
                within = np.clip(interval, 0, 100)  # the interval of few seeds can exceed the range of an accuracy
                axes.plot(within, [row, row], color=colour, lw=7, alpha=0.25, solid_capstyle="butt")
            axes.plot(values, [row] * len(values), "o", color=colour, ms=5, alpha=0.8)
            axes.plot([np.mean(values)] * 2, [row - 0.28, row + 0.28], color=colour, lw=2)
            axes.annotate(
                f"{np.mean(values):.1f}",
                (np.mean(values), row - 0.3),
                ha="center",
                va="bottom",
                color=colour,
                fontsize=9,
            )
        axes.set_yticks(range(len(groups)), [_folded(name) for name in groups])
        axes.set(ylim=(len(groups) - 0.4, -0.75), xlabel="top-1 accuracy, %", title="Accuracy after the last epoch")
        axes.grid(axis="x", alpha=0.25)
    return figure


def learning_curves(groups: Mapping[str, Sequence[Finished]]) -> Figure | None:
    """Draw the accuracy by epoch: one line per run, one colour per setting.

    Returns None if no run was scored more than once.
    """
    curves = [
        (colour, name, _curves(runs)) for colour, (name, runs) in zip(cycle(COLOURS), groups.items(), strict=False)
    ]
    curves = [(colour, name, lines) for colour, name, lines in curves if lines]
    if not curves:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.2 * max(1, len(curves) / LABELS)))
        for colour, _, lines in curves:
            for points in lines:
                axes.plot(*zip(*points, strict=True), color=colour, lw=1.8, alpha=0.85)
        ends = [float(np.mean([points[-1][1] for points in lines])) for _, _, lines in curves]
        for (colour, name, _), end, height in zip(curves, ends, separate_labels(ends, axes.get_ylim()), strict=True):
            axes.annotate(
                f"{_folded(name, 40)}  {end:.1f}", (1.01, height), xycoords=("axes fraction", "data"), color=colour,
                va="center", fontsize=9,
            )  # fmt: skip
        axes.set(xlabel="epoch", ylabel="top-1 accuracy, %", title="Learning curves")
        axes.grid(axis="y", alpha=0.25)
    return figure


def _curves(runs: Sequence[Finished]) -> list[list[tuple[float, float]]]:
    """List the points (epoch from 1, accuracy in %) of each run that was scored more than once."""
    curves = []
    for run in runs:
        score = f"{'val' if run.result.val else 'test'}/accuracy"
        points = [(row["epoch"] + 1, 100 * row[score]) for row in run.history() if score in row]
        curves.append(points)
    return [points for points in curves if len(points) > 1]


def accuracy_by_cost(
    groups: Mapping[str, Sequence[Finished]], macs: Mapping[str, int], teachers: Mapping[str, tuple[int, float]]
) -> Figure:
    """Draw the mean accuracy against the training time, and against the multiply-accumulates of one image.

    `macs` are the known multiply-accumulates by setting. If it is empty, the second panel is left out. `teachers` are
    (multiply-accumulates, accuracy in %) by the teacher's name.
    """
    with plt.rc_context(STYLE):
        size = 6.4 if macs else 4.5, 4 + 0.1 * max(0, len(groups) + len(teachers) - 6)  # the legend has two columns
        figure, axes = plt.subplots(1, 2 if macs else 1, figsize=size, sharey=True, squeeze=False)
        styles = list(zip(cycle(COLOURS), cycle("osD^vP"), groups, strict=False))
        for colour, marker, name in styles:
            runs = groups[name]
            accuracy = float(np.mean([run.accuracy for run in runs]))
            style: Any = {"color": colour, "marker": marker, "ls": "", "ms": 7}
            axes[0, 0].plot(np.mean([run.result.seconds for run in runs]), accuracy, label=_folded(name, 40), **style)
            if name in macs:
                axes[0, 1].plot(macs[name] / 1e6, accuracy, **style)
        axes[0, 0].set(xlabel="training time, s", ylabel="top-1 accuracy, %", title="Accuracy and cost")
        for name, (cost, accuracy) in teachers.items() if macs else ():
            axes[0, 1].plot(cost / 1e6, accuracy, "k*", ms=11, label=f"{name} (teacher)")
        if macs:
            axes[0, 1].set(xlabel="million multiply-accumulates\nper image")
            axes[0, 1].set_xlim(left=0)
        axes[0, 0].set_xlim(left=0)
        for panel in axes[0]:
            panel.locator_params(axis="x", nbins=5)
            panel.grid(alpha=0.25)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def accuracy_against_latency(points: Mapping[str, tuple[float, tuple[float, float, float], float]]) -> Figure:
    """Draw one point per network: its accuracy against its latency relative to the first network.

    `points` are (milliseconds for one image, quartiles of the time ratio to the first network, accuracy in %) by name.
    The bars are the quartiles.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.6))
        styles = zip(cycle(COLOURS), cycle("*osD^vP"), points.items(), strict=False)
        for colour, marker, (name, (milliseconds, (low, middle, high), accuracy)) in styles:
            axes.errorbar(
                middle, accuracy, xerr=[[middle - low], [high - middle]], color=colour, marker=marker, ls="", ms=8,
                alpha=0.85, label=_folded(f"{name}: {milliseconds:.2f} ms", 48),
            )  # fmt: skip
        axes.set(xlabel=f"time for one image, relative to {next(iter(points))}", ylabel="top-1 accuracy, %")
        axes.set_title("Accuracy against latency")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def reliability(predictions: Mapping[str, Predictions], bins: int = 15) -> Figure:
    """Draw a reliability diagram for each network (Guo et al. 2017): bars of accuracy by bin (a, b] of confidence.

    A line shows the share of the images in each bin.
    """
    columns = min(len(predictions), 2 if len(predictions) < 5 else 3)
    rows = -(-len(predictions) // columns)
    with plt.rc_context(STYLE):
        size = max(4.2, 3 * columns), max(3.6, 2.9 * rows)  # at least the size of the title and of the labels
        figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
        edges = np.linspace(0, 1, bins + 1)
        for panel, colour, (name, one) in zip(axes.flat, cycle(COLOURS), predictions.items(), strict=False):
            of_bin = np.clip(np.ceil(one.confidence * bins).astype(int) - 1, 0, bins - 1)
            counts = np.bincount(of_bin, minlength=bins)
            accuracy = np.bincount(of_bin, one.correct, bins) / np.maximum(counts, 1)
            panel.bar(edges[:-1], accuracy, 1 / bins, align="edge", color=colour, alpha=0.75, edgecolor="white", lw=0.5)
            panel.stairs(counts / counts.sum(), edges, color="black", lw=1)
            panel.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":")
            panel.set_title(_folded(name, 26), fontsize=9)
            panel.set(xlim=(0, 1), ylim=(0, 1))
        for unused in range(len(predictions), rows * columns):
            axes.flat[unused].axis("off")
            axes.flat[unused - columns].tick_params(labelbottom=True)  # the lowest panel of its column
        figure.supxlabel("confidence", fontsize=10)
        figure.supylabel("accuracy (bars), share of images (line)", fontsize=10)
        figure.suptitle("Calibration (ideal: dotted line)", x=0.02, ha="left", fontweight="bold")
    return figure


def agreement(classes: Mapping[str, np.ndarray]) -> Figure:
    """Draw, for every two networks, the share of images for which both predict the same class.

    `classes` are the predicted classes [N] by the network's name.
    """
    names, rows = [_folded(name) for name in classes], list(classes.values())
    shares = 100 * np.array([[np.mean(one == other) for other in rows] for one in rows])
    np.fill_diagonal(shares, np.nan)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(2.4 + 0.75 * len(rows), 1.9 + 0.6 * len(rows)))
        axes.imshow(shares, cmap="Blues", aspect="auto")
        axes.set_facecolor("#EEEEEE")
        middle = np.nanmean([np.nanmin(shares), np.nanmax(shares)])
        for i, j in zip(*np.nonzero(~np.isnan(shares)), strict=True):
            axes.text(
                j,
                i,
                f"{shares[i, j]:.0f}",
                ha="center",
                va="center",
                color="white" if shares[i, j] > middle else "black",
            )
        axes.set_xticks(range(len(rows)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title("Same class predicted, % of test images", x=0, ha="left")
    return figure


def _folded(text: str, width: int = 22) -> str:
    """Break a long name into several lines."""
    return textwrap.fill(text, width, break_long_words=False)


def separate_labels(heights: Sequence[float], limits: tuple[float, float]) -> list[float]:
    """Move the heights of labels apart until the labels do not overlap.

    Up to `LABELS` labels are at least 1 / `LABELS` of the axis apart. More labels are closer. `limits` are the limits
    of the axis. Heights within the limits stay within them.

    >>> separate_labels([0.5, 0.5], limits=(0.0, 1.6))
    [0.5, 0.6]
    """
    gap = (limits[1] - limits[0]) / max(LABELS, len(heights))
    upwards = [int(index) for index in np.argsort(heights, kind="stable")]
    placed = list(heights)
    lowest = -np.inf
    for index in upwards:
        placed[index] = max(placed[index], lowest)
        lowest = placed[index] + gap
    highest = limits[1]
    for index in reversed(upwards):
        placed[index] = min(placed[index], highest)
        highest = placed[index] - gap
    return placed


def example_predictions(
    images: np.ndarray,
    picked: Sequence[int],
    predictions: Mapping[str, Predictions],
    class_names: Sequence[str],
    title: str,
) -> Figure:
    """Draw images, uint8 [N, H, W, 3], each with the likeliest classes of every network.

    `picked` are the N positions of the images in the predictions.
    """
    with plt.rc_context(STYLE):
        size = max(6, 1.55 * len(images)), 1.5 + 1.05 * len(predictions)
        heights = [1.3] + [1] * len(predictions)
        figure, axes = plt.subplots(len(heights), len(images), figsize=size, squeeze=False, height_ratios=heights)
        for column, (position, image) in enumerate(zip(picked, images, strict=True)):
            axes[0, column].imshow(image)
            axes[0, column].axis("off")
            for row, (name, one) in enumerate(predictions.items(), start=1):
                panel, target = axes[row, column], one.target[position]
                axes[0, column].set_title(class_names[target], loc="center", fontsize=11)
                classes, probabilities = one.classes[position], one.probabilities[position]
                colours = [COLOURS[4] if k == target else "#BBBBBB" for k in classes]
                panel.barh(range(len(classes)), probabilities, color=colours)
                panel.set(xlim=(0, 1), xticks=[], ylim=(len(classes) - 0.4, -0.6))
                panel.set_yticks(range(len(classes)), [_short(class_names[k]) for k in classes], fontsize=8)
                panel.spines[["bottom", "left"]].set_visible(False)
                panel.tick_params(length=0)
                if column == 0:
                    panel.set_ylabel(_folded(name, 16), fontsize=9, rotation=0, ha="right", va="center", labelpad=14)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 9 else name[:8] + "."


def save(figure: Figure, file: Path) -> Path:
    """Write a PNG file of at most 256 colours, which takes a third of the space, and close the figure."""
    drawn = io.BytesIO()
    figure.savefig(drawn, bbox_inches="tight")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256).save(file, optimize=True)
    return file
