"""Winograd's algorithm F(4x4, 3x3) for 3x3 convolutions on a CPU in float32 (Lavin and Gray, CVPR 2016).

It needs a quarter of the multiplications of the direct sum. The libraries for CPUs compute the direct sum. The
libraries for GPUs choose their algorithm themselves.

The algorithm transforms each 3x3 kernel, and the inputs of each tile of 4x4 outputs, to 36 numbers. These are called
points.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.models.native import library

PANEL, POINTS = 16, 36
log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".cpp")


class WinogradConv2d(nn.Conv2d):
    """A convolution that shares the parameters of another one, under the same names.

    If it is `frozen`, its weight never changes. It then always uses Winograd's algorithm, with points that take four
    times the memory of the weight. Otherwise it uses Winograd's algorithm in training only. In evaluation it computes
    the direct sum, as the network will anywhere else.
    """

    points: Tensor | None

    def __init__(self, convolution: nn.Conv2d, frozen: bool) -> None:
        super().__init__(convolution.in_channels, convolution.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.train(convolution.training)
        points = weight_points(self.weight.detach()) if frozen else None
        self.register_buffer("points", points, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H, W]."""
        if input.device.type != "cpu" or not input.numel() or (self.points is None and not self.training):
            return super().forward(input)
        output: Tensor = Winograd.apply(input, self.weight, self.bias, self.points)
        return output


def check_winograd(device: torch.device) -> None:
    """Raise `UserError` if Winograd's algorithm is not available: on any device but a CPU, or without a compiler."""
    if device.type != "cpu":
        raise UserError(
            "winograd=true and teacher.winograd=true work on a CPU only: leave both out. The libraries for GPUs choose "
            "their algorithm themselves."
        )
    library(SOURCE)


def use_winograd(network: nn.Module, frozen: bool) -> int:
    """Replace every convolution that Winograd's algorithm fits by a `WinogradConv2d`. Returns their number.

    With `frozen`, their points are computed at once. Raises `UserError` if this needs a C++ compiler and there is none.
    """
    fitting = {name: module for name, module in network.named_modules() if _fits(module)}
    if not fitting:
        kind = "the teacher" if frozen else "the student"
        log.warning("Winograd's algorithm changes nothing in %s, which has no convolution that fits.", kind)
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

    `points` are the weight's points, or None to compute them. Gradients use the same algorithm. The output and the
    input's gradient have similar rounding errors. The rounding error of the weight's gradient is a few times torch's,
    and only this rounding depends on the number of threads. The rounding of the output does not depend on the batch
    size either.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, points: Tensor | None) -> Tensor:
        """Compute the output [B, K, H, W], in channels-last format."""
        if images.shape[1] != weight.shape[1]:
            raise ValueError(f"The images have {images.shape[1]} channels and the weight has {weight.shape[1]}.")
        ctx.save_for_backward(images, weight)
        return convolve(images, weight_points(weight) if points is None else points, bias, len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of images, weight and bias."""
        images, weight = ctx.saved_tensors
        of_images, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            convolve(gradient, weight_points(weight, turned=True), None, images.shape[1]) if of_images else None,
            weight_gradient(images, gradient) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,
            None,
        )


def weight_points(weight: Tensor, turned: bool = False) -> Tensor:
    """Compute the points G w G^T of a weight [K, C, 3, 3], as a flat tensor.

    With `turned`, compute the points of the weight that gives the input's gradient: kernels are rotated by 180 degrees,
    and inputs and outputs are swapped.
    """
    weight = _channels_last(weight)
    outputs, inputs = weight.shape[:2]
    points = weight.new_empty(POINTS * inputs * outputs)
    _call("weight_points", weight, inputs, outputs, int(turned), torch.get_num_threads(), points)
    return points


def convolve(images: Tensor, points: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """Compute the convolution [B, outputs, H, W] of images [B, C, H, W] with the points of a weight."""
    images = _channels_last(images)
    batch, inputs, height, width = images.shape
    threads = torch.get_num_threads()
    work = _allocate_work("convolve_work", images, outputs, threads)
    output = torch.empty(batch, outputs, height, width, memory_format=torch.channels_last)
    _call("convolve", images, batch, height, width, inputs, points, bias, outputs, threads, work, output)
    return output


def weight_gradient(images: Tensor, gradient: Tensor) -> Tensor:
    """Compute the weight's gradient [K, C, 3, 3] from images [B, C, H, W] and the output's gradient [B, K, H, W]."""
    images, gradient = _channels_last(images), _channels_last(gradient)
    batch, inputs, height, width = images.shape
    outputs, threads = gradient.shape[1], torch.get_num_threads()
    work = _allocate_work("weight_gradient_work", images, outputs, threads)
    result = torch.empty(outputs, inputs, 3, 3, memory_format=torch.channels_last)
    _call("weight_gradient", images, gradient, batch, height, width, inputs, outputs, threads, work, result)
    return result


def _channels_last(values: Tensor) -> Tensor:
    if values.dtype != torch.float32 or values.device.type != "cpu":
        raise TypeError(f"Winograd's algorithm needs float32 on a CPU, not {values.dtype} on {values.device}.")
    return values.contiguous(memory_format=torch.channels_last)


def _allocate_work(function: str, images: Tensor, outputs: int, threads: int) -> Tensor:
    """Allocate the memory that a kernel works in. `function` of winograd.cpp returns its size."""
    batch, inputs, height, width = images.shape
    return images.new_empty(_call(function, batch, height, width, inputs, outputs, threads))


def _call(function: str, *arguments: Tensor | int | None) -> int:
    """Call a function of winograd.cpp. Tensors are passed by their address, numbers as 64-bit integers."""
    compiled = getattr(library(SOURCE), function)
    compiled.restype = ctypes.c_int64
    return int(compiled(*map(_to_ctypes, arguments)))


def _to_ctypes(argument: Tensor | int | None) -> Any:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(argument.data_ptr() if argument is not None else None)
