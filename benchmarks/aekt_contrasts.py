"""Show what the confirmation of the AEKT study found: the differences between settings, by bed and score.

    python -m benchmarks.aekt_contrasts

The command reads the result files below results/aekt_study. There it writes contrasts.md, a table of the differences,
and draws them in contrasts.png.
"""

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tabulate import tabulate

from benchmarks.aekt_study import CONFIRMATION_SEEDS, CONFIRMATIONS, CONFIRMED, STUDY, result_file
from src.analysis.figures import COLOURS, STYLE, save
from src.analysis.report_tables import SCORES, by_seed
from src.analysis.results import Finished
from src.analysis.statistics import CONFIDENCE, Comparison, compare_paired, correct_for_multiplicity
from src.common.files import write_text
from src.runs.result import Result, read_record

CONTRASTS = {
    "AEKT minus DKD": ("aekt", "dkd"),
    "AEKT minus weight 1": ("aekt", "one"),
    "layer minus none, DKD": ("dkd serial", "dkd"),
    "layer minus none, AEKT": ("aekt serial", "aekt"),
    "AEKT minus DKD, both with layer": ("aekt serial", "dkd serial"),
    "AEKT with layer minus DKD": ("aekt serial", "dkd"),
}
"""The settings that are compared: what explicit transfer, its weight and the layer bring, and all of AEKT together."""
COMPARED = ("accuracy", "nll", "ece", "agreement")
"""The scores that are compared. Settings are compared over the seeds that both have."""


class Contrast(NamedTuple):
    """The difference between two settings on a bed, in one score."""

    bed: str
    name: str
    score: str
    found: Comparison

    @property
    def significant(self) -> bool:
        """True if the difference is significant after correction for all differences of the study."""
        return self.found.corrected_p <= 1 - CONFIDENCE


def read_results(study: Path) -> dict[str, dict[str, list[Finished]]]:
    """Read the result files of the study, by bed and setting. Beds without a finished setting are left out."""
    results = {bed: {setting: _read_setting(study, bed, setting) for setting in CONFIRMED} for bed in CONFIRMATIONS}
    return {bed: settings for bed, settings in results.items() if any(settings.values())}


def _read_setting(study: Path, bed: str, setting: str) -> list[Finished]:
    files = sorted(study.glob(result_file(bed, setting, "*")))
    if len(files) < len(CONFIRMATION_SEEDS):
        return []  # comparing before the last seed would let the results decide when to stop
    return [Finished(file.parent, read_record(Result, file)) for file in files]


def contrasts_of(results: Mapping[str, Mapping[str, Sequence[Finished]]]) -> list[Contrast]:
    """Compare the settings by seed. The p-values are corrected for all comparisons together."""
    contrasts = [
        Contrast(bed, name, score, compare_paired(one, other, by_seed(runs[one], score), by_seed(runs[other], score)))
        for name, (one, other) in CONTRASTS.items()
        for bed, runs in results.items()
        for score in COMPARED
    ]
    corrected = correct_for_multiplicity([contrast.found for contrast in contrasts])
    return [contrast._replace(found=found) for contrast, found in zip(contrasts, corrected, strict=True)]


def markdown_table(contrasts: Sequence[Contrast]) -> str:
    """Write one row for each difference and bed, with 95 % intervals. Significant differences are bold."""
    tested = sum(not isnan(contrast.found.p) for contrast in contrasts)
    caption = (
        "95 % intervals of the mean difference after the last epoch, paired by seed, in percentage points (NLL: in "
        f"nats). Bold: significant after correction for the number of comparisons ({tested}; Benjamini and Yekutieli)."
    )
    rows: dict[tuple[str, str], list[str]] = {}
    for contrast in contrasts:
        digits = SCORES[contrast.score].digits
        low, high = (f"{bound:+.{digits}f}" for bound in (contrast.found.low, contrast.found.high))
        cell = "-" if isnan(contrast.found.low) else f"{low} to {high}"
        rows.setdefault((contrast.name, contrast.bed), []).append(f"**{cell}**" if contrast.significant else cell)
    head = ["difference", "data", *(SCORES[score].column for score in COMPARED)]
    body = tabulate([[*key, *cells] for key, cells in rows.items()], head, tablefmt="pipe", disable_numparse=True)
    return f"{body}\n\n{caption}\n"


def draw(contrasts: Sequence[Contrast]) -> Figure:
    """Draw the differences with their 95 % intervals, one panel per score. Filled dots: significant."""
    beds = list(dict.fromkeys(contrast.bed for contrast in contrasts))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(COMPARED), figsize=(12, 6), sharey=True)
        for panel, score in zip(panels, COMPARED, strict=True):
            for contrast in (each for each in contrasts if each.score == score):
                row, place = list(CONTRASTS).index(contrast.name), beds.index(contrast.bed)
                _draw_interval(panel, contrast, row + 0.15 * (place - (len(beds) - 1) / 2), COLOURS[place + 1])
            panel.axvline(0, color="grey", lw=0.8)
            panel.grid(axis="x", alpha=0.25)
            unit = "points" if SCORES[score].factor == 100 else "nats"
            panel.set(title=SCORES[score].column, xlabel=f"difference, {unit}")
        panels[0].set_yticks(range(len(CONTRASTS)), [name.replace(", ", ",\n") for name in CONTRASTS])
        panels[0].invert_yaxis()
        handles = [Line2D([], [], color=COLOURS[place + 1], marker="o") for place in range(len(beds))]
        figure.legend(handles, beds, loc="outside lower center", ncols=len(beds), frameon=False)
    return figure


def _draw_interval(panel: Axes, contrast: Contrast, height: float, colour: str) -> None:
    found = contrast.found
    panel.plot([found.low, found.high], [height, height], color=colour, lw=2)
    panel.plot(found.difference, height, "o", color=colour, ms=6, mfc=colour if contrast.significant else "white")


def main() -> None:
    """Write the table, and draw the figure."""
    contrasts = contrasts_of(read_results(STUDY))
    write_text(STUDY / "contrasts.md", markdown_table(contrasts))
    save(draw(contrasts), STUDY / "contrasts.png")


if __name__ == "__main__":
    main()
