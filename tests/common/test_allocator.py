"""Freed memory stays in the process, on Linux with glibc."""

import ctypes
import platform
import subprocess
import sys

import pytest

from src.common.allocator import keep_freed_memory

FAULTS = """
import resource
from src.common.allocator import keep_freed_memory
assert keep_freed_memory()
import torch
def step():
    return sum(float(tensor.sum()) for tensor in [torch.ones(1 << 20) for _ in range(20)])
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")


@glibc
def test_freed_memory_is_used_again() -> None:
    """A step with 20 tensors of 4 MB, after five steps like it. Otherwise it usually has 20,480 page faults."""
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 100


@glibc
def test_settings_of_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not keep_freed_memory()


def test_other_systems_keep_their_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
