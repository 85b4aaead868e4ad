"""3x3 convolutions by Winograd's algorithm F(4x4, 3x3), on a CPU in float32 (Lavin and Gray, CVPR 2016).

Four times fewer multiplications than the direct sum of a CPU's library; a GPU's chooses its algorithm for itself.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import UserError
from src.native import library

PANEL, POINTS = 16, 36
log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".cpp")


class WinogradConv2d(nn.Conv2d):
    """A convolution that takes over another's parameters, under the same names.

    A `frozen` one, whose weight never changes, always computes by Winograd's algorithm, from points that take four
    times its weight's memory. Others do so in training only: they are evaluated by the direct sum, as they will be
    wherever else the network is used.
    """

    points: Tensor | None

    def __init__(self, convolution: nn.Conv2d, frozen: bool) -> None:
        super().__init__(convolution.in_channels, convolution.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.train(convolution.training)
        points = weight_points(self.weight.detach()) if frozen else None
        self.register_buffer("points", points, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """[B, outputs, H, W] of [B, inputs, H, W]."""
        if input.device.type != "cpu" or not input.numel() or (self.points is None and not self.training):
            return super().forward(input)
        output: Tensor = Winograd.apply(input, self.weight, self.bias, self.points)
        return output


def check_winograd(device: torch.device) -> None:
    """Raise `UserError` where it cannot be had: on another device than a CPU, or without a compiler."""
    if device.type != "cpu":
        raise UserError("winograd=true and teacher.winograd=true are for a CPU; a GPU has its own: leave them out.")
    library(SOURCE)


def use_winograd(network: nn.Module, frozen: bool) -> int:
    """Let the convolutions that Winograd's algorithm fits compute by it; how many they are.

    Raises `UserError` where `frozen` ones want what no compiler is there to make.
    """
    fitting = {name: module for name, module in network.named_modules() if _fits(module)}
    if not fitting:
        kind = "the teacher" if frozen else "the student"
        log.warning("Winograd's algorithm changes nothing in %s: no 3x3 convolution there fits it.", kind)
    for name, module in fitting.items():
        network.set_submodule(name, WinogradConv2d(module, frozen))
    return len(fitting)


def _fits(module: Any) -> bool:
    return (
        type(module) is nn.Conv2d
        and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
        and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
        and module.in_channels % PANEL == module.out_channels % PANEL == 0
    )


class Winograd(torch.autograd.Function):
    """The convolution of float32 images [B, C, H, W] with a weight [K, C, 3, 3] and a bias [K] or None.

    `points` are those of the weight where they are known. Gradients are by the same algorithm: the input's as exact as
    the answer, the weight's within a few times of torch's. Rounding depends on the number of threads in the weight's
    gradient alone; the answer's does not depend on the size of the batch either.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, points: Tensor | None) -> Tensor:
        """[B, K, H, W], channels last."""
        if images.shape[1] != weight.shape[1]:
            raise ValueError(f"images of {images.shape[1]} channels for a weight of {weight.shape[1]}")
        ctx.save_for_backward(images, weight)
        return convolve(images, weight_points(weight) if points is None else points, bias, len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Those of images, weight and bias."""
        images, weight = ctx.saved_tensors
        of_images, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            convolve(gradient, weight_points(weight, turned=True), None, images.shape[1]) if of_images else None,
            weight_gradient(images, gradient) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,
            None,
        )


def weight_points(weight: Tensor, turned: bool = False) -> Tensor:
    """G w G^T of a weight [K, C, 3, 3], flat; `turned`, of the one that takes gradients back to the input."""
    weight = _channels_last(weight)
    outputs, inputs = weight.shape[:2]
    points = weight.new_empty(POINTS * inputs * outputs)
    _call("weight_points", weight, inputs, outputs, int(turned), torch.get_num_threads(), points)
    return points


def convolve(images: Tensor, points: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """[B, outputs, H, W] of images [B, C, H, W] and a weight's points."""
    images = _channels_last(images)
    batch, inputs, height, width = images.shape
    threads = torch.get_num_threads()
    work = _work("convolve_work", images, outputs, threads)
    output = torch.empty(batch, outputs, height, width, memory_format=torch.channels_last)
    _call("convolve", images, batch, height, width, inputs, points, bias, outputs, threads, work, output)
    return output


def weight_gradient(images: Tensor, gradient: Tensor) -> Tensor:
    """[K, C, 3, 3] of images [B, C, H, W] and the output's gradient [B, K, H, W]."""
    images, gradient = _channels_last(images), _channels_last(gradient)
    batch, inputs, height, width = images.shape
    outputs, threads = gradient.shape[1], torch.get_num_threads()
    work = _work("weight_gradient_work", images, outputs, threads)
    result = torch.empty(outputs, inputs, 3, 3, memory_format=torch.channels_last)
    _call("weight_gradient", images, gradient, batch, height, width, inputs, outputs, threads, work, result)
    return result


def _channels_last(values: Tensor) -> Tensor:
    if values.dtype != torch.float32 or values.device.type != "cpu":
        raise TypeError(f"Winograd's algorithm is there for float32 on a CPU, not for {values.dtype} {values.device}.")
    return values.contiguous(memory_format=torch.channels_last)


def _work(function: str, images: Tensor, outputs: int, threads: int) -> Tensor:
    batch, inputs, height, width = images.shape
    return images.new_empty(_call(function, batch, height, width, inputs, outputs, threads))


def _call(function: str, *arguments: Tensor | int | None) -> int:
    """A function of winograd.cpp: tensors by their address, numbers as 64-bit integers."""
    found = getattr(library(SOURCE), function)
    found.restype = ctypes.c_int64
    return int(found(*map(_passed, arguments)))


def _passed(argument: Tensor | int | None) -> Any:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(argument.data_ptr() if argument is not None else None)
