"""Figures of the gradients that the loss terms send to the student's logits."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from src.analysis.figures import COLOURS, STYLE, separate_labels
from src.training.gradient_anatomy import QUANTILES, RATIOS

Rows = Sequence[Mapping[str, float]]
NAMES = {
    "cross_entropy": "cross-entropy",
    "explicit_transfer": "explicit transfer",
    "target_ratio": "q_t / p_t",
    "non_target_ratio": "(1 - q_t) / (1 - p_t)",
}
"""Labels of loss terms and ratios whose column names are not fit for a figure."""


def gradient_anatomy(rows: Rows, title: str) -> Figure:
    """Draw the rows of a run's gradients.csv by epoch.

    Six panels show the gradient of each term at the target logit, at the other logits and at the student's own logits,
    the cosine of every two terms, and both ratios.
    """
    terms = [name.removesuffix("/target") for name in rows[-1] if name.endswith("/target")]
    pairs = [name.removesuffix("/cosine") for name in rows[-1] if name.endswith("/cosine")]
    colours = dict(zip(terms, cycle(COLOURS), strict=False))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(16, 7.6), sharex=True)
        by_term = (
            ("target", "Pull on the target logit", "negative gradient, mean"),
            ("others", "Push on the other logits", "sum of |gradient|, mean"),
            ("own", "At the student's own logits", "length of the gradient, mean"),
        )
        for panel, (measure, heading, unit) in zip(axes[0], by_term, strict=True):
            sign = -1 if measure == "target" else 1
            lines = [(_name(term), sign, f"{term}/{measure}", colours[term]) for term in terms]
            _lines(panel, rows, lines)
            panel.set(title=heading, ylabel=unit)
        _lines(axes[1, 0], rows, [(_pair(p), 1, f"{p}/cosine", c) for p, c in zip(pairs, cycle(COLOURS), strict=False)])
        axes[1, 0].set(title="Agreement of the terms", ylabel="cosine of their gradients, mean", ylim=(-1.05, 1.05))
        for panel, ratio, colour in zip(axes[1, 1:], RATIOS, (COLOURS[3], COLOURS[1]), strict=True):
            _bands(panel, rows, ratio, colour)
        for panel in axes[1]:
            panel.set_xlabel("epoch")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _lines(panel: Axes, rows: Rows, lines: Sequence[tuple[str, int, str, str]]) -> None:
    """Draw one smoothed line for each (label, sign, column, colour), with its label at the end."""
    panel.axhline(0, color="black", lw=0.6)
    ends = []
    for label, sign, column, colour in lines:
        epochs, values = _series(rows, column)
        if len(values):
            panel.plot(epochs, sign * values, color=colour, lw=1.6, marker=_marker(values))
            ends.append((sign * values[-1], label, colour))
    limits = panel.get_ylim()
    for (_, text, colour), height in zip(ends, separate_labels([end[0] for end in ends], limits), strict=True):
        panel.annotate(text, (1.01, height), xycoords=("axes fraction", "data"), color=colour, va="center", size=7.5)


def _bands(panel: Axes, rows: Rows, ratio: str, colour: str) -> None:
    """Draw the ratio's median and quantiles over the samples of a batch, on a logarithmic axis."""
    panel.set_title(f"{_name(ratio)} over the samples")
    levels = {level: _series(rows, f"{ratio}/{level}", geometric=True) for level in QUANTILES}
    epochs, median = levels[0.5]
    if not len(median):
        panel.text(0.5, 0.5, "no teacher", transform=panel.transAxes, ha="center")
        return
    for low, high, alpha in ((0.05, 0.95, 0.15), (0.25, 0.75, 0.3)):
        panel.fill_between(epochs, levels[low][1], levels[high][1], color=colour, alpha=alpha, lw=0)
    panel.plot(epochs, median, color=colour, lw=1.8, marker=_marker(median))
    panel.axhline(1, color="black", lw=0.6)
    panel.set(yscale="log", ylabel="median; 50 % and 90 % of the samples")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:.3g}" if high < 10 * low else NullFormatter())


def _series(rows: Rows, column: str, geometric: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Smooth a column: return epochs and values as means of at most 80 groups of neighbouring rows."""
    points = np.array([(row["epoch"], row[column]) for row in rows if column in row]).reshape(-1, 2)
    if geometric:
        points[:, 1] = np.log(points[:, 1].clip(1e-30, 1e30))
    groups = np.array_split(points, min(80, len(points))) if len(points) else []
    means = np.array([group.mean(axis=0) for group in groups]).reshape(-1, 2)
    return means[:, 0], np.exp(means[:, 1]) if geometric else means[:, 1]


def _marker(values: np.ndarray) -> str:
    """Choose the marker of a line. A single point would be invisible without one."""
    return "o" if len(values) == 1 else ""


def _name(column: str) -> str:
    """Return the label of a loss term or a ratio.

    >>> _name("tckd"), _name("explicit_transfer"), _name("relation_loss")
    ('TCKD', 'explicit transfer', 'relation loss')
    """
    return NAMES.get(column, column.upper() if column in ("kd", "tckd", "nckd") else column.replace("_", " "))


def _pair(columns: str) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(_name(column) for column in columns.split("|"))


def pull_by_confidence(
    gradients: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]], teacher_confidence: float, classes: int = 100
) -> Figure:
    """Draw how strongly each loss pulls on the target logit, against the student's confidence p_t.

    `gradients` maps a label to a closed form of (student logits [N, C], teacher logits [N, C], target [N]). In both
    networks, the other classes share the remaining probability equally.
    """
    p_t = torch.logspace(-2.5, 0, 400, dtype=torch.float64)[:-1]
    target = torch.zeros(len(p_t), dtype=torch.int64)
    student, teacher = (_confident(p, classes) for p in (p_t, torch.full_like(p_t, teacher_confidence)))
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(8.2, 4.2))
        starts = []
        for (label, gradient), colour in zip(gradients.items(), cycle(COLOURS), strict=False):
            pull = -gradient(student, teacher, target)[:, 0]
            panel.plot(p_t, pull, color=colour, lw=1.8)
            starts.append((float(pull[0]), label, colour))
        panel.axvline(teacher_confidence, color="black", lw=0.8, ls=":")
        panel.annotate(" q_t", (teacher_confidence, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9)
        panel.axhline(0, color="black", lw=0.6)
        panel.set_title("Pull of each loss on the target logit")
        panel.set(xscale="log", xlabel="the student's confidence p_t", ylabel="pull on the target logit")
        panel.margins(y=0.12)
        heights = separate_labels([start[0] for start in starts], panel.get_ylim())
        for (_, text, colour), height in zip(starts, heights, strict=True):
            panel.annotate(text, (0.01, height), xycoords=("axes fraction", "data"), color=colour, va="bottom")
    return figure


def _confident(p_t: Tensor, classes: int) -> Tensor:
    """Make logits [N, C] with probability p_t [N] for class 0 at T = 1, and equal probabilities for the others."""
    logits = torch.zeros(len(p_t), classes, dtype=p_t.dtype)
    logits[:, 0] = torch.logit(p_t) + np.log(classes - 1)
    return logits
