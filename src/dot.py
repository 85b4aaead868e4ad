"""The distillation-oriented optimiser (DOT): B. Zhao et al., "DOT: A Distillation-Oriented Trainer", ICCV 2023, arXiv
2307.08436.

SGD with two momenta: distillation's gradient is kept for longer than that of the task, which is cross-entropy.

    v_task = (m - delta) v_task + g_task + weight decay w
    v_kd = (m + delta) v_kd + g_kd
    w = w - lr (v_task + v_kd)

With delta = 0 it is SGD with momentum m. Parameters that cross-entropy does not reach (adapters, a serialization layer)
are trained by SGD with momentum m, as in mdistiller; so is a network that has no other loss than cross-entropy.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from src.errors import UserError


class DOT(Optimizer):
    """The optimiser; `keep_task_gradients` has to be called before each backward pass of the whole loss."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
    ) -> None:
        """Raises `ValueError` where one of the momenta would not lie in [0, 1)."""
        if not 0 <= delta <= momentum < 1 - delta:
            raise ValueError(f"momentum {momentum} -+ delta {delta} leaves [0, 1)")
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        self.task_gradients: dict[Tensor, Tensor] = {}

    def keep_task_gradients(
        self, weighted_terms: Mapping[str, Tensor], mean_over_devices: Callable[[Tensor], Tensor]
    ) -> None:
        """Take the gradient of the weighted `cross_entropy` by itself; the graph stays for the backward pass.

        Raises `UserError` where the method has no such term.
        """
        if list(weighted_terms) == ["cross_entropy"]:
            return
        if "cross_entropy" not in weighted_terms:
            raise UserError(
                "optimizer=dot parts cross-entropy's gradient from that of distillation, and this method's loss is "
                f"{' + '.join(weighted_terms)}: choose a method with cross-entropy, or optimizer=null."
            )
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        gradients = torch.autograd.grad(
            weighted_terms["cross_entropy"], parameters, retain_graph=True, allow_unused=True
        )
        self.task_gradients = {
            parameter: mean_over_devices(gradient)
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient; the closure computes the loss and the gradients."""
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
            velocity = self._accumulated(parameter, "velocity", momentum, gradient + decay)
            parameter.sub_(group["lr"] * velocity)
            return
        velocity = self._accumulated(parameter, "task_velocity", momentum - delta, task + decay)
        velocity = velocity + self._accumulated(parameter, "kd_velocity", momentum + delta, gradient - task)
        parameter.sub_(group["lr"] * velocity)

    def _accumulated(self, parameter: Tensor, name: str, momentum: float, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name].mul_(momentum).add_(gradient)
