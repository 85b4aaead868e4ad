"""Files are written atomically, tables survive their files, and archives that claim too much are refused."""

import ast
import errno
import hashlib
import io
import multiprocessing
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common import files
from src.common.errors import UserError
from src.common.files import (
    atomic_write,
    describe_foreign,
    file_digest,
    list_members,
    one_process_at_a_time,
    output_folder,
    read_rows,
    write_rows,
    write_text,
)
from src.data.array_file import load_arrays
from src.models.program import load_program

# Atomic writes


def test_a_file_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    with atomic_write(file) as partial:
        partial.write_text("new")
        assert not file.exists()
        assert (partial.parent, partial.suffix) == (tmp_path, ".csv")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.csv"]
    assert file.read_text() == "new"


def write_and_fail(file: Path, error: BaseException) -> None:
    file.write_text("new")
    raise error


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
def test_an_error_leaves_the_old_file_and_no_partial_one(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(type(error)), atomic_write(file) as partial:
        write_and_fail(partial, error)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert file.read_text() == "old"


def test_the_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.txt")


def test_an_error_that_names_a_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "a.txt"):
        (tmp_path / "missing").read_text()
    assert caught.value.filename == str(tmp_path / "missing")


def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 8193  # more than two blocks
    (tmp_path / "a").write_bytes(content)
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_the_content_and_the_name_of_a_file_reach_the_disk_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut between two of these steps leaves the old file or the new one, and never an empty one."""
    done = []
    sync, replace = os.fsync, Path.replace

    def note_sync(number: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(number).st_mode)
        done.append(("sync", "folder" if is_folder else os.fstat(number).st_size))
        sync(number)

    def note_rename(self: Path, target: Path) -> Path:
        done.append(("rename", target.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    write_text(tmp_path / "a.txt", "new")
    assert done == [("sync", 3), ("rename", "a.txt"), ("sync", "folder")]


def test_text_is_written_in_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "größer ≥\n")
    assert (tmp_path / "a.txt").read_bytes() == "größer ≥\n".encode()


def test_temporary_names_differ_between_processes_of_the_same_id(tmp_path: Path) -> None:
    """Containers that share a folder often give all their processes the same id."""
    with atomic_write(tmp_path / "a.txt") as first, atomic_write(tmp_path / "a.txt") as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
        assert {*tmp_path.glob(".[0-9]*.*")} == {first, second}, "a run folder removes such files"
    assert (tmp_path / "a.txt").read_text() == "first"


def opens_text(call: ast.Call) -> bool:
    """Return whether a call opens a text file without an encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in ("open", "read_text", "write_text") or any(key.arg == "encoding" for key in call.keywords):
        return False
    if isinstance(call.func, ast.Attribute):
        if ast.unparse(call.func.value) in ("os", "tarfile", "Image", "self"):
            return False
        return name != "open" or not call.args or "b" not in ast.unparse(call.args[0])
    return name == "open" and (len(call.args) < 2 or "b" not in ast.unparse(call.args[1]))


def test_text_is_read_and_written_in_utf8_everywhere() -> None:
    """The encoding of the locale differs between machines."""
    assert opens_text(ast.parse("a.open()", mode="eval").body)  # type: ignore[arg-type]
    assert opens_text(ast.parse("open(file, 'w')", mode="eval").body)  # type: ignore[arg-type]
    for file in Path(files.__file__).parents[1].rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        assert [f"{file}:{call.lineno}" for call in calls if opens_text(call)] == []


# Tables


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["epoch", "train/loss", "a, b", 'q"']), st.floats(allow_nan=False) | st.integers(-9, 9)
        ).filter(bool),
        min_size=1,
    )
)
def test_rows_of_numbers_survive_their_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, float]]
) -> None:
    file = tmp_path_factory.mktemp("rows") / "a.csv"
    write_rows(file, rows)
    assert read_rows(file) == rows


