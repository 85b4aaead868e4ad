"""The device of the tests in tests/gpu: an NVIDIA GPU, or the CPU if AEKT_TEST_DEVICE=cpu asks for a rehearsal."""

import os

import torch
from torch import Tensor, nn

from src.training.distiller import Distiller
from tests.helpers import interruption

REHEARSAL = os.environ.get("AEKT_TEST_DEVICE") == "cpu"
ACCELERATOR = "cpu" if REHEARSAL else "gpu"
"""The value of Lightning's option, and the name in conf/trainer."""
DEVICE = torch.device("cpu") if REHEARSAL else torch.device("cuda", 0)
CPU = torch.device("cpu")
SMALL = (
    *(option for option in interruption.SMALL if option.partition("=")[0] not in ("trainer", "logger")),
    f"trainer={ACCELERATOR}",
    "logger=none",  # W&B may be missing
)
"""A short run on the tiny arrays. A checkpoint is saved after every batch."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Compute |found - expected| / |expected| of whole tensors, in float64 on the CPU. Two zeros have no error."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    distance, norm = (found - expected).norm(), expected.norm()
    return float(distance / norm) if norm > 0 else float(distance)


def move(distiller: Distiller, device: torch.device, dtype: torch.dtype = torch.float32) -> Distiller:
    """Move a module and its teacher to a device, in channels last, and to a data type.

    Convolutions and linear layers convert their input, because images are normalised in float32.
    """
    networks: list[nn.Module] = [distiller.to(device, dtype)]
    distiller.student.to(memory_format=torch.channels_last)
    if distiller.teacher is not None:
        distiller.teacher.to(device, torch.channels_last)
        networks.append(distiller.teacher.network.to(dtype))
    for module in (module for network in networks for module in network.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(_convert_input)
    return distiller


def _convert_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(next(module.parameters()).dtype) for x in inputs)
