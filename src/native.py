"""This project's C++ files as shared libraries, compiled where they are first needed and kept."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from src.errors import UserError
from src.files import by_one_process, written_whole

CACHE = Path("~/.cache/aekt/native")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
AVX2 = ("-mavx2", "-mfma")


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """A C++ file's library, for this kind of processor. Raises `UserError` where it cannot be compiled."""
    flags = (*FLAGS, *(AVX2 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else ()))
    made_from = hashlib.sha256(repr(flags).encode() + source.read_bytes()).hexdigest()
    file = CACHE.expanduser() / f"{source.stem}-{made_from[:16]}.so"
    with by_one_process(file):
        if not file.is_file():
            _compile(source, flags, file)
    return ctypes.CDLL(str(file))


def _compile(source: Path, flags: tuple[str, ...], file: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(compiler[0]):
        raise UserError(f"{source.name} needs a C++ compiler, and there is no {compiler[0]}: install g++, or set CXX.")
    with written_whole(file) as partial:
        ended = subprocess.run([*compiler, *flags, str(source), "-o", str(partial)], capture_output=True, text=True)
        if ended.returncode:
            said = ended.stderr.strip().splitlines()
            raise UserError(f"{compiler[0]} cannot compile {source.name}: {said[0] if said else ended.returncode}")
