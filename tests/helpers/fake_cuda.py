"""Run code on a CUDA device that does not exist, and list the moments at which the host would wait for it."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
READS = (
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten._linalg_svd, aten._linalg_eigh, aten.linalg_eig, aten.linalg_qr, aten.linalg_inv_ex,
)  # fmt: skip
"""Operators whose result or whose shape the host reads from the device, or whose solver waits for it."""


class HostWaits(TorchDispatchMode):
    """List the operators of a block for which the host waits for a CUDA device.

    These are copies between the host and the device in both directions, results that Python reads (`.item()`),
    operators whose output shape depends on the values, and decompositions of matrices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note the operator if the host has to wait for it."""
        given = [arg for arg in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(arg, Tensor)]
        on_device = [each.is_cuda for each in given]
        if func.overloadpacket in READS and any(on_device):
            self.found.append(str(func))
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and given[0].is_cuda:
            kinds = {
                ("a mask" if each.dtype == torch.bool else "indices of the host")
                for each in given[1:]
                if each.dtype == torch.bool or not each.is_cuda
            }
            self.found.extend(f"{func} with {kind}" for kind in sorted(kinds))
        if func.overloadpacket is aten._local_scalar_dense:  # a fake tensor has no value, so go on with zero
            return 0.0 if given[0].is_floating_point() else False if given[0].dtype == torch.bool else 0
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten._to_copy, aten.copy_) and self._crosses(func, given, result):
            self.found.append(str(func))
        return result

    @staticmethod
    def _crosses(func: Any, given: list[Tensor], result: Any) -> bool:
        source = given[1] if func.overloadpacket is aten.copy_ else given[0]
        return source.is_cuda != result.is_cuda and source.numel() > 0


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Let tensors of the block exist only as shapes, so that code runs on `CUDA` on a machine without one."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def to_fake_cuda(value: Any, mode: FakeTensorMode) -> Any:
    """Move a tensor, the tensors of a tuple or list, or a module in place to the fake device."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = to_fake_cuda(parameter, mode).detach()
                    module._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = to_fake_cuda(buffer, mode)
        return value
    if isinstance(value, (tuple, list)):
        moved = [to_fake_cuda(each, mode) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return mode.from_tensor(value).to(CUDA)
