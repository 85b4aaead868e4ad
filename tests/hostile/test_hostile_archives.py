"""Archives and links made up to do harm: zip bombs, huge claims, wrong checksums, paths that lead outside."""

import contextlib
import functools
import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.common.errors import UserError
from src.data.array_file import load_arrays
from src.data.stream_data import ShardPhotos, read_index
from src.models.checkpoints import load_weights, read_state_dict, save_weights
from src.models.resnet import resnet8
from src.setup.reopen import read_config
from src.teachers.answers import Answers
from tests.helpers.hostile import write_shard_index
from tests.helpers.place import Place


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "bomb.pth"
    torch.save({"model": resnet8(10).state_dict()}, file)
    with (
        zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("bomb/data/99", "w") as member,
    ):
        for _ in range(257):
            member.write(bytes(2**20))
    with pytest.raises(UserError, match=r"bomb\.pth claims to hold 26\d,\d{3},\d{3} bytes, which is implausible"):
        read_state_dict(file)


class Payload:
    """An object that creates a file when a pickle of it is loaded."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments, {"state": 1}, iter([1, 2]), iter([("key", 1)])


@pytest.mark.parametrize("place", ["beside the weights", "among the weights", "as a key"])
@pytest.mark.parametrize("call", ["touch", "open", "mkdir", "partial"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_beside_the_weights_is_never_executed(tmp_path: Path, call: str, place: str, zipped: bool) -> None:
    """The file may load without it or be refused. In neither case does anything run."""
    file, marker = tmp_path / "a.pth", tmp_path / "executed"
    payload = {
        "touch": Payload(Path.touch, marker),
        "open": Payload(open, str(marker), "w"),
        "mkdir": Payload(os.mkdir, str(marker)),
        "partial": Payload(functools.partial(Path.touch, marker)),
    }[call]
    state: dict[Any, Any] = dict(resnet8(10).state_dict())
    content: dict[Any, Any] = {"state_dict": state}
    if place == "among the weights":
        state["more"] = payload
    else:
        content |= {payload: 1} if place == "as a key" else {"hyper_parameters": {"x": payload}}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    network = resnet8(10)
    with contextlib.suppress(UserError):
        load_weights(network, file)
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not marker.exists()


@pytest.mark.parametrize("flipped", [0.3, 0.6, 0.9])
def test_a_flipped_bit_in_the_weights_is_found(tmp_path: Path, flipped: float) -> None:
    """Torch itself loads them, because it does not verify checksums."""
    file = tmp_path / "a.pth"
    save_weights(resnet8(10), file)
    with zipfile.ZipFile(file) as archive:
        weights = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(file.read_bytes())
    content[weights.header_offset + int(flipped * weights.file_size)] ^= 1
    file.write_bytes(content)
    torch.load(file, weights_only=True)
    with pytest.raises(UserError, match="is damaged"):
        read_state_dict(file)


def test_headers_of_huge_arrays_are_refused(tmp_path: Path, originals: Place) -> None:
    with zipfile.ZipFile(originals.data) as old:
        members = {name: old.read(name) for name in old.namelist()}
    for shape in ("(1000000000000, 8, 8, 3)", "(4000000000, 8, 8, 3)", "(-1, 8, 8, 3)"):
        buffer = io.BytesIO()
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        buffer.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(100))
        with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
            for name, content in {**members, "train_images.npy": buffer.getvalue()}.items():
                archive.writestr(name, content)
        with pytest.raises(UserError, match=r"huge\.npz"):
            load_arrays(tmp_path / "huge.npz")


def test_names_in_an_archive_cannot_leave_its_folder(tmp_path: Path, originals: Place) -> None:
    inner = tmp_path / "a" / "b" / "data.npz"
    inner.parent.mkdir(parents=True)
    shutil.copy(originals.data, inner)
    with zipfile.ZipFile(inner, "a") as archive:
        for name in ("../../evil.npy", str(tmp_path / "evil.npy")):
            array = io.BytesIO()
            np.save(array, np.zeros(3))
            archive.writestr(name, array.getvalue())
    load_arrays(inner)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [inner]


def test_an_index_of_shards_cannot_choose_the_folder_of_the_cache(tmp_path: Path) -> None:
    write_shard_index(tmp_path / "index.npz")
    read_index(str(tmp_path))
    write_shard_index(tmp_path / "index.npz", digest="../../../../../evil")
    with pytest.raises(UserError, match=r"index\.npz.* python -m src\.convert: "):
        read_index(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipes_devices_and_loops_are_refused_without_waiting(tmp_path: Path, originals: Place) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "loop", tmp_path / "nothing"):
        link = tmp_path / "loop"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        for load in (read_state_dict, load_arrays):
            with pytest.raises(UserError, match=r"is not a file|does not exist"):
                load(link)
        (tmp_path / "config.yaml").unlink(missing_ok=True)
        (tmp_path / "config.yaml").symlink_to(target)
        with pytest.raises(UserError, match=r"has no config\.yaml"):
            read_config(tmp_path, str(tmp_path))
        assert Answers.load(link, 20, 10) is None


def test_shards_are_read_and_never_unpacked(tmp_path: Path) -> None:
    """A member of a tar archive may have a path that leads out of its folder."""
    with tarfile.open(tmp_path / "train-00000.tar", "w") as tar:
        member = tarfile.TarInfo("../../evil")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    photos = ShardPhotos(
        str(tmp_path), "train", np.zeros(2, np.int32), np.array([512, 512]), np.array([3, 2**50]), None, 0
    )
    assert photos.read([0]) == [b"abc"]
    with pytest.raises(UserError, match=r"train-00000\.tar"):
        photos.read([1])
    assert {file.name for file in tmp_path.parent.rglob("evil")} == set()