def test_a_missing_value_is_an_empty_cell(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", [{"epoch": 0, "loss": 0.5}, {"epoch": 1, "accuracy": 0.25}])
    assert (tmp_path / "a.csv").read_text() == "epoch,loss,accuracy\n0,0.5,\n1,,0.25\n"


def test_a_table_that_does_not_exist_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "a.csv") == []


# Archives


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return path


def test_members_are_listed_by_path_and_from_an_open_file(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", images=b"abc", labels=b"d")
    assert [(member.filename, member.file_size) for member in list_members(path)] == [("images", 3), ("labels", 1)]
    opened = io.BytesIO(path.read_bytes())
    path.unlink()
    assert [member.filename for member in list_members(path, opened)] == ["images", "labels"]


def test_an_archive_that_claims_too_many_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.npz", images=os.urandom(600), labels=os.urandom(500))
    monkeypatch.setattr(files, "LARGEST_ARCHIVE", 1100)
    assert len(list_members(path)) == 2
    monkeypatch.setattr(files, "LARGEST_ARCHIVE", 1099)
    with pytest.raises(UserError, match=r"a\.npz claims to hold 1,100 bytes, which is implausible: get the file again"):
        list_members(path)


def test_a_large_member_that_is_compressed_too_well_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros, noise = bytes(10_000), os.urandom(10_000)
    bomb, honest = archive(tmp_path / "bomb.npz", images=zeros), archive(tmp_path / "honest.npz", images=noise)
    (member,) = list_members(bomb)
    ratio = member.file_size / member.compress_size
    monkeypatch.setattr(files, "LARGE_ARCHIVE", 10_000)
    monkeypatch.setattr(files, "LARGEST_RATIO", ratio / 2)
    assert len(list_members(honest)) == 1
    with pytest.raises(UserError, match="implausible"):
        list_members(bomb)
    monkeypatch.setattr(files, "LARGE_ARCHIVE", 10_001)
    assert len(list_members(bomb)) == 1, "a small archive may have any ratio"
    with pytest.raises(UserError, match="implausible"):
        list_members(archive(tmp_path / "many.npz", images=zeros, more=zeros))


# Files that several processes make


def make(folder: Path) -> None:
    """Make a file unless another process has made it, and note who did."""
    with one_process_at_a_time(folder / "deep" / "a.txt"):
        if not (folder / "deep" / "a.txt").exists():
            with (folder / "makers").open("a") as makers:
                makers.write(f"{os.getpid()}\n")
            write_text(folder / "deep" / "a.txt", "made")


def test_of_several_processes_one_makes_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len((tmp_path / "makers").read_text().splitlines()) == 1


def test_a_lock_of_a_file_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), one_process_at_a_time(tmp_path / "a.txt"):
        raise ZeroDivisionError
    with one_process_at_a_time(tmp_path / "a.txt"):
        pass


# The option `out`


def test_an_output_folder_is_not_named_like_a_file(tmp_path: Path) -> None:
    assert output_folder(str(tmp_path / "report.v2")) == tmp_path / "report.v2"
    for name in ("x.onnx", "table.md", "page.HTML"):
        with pytest.raises(UserError, match=rf"out=.*{name} has the name of a file: give a folder"):
            output_folder(str(tmp_path / name))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file: give a folder"):
        output_folder(str(tmp_path / "file"))
    (tmp_path / "made.md").mkdir()
    assert output_folder(str(tmp_path / "made.md")) == tmp_path / "made.md"


# Files given by mistake


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"), (b"  <html>", "an HTML page"), (b"version https://git-lfs.github.com/x", "git LFS"),
        (b"\x89HDF\r\n", "an HDF5 file"), (b"Rar!\x1a", "a compressed file"), (b"anything else", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", [load_arrays, load_program])
def test_the_refusal_of_a_file_says_what_the_file_is(
    tmp_path: Path, read: Any, content: bytes, kind: str | None
) -> None:
    file = tmp_path / "a.npz"
    file.write_bytes(content)
    assert (describe_foreign(file) or "").startswith(kind or "") or kind == "git LFS"
    with pytest.raises(UserError, match=kind or "damaged"):
        read(file)
