"""`gradients.csv`: how much gradient each loss term sends to the student's logits, measured while a run trains."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from src.common.files import read_rows, write_rows
from src.methods.decoupling import target_log_odds
from src.methods.method import Batch, DistillationLogits, at_least_float32
from src.training.distiller import Distiller

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RATIOS = ("target_ratio", "non_target_ratio")
"""q_t / p_t, which adapts explicit transfer, and (1 - q_t) / (1 - p_t), which adapts NCKD."""
FILE = "gradients.csv"


def anatomy(
    weighted_terms: Mapping[str, Tensor], batch: Batch, logits: DistillationLogits, temperature: float
) -> dict[str, float]:
    """Measure the gradients that the weighted terms of a batch send to the student's logits.

    The values are means over the batch, in units of one sample's loss:

    - `<term>/target`: the gradient at the target logit, and `<term>/others`: the sum of its magnitudes at the other
      logits. Both are taken at the logits that the term reads.
    - `<term>/own`: the length of the gradient at the student's own logits, if the gradient reaches them. For a
      distillation term, it has passed back through the serialization layer.
    - `<term>|<term>/cosine`: the mean cosine of two terms' gradients, and `<term>|<term>/against`: the share of samples
      in which it is negative. Both are taken at the student's own logits if both terms reach them, and otherwise at
      the logits for distillation.
    - `target_ratio/<quantile>`, `non_target_ratio/<quantile>`: quantiles of q_t / p_t and (1 - q_t) / (1 - p_t) at
      `temperature`.

    Terms without a gradient at either kind of logits are left out. The graph is kept for the backward pass.
    """
    if not batch.student.logits.requires_grad:
        return {}
    # Without a teacher, an image without a label has no target: the student's prediction stands for it.
    target = torch.where(batch.target < 0, batch.student.logits.argmax(dim=1), batch.target)
    at_own, at_distilled = _gradients_at_logits(weighted_terms, batch.student.logits, logits.student)
    found: dict[str, Tensor] = {}
    for name, gradient in {**at_own, **at_distilled}.items():
        pull = gradient.gather(1, target[:, None]).squeeze(1)
        found[f"{name}/target"] = pull.mean()
        found[f"{name}/others"] = (gradient.abs().sum(dim=1) - pull.abs()).mean()
        if name in at_own:
            found[f"{name}/own"] = at_own[name].norm(dim=1).mean()
    for one, other in itertools.combinations(weighted_terms, 2):
        shared = next((place for place in (at_own, at_distilled) if one in place and other in place), None)
        if shared is not None:
            cosine = F.cosine_similarity(shared[one], shared[other], dim=1)
            found |= {f"{one}|{other}/cosine": cosine.mean(), f"{one}|{other}/against": (cosine < 0).float().mean()}
    found |= _ratios(batch, logits, temperature)
    return dict(zip(found, torch.stack([value.double() for value in found.values()]).tolist(), strict=True))


def _gradients_at_logits(
    weighted_terms: Mapping[str, Tensor], own: Tensor, distilled: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the gradient of each term at the student's own logits and at the logits for distillation, each [B, C].

    A term without a gradient at these logits is left out. The unit is one sample's loss.
    """
    at_own: dict[str, Tensor] = {}
    at_distilled: dict[str, Tensor] = {}
    for name, term in weighted_terms.items():
        if not term.requires_grad:
            continue
        gradients = torch.autograd.grad(term, (own, distilled), retain_graph=True, allow_unused=True)
        for kept, gradient in zip((at_own, at_distilled), gradients, strict=True):
            if gradient is not None:
                kept[name] = len(own) * at_least_float32(gradient)
    return at_own, at_distilled


def _ratios(batch: Batch, logits: DistillationLogits, temperature: float) -> dict[str, Tensor]:
    """Compute quantiles of both ratios by name. Returns an empty dictionary without a teacher."""
    student, teacher = logits.views[0]
    if teacher is None:
        return {}
    q, p = (target_log_odds(each, batch.target, temperature) for each in (teacher, student.detach()))
    logs = torch.stack([F.logsigmoid(q) - F.logsigmoid(p), F.logsigmoid(-q) - F.logsigmoid(-p)]).double()
    quantiles = torch.quantile(logs, torch.tensor(QUANTILES, dtype=logs.dtype, device=logs.device), dim=1).exp()
    return {f"{name}/{level}": quantiles[i, j] for j, name in enumerate(RATIOS) for i, level in enumerate(QUANTILES)}


class GradientAnatomy(Callback):
    """Measure the `anatomy` of every `every`-th step, for the logger and for gradients.csv.

    Only gradients at logits are computed, which costs little beside the networks. The training does not change. With
    several devices, rank zero measures its share of each batch.
    """

    def __init__(self, folder: Path, every: int, temperature: float) -> None:
        self.file = folder / FILE
        self.every, self.temperature = every, temperature
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows up to the checkpoint. Later steps are trained again."""
        self.rows = list(state_dict["rows"])

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Measure the terms while their graph exists. Of an accumulated step, only the first batch is measured."""
        accumulated = trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches
        if trainer.global_step % self.every or accumulated or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Distiller)
        assert pl_module.last_batch is not None
        row = anatomy(pl_module.weighted_terms, *pl_module.last_batch, self.temperature)
        if not row:
            return
        epoch = trainer.current_epoch + trainer.fit_loop.batch_idx / trainer.num_training_batches
        self.rows.append({"step": trainer.global_step, "epoch": epoch, **row})
        for logger in trainer.loggers:
            logger.log_metrics({f"gradients/{name}": value for name, value in row.items()}, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows so far."""
        if trainer.is_global_zero and self.rows:
            write_rows(self.file, self.rows)


def read_gradients(folder: Path) -> list[dict[str, float]]:
    """Read the rows of a run folder's gradients.csv. Returns no rows if the run measured none."""
    return read_rows(folder / FILE)
