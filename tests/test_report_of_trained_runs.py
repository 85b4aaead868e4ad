"""From training to a report: runs of several methods, and an ablation."""

from pathlib import Path

import pytest

from tests.helpers.commands import run
from tests.helpers.place import RUNS, Place, result_of


def test_a_report_of_trained_runs(copies: Place) -> None:
    folder = copies.folder("aekt", "serial")
    unfinished = copies.folder("kd", "none")
    (unfinished / "result.json").unlink()
    out = copies.path / "reports"
    ran = run("report", f"runs={copies.runs}", f"out={out}")
    assert (ran.code, ran.err) == (0, "")
    assert f"Left out: {unfinished} is stopped: 1 of 1 epochs done" in ran.out
    table = (out / "table.md").read_text()
    assert str(unfinished.relative_to(copies.runs)) in table
    rows = [line for line in table.partition("| compared")[0].splitlines() if line.startswith("| resnet")]
    assert len(rows) == len(RUNS)  # the teacher's and all but the unfinished one
    (row,) = [row for row in rows if "aekt, serial" in row]
    assert f"{100 * result_of(folder)['test']['accuracy']:.1f}" in row
    assert sum("resnet8" in row for row in rows) == len(RUNS) - 1
    for picture in ("accuracy.png", "reliability.png", "agreement.png", "class_relations.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "is left out of the pictures" not in table


@pytest.mark.slow
def test_an_ablation_from_its_command_to_its_table(array_file: Path, tmp_path: Path) -> None:
    """The command line overrides the experiment's values, and a second command trains only the missing runs."""
    here = (f"data.path={array_file}", f"runs={tmp_path / 'runs'}", f"teacher.store={tmp_path}")
    small = (
        "data=cifar10", "model=resnet20_to_resnet8", "trainer=debug", "start_over=false", "logger=none",
        "schedule.batch_size=8",
    )  # fmt: skip
    ablation = ("-m", "experiment=ablation_confidence_term", *small, *here)
    ran = run("train", *ablation, "seed=0,1", "method.confidence_term=false")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("This sweep has 2 runs.")
    assert "of training, one run after another" in ran.out

    again = run("train", *ablation)
    assert again.out.startswith("This sweep has 2 runs.")
    assert again.out.count("is finished already") == 1

    ran = run("report", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'out'}", "answers=false")
    assert ran.code == 0
    table = " ".join((tmp_path / "out" / "table.md").read_text().split())
    assert "| resnet8 by aekt, serial (confidence_term=False) | 2 |" in table
    assert "| resnet8 by aekt, serial (confidence_term=True) | 1 |" in table
    for picture in ("accuracy.png", "gradients-2.png", "class_relations.png", "strongest_relations.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
