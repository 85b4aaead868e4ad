"""Facts about devices. `tests/training/test_term_log.py` tests how often the host waits for a device."""

import pytest
import torch

from src.common.devices import fits_in_memory

CUDA = torch.device("cuda")


@pytest.mark.parametrize(("size", "fits"), [(0, True), (40, True), (41, False), (100, False)])
def test_what_takes_a_third_of_the_free_memory_of_a_gpu_fits(
    monkeypatch: pytest.MonkeyPatch, size: int, fits: bool
) -> None:
    """100 bytes are free, and torch keeps 20 bytes that it does not use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert fits_in_memory(size, CUDA) is fits


def test_nothing_is_copied_to_other_devices() -> None:
    assert not fits_in_memory(0, torch.device("cpu"))
    assert not fits_in_memory(0, torch.device("mps"))
