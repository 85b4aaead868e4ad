"""ExecuTorch files: they run in PyTorch's runtime for small devices, with its XNNPACK delegate.

A file takes one image per call: ExecuTorch reserves memory for a fixed batch size. Imports of executorch take several
seconds, so they are inside the functions.
"""

import contextlib
import copy
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.models.network import Network, Output

log = logging.getLogger(__name__)


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


class Graph(Network):
    """A network as a graph of torch.export, which computes logits alone."""

    def __init__(self, graph: nn.Module, training: bool) -> None:
        super().__init__()
        self.graph, self.training = graph, training

    def train(self, mode: bool = True) -> "Graph":
        """Set the mode. torchao changes the operators of the graph, whose own `train` raises an error."""
        if mode != self.training:
            from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train

            self.training = mode
            (move_exported_model_to_train if mode else move_exported_model_to_eval)(self.graph)
        return self

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits. There are no features, and the pooled features have shape [B, 0]."""
        return Output(self(images), (), images.new_empty(len(images), 0))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, C] of normalised images [B, 3, H, W]."""
        logits: Tensor = self.graph(images)
        return logits


def prepare(network: nn.Module, images: Tensor, is_qat: bool) -> Graph:
    """Copy a network for normalised images like `images` [N, 3, H, W], and insert observers for int8.

    With `is_qat`, the observers also round what they observe, and the copy can be trained.
    """
    with _quiet():
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

        config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True, is_qat=is_qat)
        quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(config)
        copied = copy.deepcopy(network).train(is_qat).requires_grad_(is_qat)
        two = images[:1].expand(2, -1, -1, -1).contiguous()  # torch.export would treat a batch size of 1 as a constant
        program = torch.export.export(copied, (two,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        return Graph((prepare_qat_pt2e if is_qat else prepare_pt2e)(program.module(), quantizer), is_qat)


def convert(prepared: Graph) -> Graph:
    """Replace the observers by int8 operators with the observed ranges."""
    with _quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        return Graph(convert_pt2e(prepared.eval().graph), training=False)


def quantise(network: nn.Module, batches: Iterable[Tensor]) -> Graph:
    """Return a copy in int8, with the ranges of activations for normalised images, each batch [B, 3, H, W]."""
    batches = list(batches)
    prepared = prepare(network, batches[0], is_qat=False)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return convert(prepared)


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
