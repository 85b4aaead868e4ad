"""Shared libraries of C++ files are compiled once per source and set of flags."""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from src.common.errors import UserError
from src.models import native

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")

Load = Callable[[Path], ctypes.CDLL]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`native.library` with an empty cache on the disk, and without its cache in memory."""
    monkeypatch.setattr(native, "CACHE", tmp_path / "cache")
    return native.library.__wrapped__


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "answer.cpp"
    file.write_text('extern "C" int answer() { return 42; }')
    return file


def compiled(tmp_path: Path) -> list[str]:
    """The names of all files in the cache, except locks."""
    return sorted(file.name for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock")


def test_a_library_is_compiled_once(load: Load, source: Path, tmp_path: Path):
    assert load(source).answer() == 42
    with patch.object(native, "_compile", side_effect=AssertionError("compiled again")):
        assert load(source).answer() == 42
    (name,) = compiled(tmp_path)
    assert name.startswith("answer-")
    assert name.endswith(".so")


def test_another_source_is_compiled_to_another_file(load: Load, source: Path, tmp_path: Path):
    first = load(source)
    source.write_text('extern "C" int answer() { return 43; }')
    assert load(source).answer() == 43
    assert first.answer() == 42
    assert len(compiled(tmp_path)) == 2


def test_other_flags_are_compiled_to_another_file(
    load: Load, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load(source)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DOTHER"))
    load(source)
    assert len(compiled(tmp_path)) == 2


def test_a_file_that_cannot_be_compiled_is_refused_with_the_compilers_reason(load: Load, tmp_path: Path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("not C++")
    with pytest.raises(UserError, match=r"c\+\+ cannot compile broken\.cpp \(.*error.*\): set CXX") as error:
        load(broken)
    assert "\n" not in str(error.value)
    assert compiled(tmp_path) == []


def test_the_compiler_is_that_of_cxx(load: Load, source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(UserError, match=r"answer\.cpp needs a C\+\+ compiler, but no-such-compiler is not found"):
        load(source)
    monkeypatch.setenv("CXX", f"{shutil.which('c++')} -DOTHER")
    assert load(source).answer() == 42


def test_a_missing_compiler_is_reported(load: Load, source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"answer\.cpp needs a C\+\+ compiler, but c\+\+ is not found: install g\+\+"):
        load(source)
