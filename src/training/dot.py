"""The distillation-oriented optimiser (DOT): B. Zhao et al., "DOT: A Distillation-Oriented Trainer", ICCV 2023, arXiv
2307.08436.

DOT is SGD with two momenta. The momentum of distillation's gradient is larger than that of the gradient of the task,
which is cross-entropy:

    v_task = (m - delta) v_task + g_task + weight decay w
    v_kd = (m + delta) v_kd + g_kd
    w = w - lr (v_task + v_kd)

With delta = 0 this is SGD with momentum m. Parameters without a gradient of cross-entropy (adapters, a serialization
layer) are trained by SGD with momentum m, as in mdistiller. The same holds if cross-entropy is the only loss.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from src.common.errors import UserError


class DOT(Optimizer):
    """SGD with two momenta. Call `keep_task_gradients` before each backward pass of the whole loss."""

    unsupported_precisions = ("16-mixed",)
    """Precisions with a gradient scaler, under which the two gradients would have different scales."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
    ) -> None:
        """Make the optimiser. Raises `ValueError` if one of the momenta m - delta and m + delta is outside [0, 1)."""
        if not 0 <= delta <= momentum < 1 - delta:
            raise ValueError(f"momentum {momentum} minus and plus delta {delta} must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        self.task_gradients: dict[Tensor, Tensor] = {}

    @staticmethod
    def check_trainer(options: Mapping[str, Any]) -> None:
        """Raise `UserError` if an option of the trainer would change one of the two gradients alone."""
        for name, neutral in (("gradient_clip_val", 0), ("accumulate_grad_batches", 1)):
            if options.get(name) not in (None, neutral):
                raise UserError(f"optimizer=dot does not support trainer.{name}: leave it out.")

    def keep_task_gradients(
        self, weighted_terms: Mapping[str, Tensor], mean_over_devices: Callable[[list[Tensor]], list[Tensor]]
    ) -> None:
        """Compute and keep the gradient of the weighted term `cross_entropy`. The graph is kept for the backward pass.

        Raises `UserError` if the method has no such term.
        """
        if list(weighted_terms) == ["cross_entropy"]:
            return
        if "cross_entropy" not in weighted_terms:
            raise UserError(
                "optimizer=dot needs the term cross_entropy, but a stage of this method has only "
                f"{', '.join(weighted_terms)}: choose a method with cross-entropy, or optimizer=null."
            )
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        gradients = torch.autograd.grad(
            weighted_terms["cross_entropy"], parameters, retain_graph=True, allow_unused=True
        )
        found = {p: gradient for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        self.task_gradients = dict(zip(found, mean_over_devices(list(found.values())), strict=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient. The closure computes the loss and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        self.task_gradients = {}
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
        momentum, delta = group["momentum"], group["delta"]
        decay = group["weight_decay"] * parameter
        task = self.task_gradients.get(parameter)
        if task is None:
            velocity = self._accumulate(parameter, "velocity", momentum, gradient + decay)
            parameter.sub_(group["lr"] * velocity)
            return
        velocity = self._accumulate(parameter, "task_velocity", momentum - delta, task + decay)
        velocity = velocity + self._accumulate(parameter, "kd_velocity", momentum + delta, gradient - task)
        parameter.sub_(group["lr"] * velocity)

    def _accumulate(self, parameter: Tensor, name: str, momentum: float, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        velocity: Tensor = state[name].mul_(momentum).add_(gradient)
        return velocity
