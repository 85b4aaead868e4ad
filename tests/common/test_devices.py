"""Facts about devices. `tests/training/test_term_log.py` tests how often the host waits for a device."""

import pytest
import torch

from src.common.devices import fits_in_memory

CUDA = torch.device("cuda")


@pytest.mark.parametrize(("size", "fits"), [(0, True), (50, True), (51, False), (100, False)])
def test_what_takes_half_of_the_free_memory_of_a_gpu_fits(
    monkeypatch: pytest.MonkeyPatch, size: int, fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert fits_in_memory(size, CUDA) is fits


def test_nothing_is_copied_to_other_devices() -> None:
    assert not fits_in_memory(0, torch.device("cpu"))
    assert not fits_in_memory(0, torch.device("mps"))
