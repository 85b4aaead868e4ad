"""Faster training steps, chiefly on a GPU: compiled terms, fused optimisers, and a stream for the teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, distributed
from torch.optim import Optimizer

from src.methods.method import Batch, DistillationLogits, LogitMethod, Method
from src.models.network import Output

KERNELS = ("fused", "foreach")
"""Options by which torch's optimisers choose their kernels."""
Terms = Callable[[Batch, DistillationLogits], Mapping[str, Tensor]]


def compiled_terms(method: Method) -> Terms:
    """Return `method.all_terms`, with the distillation compiled by torch.compile if the method allows this.

    Cross-entropy stays outside, so that its gradient does not reach the logits for distillation even as a zero.
    """
    if not isinstance(method, LogitMethod) or not method.can_be_compiled:
        return method.all_terms
    distillation = torch.compile(method.distillation, dynamic=False)

    def all_terms(batch: Batch, logits: DistillationLogits) -> Mapping[str, Tensor]:
        return {"cross_entropy": method.label_loss(batch), **distillation(logits, _with_plain_outputs(batch))}

    return all_terms


def _with_plain_outputs(batch: Batch) -> Batch:
    """Replace the outputs by plain ones. The compiler reads every field, and a `WithoutFeatures` refuses that."""
    views = tuple(view._replace(student=_plain(view.student), teacher=_plain(view.teacher)) for view in batch.views)
    return dataclasses.replace(batch, views=views)


def _plain(output: Output | None) -> Any:
    return output if output is None else Output(*output)


def make_fused(make_optimizer: Callable[..., Optimizer], groups: Any, trainer: Trainer) -> Optimizer:
    """Make the optimiser, on a GPU with one fused kernel if it has one and the configuration does not choose.

    Under float16, a fused optimiser scales the gradients itself. Lightning can then not clip them. A checkpoint of
    another device does not change the choice.
    """
    optimizer = make_optimizer([dict(group) for group in groups])  # copies, because an optimiser fills its groups
    is_undecided = all(optimizer.defaults.get(option, False) is None for option in KERNELS)
    clips_scaled = trainer.precision == "16-mixed" and trainer.gradient_clip_val is not None
    on_gpu = trainer.strategy.root_device.type == "cuda"
    if on_gpu and is_undecided and not clips_scaled:
        optimizer = make_optimizer([dict(group) for group in groups], fused=True)
    chosen = {option: optimizer.param_groups[0][option] for option in KERNELS if option in optimizer.param_groups[0]}

    def keep_choice(loaded: Optimizer) -> None:
        for group in loaded.param_groups:
            group.update(chosen)

    optimizer.register_load_state_dict_post_hook(keep_choice)
    return optimizer


def mean_over_devices(tensors: list[Tensor]) -> list[Tensor]:
    """Compute the means of tensors over all devices, with one collective."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = (flat / distributed.get_world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class SideStream:
    """A second CUDA stream, on which a part of a step runs beside the rest. On other devices, it runs in place.

    The block of `beside` sees everything that was computed before it. The rest of the step must call `join` before it
    reads a result of the block. Memory is then safe without further marks: whatever reuses it waits for both streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __deepcopy__(self, memo: dict[int, Any]) -> SideStream:
        """Return the stream itself: a weight average copies the module that holds it."""
        return self

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run the block on the second stream."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Let everything that follows wait for the second stream."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
