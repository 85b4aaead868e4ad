from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from src.analysis.document import markdown
from src.analysis.results import find_runs, group
from src.report import by_pair, comparisons, draw, notes, results, unfinished_section
from tests.analysis.run_folders import TEACHER, write_run
from tests.commands import run

ACCURACIES = {"vanilla": (0.30, 0.31, 0.32), "kd": (0.40, 0.42, 0.41), "dkd": (0.411, 0.419, 0.43)}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for method, values in ACCURACIES.items():
        for seed, accuracy in enumerate(values):
            write_run(tmp_path / "runs", method, seed, accuracy)
    return tmp_path / "runs"


def test_the_table(runs: Path) -> None:
    table = results(group(find_runs(runs)[0]))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["resnet8 by kd"] == {
        "network": "resnet8 by kd", "n": "3", "top-1": "41.0 +- 1.0", "best": "42.0 +- 1.0", "top-5": "90.0 +- 0.0",
        "NLL": "1.50 +- 0.00", "ECE": "10.0 +- 0.0", "agree": "60.0 +- 0.0", "size": "80k", "time": "10 s",
    }  # fmt: skip
    assert rows["resnet8 alone"]["agree"] == "-"


def test_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    pair: dict[str, Any] = {"data": "cifar100", "student": "wrn16_2", "teacher": {**TEACHER, "name": "wrn40_2"}}
    write_run(tmp_path, "dkd", **pair)
    write_run(tmp_path, "aekt", **pair)
    table = results(group(find_runs(tmp_path)[0]))
    published = [row[list(table.columns).index("published")] for row in table.rows]
    assert published == ["76.23 (best)", "-"]
    assert "DKD, CTKD and logit standardization give the best epoch" in table.caption


def test_every_two_settings_are_compared_by_seed(runs: Path) -> None:
    groups = group(find_runs(runs)[0])
    table = comparisons(groups, against=None)
    assert table
    assert [row[0] for row in table.rows] == [
        "resnet8 by kd less resnet8 alone", "resnet8 by dkd less resnet8 alone", "resnet8 by dkd less resnet8 by kd",
    ]  # fmt: skip
    assert "distinguishable, resnet8 by dkd is higher" in table.rows[1][-1]
    assert "not distinguishable; n=3 does not suffice" in table.rows[2][-1]
    assert len((comparisons(groups, against="kd") or table).rows) == 2


def test_a_seed_that_others_have_is_missed(runs: Path) -> None:
    write_run(runs, "at", 1, 0.4)
    assert "resnet8 by at: no finished run with seed 0, 2, which others have." in notes(group(find_runs(runs)[0]))


def test_methods_by_pairs(runs: Path) -> None:
    assert by_pair(group(find_runs(runs)[0])) == []
    write_run(runs, "kd", 0, 0.6, student="resnet14")
    last, best, _ = by_pair(group(find_runs(runs)[0]))
    assert last.columns == ["method", "resnet20 to resnet14", "resnet20 to resnet8"]
    cells = {row[0]: row[1:] for row in last.rows}
    assert cells["vanilla"] == ["", "31.0 +- 1.0 (3)"]
    assert cells["kd"] == ["60.0 (1)", "41.0 +- 1.0 (3)"]
    assert {row[0]: row[1:] for row in best.rows}["kd"] == ["61.0", "42.0 +- 1.0"]


def test_learning_curves_only_where_there_is_more_than_a_dot(runs: Path, tmp_path: Path) -> None:
    groups, cfg = group(find_runs(runs)[0]), OmegaConf.create({"classes": None})
    assert {picture.file.name for picture in draw(groups, {}, tmp_path, cfg)} == {
        "accuracy.png", "learning_curves.png", "accuracy_by_cost.png",
    }  # fmt: skip
    for file in runs.rglob("metrics.csv"):
        file.write_text("epoch,test/accuracy\n0,\n1,\n2,0.5\n")
    assert "learning_curves.png" not in {picture.file.name for picture in draw(groups, {}, tmp_path, cfg)}


def test_what_is_not_finished_is_listed_by_its_place_below_the_runs(runs: Path) -> None:
    folder = write_run(runs, "at", 1, 0.4)
    (folder / "result.json").write_text("{")
    (table,) = unfinished_section(find_runs(runs)[1], runs).tables
    assert table.rows == [[str(folder.relative_to(runs)), "damaged", "result.json cannot be read (JSONDecodeError)"]]
    assert str(folder.relative_to(runs)) in markdown([unfinished_section(find_runs(runs)[1], runs)])


def test_the_command_on_folders_of_another_program(runs: Path, tmp_path: Path) -> None:
    """Names out of them reach a terminal, a page and a program that makes paper: none may act there."""
    name = "[/red]<img src=x onerror=alert(1)>$|\\x"
    hostile = write_run(runs, "evil", 0, 0.2, student=name, class_names=[name])
    (hostile / "config.yaml").write_text(f"data: {{_target_: os.system, command: touch {tmp_path}/executed}}\n")
    (runs / "elsewhere").mkdir()
    (runs / "elsewhere" / "result.json").write_text('{"accuracy": 1}')
    out = tmp_path / "out"
    ran = run("report", f"runs={runs}", f"out={out}", "title=Tiny")
    assert (ran.code, ran.err) == (0, "")
    assert not (tmp_path / "executed").exists()
    assert "elsewhere is foreign: result.json is not what a run writes" in ran.out
    assert {file.name for file in out.iterdir()} == {
        "report.html", "table.md", "table.tex", "accuracy.png", "learning_curves.png", "accuracy_by_cost.png",
    }  # fmt: skip
    page = (out / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    assert "<img src=x" not in (out / "table.md").read_text()
    for text in (page, (out / "table.md").read_text()):
        assert "elsewhere" in text
        assert "is in no picture that needs its answers" in text
        assert str(tmp_path) not in text


def test_a_run_that_fails_says_why_until_it_goes_on(tmp_path: Path, array_file: Path) -> None:
    arguments = (
        "train", "data=cifar10", f"data.path={array_file}", "model=resnet20_to_resnet8", "trainer=debug", "logger=none",
        "method=vanilla", f"runs={tmp_path}", "schedule.batch_size=8",
    )  # fmt: skip
    ran = run(*arguments, "schedule.learning_rate=1e30")
    assert ran.code == 1
    ((failed,), finished) = (find_runs(tmp_path)[1], find_runs(tmp_path)[0])
    assert finished == []
    assert failed.state == "failed"
    assert failed.detail.startswith("0 of 1 epochs done: The loss is not finite in epoch 0")
    assert " ".join((failed.folder / "failure.txt").read_text().split()) in ran.err
