"""The contrasts of the AEKT study: differences by seed, corrected together, as a table and a figure."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import false_discovery_control

from benchmarks.aekt_contrasts import COMPARED, CONTRASTS, Contrast, contrasts_of, draw, markdown_table, read_results
from benchmarks.aekt_study import CONFIRMATION_SEEDS, CONFIRMED, result_file
from tests.helpers.run_folders import make_result

BED = "cifar100, few images"


@pytest.fixture
def contrasts(tmp_path: Path) -> list[Contrast]:
    """Results in which `aekt` is 2 points ahead of `dkd`, give or take 0.1, and all other settings differ by chance."""
    noise = np.random.default_rng(0)
    for setting in CONFIRMED:
        for seed in CONFIRMATION_SEEDS:
            accuracy = 0.5 + seed / 100 + noise.normal(scale=0.001) + (0.02 if setting == "aekt" else 0)
            file = tmp_path / result_file(BED, setting, seed)
            file.parent.mkdir(parents=True)
            make_result(seed=seed, accuracy=float(accuracy)).write(file)
    return contrasts_of(read_results(tmp_path))


def accuracy_of(contrasts: list[Contrast], name: str) -> Contrast:
    return next(each for each in contrasts if (each.name, each.score) == (name, "accuracy"))


def test_settings_are_compared_by_seed(contrasts: list[Contrast]) -> None:
    assert {each.bed for each in contrasts} == {BED}
    assert len(contrasts) == len(CONTRASTS) * len(COMPARED)
    ahead = accuracy_of(contrasts, "AEKT minus DKD")
    assert ahead.found.seeds == tuple(CONFIRMATION_SEEDS)
    assert ahead.found.difference == pytest.approx(2, abs=0.2)
    assert ahead.significant
    assert not accuracy_of(contrasts, "layer minus none, DKD").significant


def test_a_setting_that_lacks_a_seed_is_left_out(tmp_path: Path) -> None:
    for setting, seeds in {"dkd": CONFIRMATION_SEEDS, "aekt": CONFIRMATION_SEEDS[:-1]}.items():
        for seed in seeds:
            file = tmp_path / result_file(BED, setting, seed)
            file.parent.mkdir(parents=True)
            make_result(seed=seed).write(file)
    results = read_results(tmp_path)
    assert list(results) == [BED]
    assert {setting for setting, found in results[BED].items() if found} == {"dkd"}
    (tmp_path / result_file(BED, "dkd", 0)).unlink()
    assert not read_results(tmp_path)


def test_all_differences_are_corrected_together(contrasts: list[Contrast]) -> None:
    tested = [each.found for each in contrasts if not np.isnan(each.found.p)]
    expected = false_discovery_control([found.p for found in tested], method="by")
    assert len(tested) == len(CONTRASTS)  # the other scores of these results are constant
    assert [found.corrected_p for found in tested] == pytest.approx(list(expected))


def test_the_table_has_a_row_for_each_difference_and_marks_significant_ones(contrasts: list[Contrast]) -> None:
    lines = markdown_table(contrasts).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert rows[0] == ["difference", "data", "top-1", "NLL", "ECE", "agree"]
    assert len(rows) == 2 + len(CONTRASTS)
    assert f"number of comparisons ({len(CONTRASTS)}; " in lines[-1]
    by_name = {row[0]: row[2] for row in rows}
    low, high = accuracy_of(contrasts, "AEKT minus DKD").found.low, accuracy_of(contrasts, "AEKT minus DKD").found.high
    assert by_name["AEKT minus DKD"] == f"**{low:+.1f} to {high:+.1f}**"
    assert "**" not in by_name["layer minus none, DKD"]


def test_the_figure_has_a_panel_for_each_score(contrasts: list[Contrast]) -> None:
    figure = draw(contrasts)
    assert isinstance(figure, Figure)
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["top-1", "NLL", "ECE", "agree"]
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() != "white" for line in dots] == [True, True, False, True, False, False]
