"""The command `python -m src.convert`."""

from pathlib import Path

import pytest

from src.data.stream_data import StreamData
from tests.helpers.commands import assert_refused, run
from tests.helpers.photo_folders import load, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos of 3 classes. Read only."""
    return write_folder(tmp_path_factory.mktemp("photos"))


def test_a_folder_is_converted_once(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    ran = run("convert", f"data.root={folder}", f"out={out}")
    assert ran.code == 0, ran.err
    assert f"data=stream data.root={out}" in ran.out
    assert load(out, StreamData).source.digest == load(folder).source.digest
    again = run("convert", f"data.root={folder}", f"out={out}")
    assert_refused(again, f"out={out} exists already: choose another folder, or remove it.")


def test_the_output_folder_is_required(folder: Path) -> None:
    ran = run("convert", f"data.root={folder}")
    assert ran.code == 1
    assert "out" in ran.err


def test_data_in_an_array_file_is_refused(tmp_path: Path) -> None:
    ran = run("convert", "data=cifar100", f"out={tmp_path / 'other'}")
    assert_refused(ran, "data=cifar100 is not a folder of photos", "data=imagefolder")
    assert not (tmp_path / "other").exists()
