"""Task serialization (AEKT, arXiv 2409.01679, Figure 1): cross-entropy on one set of logits, distillation on another.

The layer exists in training only. Inference uses the student's own logits. The paper specifies one FC layer after the
student's logits, with cross-entropy before it and distillation after it. Our choices are its initial weights, its bias,
its factor, its learning rate, its decay towards the identity, and the parallel control.
"""

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from src.methods.method import at_least_float32
from src.models.network import Network
from src.teachers.teacher import Teacher

Start = Literal["identity", "teacher"]


class Serialization(nn.Module):
    """The base class of all serialization layers."""

    lr_scale = 1.0
    """Multiplies the student's learning rate."""
    weight_decay: float | None = None
    """None means the optimiser's own weight decay."""
    needs_teacher = False
    """Whether the layer starts from the teacher's last layer."""

    def allocate(self, student: Network, teacher: Teacher | None = None) -> None:
        """Make the layer in sizes that fit the student's classifier."""

    def forward(self, logits: Tensor, pooled: Tensor) -> Tensor:
        """Return logits for distillation [B, C], from the student's logits [B, C] and pooled features [B, D]."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward()")

    def penalties(self) -> Mapping[str, Tensor]:
        """Return the layer's own loss terms by name, as weighted scalars. They join the terms of the method."""
        return {}


class NoSerialization(Serialization):
    """`serialization=none`: u = z."""

    def forward(self, logits: Tensor, pooled: Tensor) -> Tensor:
        """Return the student's logits."""
        return logits


class Serial(Serialization):
    """`serialization=serial`: u = s (W z + b).

    - `start`: W starts as the identity, so that training starts as plain distillation. With `teacher`, it starts as the
      `relations_of_classes` in the teacher's last layer. b starts as zero.
    - `factor`: whether the factor s is learnt, from 1. Otherwise it is 1.
    - `decay` d adds the term d/2 |W - I|^2 to the loss (I is the identity, and the norm is Frobenius's).
    - `lr_scale` multiplies the student's learning rate.

    The optimiser's own weight decay is off, because it would pull W off the identity towards zero.
    """

    weight_decay = 0.0

    def __init__(
        self,
        lr_scale: NonNegativeFloat,
        start: Start = "identity",
        factor: bool = False,
        decay: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__()
        self.lr_scale = lr_scale
        self.needs_teacher = start == "teacher"
        self.has_factor, self.decay = factor, decay
        self.factor: nn.Parameter | None
        self.register_parameter("factor", None)

    def allocate(self, student: Network, teacher: Teacher | None = None) -> None:
        """Make one C x C linear layer. Raises `UserError` if the teacher has no last layer from which to start."""
        num_classes = student.classifier_layer.out_features
        self.layer = nn.Linear(num_classes, num_classes)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        if self.needs_teacher and teacher is not None:  # a finished run may be opened without its teacher
            self.layer.weight.data.copy_(relations_of_classes(teacher.classifier().weight))
        if self.has_factor:
            self.factor = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, pooled: Tensor) -> Tensor:
        """Compute s (W z + b) in float32. In bfloat16, even the identity would round the logits to three digits."""
        with torch.autocast(logits.device.type, enabled=False):
            serialized: Tensor = self.layer(at_least_float32(logits))
        return serialized if self.factor is None else self.factor * serialized

    def penalties(self) -> Mapping[str, Tensor]:
        """Return the decay towards the identity, if there is one."""
        if self.decay == 0:
            return {}
        weight = self.layer.weight
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return {"layer_decay": self.decay / 2 * (weight - identity).square().sum()}


def relations_of_classes(weight: Tensor) -> Tensor:
    """Estimate the logits of each class's typical image from a last layer's weights [C, D]. Returns [C, C].

    In a well trained network the features of class t point along its weights w_t, after both are centred (neural
    collapse, Papyan et al. 2020). The logits of class t are then proportional to w_i . w_t over the classes i. Column t
    is this vector. It is shifted and scaled so that the other classes have the mean 0 and class t has 1, as in the
    identity.
    """
    centred = (weight - weight.mean(dim=0)).double()
    logits = centred @ centred.T
    others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    mean = torch.where(others, logits, 0.0).sum(dim=0) / (len(logits) - 1)
    return ((logits - mean) / (logits.diagonal() - mean)).to(weight.dtype)


class Parallel(Serialization):
    """`serialization=parallel`: a second classifier for distillation on the same pooled features.

    This is the control for `serial`. The classifier starts as a copy of the student's, so that training starts as plain
    distillation here too.
    """

    def __init__(self, lr_scale: NonNegativeFloat) -> None:
        super().__init__()
        self.lr_scale = lr_scale

    def allocate(self, student: Network, teacher: Teacher | None = None) -> None:
        """Copy the student's classifier."""
        self.layer = copy.deepcopy(student.classifier_layer)

    def forward(self, logits: Tensor, pooled: Tensor) -> Tensor:
        """Return the second classifier's logits."""
        second: Tensor = self.layer(pooled)
        return second
