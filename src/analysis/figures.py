"""Pictures of finished runs."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from src.analysis.results import Finished

COLOURS = ("#555555", "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
"""Okabe and Ito's, told apart by the colour-blind too."""
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 10,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
}


def learning_curves(groups: Sequence[Sequence[Finished]]) -> Figure:
    """Accuracy by epoch, one line a run, one colour a setting, its mean labelled at the end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.2))
        ends = []
        for colour, runs in zip(cycle(COLOURS), groups, strict=False):
            for run in runs:
                rows = run.history()
                split = "val" if "val" in run.result else "test"
                points = [
                    (row["epoch"] + 1, 100 * row[f"{split}/accuracy"]) for row in rows if f"{split}/accuracy" in row
                ]
                marker = "o" if len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), color=colour, lw=1.8, alpha=0.85, marker=marker)
            final = np.mean([100 * run.result["test"]["accuracy"] for run in runs])
            ends.append((final, f"{runs[0].name}  {final:.1f} %", colour))
        for (_, text, colour), height in zip(ends, _apart([end[0] for end in ends], axes.get_ylim()), strict=True):
            axes.annotate(
                text, (1.01, height), xycoords=("axes fraction", "data"), color=colour, va="center", fontsize=9
            )
        axes.set(xlabel="epoch", ylabel="top-1 accuracy, %", title="Learning curves")
        axes.grid(axis="y", alpha=0.25)
    return figure


def _apart(heights: Sequence[float], limits: tuple[float, float]) -> list[float]:
    """Heights moved so far apart that labels at them do not overlap."""
    gap = (limits[1] - limits[0]) / 16
    placed = dict.fromkeys(range(len(heights)), 0.0)
    previous = -np.inf
    for index in np.argsort(heights):
        previous = placed[int(index)] = max(heights[int(index)], previous + gap)
    return list(placed.values())


def class_relations(weight: np.ndarray, class_names: Sequence[str], strongest: int = 14) -> Figure:
    """The serialization layer's weights [C, C] off the identity, and the strongest relations between two classes."""
    change = weight - np.eye(len(weight))
    between = change - np.diag(np.diag(change))
    limit = np.quantile(np.abs(between), 0.999)
    with plt.rc_context(STYLE):
        figure, (matrix, bars) = plt.subplots(1, 2, figsize=(12, 6.4), width_ratios=(1.45, 1))
        picture = matrix.imshow(between, cmap="RdBu_r", vmin=-limit, vmax=limit)
        step = -(-len(class_names) // 62)
        ticks = range(0, len(class_names), step)
        size = 6 if len(class_names) > 20 else 9
        matrix.set_xticks(
            ticks, [class_names[i] for i in ticks], fontsize=size, rotation=90 if max(map(len, class_names)) > 2 else 0
        )
        matrix.set_yticks(ticks, [class_names[i] for i in ticks], fontsize=size)
        matrix.set(xlabel="from the student's logit of class j", ylabel="to the logit for distillation of class i")
        matrix.set_title("What the serialization layer learned: w_ij off the diagonal")
        figure.colorbar(picture, ax=matrix, shrink=0.6, pad=0.02)
        rows, columns = np.unravel_index(np.argsort(-np.abs(between), axis=None)[:strongest], between.shape)
        values = between[rows, columns]
        labels = [
            f"{class_names[j]}  \N{RIGHTWARDS ARROW}  {class_names[i]}" for i, j in zip(rows, columns, strict=True)
        ]
        bars.barh(range(strongest), values, color=np.where(values > 0, COLOURS[3], COLOURS[1]))
        bars.set_yticks(range(strongest), labels)
        bars.invert_yaxis()
        bars.axvline(0, color="black", lw=0.8)
        bars.locator_params(axis="x", nbins=4)
        bars.set(title="Its strongest relations", xlabel="weight w_ij")
    return figure


def what_they_say(
    images: np.ndarray, target: np.ndarray, said: dict[str, np.ndarray], class_names: Sequence[str], title: str
) -> Figure:
    """Images uint8 [N, H, W, 3], each with the three likeliest classes of every network (probabilities [N, C])."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1 + len(said), len(images), figsize=(1.55 * len(images), 1.5 + 1.05 * len(said)), squeeze=False,
            height_ratios=[1.3] + [1] * len(said),
        )  # fmt: skip
        for column, image in enumerate(images):
            axes[0, column].imshow(image)
            axes[0, column].axis("off")
            axes[0, column].set_title(class_names[target[column]], loc="center", fontsize=11)
            for row, (name, probabilities) in enumerate(said.items(), start=1):
                panel = axes[row, column]
                top = np.argsort(-probabilities[column])[:3]
                colours = [COLOURS[4] if k == target[column] else "#BBBBBB" for k in top]
                panel.barh(range(3), probabilities[column][top], color=colours)
                panel.set(xlim=(0, 1), xticks=[], ylim=(2.6, -0.6))
                panel.set_yticks(range(3), [_short(class_names[k]) for k in top], fontsize=8)
                panel.spines[["bottom", "left"]].set_visible(False)
                panel.tick_params(length=0)
                if column == 0:
                    panel.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center", labelpad=14)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 9 else name[:8] + "."


def save(figure: Figure, file: Path) -> Path:
    """Write a PNG and let go of the figure."""
    figure.savefig(file)
    plt.close(figure)
    return file
