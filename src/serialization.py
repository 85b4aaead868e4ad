"""Task serialization (AEKT, arXiv 2409.01679, Figure 1): cross-entropy on one set of logits, distillation on another.

Training only: inference uses the student's own logits. Given by the paper: one FC layer after the student's logits,
with cross-entropy before and distillation after it. Ours: its identity start, its bias, its learning rate, no weight
decay on it, and the parallel control.
"""

import copy

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from src.methods.method import at_least_float32
from src.models.network import Network


class Serialization(nn.Module):
    """`serialization=none`: one head for both tasks, u = z."""

    lr_scale = 1.0
    weight_decay: float | None = None
    """None: the optimiser's."""

    def build(self, student: Network) -> None:
        """Make the layer in the sizes of the student's classifier."""

    def forward(self, logits: Tensor, pooled: Tensor | None) -> Tensor:
        """Logits for distillation [B, C] from the student's logits [B, C] and pooled features [B, D]."""
        return logits


class Serial(Serialization):
    """`serialization=serial`: u = W z + b, W starting as the identity and b as zero, learning at `lr_scale` times the
    student's rate.

    Weight decay would pull W towards zero and off the identity: it has none.
    """

    weight_decay = 0.0

    def __init__(self, lr_scale: NonNegativeFloat) -> None:
        super().__init__()
        self.lr_scale = lr_scale

    def build(self, student: Network) -> None:
        """One C x C linear layer."""
        num_classes = student.classifier_layer.out_features
        self.layer = nn.Linear(num_classes, num_classes)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, logits: Tensor, pooled: Tensor | None) -> Tensor:
        """W z + b, in float32: in bfloat16 even the identity would round the logits to three digits."""
        with torch.autocast(logits.device.type, enabled=False):
            return self.layer(at_least_float32(logits))


class Parallel(Serialization):
    """`serialization=parallel`: distillation has a classifier of its own on the same pooled features; the control for
    serial.

    It starts as a copy of the student's classifier, so that training starts as plain distillation here too.
    """

    def __init__(self, lr_scale: NonNegativeFloat) -> None:
        super().__init__()
        self.lr_scale = lr_scale

    def build(self, student: Network) -> None:
        """A second classifier."""
        self.layer = copy.deepcopy(student.classifier_layer)

    def forward(self, logits: Tensor, pooled: Tensor | None) -> Tensor:
        """The second classifier's logits."""
        assert pooled is not None
        return self.layer(pooled)
