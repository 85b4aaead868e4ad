"""Shared libraries of this project's C++ files, compiled on first use and cached."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from src.common.errors import UserError
from src.common.files import atomic_write, one_process_at_a_time

CACHE = Path("~/.cache/aekt/native")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
AVX2 = ("-mavx2", "-mfma")


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """Load the shared library of a C++ file, compiled for this kind of processor.

    The name of the cached file contains a hash of the source and the compiler's flags. Raises `UserError` if the file
    cannot be compiled.
    """
    flags = (*FLAGS, *(AVX2 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else ()))
    made_from = hashlib.sha256(repr(flags).encode() + source.read_bytes()).hexdigest()
    file = CACHE.expanduser() / f"{source.stem}-{made_from[:16]}.so"
    with one_process_at_a_time(file):
        if not file.is_file():
            _compile(source, flags, file)
    return ctypes.CDLL(str(file))


def _compile(source: Path, flags: tuple[str, ...], file: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(compiler[0]):
        raise UserError(f"{source.name} needs a C++ compiler, but {compiler[0]} is not found: install g++, or set CXX.")
    with atomic_write(file) as partial:
        ended = subprocess.run([*compiler, *flags, str(source), "-o", str(partial)], capture_output=True, text=True)
        if ended.returncode:
            lines = ended.stderr.strip().splitlines()
            reason = lines[0] if lines else f"exit status {ended.returncode}"
            raise UserError(f"{compiler[0]} cannot compile {source.name} ({reason}): set CXX to another compiler.")
