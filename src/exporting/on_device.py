"""ExecuTorch files: they run in PyTorch's runtime for small devices, with its XNNPACK delegate.

A file takes one image per call: ExecuTorch reserves memory for a fixed batch size. Imports of executorch take several
seconds, so they are inside the functions.
"""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.common.errors import UserError

log = logging.getLogger(__name__)

CALIBRATION_BATCH = 64
"""Images per forward pass of the calibration. It does not change the observed ranges."""


def write_program(network: nn.Module, file: Path, images: Tensor, metadata: Mapping[str, str]) -> None:
    """Write a module that maps one uint8 image [1, 3, H, W] to logits.

    The size is that of `images` [N, 3, H, W]. Each entry of `metadata` becomes a method of the file without arguments.
    """
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.devtools.backend_debug import get_delegation_info
        from executorch.exir import to_edge_transform_and_lower

        program = torch.export.export(network, (images[:1].contiguous(),))
        lowered = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=dict(metadata)
        )
        operators = get_delegation_info(lowered.exported_program().graph_module).delegation_by_operator
        file.write_bytes(lowered.to_executorch().buffer)
    left = Counter({name: found.non_delegated for name, found in operators.items() if name != "getitem"})
    log.info("Operators outside XNNPACK: %s.", ", ".join(f"{name} ({count})" for name, count in left.items() if count))


def quantise(network: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy with int8 weights, per channel, and int8 activations, by their ranges for `images` [N, 3, H, W].

    The normalisation in front of the network stays in float32.
    """
    with _quiet():
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
        quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(config)
        # The normalisation's operators are in no submodule. Its constants would be rounded to 8 bits.
        quantizer.set_filter_function(lambda node: len(node.meta.get("nn_module_stack", ())) != 1)
        batch = {"images": {0: torch.export.Dim("batch")}}
        program = torch.export.export(network, (images[:2].contiguous(),), dynamic_shapes=batch)
        prepared = prepare_pt2e(program.module(), quantizer)
        with torch.no_grad():
            for part in images.split(CALIBRATION_BATCH):
                prepared(part)
        quantised: nn.Module = convert_pt2e(prepared)
        return quantised


def load_program(file: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """Load a file in ExecuTorch's runtime, as a function from uint8 images [B, 3, H, W] to logits [B, C].

    All programs of a process share the threads. Raises `UserError` if the runtime cannot load the file.
    """
    with _quiet():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(threads)
        try:
            program: Any = Runtime.get().load_program(file)
            method = program.load_method("forward")
        except Exception as error:
            raise UserError(f"executorch cannot load {file} ({error}): export it again.") from error

    def predict(images: Tensor) -> Tensor:
        # The runtime would read the memory of channels-last images as if they were contiguous.
        return torch.cat([method.execute([image])[0] for image in images.contiguous().split(1)])

    return predict


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the libraries' messages, and undo their changes to the logging of this process."""
    root, noisy = logging.getLogger(), logging.getLogger("torch.utils._pytree")
    handlers, level = list(root.handlers), noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        noisy.setLevel(level)
        root.handlers[:] = handlers
