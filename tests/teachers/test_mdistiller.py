"""Released teachers are downloaded once and completely. No other file of the archive is written."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from src.common.errors import UserError
from src.teachers.mdistiller import ARCHITECTURES, fetch


class Handler(SimpleHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        Handler.requests += 1
        super().do_GET()

    def log_message(self, *_: Any) -> None: ...


class Server:
    """A local web server with one archive."""

    def __init__(self, folder: Path, url: str) -> None:
        self.file = folder / "cifar_teachers.tar"
        self.url = url

    @property
    def requests(self) -> int:
        return Handler.requests


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    Handler.requests = 0
    served = tmp_path / "served"
    served.mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served)))
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield Server(served, f"http://127.0.0.1:{http.server_port}/cifar_teachers.tar")
    http.shutdown()
    thread.join()
    http.server_close()


def content(name: str) -> bytes:
    return f"weights of {name} ".encode() * 100


def archive(members: dict[str, bytes | tarfile.TarInfo], mode: str = "w:") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, value in members.items():
            info = value if isinstance(value, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(value, bytes):
                info.size = len(value)
            tar.addfile(info, io.BytesIO(value) if isinstance(value, bytes) else None)
    return buffer.getvalue()


def members(prefix: str = "cifar_teachers/", names: tuple[str, ...] = ARCHITECTURES) -> dict[str, Any]:
    return {f"{prefix}{name}_vanilla/ckpt_epoch_240.pth": content(name) for name in names}


def files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


EXTRACTED = sorted([f"{name}_vanilla/ckpt_epoch_240.pth" for name in ARCHITECTURES] + ["cifar_teachers.sha256"])


@pytest.mark.parametrize("prefix", ["cifar_teachers/", "", "./", "./a/b/"])
@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_one_download_brings_all_released_teachers(prefix: str, mode: str, server: Server, tmp_path: Path):
    others = {f"{prefix}wrn_40_2_vanilla/ckpt_epoch_120.pth": b"x", "README": b"y", "../evil": b"z", "/root": b"z"}
    data = archive({**members(prefix), **others}, mode)
    server.file.write_bytes(data)
    folder = tmp_path / "teachers" / "cifar100"
    path = fetch("wrn_40_2", folder, server.url)
    assert path == folder / "wrn_40_2_vanilla" / "ckpt_epoch_240.pth"
    assert path.read_bytes() == content("wrn_40_2")
    assert files(folder) == EXTRACTED
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["served", "teachers"]
    assert (folder / "cifar_teachers.sha256").read_text().strip() == hashlib.sha256(data).hexdigest()
    for name in ARCHITECTURES:
        assert fetch(name, folder, server.url).read_bytes() == content(name)
    assert server.requests == 1


def test_existing_files_are_kept_and_missing_ones_are_downloaded_again(server: Server, tmp_path: Path):
    server.file.write_bytes(archive(members()))
    fetch("vgg13", tmp_path, server.url)
    (tmp_path / "vgg13_vanilla" / "ckpt_epoch_240.pth").write_bytes(b"mine")
    (tmp_path / "ResNet50_vanilla" / "ckpt_epoch_240.pth").unlink()
    assert fetch("ResNet50", tmp_path, server.url).read_bytes() == content("ResNet50")
    assert fetch("vgg13", tmp_path, server.url).read_bytes() == b"mine"
    assert server.requests == 2


def assert_refused(match: str, architecture: str, folder: Path, url: str) -> None:
    """Check that the download is refused in one line, and that no file is added or removed."""
    before = files(folder)
    with pytest.raises(UserError, match=match) as error:
        fetch(architecture, folder, url)
    assert "\n" not in str(error.value)
    assert files(folder) == before


def test_an_archive_that_has_changed_is_refused(server: Server, tmp_path: Path):
    folder = tmp_path / "teachers"
    server.file.write_bytes(archive(members()))
    fetch("vgg13", folder, server.url)
    (folder / "resnet56_vanilla" / "ckpt_epoch_240.pth").unlink()
    server.file.write_bytes(archive({**members(), "more": b"x"}))
    assert_refused(r"has changed since .*cifar_teachers\.sha256 was written", "resnet56", folder, server.url)
    (folder / "cifar_teachers.sha256").unlink()
    assert fetch("resnet56", folder, server.url).is_file()


def test_a_truncated_archive_is_refused(server: Server, tmp_path: Path):
    data = archive(members())
    folder = tmp_path / "teachers"
    ends = [tarfile.RECORDSIZE * n for n in range(len(data) // tarfile.RECORDSIZE)]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        between = [member.offset for member in tar.getmembers()]
    for length in {0, 100, 512, 700, *ends, *between}:
        server.file.write_bytes(data[:length])
        assert_refused("is not a complete and safe tar archive", "wrn_40_2", folder, server.url)
    assert files(folder) == []
    compressed = archive(members(), "w:gz")
    server.file.write_bytes(compressed[: len(compressed) // 2])
    assert_refused("is not a complete and safe tar archive", "wrn_40_2", folder, server.url)


def test_a_damaged_header_is_not_taken_for_the_end_of_the_archive(server: Server, tmp_path: Path):
    data = bytearray(archive(members()))
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        start = tar.getmembers()[3].offset
    data[start + 10] ^= 1
    server.file.write_bytes(data)
    assert_refused("is not a complete and safe tar archive", "wrn_40_2", tmp_path / "teachers", server.url)


@pytest.mark.parametrize("page", [b"<html>404</html>", bytes(20_000)])
def test_a_page_that_is_no_archive_is_refused(page: bytes, server: Server, tmp_path: Path):
    server.file.write_bytes(page)
    assert_refused("not a complete and safe tar archive|holds no teacher", "vgg13", tmp_path / "teachers", server.url)


def test_unreachable_addresses_are_reported(server: Server, tmp_path: Path):
    folder = tmp_path / "teachers"
    assert_refused(r"cifar_teachers\.tar cannot be downloaded \(HTTP Error 404", "vgg13", folder, server.url)
    assert_refused("cannot be downloaded .*unknown url type", "vgg13", folder, "nowhere")
    assert_refused("cannot be downloaded", "vgg13", folder, "http://127.0.0.1:1/cifar_teachers.tar")
    server.file.write_bytes(archive(members()))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch("vgg13", blocked / "teachers", server.url)


def test_a_missing_architecture_is_reported(server: Server, tmp_path: Path):
    server.file.write_bytes(archive(members(names=("vgg13",))))
    with pytest.raises(UserError, match="holds no teacher resnet56"):
        fetch("resnet56", tmp_path / "teachers", server.url)
    with pytest.raises(UserError, match="has released no teacher resnet20: choose one of wrn_40_2, resnet56"):
        fetch("resnet20", tmp_path / "teachers", server.url)
    assert server.requests == 1


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


WANTED = "vgg13_vanilla/ckpt_epoch_240.pth"


@pytest.mark.parametrize(
    "member",
    [
        {f"../{WANTED}": b"x"},
        {f"a/../../{WANTED}": b"x"},
        {WANTED: link(WANTED, tarfile.SYMTYPE, "/etc/passwd")},
        {WANTED: link(WANTED, tarfile.SYMTYPE, "other")},
        {WANTED: link(WANTED, tarfile.LNKTYPE, "../../other")},
        {WANTED: link(WANTED, tarfile.FIFOTYPE, "")},
        {WANTED: b""},
    ],
    ids=["outside", "winding", "symlink out", "symlink", "hard link", "pipe", "empty"],
)
def test_unsafe_members_are_refused(member: dict[str, Any], server: Server, tmp_path: Path):
    server.file.write_bytes(archive({**members(names=("resnet56",)), **member}))
    assert_refused("is not a complete and safe tar archive", "resnet56", tmp_path / "teachers", server.url)
    assert files(tmp_path) == ["served/cifar_teachers.tar"]


def test_enormous_members_are_refused(server: Server, tmp_path: Path):
    info = tarfile.TarInfo(WANTED)
    info.size = 2**40
    server.file.write_bytes(info.tobuf() + bytes(2 * tarfile.RECORDSIZE))
    assert_refused("is not a complete and safe tar archive", "vgg13", tmp_path / "teachers", server.url)
