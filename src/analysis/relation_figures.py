"""Figures of relations between classes: matrices, and the strongest relations of single classes."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.analysis.class_relations import order, strength, strongest
from src.analysis.figures import COLOURS, STYLE


def relation_matrices(
    matrices: Mapping[str, np.ndarray], class_names: Sequence[str], superclasses: Sequence[str] | None
) -> Figure:
    """Draw matrices [C, C] side by side, under their titles, all in the class order of the first.

    Lines separate the superclasses.
    """
    first = next(iter(matrices.values()))
    sequence = order(first, superclasses)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(matrices), figsize=(6.4 * len(matrices), 5.7), squeeze=False)
        for column, (panel, (title, matrix)) in enumerate(zip(axes[0], matrices.items(), strict=True)):
            shown = matrix[np.ix_(sequence, sequence)]
            signed = bool((matrix < 0).any())
            limit = np.quantile(np.abs(matrix), 0.998) or 1.0
            picture = panel.imshow(
                shown, cmap="RdBu_r" if signed else "Greys", vmin=-limit if signed else 0, vmax=limit,
                interpolation="nearest",
            )  # fmt: skip
            panel.set_title(title)
            figure.colorbar(picture, ax=panel, shrink=0.7, pad=0.02, extend="both" if signed else "max")
            if superclasses is None:
                _class_ticks(panel, [class_names[i] for i in sequence])
            else:
                _superclass_ticks(panel, [superclasses[i] for i in sequence], named=column == 0)
        axes[0, 0].set(xlabel="class j", ylabel="class i")
    return figure


def _class_ticks(panel: Axes, names: Sequence[str]) -> None:
    """Label the classes. Of more than 62 classes, only every second, third, ... is labelled."""
    places = range(0, len(names), -(-len(names) // 62))
    size = 6 if len(names) > 20 else 9
    turned = 90 if max(map(len, names)) > 2 else 0
    panel.set_xticks(places, [names[i] for i in places], fontsize=size, rotation=turned)
    panel.set_yticks(places, [names[i] for i in places], fontsize=size)


def _superclass_ticks(panel: Axes, superclasses: Sequence[str], named: bool) -> None:
    """Draw a line between superclasses. If `named`, label each superclass at its middle."""
    sizes = [(name, len(list(run))) for name, run in groupby(superclasses)]
    ends = np.cumsum([size for _, size in sizes])
    for end in ends[:-1]:
        panel.axhline(end - 0.5, color="#AAAAAA", lw=0.4)
        panel.axvline(end - 0.5, color="#AAAAAA", lw=0.4)
    middles = [end - (size + 1) / 2 for end, (_, size) in zip(ends, sizes, strict=True)]
    panel.set_xticks([])
    panel.set_yticks(middles, [name.replace("_", " ") for name, _ in sizes] if named else [""] * len(sizes), fontsize=8)
    panel.tick_params(length=0)


def strongest_relations(
    weight: np.ndarray,
    class_names: Sequence[str],
    superclasses: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    count: int = 20,
) -> Figure:
    """Draw the `count` largest |w_ij| of single classes i, one panel per class.

    Without `classes`, the three classes with the strongest relations are drawn. Names in bold are classes of the same
    superclass as class i.
    """
    if classes is None:
        classes = np.argsort(-strength(weight).max(axis=1))[:3].tolist()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(classes), figsize=(4.4 * len(classes), 5.6), squeeze=False)
        for panel, row in zip(axes[0], classes, strict=True):
            others = strongest(weight, row, count)
            values = weight[row, others]
            panel.barh(range(len(others)), values, color=np.where(values > 0, COLOURS[3], COLOURS[1]))
            panel.set_yticks(range(len(others)), [class_names[j].replace("_", " ") for j in others], fontsize=9)
            for label, j in zip(panel.get_yticklabels(), others, strict=True):
                if superclasses is not None and superclasses[j] == superclasses[row]:
                    label.set_fontweight("bold")
            panel.invert_yaxis()
            panel.axvline(0, color="black", lw=0.8)
            panel.locator_params(axis="x", nbins=4)
            panel.set(title=class_names[row].replace("_", " "), xlabel="weight w_ij")
    return figure
