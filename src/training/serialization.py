"""Task serialization (AEKT, arXiv 2409.01679, Figure 1): cross-entropy on one set of logits, distillation on another.

The layer exists in training only. Inference uses the student's own logits. The paper specifies one FC layer after the
student's logits, with cross-entropy before it and distillation after it. Our choices are the identity as its initial
weight, its bias, its learning rate, no weight decay on it, and the parallel control.
"""

import copy

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from src.methods.method import at_least_float32
from src.models.network import Network


class Serialization(nn.Module):
    """The base class of all serialization layers."""

    lr_scale = 1.0
    """Multiplies the student's learning rate."""
    weight_decay: float | None = None
    """None means the optimiser's own weight decay."""

    def allocate(self, student: Network) -> None:
        """Make the layer in sizes that fit the student's classifier."""

    def forward(self, logits: Tensor, pooled: Tensor) -> Tensor:
        """Return logits for distillation [B, C], from the student's logits [B, C] and pooled features [B, D]."""
        raise NotImplementedError


class NoSerialization(Serialization):
    """`serialization=none`: u = z."""

    def forward(self, logits: Tensor, pooled: Tensor) -> Tensor:
        """Return the student's logits."""
        return logits


class Serial(Serialization):
    """`serialization=serial`: u = W z + b.

    W starts as the identity and b as zero, so that training starts as plain distillation. The layer learns at
    `lr_scale` times the student's rate. It has no weight decay, which would pull W off the identity towards zero.
    """

    weight_decay = 0.0

    def __init__(self, lr_scale: NonNegativeFloat) -> None:
        super().__init__()
        self.lr_scale = lr_scale

    def allocate(self, student: Network) -> None:
        """Make one C x C linear layer."""
        num_classes = student.classifier_layer.out_features
        self.layer = nn.Linear(num_classes, num_classes)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, logits: Tensor, pooled: Tensor) -> Tensor:
        """Compute W z + b in float32. In bfloat16, even the identity would round the logits to three digits."""
        with torch.autocast(logits.device.type, enabled=False):
            serialized: Tensor = self.layer(at_least_float32(logits))
        return serialized


class Parallel(Serialization):
    """`serialization=parallel`: a second classifier for distillation on the same pooled features.

    This is the control for `serial`. The classifier starts as a copy of the student's, so that training starts as plain
    distillation here too.
    """

    def __init__(self, lr_scale: NonNegativeFloat) -> None:
        super().__init__()
        self.lr_scale = lr_scale

    def allocate(self, student: Network) -> None:
        """Copy the student's classifier."""
        self.layer = copy.deepcopy(student.classifier_layer)

    def forward(self, logits: Tensor, pooled: Tensor) -> Tensor:
        """Return the second classifier's logits."""
        second: Tensor = self.layer(pooled)
        return second
