"""What is left of a softmax without its target class, which DKD and the methods after it are made of.

Notation: logits u [B, C], target class t [B], temperature T, p = softmax(u / T), and among the other classes p'_i =
p_i / (1 - p_t), so that p' = softmax(u_i / T, i != t).

Everything that a loss knows of the target class is its log-odds l = log(p_t / (1 - p_t)) = u_t / T - logsumexp_{i !=
t}(u_i / T): log p_t = logsigmoid(l) and log(1 - p_t) = logsigmoid(-l), exact where p_t rounds to 0 or 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.methods.method import at_least_float32


class Decoupled(NamedTuple):
    """The logits of student (p) and teacher (q) as what they say of the target and of the others."""

    student: Tensor
    """[B], log(p_t / (1 - p_t))."""
    teacher: Tensor
    """[B], log(q_t / (1 - q_t)); a constant."""
    divergence: Tensor
    """[B], KL(q', p') among the others; exactly 0 for two classes."""


def decouple(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Decoupled:
    """One pass over the logits [B, C] of both networks; gradients reach the student's alone."""
    return Decoupled(*_Decoupling.apply(student_logits, teacher_logits, target[:, None], temperature))


class _Decoupling(torch.autograd.Function):
    """Written by hand for its gradient: autograd would keep a dozen arrays of [B, C], this keeps p' and q'.

    Of l: 1 / T at u_t and -p'_i / T at u_i. Of KL(q', p'): 0 at u_t and (p'_i - q'_i) / T at u_i.

    With gaps g_i = (u_i - max u) / T and a sum s of exp(g) among the others: p' = exp(g) / s, log p' = g - log s. The
    arrays of gaps are used up, since memory is what bounds this loss where classes are many.
    """

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Any:
        teacher_gaps, teacher_gap = _gaps(teacher_logits, target, temperature)
        q, log_sum_q = _softmax(teacher_gaps.exp())
        gaps, gap = _gaps(student_logits, target, temperature)
        log_ratio = teacher_gaps.sub_(gaps)  # log(q' / p') but for the sums
        p, log_sum_p = _softmax(gaps.exp_())
        log_ratio.sub_(log_sum_q - log_sum_p).scatter_(1, target, 0.0)
        divergence = log_ratio.mul_(q).sum(dim=1)
        ctx.save_for_backward(p, q, target)
        ctx.temperature, ctx.dtype = temperature, student_logits.dtype
        teacher_log_odds = (teacher_gap - log_sum_q).squeeze(1)
        ctx.mark_non_differentiable(teacher_log_odds)
        return (gap - log_sum_p).squeeze(1), teacher_log_odds, divergence

    @staticmethod
    def backward(ctx: Any, of_log_odds: Tensor, _: Tensor, of_divergence: Tensor) -> Any:
        p, q, target = ctx.saved_tensors
        of_log_odds, of_divergence = (of[:, None] / ctx.temperature for of in (of_log_odds, of_divergence))
        gradient = (p * (of_divergence - of_log_odds)).addcmul_(q, of_divergence, value=-1)
        return gradient.scatter_(1, target, of_log_odds).to(ctx.dtype), None, None, None


def _gaps(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(u - peak) / T of the other classes [B, C] (-inf for the target) and of the target [B, 1].

    The peak is the others'. It is taken off before dividing, so that the division rounds gaps.
    """
    logits = at_least_float32(logits)
    others = logits.scatter(1, target, -torch.inf)
    peak = others.amax(dim=1, keepdim=True)
    return others.sub_(peak).div_(temperature), (logits.gather(1, target) - peak) / temperature


def _softmax(exponentials: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C] divided (in place) by each row's sum, and the logarithm of that sum, [B, 1]."""
    total = exponentials.sum(dim=1, keepdim=True)
    return exponentials.div_(total), total.log()


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
