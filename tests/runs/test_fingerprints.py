"""Fingerprints change with the code, the data and the teacher of a run, and with nothing else."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from src.runs import fingerprints as module
from src.runs.fingerprints import PACKAGES, code_digest, fingerprints, run_targets, versions
from tests.helpers.configure import configure

MAIN = '''"""A module."""

import math

from src.helper import double  # the helper counts too


class Thing:
    """A class."""

    size: int = 3
    """A number."""

    def area(self) -> float:
        """Compute the area."""
        return double(math.pi) * self.size  # twice
'''
HELPER = "def double(x: float) -> float:\n    return 2 * x\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a module, a helper that it imports, and a module that it does not import."""
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "main.py").write_text(MAIN)
    (folder / "helper.py").write_text(HELPER)
    (folder / "other.py").write_text("x = 1\n")
    monkeypatch.setattr(module, "PACKAGE", folder)
    return folder


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', '"""Another docstring."""'),
        ('    """A class."""\n\n', ""),
        ('"""A number."""', '"""Another number."""'),
        ('"""Compute the area."""', '"""Return it."""'),
        ("  # twice", "  # two times"),
        ("\n\n\nclass", "\n\n# A comment.\n\n\n\nclass"),
        ("double(math.pi) * self.size", "(\n            double(math.pi)\n            * self.size\n        )"),
    ],
    ids=["module", "class", "attribute", "function", "comment", "blank lines", "line breaks"],
)
def test_docstrings_comments_and_layout_keep_the_digest(package: Path, old: str, new: str) -> None:
    before = code_digest(["src.main"])
    assert MAIN.count(old) == 1
    (package / "main.py").write_text(MAIN.replace(old, new))
    assert code_digest(["src.main"]) == before


@pytest.mark.parametrize(
    ("old", "new"), [("double(math.pi)", "double(math.e)"), ("int = 3", "int = 4"), ("def area", "def volume")]
)
def test_code_changes_the_digest(package: Path, old: str, new: str) -> None:
    before = code_digest(["src.main"])
    (package / "main.py").write_text(MAIN.replace(old, new))
    assert code_digest(["src.main"]) != before


def test_the_code_of_imported_modules_of_the_package_counts(package: Path) -> None:
    before = code_digest(["src.main"])
    (package / "other.py").write_text("x = 2\n")
    assert code_digest(["src.main"]) == before
    (package / "helper.py").write_text(HELPER.replace("2 * x", "3 * x"))
    assert code_digest(["src.main"]) != before


def test_a_cpp_file_beside_a_module_counts_with_its_comments(package: Path) -> None:
    digests = [code_digest(["src.main"])]
    for source in ("int one = 1;", "int one = 1; // a comment"):
        (package / "helper.cpp").write_text(source)
        digests.append(code_digest(["src.main"]))
    assert len(set(digests)) == 3


def test_modules_that_import_each_other_are_hashed_once_in_any_order(package: Path) -> None:
    (package / "helper.py").write_text(f"from src.main import Thing\n{HELPER}")
    assert code_digest(["src.main", "src.helper"]) == code_digest(["src.helper", "src.main"])


def test_fingerprints_hold_the_digests_of_code_data_and_teacher() -> None:
    found = fingerprints(configure("method=kd"), "da7a", "7eac")
    assert (found.data, found.teacher) == ("da7a", "7eac")
    assert len(found.code) == 64
    assert fingerprints(configure("method=vanilla"), "da7a", None).teacher is None


def test_the_code_of_the_chosen_method_counts_and_that_of_others_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[list[str]] = []

    def remember(modules: list[str]) -> str:
        hashed.append(modules)
        return "digest"

    monkeypatch.setattr(module, "code_digest", remember)
    fingerprints(configure("method=kd", "method@also=sp"), "da7a", "7eac")
    fingerprints(configure("method=kd"), "da7a", "7eac")
    both, one = hashed
    assert {"src.training.distiller", "src.methods.kd", "src.training.serialization", "src.data.array_data"} <= set(one)
    assert "src.methods.dkd" not in one
    assert set(both) - set(one) == {"src.methods.sp", "src.methods.combined"}


def test_targets_are_those_of_the_identity_without_those_that_train_the_teacher() -> None:
    cfg: Any = configure("method=kd").copy()
    OmegaConf.update(cfg, "teacher.method._target_", "src.methods.tfkd.TfKD")
    OmegaConf.update(cfg, "logger._target_", "src.runs.loggers.csv_logger")
    targets = run_targets(cfg)
    assert targets == sorted(set(targets))
    assert {"src.methods.kd.KD", "torch.optim.SGD", cfg.model.teacher._target_} <= set(targets)
    assert not {"src.methods.tfkd.TfKD", "src.runs.loggers.csv_logger"} & set(targets)


def test_versions_name_python_and_the_packages_and_a_checkout_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 0, stdout="abc1234-dirty\n")

    monkeypatch.setattr(subprocess, "run", describe)
    found = versions()
    assert found.keys() == {"python", *PACKAGES, "commit"}
    assert found["commit"] == "abc1234-dirty"


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")], ids=str)
def test_versions_outside_a_checkout_have_no_commit(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def describe(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(subprocess, "run", describe)
    assert versions().keys() == {"python", *PACKAGES}
