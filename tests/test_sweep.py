"""What a sweep announces, and an ablation from its command to its table."""

from pathlib import Path

import pytest

from src.sweep import Clock, estimate, in_words
from tests.commands import run


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 seconds"),
        (119, "119 seconds"),
        (150, "2.5 minutes"),
        (7199, "120 minutes"),
        (36000, "10 hours"),
        (3 * 86400, "3.0 days"),
        (40.2 * 86400, "40 days"),
    ],
)
def test_times_are_told_in_their_unit(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_the_estimate_grows_with_the_runs() -> None:
    said = estimate([3600.0, 7200.0, 0.0, 3600.0], 48)
    assert said.startswith(
        "About 2.0 days of training one after another, give or take 20 hours: 0 seconds to 2.0 hours"
    )
    assert "give or take" not in estimate([60.0], 1)


def test_the_first_step_does_not_count() -> None:
    clock = Clock()
    clock.ends = [100.0, 101.0, 102.0, 103.0]
    assert clock.seconds_a_step == 1.0


@pytest.mark.slow
def test_an_ablation_from_its_command_to_its_table(array_file: Path, tmp_path: Path) -> None:
    """Overrides of the command line win over the experiment's own, and only what is missing is done."""
    here = (f"data.path={array_file}", f"runs={tmp_path / 'runs'}", f"teacher.store={tmp_path}")
    small = ("data=cifar10", "model=resnet20_to_resnet8", "trainer=debug", "logger=none", "schedule.batch_size=8")
    ablation = ("-m", "experiment=ablation_confidence_term", *small, *here)
    ran = run("train", *ablation, "seed=0,1", "method.confidence_term=false")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("This is 2 runs.")
    assert "of training one after another" in ran.out

    again = run("train", *ablation)
    assert again.out.startswith("This is 2 runs.")
    assert again.out.count("is finished already") == 1

    ran = run("report", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'out'}", "answers=false")
    assert ran.code == 0
    table = " ".join((tmp_path / "out" / "table.md").read_text().split())
    assert "| resnet8 by aekt, serial (confidence_term=False) | 2 |" in table
    assert "| resnet8 by aekt, serial (confidence_term=True) | 1 |" in table
    for picture in ("accuracy.png", "gradients-2.png", "class_relations.png", "strongest_relations.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
