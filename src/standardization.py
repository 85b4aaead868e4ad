"""Logit standardization: S. Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427.

Before a temperature divides them, the logits of both networks lose their mean and take unit deviation, sample by
sample: Z(x) = (x - mean(x)) / sigma(x), with sigma^2 the mean of (x - mean(x))^2 over the
C classes. A student then has to match the order and the relative gaps of its teacher's logits, not their scale.

The released code takes the variance over C - 1 and adds 1e-7 to sigma; the paper's equation is what stands here.
"""

import torch
from torch import Tensor

from src.methods.features import bounded
from src.methods.method import at_least_float32


def standardized(logits: Tensor) -> Tensor:
    """Z(logits) of each row, [B, C]; zeros, without a gradient, where all logits of a row are equal.

    >>> standardized(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.,  1.]])
    """
    logits = at_least_float32(logits)
    logits = logits - logits.amax(dim=1, keepdim=True).detach()  # exact; the mean of large logits would round
    centred = bounded(logits - logits.mean(dim=1, keepdim=True), dim=1)
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1)
