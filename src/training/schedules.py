"""Learning-rate schedules that take more than the arguments of torch's own classes."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR


def one_cycle(optimizer: Optimizer, total_steps: int) -> OneCycleLR:
    """Make torch's OneCycleLR, whose peak is each parameter group's own learning rate. Momentum is not cycled."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=total_steps, cycle_momentum=False)
