"""Adaptive Explicit Knowledge Transfer (AEKT): H. Park, J.-S. Lee, arXiv 2409.01679.

    loss = CE + warm-up * (alpha TCKD + beta NCKD + gamma L_AEKT)

u are the student's logits after the serialization layer, v the teacher's logits, t is the target class and T the
temperature. p = softmax(u / T), q = softmax(v / T), and sg is the stop-gradient.

    TCKD   = T^2 KL([q_t, 1 - q_t], [p_t, 1 - p_t])       target class against the others (DKD)
    NCKD   = T^2 KL(q', p')                               among the other classes (DKD): "implicit" knowledge
    L_AEKT = -T sg(w) log p_t                             the teacher's confidence in the target: "explicit" knowledge

Cross-entropy acts on the student's own logits. Distillation acts after the serialization layer
(`src/training/serialization.py`), which exists in training only.

The abstract and the figure captions of the paper give these parts:

- The three losses act together.
- L_AEKT weights the learning of the teacher's target-class confidence by the ratio of teacher to student.
- The serialization layer.
- The ablation without the term 1 - p_t.

The exact form of the weight w, its bound, the factor T, and all constants that DKD does not publish are ours.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.decoupling import Decoupled, decouple, target_log_odds
from src.methods.dkd import nckd_loss, tckd_loss
from src.methods.method import Batch, DistillationLogits, LogitMethod, warm_up

Weighting = Literal["ratio", "relative", "excess", "log_ratio", "constant", "one"]
LARGEST_BOUND = 1e6
"""Beyond this bound, the product of weight and loss can overflow float32."""


def explicit_weight(log_p: Tensor, log_q: Tensor, weighting: Weighting, max_weight: float) -> Tensor:
    """Compute the weight w of each sample, [B], from log p_t and log q_t, [B]. The choices are ours.

    - `ratio`: r = min(q_t / p_t, max_weight). Below the bound, -w log p_t has the gradient of q_t / p_t. It always
      pulls p_t up.
    - `relative`: r over its mean in the batch. The mean weight is 1 in every step, and the ratio only shares it out.
    - `excess`: min(max(q_t / p_t - 1, 0), max_weight). It is 0 as soon as p_t has reached q_t.
    - `log_ratio`: log(q_t / p_t), clamped to +-max_weight. It is 0 at p_t = q_t, and pulls a larger p_t down.
    - `constant`: q_t. The student has no influence on it.
    - `one`: 1, which is cross-entropy at temperature T. The teacher has no influence on it: the control.
    """
    if weighting == "one":
        return torch.ones_like(log_q)
    if weighting == "constant":
        return log_q.exp()
    log_ratio = log_q - log_p
    if weighting == "log_ratio":
        return log_ratio.clamp(-max_weight, max_weight)
    if weighting == "excess":
        return log_ratio.clamp(0, math.log1p(max_weight)).expm1()
    bounded = log_ratio.clamp(max=math.log(max_weight))
    return bounded.exp() if weighting == "ratio" else len(bounded) * bounded.softmax(dim=0)


def explicit_transfer_loss(
    decoupled: Decoupled, weight: Tensor, temperature: float, confidence_term: bool = True
) -> Tensor:
    """Compute L_AEKT = -T sg(w) log p_t, averaged over the batch, with the weights w [B] of `explicit_weight`.

    The gradient of one sample's loss is -w (1 - p_t) at u_t and w p_i at u_i. Without the confidence term (the
    ablation of the paper's Figure B.1), the log-odds log(p_t / (1 - p_t)) replace log p_t. The gradient is then -w at
    u_t and w p'_i at u_i, and the loss is unbounded below.
    """
    log_odds = decoupled.student_log_odds
    confidence = F.logsigmoid(log_odds) if confidence_term else log_odds
    return -temperature * (weight.detach() * confidence).mean()


class AEKT(LogitMethod):
    """cross_entropy_weight * CE + warm-up * (alpha * TCKD + beta * NCKD + gamma * L_AEKT)."""

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        alpha: float,
        beta: float,
        gamma: float,
        temperature: PositiveFloat,
        warmup_epochs: NonNegativeFloat,
        weighting: Weighting,
        max_weight: Annotated[float, Field(gt=0, le=LARGEST_BOUND)],
        weight_temperature: PositiveFloat,
        confidence_term: bool,
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
        self.warmup_epochs = warmup_epochs
        self.weighting = weighting
        self.max_weight = max_weight
        self.weight_temperature = weight_temperature
        self.confidence_term = confidence_term

    def weights(self, epoch: int) -> dict[str, float]:
        """Warm the distillation terms up linearly. Cross-entropy has its full weight from the start."""
        warm = warm_up(epoch, self.warmup_epochs)
        return {
            "cross_entropy": self.cross_entropy_weight,
            "tckd": warm * self.alpha,
            "nckd": warm * self.beta,
            "explicit_transfer": warm * self.gamma,
        }

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return TCKD, NCKD and explicit transfer."""
        decoupled = decouple(logits.student, logits.teacher, batch.target, self.temperature)
        weight = self._weight(decoupled, logits, batch.target)
        return {
            "tckd": tckd_loss(decoupled, self.temperature),
            "nckd": nckd_loss(decoupled, self.temperature),
            "explicit_transfer": explicit_transfer_loss(decoupled, weight, self.temperature, self.confidence_term),
        }

    def _weight(self, decoupled: Decoupled, logits: DistillationLogits, target: Tensor) -> Tensor:
        """Compute the weights [B], whose p_t and q_t have a temperature of their own."""
        p, q = decoupled.student_log_odds, decoupled.teacher_log_odds
        if self.weight_temperature != self.temperature:
            p, q = (
                target_log_odds(each, target, self.weight_temperature)
                for each in (logits.student.detach(), logits.teacher)
            )
        return explicit_weight(F.logsigmoid(p), F.logsigmoid(q), self.weighting, self.max_weight)
