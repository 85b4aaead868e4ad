"""Facts about the device that trains."""

import torch
from lightning import Trainer


def fits_in_memory(size: int, device: torch.device) -> bool:
    """Return whether `size` bytes take at most a third of a GPU's free memory. Always false for other devices.

    Memory that torch has freed but keeps for itself counts as free.

    >>> fits_in_memory(1, torch.device("cpu"))
    False
    """
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 3 * size <= free + kept


def steps_between_logs(trainer: Trainer) -> int:
    """Return the trainer's `log_every_n_steps`. 0 means that nothing is logged by step."""
    interval: int = vars(trainer)["log_every_n_steps"]  # Lightning does not declare this attribute
    return interval


def steps_between_waits(trainer: Trainer, wanted: int | None) -> int:
    """Return the number of steps after which the host may wait for the device.

    `wanted` is the configured number. None means every step on a CPU, where nothing is waited for, and every
    `log_every_n_steps` steps on other devices, which then work ahead of the host's checks. If the loggers are off
    (`log_every_n_steps` 0), it means every 50 steps.
    """
    if wanted is not None:
        return wanted
    return 1 if trainer.strategy.root_device.type == "cpu" else steps_between_logs(trainer) or 50
