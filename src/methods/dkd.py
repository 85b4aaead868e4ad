"""Decoupled knowledge distillation (DKD): B. Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv
2203.08679.

Notation: student logits u, teacher logits v, target class t, temperature T; p = softmax(u / T), q = softmax(v / T),
and among the non-target classes p'_i = p_i / (1 - p_t), q'_i = q_i / (1 - q_t). KD = TCKD + (1 - q_t) NCKD.

Everything that a loss knows of the target class is its log-odds l = log(p_t / (1 - p_t)) = u_t / T - logsumexp_{i !=
t}(u_i / T): log p_t = logsigmoid(l) and log(1 - p_t) = logsigmoid(-l), exact where p_t rounds to 0 or 1.
"""

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.method import Batch, Method, at_least_float32, cross_entropy, log_softmax, warm_up


def non_target_logits(logits: Tensor, target: Tensor) -> Tensor:
    """The C - 1 logits of each row without its target's: [B, C] and [B] to [B, C - 1].

    The others are gathered. Pushing the target's logit to -1000 instead, as is customary, is wrong once logits are as
    large; pushing it to -inf makes the divergence NaN.
    """
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, others + (others >= target[:, None]))


def target_log_odds(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """l = log(p_t / (1 - p_t)) of each row, [B]. Gradient at u_t: 1 / T, at u_i: -p'_i / T."""
    logits = at_least_float32(logits)
    others = non_target_logits(logits, target)
    peak = others.amax(dim=1, keepdim=True).detach()
    gap = (logits.gather(1, target[:, None]) - peak).squeeze(1)
    return gap / temperature - torch.logsumexp((others - peak) / temperature, dim=1)


def tckd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """TCKD = T^2 KL([q_t, 1 - q_t], [p_t, 1 - p_t]), averaged over the batch; logits [B, C], target [B].

    Gradient of one sample's loss at u_t: T (p_t - q_t), at u_i: T p'_i (q_t - p_t).
    """
    student = target_log_odds(student_logits, target, temperature)
    teacher = target_log_odds(teacher_logits, target, temperature)
    log_p, log_not_p = F.logsigmoid(student), F.logsigmoid(-student)
    log_q, log_not_q = F.logsigmoid(teacher), F.logsigmoid(-teacher)
    divergence = log_q.exp() * (log_q - log_p) + log_not_q.exp() * (log_not_q - log_not_p)
    return temperature**2 * divergence.mean()


def nckd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """NCKD = T^2 KL(q', p'), averaged over the batch; logits [B, C], target [B]. Exactly 0 for two classes.

    Gradient of one sample's loss at u_t: 0, at u_i: T (p'_i - q'_i).
    """
    log_p = log_softmax(non_target_logits(student_logits, target), temperature)
    log_q = log_softmax(non_target_logits(teacher_logits, target), temperature)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


class DKD(Method):
    """cross_entropy_weight * CE + warm-up * (alpha * TCKD + beta * NCKD)."""

    distils_logits = True

    def __init__(
        self,
        *,
        cross_entropy_weight: float,
        alpha: float,
        beta: float,
        temperature: PositiveFloat,
        warmup_epochs: NonNegativeFloat,
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.warmup_epochs = warmup_epochs

    def weights(self, epoch: int) -> dict[str, float]:
        """The distillation terms warm up linearly, cross-entropy does not."""
        warm = warm_up(epoch, self.warmup_epochs)
        return {"cross_entropy": self.cross_entropy_weight, "tckd": warm * self.alpha, "nckd": warm * self.beta}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on the student's own logits, TCKD and NCKD on its logits for distillation."""
        student, teacher = batch.student.distillation_logits, batch.teacher.logits
        return {
            "cross_entropy": cross_entropy(batch),
            "tckd": tckd_loss(student, teacher, batch.target, self.temperature),
            "nckd": nckd_loss(student, teacher, batch.target, self.temperature),
        }
