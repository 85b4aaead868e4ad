"""Adaptive Explicit Knowledge Transfer (AEKT): H. Park, J.-S. Lee, arXiv 2409.01679.

Given by the paper (as far as its abstract and figure captions tell): L_TCKD, L_NCKD and L_AEKT act together; L_AEKT
weights the learning of the teacher's confidence in the target class by the ratio of teacher to student; distillation
acts after a serialization layer, cross-entropy before it (`src/serialization.py`); the ablation without the 1 - p_t
term. Ours: the exact form of the weight and its bound, the scale T of the loss, and all constants that DKD does not
publish.

Notation as in `src/methods/dkd.py`; sg is stop-gradient.
"""

import math
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from src.errors import UserError
from src.methods.decoupling import Decoupled
from src.methods.dkd import DKD
from src.methods.method import warm_up

Weighting = Literal["ratio", "log_ratio", "constant"]
LARGEST_BOUND = 1e6
"""Beyond it float32 has no room for weight times loss."""


def explicit_weight(log_p: Tensor, log_q: Tensor, weighting: Weighting, max_weight: float) -> Tensor:
    """The weight w of each sample, [B], from log p_t and log q_t, [B]; ours.

    - `ratio`: min(q_t / p_t, max_weight). Below the bound w log p_t has the gradient of q_t / p_t; it always pulls p_t
      up.
    - `log_ratio`: log(q_t / p_t) within +-max_weight; vanishes where p_t = q_t and pulls back beyond.
    - `constant`: q_t; transfer without adaptation, the control.
    """
    if weighting == "ratio":
        return (log_q - log_p).clamp(max=math.log(max_weight)).exp()
    if weighting == "log_ratio":
        return (log_q - log_p).clamp(-max_weight, max_weight)
    return log_q.exp()


def explicit_transfer_loss(
    decoupled: Decoupled,
    temperature: float,
    weighting: Weighting = "ratio",
    max_weight: float = 10.0,
    confidence_term: bool = True,
) -> Tensor:
    """L_AEKT = -T sg(w) log p_t, averaged over the batch.

    Gradient of one sample's loss at u_t: -w (1 - p_t), at u_i: w p_i. Without the confidence term (the ablation of the
    paper's Figure B.1) log p_t gives way to the log-odds log(p_t / (1 - p_t)): gradient -w at u_t, w p'_i at u_i; that
    loss is unbounded below.
    """
    log_p, log_q = F.logsigmoid(decoupled.student), F.logsigmoid(decoupled.teacher)
    weight = explicit_weight(log_p, log_q, weighting, max_weight).detach()
    confidence = log_p if confidence_term else decoupled.student
    return -temperature * (weight * confidence).mean()


class AEKT(DKD):
    """cross_entropy_weight * CE + warm-up * (alpha * TCKD + beta * NCKD + gamma * L_AEKT)."""

    def __init__(
        self, *, gamma: float, weighting: Weighting, max_weight: float, confidence_term: bool, **dkd: float
    ) -> None:
        super().__init__(**dkd)
        if weighting not in get_args(Weighting):
            raise UserError(f"method.weighting={weighting} is unknown: choose one of {', '.join(get_args(Weighting))}.")
        if not 0 < max_weight <= LARGEST_BOUND:
            raise UserError(
                f"method.max_weight={max_weight} does not bound the weight: give a number in (0, {LARGEST_BOUND:g}]."
            )
        self.gamma = gamma
        self.weighting = weighting
        self.max_weight = max_weight
        self.confidence_term = confidence_term

    def weights(self, epoch: int) -> dict[str, float]:
        """DKD's weights and that of explicit transfer, which warms up with them."""
        return {**super().weights(epoch), "explicit_transfer": warm_up(epoch, self.warmup_epochs) * self.gamma}

    def distillation(self, decoupled: Decoupled) -> dict[str, Tensor]:
        """DKD's terms and explicit transfer."""
        explicit = explicit_transfer_loss(
            decoupled, self.temperature, self.weighting, self.max_weight, self.confidence_term
        )
        return {**super().distillation(decoupled), "explicit_transfer": explicit}
