"""The benchmarks run as the README says; what they measure is nobody's to assert."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = (
    "step_stored", "step_plain", "compiled", "winograd", "loop", "data", "loss", "startup", "sweep", "memory",
    "teacher", "scale",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_timed_and_kept(row: str, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    smallest = ["--rounds", "1", "--steps", "1", "--batches", "2", "--batch-sizes", "8"]
    shortest = ["--sweep-images", "100", "--sweep-epochs", "1", "--sweep-seeds", "1"]
    pair = ["--pairs", "wrn40_2_to_wrn16_2", "--out", str(table)]
    command = [sys.executable, "-m", "benchmarks.speed", row, *smallest, *shortest, *pair]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    heading, _, _, _, *rows = table.read_text().splitlines()
    assert heading.startswith(f"`python -m benchmarks.speed {row}")
    assert rows
    assert all(float(line.split("|")[4].split()[0]) > 0 for line in rows)


@pytest.mark.slow
def test_a_method_is_timed_against_kd() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.methods", "vanilla", "--rounds", "1", "--batch-size", "8"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.rstrip().splitlines()[-1].startswith("| vanilla | - |")
