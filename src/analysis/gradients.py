"""What each loss term does to the student's logits: in closed form, and measured while it trains.

Notation as in `src/methods/dkd.py`: student logits u, teacher logits v, target class t, temperature T, p and q their
softmax at T, p' and q' the same among the other classes. All that knows the student through p_t alone pushes along one
direction, p' - onehot(t); TCKD and explicit transfer differ in how hard.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from src.distiller import Distiller
from src.methods.aekt import Weighting, explicit_weight
from src.methods.decoupling import target_log_odds
from src.methods.method import Batch, at_least_float32, log_softmax
from src.run import read_rows, write_rows

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RATIOS = ("target_ratio", "non_target_ratio")
"""q_t / p_t, which adapts explicit transfer, and (1 - q_t) / (1 - p_t), which adapts NCKD."""
FILE = "gradients.csv"


def kd_gradient(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T (p - q): of each sample's KD at u, [B, C]."""
    p, q = log_softmax(student_logits, temperature).exp(), log_softmax(teacher_logits, temperature).exp()
    return temperature * (p - q)


def tckd_gradient(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T (q_t - p_t) (p' - onehot(t)): of each sample's TCKD at u, [B, C]."""
    student, teacher = (target_log_odds(logits, target, temperature) for logits in (student_logits, teacher_logits))
    gap = teacher.sigmoid() - student.sigmoid()
    return temperature * gap[:, None] * target_direction(student_logits, target, temperature)


def nckd_gradient(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T (p' - q'), 0 at t: of each sample's NCKD at u, [B, C]."""
    student, teacher = (_among_others(logits, target, temperature) for logits in (student_logits, teacher_logits))
    return temperature * (student - teacher)


def explicit_transfer_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float,
    weighting: Weighting = "ratio",
    max_weight: float = 10.0,
    confidence_term: bool = True,
) -> Tensor:
    """w (1 - p_t) (p' - onehot(t)): of each sample's L_AEKT at u, [B, C]; w (p' - onehot(t)) without the confidence
    term (the ablation of the paper's Figure B.1).
    """
    student, teacher = (target_log_odds(logits, target, temperature) for logits in (student_logits, teacher_logits))
    weight = explicit_weight(F.logsigmoid(student), F.logsigmoid(teacher), weighting, max_weight)
    size = weight * (-student).sigmoid() if confidence_term else weight
    return size[:, None] * target_direction(student_logits, target, temperature)


def target_direction(student_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """p' - onehot(t), [B, C]: where descent takes from the others, each by its share, what it gives to the target."""
    others = _among_others(student_logits, target, temperature)
    return others.scatter(1, target[:, None], -1.0)


def _among_others(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """p' [B, C], 0 at the target."""
    return log_softmax(at_least_float32(logits).scatter(1, target[:, None], -math.inf), temperature).exp()


def anatomy(weighted_terms: Mapping[str, Tensor], batch: Batch, temperature: float) -> dict[str, float]:
    """What the weighted terms of one batch of B images send to the student's logits, before they are summed.

    - `<term>/target`, `<term>/others`: gradient at the target logit, and sum of its sizes at the other logits, of the
      logits that the term reads; `<term>/own`: its length at the student's own logits, where it reaches them (after
      the serialization layer for what is measured behind it). Means over the batch, in units of one sample's loss.
    - `<term>|<term>/cosine`: mean cosine of two terms' gradients, sample by sample, and `.../against`: the share of
      samples where it is negative; at the student's own logits, or where these part, at those for distillation.
    - `target_ratio/<quantile>`, `non_target_ratio/<quantile>`: of q_t / p_t and (1 - q_t) / (1 - p_t) at `temperature`.

    Terms that reach neither logits are left out. The graph stays for the backward pass.
    """
    own, distilled = batch.student.logits, batch.student.distillation_logits
    if not own.requires_grad:
        return {}
    at_own: dict[str, Tensor] = {}
    at_distilled: dict[str, Tensor] = {}
    for name, term in weighted_terms.items():
        gradients = torch.autograd.grad(term, (own, distilled), retain_graph=True, allow_unused=True)
        for kept, gradient in zip((at_own, at_distilled), gradients, strict=True):
            if gradient is not None:
                kept[name] = len(own) * at_least_float32(gradient)
    found: dict[str, Tensor] = {}
    for name, gradient in {**at_own, **at_distilled}.items():
        pull = gradient.gather(1, batch.target[:, None]).squeeze(1)
        found[f"{name}/target"] = pull.mean()
        found[f"{name}/others"] = (gradient.abs().sum(dim=1) - pull.abs()).mean()
        if name in at_own:
            found[f"{name}/own"] = at_own[name].norm(dim=1).mean()
    for one, other in itertools.combinations(weighted_terms, 2):
        meeting = next((place for place in (at_own, at_distilled) if one in place and other in place), None)
        if meeting is not None:
            cosine = F.cosine_similarity(meeting[one], meeting[other], dim=1)
            found |= {f"{one}|{other}/cosine": cosine.mean(), f"{one}|{other}/against": (cosine < 0).float().mean()}
    found |= _ratios(batch, temperature)
    return dict(zip(found, torch.stack([value.double() for value in found.values()]).tolist(), strict=True))


def _ratios(batch: Batch, temperature: float) -> dict[str, Tensor]:
    """Quantiles of both ratios; none without a teacher."""
    teacher = batch.views[0].teacher
    if teacher is None:
        return {}
    logits = (teacher.distillation_logits, batch.student.distillation_logits.detach())
    q, p = (target_log_odds(each, batch.target, temperature) for each in logits)
    logs = torch.stack([F.logsigmoid(q) - F.logsigmoid(p), F.logsigmoid(-q) - F.logsigmoid(-p)]).double()
    quantiles = torch.quantile(logs, torch.tensor(QUANTILES, dtype=logs.dtype, device=logs.device), dim=1).exp()
    return {f"{name}/{level}": quantiles[i, j] for j, name in enumerate(RATIOS) for i, level in enumerate(QUANTILES)}


class GradientAnatomy(Callback):
    """Measures the `anatomy` of every `every`-th step, for the logger and for gradients.csv, a row a measured step.

    It looks at gradients of logits only, which costs nothing beside the networks, and leaves what is trained as it is.
    With several devices it sees the first one's share of each batch.
    """

    def __init__(self, folder: Path, every: int, temperature: float) -> None:
        self.file = folder / FILE
        self.every, self.temperature = every, temperature
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The rows up to the checkpoint: what came after it is done again."""
        self.rows = list(state_dict["rows"])

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the terms while their graph is there."""
        if trainer.global_step % self.every or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Distiller)
        assert pl_module.batch is not None
        row = anatomy(pl_module.weighted_terms, pl_module.batch, self.temperature)
        if not row:
            return
        epoch = trainer.current_epoch + trainer.fit_loop.batch_idx / trainer.num_training_batches
        self.rows.append({"step": trainer.global_step, "epoch": epoch, **row})
        for logger in trainer.loggers:
            logger.log_metrics({f"gradients/{name}": value for name, value in row.items()}, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what there is."""
        if trainer.is_global_zero and self.rows:
            write_rows(self.file, self.rows)


def read_gradients(folder: Path) -> list[dict[str, float]]:
    """The rows of a run folder's gradients.csv; none where the run measured none."""
    return read_rows(folder / FILE)
