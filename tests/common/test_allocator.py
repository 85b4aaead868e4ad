"""Freed memory stays in the process, on Linux with glibc."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from src.common.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
import torch
def step():
    return sum(float(tensor.sum()) for tensor in [torch.ones(1 << 20) for _ in range(20)])
step(), step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")


def page_faults(keep: bool) -> int:
    """Count the page faults of 20 tensors of 4 MB each, after as many have been freed."""
    code = FAULTS.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@glibc
def test_freed_memory_is_used_again() -> None:
    assert page_faults(keep=False) > 1000  # 1024 pages in each tensor
    assert page_faults(keep=True) < 100


@glibc
def test_settings_of_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from src.common.allocator import keep_freed_memory

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not keep_freed_memory()


def test_other_systems_keep_their_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    from src.common import allocator

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
