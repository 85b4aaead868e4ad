"""The examples of docs/extending.md: written to a copy of the project as they are shown, and run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"\*\*`([^`]+)`\*\*\n\n```\w+\n(.*?)```", PAGE, re.S))
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all examples."""
    root = tmp_path_factory.mktemp("extended")
    for folder in ("src", "conf"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in FILES.items():
        assert not (root / name).exists(), f"docs/extending.md would overwrite {name}"
        (root / name).write_text(content)
    return root


def test_the_examples_are_complete_and_short() -> None:
    folders = {str(Path(name).parent) for name in FILES}
    assert {
        "src/methods",
        "conf/method",
        "src/training",
        "conf/serialization",
        "src/models",
        "conf/network",
        "conf/model",
        "src/data",
        "conf/data",
    } <= folders
    assert {name: len(content.splitlines()) for name, content in FILES.items() if len(content.splitlines()) > 25} == {}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(shlex.split(command)[3:6]))
def test_the_commands_run(command: str, extended: Path, array_file: Path) -> None:
    words = shlex.split(command)[3:]
    if "data=glyphs" in words:  # to draw them takes longer than everything else
        words[words.index("data=glyphs")] = "data=cifar10"
        words.append(f"data.path={array_file}")
    words = [word for word in words if word.partition("=")[0] != "model" or "twolayers" in word or "resnet20" in word]
    if not any(word.startswith("model=") for word in words):
        words.append("network@model.teacher=resnet20")
    run = subprocess.run(
        [sys.executable, "-m", "src.train", *words, "schedule.batch_size=8"],
        cwd=extended,
        env={**os.environ, "PYTHONPATH": str(extended)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "after the last epoch" in run.stdout


def test_the_code_examples_follow_the_style(extended: Path) -> None:
    files = [str(extended / name) for name in FILES if name.endswith(".py")]
    for check in (["check"], ["format", "--check"]):
        ran = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), *files],
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
