"""Curriculum temperature (CTKD): Z. Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, arXiv
2211.16231.

    T      = T_min + T_range sigmoid(theta)
    loss   = T^2 KL(softmax(v / T), softmax(u / T)), averaged over the batch
    lambda = (1 - cos(pi min(epoch / epochs, 1))) / 2, epoch from 1

Notation: u are the logits of the student, v those of the teacher, theta gives the temperature T, and lambda is the
curriculum.

The temperature is learned against the student. The gradient of the loss is multiplied by -lambda before it reaches
theta: a step that descends for the student ascends for theta. lambda grows from 0 to 1 over the first epochs.

theta is one parameter of the method (global), or the output of a small perceptron that reads both predictions
(instance-wise).
"""

import math

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from src.methods.method import Batch, DistillationLogits, LogitMethod, Networks, at_least_float32, log_softmax, warm_up


def curriculum(epoch: int, epochs: float) -> float:
    """Compute lambda = (1 - cos(pi min((epoch + 1) / epochs, 1))) / 2, with `epoch` from 0.

    >>> round(curriculum(0, 10), 4)
    0.0245
    """
    return (1 - math.cos(math.pi * warm_up(epoch, epochs))) / 2


def reverse_gradient(value: Tensor, strength: float) -> Tensor:
    """Return `value`, with a gradient that is multiplied by -strength on its way back."""
    return value.detach() - strength * (value - value.detach())


def ctkd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor) -> Tensor:
    """Compute T^2 KL(q, p), averaged over the batch. p = softmax(u / T), q = softmax(v / T), logits u and v [B, C].

    `temperature` is [] or [B]. Its gradient includes T^2 and both softmaxes.
    """
    temperature = temperature.expand(len(student_logits))
    log_p, log_q = (log_softmax(logits, temperature[:, None]) for logits in (student_logits, teacher_logits))
    divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)
    return (temperature**2 * divergence).mean()


class CTKD(LogitMethod):
    """cross_entropy_weight * CE + kd_weight * KD at the learned temperature."""

    can_be_compiled = False  # the curriculum's strength is another number in each epoch

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        kd_weight: float,
        temperature_min: PositiveFloat,
        temperature_range: PositiveFloat,
        theta: float,
        curriculum_epochs: NonNegativeFloat,
        instance: bool,
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.kd_weight = kd_weight
        self.temperature_min = temperature_min
        self.temperature_range = temperature_range
        self.initial_theta = theta
        self.curriculum_epochs = curriculum_epochs
        self.instance = instance

    def allocate(self, networks: Networks) -> None:
        """Make theta, or the perceptron [B, 2C] -> [B, 2C] -> [B, 1]. It first outputs the initial theta."""
        if not self.instance:
            self.theta = nn.Parameter(torch.tensor(float(self.initial_theta)))
            return
        width = 2 * networks.student_shapes.logits
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, self.initial_theta)
        self.perceptron = nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)

    def temperature(self, student_logits: Tensor, teacher_logits: Tensor, strength: float) -> Tensor:
        """Compute T, [] or instance-wise [B]. No gradient reaches the student through its effect on the temperature."""
        if self.instance:
            predictions = [log_softmax(logits, 1.0).exp() for logits in (student_logits.detach(), teacher_logits)]
            both = torch.cat(predictions, dim=1).to(next(self.perceptron.parameters()).dtype)
            theta = self.perceptron(both).squeeze(1)
        else:
            theta = self.theta
        theta = reverse_gradient(at_least_float32(theta), strength)
        return self.temperature_min + self.temperature_range * torch.sigmoid(theta)

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "kd": self.kd_weight}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return KD at the learned temperature."""
        strength = curriculum(batch.epoch, self.curriculum_epochs)
        temperature = self.temperature(logits.student, logits.teacher, strength)
        return {"kd": ctkd_loss(logits.student, logits.teacher, temperature)}
