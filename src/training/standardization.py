"""Logit standardization: S. Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427.

The logits of each sample are standardized before they are divided by the temperature:

    Z(x) = (x - mean(x)) / sigma(x),   sigma^2 = mean of (x - mean(x))^2 over the C classes.

The student then has to match the order and the relative gaps of its teacher's logits, but not their scale. The released
code divides the variance by C - 1 and adds 1e-7 to sigma. This file implements the paper's equation.
"""

import torch
from torch import Tensor

from src.methods.features import bounded
from src.methods.method import at_least_float32


def standardize(logits: Tensor) -> Tensor:
    """Compute Z of each row of logits [B, C]. A row of equal logits gives zeros and has no gradient.

    >>> standardize(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.,  1.]])
    """
    logits = at_least_float32(logits)
    # The largest logit is subtracted first: this is exact, whereas the mean of large logits would be rounded.
    logits = logits - logits.amax(dim=1, keepdim=True).detach()
    centred = bounded(logits - logits.mean(dim=1, keepdim=True), dim=1)
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1)
