"""Tables of a report: results, methods by pairs, comparisons, relations between classes, and unfinished folders."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.analysis.answered import Answered
from src.analysis.document import Section, Table, markdown
from src.analysis.predictions import Predictions
from src.analysis.report_tables import (
    comparison_table,
    hierarchy_table,
    notes,
    pair_tables,
    results_table,
    unfinished_table,
)
from src.analysis.results import Finished, find_runs, group
from src.analysis.statistics import compare_paired, correct_for_multiplicity
from tests.helpers.run_folders import TEACHER, finished, write_run

ACCURACIES = {"vanilla": (0.30, 0.31, 0.32), "kd": (0.40, 0.42, 0.41), "dkd": (0.411, 0.419, 0.43)}
SUPERCLASSES = ["animal", "plant", "vehicle"] * 4
NAMES = [f"{name} {i}" for i, name in enumerate(SUPERCLASSES)]
SAME = np.equal.outer(SUPERCLASSES, SUPERCLASSES)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for method, values in ACCURACIES.items():
        for seed, accuracy in enumerate(values):
            write_run(tmp_path / "runs", method, seed, accuracy)
    return tmp_path / "runs"


def columns_of(table: Table) -> dict[str, list[str]]:
    return {name: [row[index] for row in table.rows] for index, name in enumerate(table.columns)}


# Results


def test_a_row_has_the_means_of_a_setting(runs: Path) -> None:
    table = results_table(group(find_runs(runs)[0]))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["resnet8 by kd"] == {
        "network": "resnet8 by kd", "n": "3", "top-1": "41.0 +- 1.0", "best": "42.0 +- 1.0", "top-5": "90.0 +- 0.0",
        "NLL": "1.50 +- 0.00", "ECE": "10.0 +- 0.0", "agree": "60.0 +- 0.0", "size": "80k", "time": "10 s",
    }  # fmt: skip
    assert rows["resnet8 alone"]["agree"] == "-"


def test_a_method_without_a_teacher_has_a_name_and_no_agreement(runs: Path) -> None:
    write_run(runs, "tfkd", 0, 0.35)
    table = results_table(group(find_runs(runs)[0]))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert [name for name in rows if name.endswith("alone")] == ["resnet8 alone"]
    assert (rows["resnet8 by tfkd"]["top-1"], rows["resnet8 by tfkd"]["agree"]) == ("35.0", "-")


def test_columns_without_a_value_are_dropped(tmp_path: Path) -> None:
    write_run(tmp_path, "vanilla", best_epoch=None)
    table = results_table(group(find_runs(tmp_path)[0]))
    assert table.columns == ["network", "n", "top-1", "top-5", "NLL", "ECE", "size", "time"]


def test_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    pair: dict[str, Any] = {"data": "cifar100", "student": "wrn16_2", "teacher": {**TEACHER, "name": "wrn40_2"}}
    write_run(tmp_path, "dkd", **pair)
    write_run(tmp_path, "aekt", **pair)
    table = results_table(group(find_runs(tmp_path)[0]))
    assert columns_of(table)["published"] == ["76.23 (best)", "-"]
    assert "DKD, CTKD and logit standardization give the best epoch" in table.caption


def test_methods_stand_beside_pairs_if_there_are_several(runs: Path) -> None:
    assert pair_tables(group(find_runs(runs)[0])) == []
    write_run(runs, "kd", 0, 0.6, student="resnet14")
    last, best, _ = pair_tables(group(find_runs(runs)[0]))
    assert last.columns == ["method", "resnet20 to resnet14", "resnet20 to resnet8"]
    cells = {row[0]: row[1:] for row in last.rows}
    assert cells["vanilla"] == ["", "31.0 +- 1.0 (3)"]
    assert cells["kd"] == ["60.0 (1)", "41.0 +- 1.0 (3)"]
    assert {row[0]: row[1:] for row in best.rows}["kd"] == ["61.0", "42.0 +- 1.0"]


def test_a_pair_with_several_settings_of_a_method_has_a_row_for_each(runs: Path) -> None:
    for accuracy, temperature in ((0.6, 4.0), (0.7, 2.0)):
        settings = {"method": {"name": "kd", "temperature": temperature}}
        write_run(runs, "kd", 0, accuracy, student="resnet14", settings=settings)
    last, *_ = pair_tables(group(find_runs(runs)[0]))
    cells = {row[0]: row[1:] for row in last.rows}
    assert cells["kd"] == ["", "41.0 +- 1.0 (3)"]
    assert cells["kd (temperature=4.0)"] == ["60.0 (1)", ""]
    assert cells["kd (temperature=2.0)"] == ["70.0 (1)", ""]


# Comparisons


def test_every_two_settings_are_compared_by_seed(runs: Path) -> None:
    groups = group(find_runs(runs)[0])
    table = comparison_table(groups, against=None)
    assert table
    assert table.sentences
    assert table.columns == ["compared", "score", "difference", "p", "corrected p", "verdict"]
    assert [row[0] for row in table.rows] == [
        "resnet8 by kd minus resnet8 alone", "resnet8 by dkd minus resnet8 alone", "resnet8 by dkd minus resnet8 by kd",
    ]  # fmt: skip
    assert "distinguishable, resnet8 by dkd is higher" in table.rows[1][-1]
    assert "not distinguishable; n=3 is not enough" in table.rows[2][-1]
    assert len((comparison_table(groups, against="kd") or table).rows) == 2


def test_the_p_values_are_corrected_for_the_comparisons_of_the_table(runs: Path) -> None:
    groups = group(find_runs(runs)[0])
    by_seed = {
        method: {seed: 100 * value for seed, value in enumerate(values)} for method, values in ACCURACIES.items()
    }
    pairs = [("kd", "vanilla"), ("dkd", "vanilla"), ("dkd", "kd")]
    expected = correct_for_multiplicity([compare_paired(a, b, by_seed[a], by_seed[b]) for a, b in pairs])
    assert [each.p for each in expected] == pytest.approx([0.003317, 0.0000275, 0.2419], rel=1e-2)
    assert [each.corrected_p for each in expected] == pytest.approx([0.009121, 0.0001515, 0.4435], rel=1e-2)
    table = comparison_table(groups, against=None)
    assert table
    columns = columns_of(table)
    assert columns["p"] == ["0.003", "<0.001", "0.242"]
    assert columns["corrected p"] == ["0.009", "<0.001", "0.443"]
    assert "number of comparisons (3; Benjamini and Yekutieli)" in table.caption


def test_a_difference_that_is_significant_only_by_itself_is_called_so(tmp_path: Path) -> None:
    accuracies = {
        "vanilla": (0.30, 0.31, 0.32),
        "kd": (0.40, 0.44, 0.41),
        "dkd": (0.42, 0.41, 0.44),
        "at": (0.3, 0.4, 0.2),
    }
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            write_run(tmp_path, method, seed, accuracy)
    groups = group(find_runs(tmp_path)[0])
    alone = comparison_table({name: groups[name] for name in ("resnet8 alone", "resnet8 by kd")}, against=None)
    among = comparison_table(groups, against=None)
    assert alone
    assert among
    assert "distinguishable, resnet8 by kd is higher" in alone.rows[0][-1]
    assert alone.rows[0][3] == alone.rows[0][4] == among.rows[0][3]
    assert among.rows[0][0] == alone.rows[0][0]
    assert "resnet8 by kd is higher, but the difference is not significant after correction" in among.rows[0][-1]


def test_a_comparison_of_one_seed_has_no_p_value_and_does_not_count(runs: Path) -> None:
    write_run(runs, "at", 0, 0.4)
    table = comparison_table(group(find_runs(runs)[0]), against=None)
    assert table
    rows = {row[0]: row for row in table.rows}
    assert len(rows) == 6
    assert rows["resnet8 by at minus resnet8 by kd"][2:5] == ["+0.00", "-", "-"]
    assert "number of comparisons (3; Benjamini and Yekutieli)" in table.caption


def test_several_scores_are_compared_each_in_its_unit(tmp_path: Path) -> None:
    scores = {
        "vanilla": [{"nll": 1.0}, {"nll": 1.1}],
        "kd": [{"nll": 1.013, "agreement": 0.5}, {"nll": 1.113, "agreement": 0.6}],
        "dkd": [{"nll": 1.02, "agreement": 0.51}, {"nll": 1.16, "agreement": 0.63}],
    }
    for method, by_seed in scores.items():
        for seed, test in enumerate(by_seed):
            write_run(tmp_path, method, seed, test={"accuracy": 0.5, "top5": 0.9, "ece": 0.1, **test})
    table = comparison_table(group(find_runs(tmp_path)[0]), against=None, scores=["nll", "agreement"])
    assert table
    assert [row[:3] for row in table.rows] == [
        ["resnet8 by kd minus resnet8 alone", "NLL", "+0.013"],
        ["resnet8 by dkd minus resnet8 alone", "NLL", "+0.040"],
        ["resnet8 by dkd minus resnet8 by kd", "NLL", "+0.027"],
        ["resnet8 by dkd minus resnet8 by kd", "agree", "+2.00"],  # a student alone has no teacher to agree with
    ]
    assert "interval is -0.227 to +0.281" in table.rows[2][-1]


def test_students_of_different_networks_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "kd")
    write_run(tmp_path, "dkd", student="resnet14")
    assert comparison_table(group(find_runs(tmp_path)[0]), against=None) is None


# Relations between classes


@pytest.fixture
def run(tmp_path: Path) -> Finished:
    """A run whose serialization layer knows the superclasses. Only its checkpoint is on the disk."""
    noise = np.random.default_rng(0).normal(0, 0.1, SAME.shape)
    weight = torch.from_numpy(np.eye(12) + noise + 0.5 * SAME)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {"serialization.layer.weight": weight}}, tmp_path / "checkpoints" / "last.ckpt")
    return finished(tmp_path, method="aekt", layer="serial", class_names=NAMES, superclasses=SUPERCLASSES)


@pytest.fixture
def answered() -> Answered:
    """The answers of a student, and of a teacher that agrees, who mistake classes for others of their superclass."""
    target = np.repeat(np.arange(12), 4)
    student = target.copy()
    student[::4] = (target[::4] + 3) % 12
    data: Any = None
    return Answered(Predictions(student[:, None], np.ones((48, 1)), target), student, 0, 0, data)


def test_the_hierarchy_is_measured_for_the_layer_and_the_confusions(run: Finished, answered: Answered) -> None:
    table = hierarchy_table({"student": [run], "unasked": [run]}, {"student": answered})
    assert table is not None
    rows = [(row[0], row[1].partition(":")[0], row[2][:4], row[3][:4]) for row in table.rows]
    assert rows == [
        ("student", "Serialization layer", "1.00", "0.59"),
        ("student", "Teacher", "0.83", "-"),
        ("student", "Student", "0.83", "1.00"),
        ("unasked", "Serialization layer", "1.00", "-"),
    ]


def test_only_measures_with_a_value_are_listed_and_explained(run: Finished, answered: Answered) -> None:
    flat = Finished(run.folder, run.result.model_copy(update={"superclasses": None}))
    table = hierarchy_table({"student": [flat]}, {"student": answered})
    assert table is not None
    assert table.columns == ["network", "relations", "teacher"]
    assert [row[1].partition(":")[0] for row in table.rows] == ["Serialization layer", "Student"]
    assert "superclass" not in table.caption
    assert hierarchy_table({"student": [flat]}, {}) is None


def test_a_run_without_a_readable_layer_has_no_hierarchy(run: Finished) -> None:
    (run.folder / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    assert hierarchy_table({"student": [run]}, {}) is None
    assert hierarchy_table({"student": [finished(run.folder, layer="none")]}, {}) is None


# Notes and unfinished folders


def test_a_seed_that_only_other_settings_have_is_reported_as_missing(runs: Path) -> None:
    write_run(runs, "at", 1, 0.4)
    said = notes(group(find_runs(runs)[0]))
    assert "resnet8 by at: no finished run with seed 0, 2, which other settings have." in said


def test_the_notes_name_teachers_and_versions(runs: Path) -> None:
    folder = write_run(runs, "at", 0, teacher={**TEACHER, "name": "resnet56", "accuracy": 0.725})
    (folder / "run.json").write_text("damaged")
    said = notes(group(find_runs(runs)[0]))
    assert said[0] == "Teacher: resnet20 (70.00 %), resnet56 (72.50 %)."
    assert said[-1] == "Made by code abc, torch 2.14."


def test_folders_are_listed_by_their_place_below_the_runs(runs: Path) -> None:
    folder = write_run(runs, "at", 1, 0.4)
    (folder / "result.json").write_text("{")
    table = unfinished_table(find_runs(runs)[1], str(runs))
    place = str(folder.relative_to(runs))
    ((found, state, why),) = table.rows
    assert (found, state) == (place, "damaged")
    assert why.startswith("result.json is damaged (")
    assert table.sentences
    assert place in markdown([Section("Not among the results", tables=[table])])


def test_a_report_never_prints_nan(tmp_path: Path) -> None:
    """Two settings of one seed each, without a common seed, and a loss and a time that are not finite."""
    write_run(tmp_path, "kd", 0, 0.5)
    write_run(tmp_path, "dkd", 1, 0.6, seconds=float("nan"))
    write_run(tmp_path, "at", 2, 0.4, test={"accuracy": 0.4, "top5": 0.9, "nll": float("nan"), "ece": float("inf")})
    groups = group(find_runs(tmp_path)[0])
    results, compared = results_table(groups), comparison_table(groups, None)
    assert compared is not None
    assert columns_of(results)["top-1"] == ["50.0", "60.0", "40.0"]
    assert columns_of(results)["NLL"] == ["1.50", "1.50", "-"]
    assert columns_of(results)["time"] == ["10 s", "-", "10 s"]
    assert columns_of(compared)["difference"] == ["-", "-", "-"]
    text = markdown([Section("results", tables=[results, compared])])
    assert not re.search(r"\b(nan|inf)\b", text)
