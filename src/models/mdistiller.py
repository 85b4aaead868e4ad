"""The teachers for CIFAR-100 that mdistiller has released."""

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath

import torch

from src.errors import UserError
from src.files import by_one_process, written_whole

RELEASE = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"
ARCHITECTURES = ("wrn_40_2", "resnet56", "resnet110", "resnet32x4", "vgg13", "ResNet50")
LARGEST = 2**30
"""Bytes of one checkpoint: several times what the largest has, with its optimiser's state."""


def fetch(architecture: str, folder: Path, url: str = RELEASE) -> Path:
    """`<folder>/<architecture>_vanilla/ckpt_epoch_240.pth`; where it is missing, all released teachers are downloaded.

    The first download's SHA-256 is kept in `<folder>/cifar_teachers.sha256`, and every later one has to have it.
    Raises `UserError` where the architecture was not released, nothing can be downloaded, or the archive is damaged,
    another one than before, unsafe, or without the architecture; nothing is extracted then.
    """
    checkpoint = folder / _place(architecture)
    if checkpoint.is_file():
        return checkpoint
    if architecture not in ARCHITECTURES:
        raise UserError(f"mdistiller has released no teacher {architecture}, only {', '.join(ARCHITECTURES)}.")
    try:
        with (
            by_one_process(folder / "cifar_teachers.tar"),
            tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch,
        ):
            if checkpoint.is_file():
                return checkpoint
            archive = Path(scratch) / "cifar_teachers.tar"
            torch.hub.download_url_to_file(url, str(archive))
            _extract(archive, folder, architecture, url)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{url} is no whole and safe tar archive ({reason}): try again later.") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be had ({error}): bring its content to {folder} by hand.") from error
    return checkpoint


def _place(architecture: str) -> PurePosixPath:
    return PurePosixPath(f"{architecture}_vanilla/ckpt_epoch_240.pth")


def _extract(file: Path, folder: Path, architecture: str, url: str) -> None:
    """Write the archive's teachers below the folder, wherever in the archive they are."""
    with tarfile.open(file) as archive:
        members = {}
        for member in archive.getmembers():
            place = PurePosixPath(*PurePosixPath(member.name).parts[-2:])
            if place in map(_place, ARCHITECTURES):
                members[place] = _safe(member, folder)
        _check_end(archive)
        if _place(architecture) not in members:
            raise UserError(f"{url} holds no teacher {architecture}: give a checkpoint of it by teacher.path.")
        _check_digest(file, folder / "cifar_teachers.sha256", url)
        for place, member in members.items():
            content = archive.extractfile(member)
            if content is None or (folder / place).is_file():
                continue
            (folder / place).parent.mkdir(exist_ok=True)
            with written_whole(folder / place) as partial, partial.open("wb") as copy:
                shutil.copyfileobj(content, copy)


def _safe(member: tarfile.TarInfo, folder: Path) -> tarfile.TarInfo:
    """The member, where it is a file of a sane size inside the archive's own folder."""
    tarfile.data_filter(member, str(folder))
    if not member.isreg() or not 0 < member.size <= LARGEST:
        raise tarfile.TarError(f"{member.name} is no file of a plausible size")
    return member


def _check_end(archive: tarfile.TarFile) -> None:
    """A whole archive ends in a block of zeros; tarfile takes a cut between two members for the end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")


def _check_digest(file: Path, known: Path, url: str) -> None:
    """Compare with the first download, which this may be."""
    with file.open("rb") as content:
        digest = hashlib.sha256()
        while block := content.read(1 << 20):
            digest.update(block)
    if not known.is_file():
        with written_whole(known) as partial:
            partial.write_text(f"{digest.hexdigest()}\n", encoding="utf-8")
    elif known.read_text(encoding="utf-8").strip() != digest.hexdigest():
        raise UserError(f"{url} is not what it was when {known} was written: delete that file if you trust the change.")
