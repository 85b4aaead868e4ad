"""Learning-rate schedules that need more than torch's own arguments."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR


def one_cycle(optimizer: Optimizer, total_steps: int) -> OneCycleLR:
    """torch's OneCycleLR with each parameter group's own learning rate as its peak, momentum left alone."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=total_steps, cycle_momentum=False)
