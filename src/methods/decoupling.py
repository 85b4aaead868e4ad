"""A softmax without its target class: the part that DKD and later methods share.

Notation: logits u [B, C], target class t [B], temperature T.

    p    = softmax(u / T)
    p'_i = p_i / (1 - p_t) for i != t, which is softmax(u_i / T, i != t)
    l    = log(p_t / (1 - p_t)) = u_t / T - logsumexp_{i != t}(u_i / T)

A loss on p_t needs only its log-odds l: log p_t = logsigmoid(l) and log(1 - p_t) = logsigmoid(-l). Both stay exact even
if p_t rounds to 0 or 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.methods.method import at_least_float32


class Decoupled(NamedTuple):
    """The target class under student (p) and teacher (q), and the divergence among the other classes."""

    student_log_odds: Tensor
    """[B], log(p_t / (1 - p_t))."""
    teacher_log_odds: Tensor
    """[B], log(q_t / (1 - q_t)), without a gradient."""
    non_target_kl: Tensor
    """[B], KL(q', p') among the other classes. Exactly 0 for two classes."""


def decouple(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Decoupled:
    """Split the logits [B, C] of both networks in one pass. Only the student's logits get gradients."""
    return Decoupled(*_Decoupling.apply(student_logits, teacher_logits, target[:, None], temperature))


class _Decoupling(torch.autograd.Function):
    """The split, with a gradient written by hand. Autograd would keep a dozen arrays [B, C] instead of two.

        gradient of l            1 / T at u_t, -p'_i / T at u_i
        gradient of KL(q', p')   0 at u_t, (p'_i - q'_i) / T at u_i

    The gaps are g_i = (u_i - max u) / T, and s is the sum of exp(g_i), both over the other classes. Then
    p'_i = exp(g_i) / s and log p'_i = g_i - log s. The arrays of gaps are overwritten, because memory limits this loss
    if there are many classes.
    """

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Any:
        teacher_gaps, teacher_gap = _gaps(teacher_logits, target, temperature)
        q_others, log_sum_q = _normalise(teacher_gaps.exp())
        gaps, gap = _gaps(student_logits, target, temperature)
        log_ratio = teacher_gaps.sub_(gaps)  # log(q' / p') before the logarithms of the sums are subtracted
        p_others, log_sum_p = _normalise(gaps.exp_())
        # At the target, log_ratio is -inf minus -inf, which is NaN.
        log_ratio.sub_(log_sum_q - log_sum_p).scatter_(1, target, 0.0)
        divergence = log_ratio.mul_(q_others).sum(dim=1)
        ctx.save_for_backward(p_others, q_others, target)
        ctx.temperature, ctx.dtype = temperature, student_logits.dtype
        teacher_log_odds = (teacher_gap - log_sum_q).squeeze(1)
        ctx.mark_non_differentiable(teacher_log_odds)
        return (gap - log_sum_p).squeeze(1), teacher_log_odds, divergence

    @staticmethod
    def backward(ctx: Any, grad_log_odds: Tensor, _: Tensor, grad_divergence: Tensor) -> Any:
        p_others, q_others, target = ctx.saved_tensors
        of_log_odds, of_divergence = (grad[:, None] / ctx.temperature for grad in (grad_log_odds, grad_divergence))
        gradient = (p_others * (of_divergence - of_log_odds)).addcmul_(q_others, of_divergence, value=-1)
        return gradient.scatter_(1, target, of_log_odds).to(ctx.dtype), None, None, None


def _gaps(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute (u - peak) / T of the other classes [B, C], with -inf at the target, and of the target [B, 1].

    The peak is the largest logit of the other classes. It is subtracted before the division, which then rounds
    differences instead of large numbers.
    """
    logits = at_least_float32(logits)
    others = logits.scatter(1, target, -torch.inf)
    peak = others.amax(dim=1, keepdim=True)
    return others.sub_(peak).div_(temperature), (logits.gather(1, target) - peak) / temperature


def _normalise(exponentials: Tensor) -> tuple[Tensor, Tensor]:
    """Divide exponentials [B, C] by each row's sum, in place. Returns the quotients and the sum's logarithm [B, 1]."""
    total = exponentials.sum(dim=1, keepdim=True)
    return exponentials.div_(total), total.log()


def non_target_logits(logits: Tensor, target: Tensor) -> Tensor:
    """Remove the target's logit from each row: [B, C] and [B] to [B, C - 1].

    The other logits are gathered. It is customary to set the target's logit to -1000 instead, which fails if other
    logits are near -1000. -inf would make the divergence NaN.

    >>> non_target_logits(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1]))
    tensor([[1., 3.]])
    """
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, others + (others >= target[:, None]))


def target_log_odds(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Compute l = log(p_t / (1 - p_t)) of each row, [B]. Gradient: 1 / T at u_t, -p'_i / T at u_i."""
    logits = at_least_float32(logits)
    others = non_target_logits(logits, target)
    peak = others.amax(dim=1, keepdim=True).detach()
    gap = (logits.gather(1, target[:, None]) - peak).squeeze(1)
    return gap / temperature - torch.logsumexp((others - peak) / temperature, dim=1)
