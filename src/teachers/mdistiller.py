"""Download of the teachers for CIFAR-100 that mdistiller has released."""

import http.client
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath

import torch

from src.common.errors import UserError
from src.common.files import atomic_write, file_digest, one_process_at_a_time, write_text

RELEASE = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"
ARCHITECTURES = ("wrn_40_2", "resnet56", "resnet110", "resnet32x4", "vgg13", "ResNet50")
LARGEST = 2**30
"""Maximum bytes of one checkpoint: several times the size of the largest one with its optimiser's state."""


def fetch(architecture: str, folder: Path, url: str = RELEASE) -> Path:
    """Return the path of a teacher, `<folder>/<architecture>_vanilla/ckpt_epoch_240.pth`.

    If the file is missing, all released teachers are downloaded. The SHA-256 of the first download is kept in
    `<folder>/cifar_teachers.sha256`, and later downloads must have the same hash.

    Raises `UserError` if the architecture was not released, if the download fails, or if the archive is damaged, has
    changed since the first download, is unsafe, or lacks the architecture. Nothing is extracted then.
    """
    checkpoint = folder / _place(architecture)
    if checkpoint.is_file():
        return checkpoint
    if architecture not in ARCHITECTURES:
        released = ", ".join(ARCHITECTURES)
        raise UserError(f"mdistiller has released no teacher {architecture}: choose one of {released}.")
    try:
        with (
            one_process_at_a_time(folder / "cifar_teachers.tar"),
            tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch,
        ):
            if checkpoint.is_file():
                return checkpoint
            archive = Path(scratch) / "cifar_teachers.tar"
            torch.hub.download_url_to_file(url, str(archive))
            _extract(archive, folder, architecture, url)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{url} is not a complete and safe tar archive ({reason}): try again later.") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} cannot be downloaded ({error}): copy the content of the archive to {folder} yourself."
        ) from error
    return checkpoint


def _place(architecture: str) -> PurePosixPath:
    return PurePosixPath(f"{architecture}_vanilla/ckpt_epoch_240.pth")


def _extract(file: Path, folder: Path, architecture: str, url: str) -> None:
    """Write the teachers of the archive, in whatever folder they are, to `folder`. Existing files are kept."""
    with tarfile.open(file) as archive:
        members = {}
        for member in archive.getmembers():
            place = PurePosixPath(*PurePosixPath(member.name).parts[-2:])
            if place in map(_place, ARCHITECTURES):
                members[place] = _checked(member, folder)
        _check_end(archive)
        if _place(architecture) not in members:
            raise UserError(
                f"{url} holds no teacher {architecture}: give a checkpoint of this network with teacher.path=FILE."
            )
        _check_digest(file, folder / "cifar_teachers.sha256", url)
        for place, member in members.items():
            content = archive.extractfile(member)
            if content is None or (folder / place).is_file():
                continue
            (folder / place).parent.mkdir(exist_ok=True)
            with atomic_write(folder / place) as partial, partial.open("wb") as copy:
                shutil.copyfileobj(content, copy)


def _checked(member: tarfile.TarInfo, folder: Path) -> tarfile.TarInfo:
    """Return the member. Raises `TarError` unless it is a file of plausible size inside the archive's own folder."""
    tarfile.data_filter(member, str(folder))
    if not member.isreg() or not 0 < member.size <= LARGEST:
        raise tarfile.TarError(f"{member.name} is not a file of plausible size")
    return member


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise `ReadError` unless the archive ends in a block of zeros.

    tarfile does not notice that an archive was truncated between two members.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")


def _check_digest(file: Path, known: Path, url: str) -> None:
    """Compare the file with the digest of the first download. Write the digest if this is the first one."""
    digest = file_digest(file)
    if not known.is_file():
        write_text(known, f"{digest}\n")
    elif known.read_text(encoding="utf-8").strip() != digest:
        raise UserError(f"{url} has changed since {known} was written: delete that file if you trust the change.")
