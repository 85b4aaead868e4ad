"""`python -m src.report`, from run folders to its files."""

from pathlib import Path

import pytest

from src.analysis.document import Table
from src.analysis.results import find_runs
from src.report import show
from tests.helpers.commands import assert_refused, run
from tests.helpers.run_folders import write_run

ALWAYS = {"report.html", "table.md", "table.tex", "accuracy.png", "learning_curves.png", "accuracy_by_cost.png"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    accuracies = {"vanilla": (0.30, 0.31, 0.32), "kd": (0.40, 0.42, 0.41), "tfkd": (0.33, 0.34, 0.32)}
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            write_run(tmp_path / "runs", method, seed, accuracy)
    return tmp_path / "runs"


def test_the_report_is_written_in_three_forms(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = run("report", f"runs={runs}", f"out={out}", "answers=false")
    assert (ran.code, ran.err) == (0, "")
    assert {file.name for file in out.iterdir()} == ALWAYS
    assert f"Written: {out / 'report.html'}" in " ".join(ran.out.split())
    for file, column in (
        ("report.html", ">corrected p</th>"),
        ("table.md", "| corrected p "),
        ("table.tex", "& corrected p "),
    ):
        text = (out / file).read_text()
        assert column in text
        assert "resnet8 by tfkd" in text
        assert "resnet8 by kd minus resnet8 alone" in text
    assert "resnet8 by tfkd" in ran.out


def test_only_comparisons_with_the_chosen_method_are_made(runs: Path, tmp_path: Path) -> None:
    ran = run("report", f"runs={runs}", f"out={tmp_path / 'out'}", "answers=false", "against=tfkd")
    assert (ran.code, ran.err) == (0, "")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "resnet8 by tfkd minus resnet8 alone" in text
    assert "resnet8 by kd minus resnet8 alone" not in text


def test_the_chosen_scores_are_compared(runs: Path, tmp_path: Path) -> None:
    ran = run("report", f"runs={runs}", f"out={tmp_path / 'out'}", "answers=false", "scores=[nll,ece]")
    assert (ran.code, ran.err) == (0, "")
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if "resnet8 by kd minus resnet8 alone" in line]
    assert [row[2].strip() for row in rows] == ["NLL", "ECE"]
    ran = run("report", f"runs={runs}", "scores=[loss]")
    assert (ran.code, ran.err) == (
        1, "error: scores=loss is not a score: choose from accuracy, top5, nll, ece, agreement.\n",
    )  # fmt: skip


def test_an_unknown_method_to_compare_with_is_refused(runs: Path, tmp_path: Path) -> None:
    ran = run("report", f"runs={runs}", f"out={tmp_path / 'out'}", "against=KD")
    assert (ran.code, ran.err.strip()) == (
        1, "error: against=KD is not a method of these runs: choose from kd, tfkd, vanilla.",
    )  # fmt: skip


def test_runs_of_two_protocols_have_sections_and_pictures_of_their_own(runs: Path, tmp_path: Path) -> None:
    write_run(runs, "kd", settings={"data": {"name": "other"}}, data="other")
    ran = run("report", f"runs={runs}", f"out={tmp_path / 'out'}", "answers=false")
    assert (ran.code, ran.err) == (0, "")
    titles = [line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("## ")]
    assert titles == ["## colours, 200 training images, 3 epochs", "## other, 200 training images, 3 epochs"]
    assert (tmp_path / "out" / "2-accuracy.png").is_file()


def test_folders_of_another_program_cannot_act(runs: Path, tmp_path: Path) -> None:
    """Names from run folders reach a terminal, a page, and a program that typesets. None may act there."""
    name = "[/red]<img src=x onerror=alert(1)>$|\\x"
    hostile = write_run(runs, "evil", 0, 0.2, student=name, class_names=[name])
    (hostile / "config.yaml").write_text(f"data: {{_target_: os.system, command: touch {tmp_path}/executed}}\n")
    (runs / "elsewhere").mkdir()
    (runs / "elsewhere" / "result.json").write_text('{"accuracy": 1}')
    out = tmp_path / "out"
    ran = run("report", f"runs={runs}", f"out={out}", "title=Tiny")
    assert (ran.code, ran.err) == (0, "")
    assert not (tmp_path / "executed").exists()
    assert "elsewhere is foreign: result.json was not written by a run" in ran.out
    assert {file.name for file in out.iterdir()} == ALWAYS
    page = (out / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    assert "<img src=x" not in (out / "table.md").read_text()
    for text in (page, (out / "table.md").read_text()):
        assert "elsewhere" in text
        assert "is left out of the pictures of predictions" in text
        assert str(tmp_path) not in text


def test_a_failed_run_is_listed_with_its_error(tmp_path: Path, array_file: Path) -> None:
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


def test_without_finished_runs_nothing_is_written(tmp_path: Path) -> None:
    ran = run("report", f"runs={tmp_path}", f"out={tmp_path / 'out'}")
    assert_refused(ran, f"There is no finished run below {tmp_path}: train one with python -m src.train")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_runs_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.touch()
    ran = run("report", f"runs={file}", f"out={tmp_path / 'out'}")
    assert_refused(ran, f"runs={file} is a file: give a folder, in which the runs are searched.")


def test_a_terminal_shows_the_most_important_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show("title [/red]", Table("caption", ["network", "top-1", "top-5"], [["resnet8 [b]", "41.0", "90.0"]]))
    shown = capsys.readouterr().out
    assert "title [/red]" in shown
    assert "resnet8 [b]" in shown
    assert "41.0" in shown
    assert "90.0" not in shown
