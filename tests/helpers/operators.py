"""Record the aten operators of a computation, and find those that are not deterministic on CUDA.

`trainer.deterministic=true` calls `torch.use_deterministic_algorithms(True)`. Most operators then use a deterministic
algorithm. A few have none: on CUDA they raise an error, many of them only in the backward pass. No GPU is needed to
find them, because the operators that a computation calls are recorded on the CPU.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Arguments = Mapping[str, Any]


class Hazard(NamedTuple):
    """Operators without a deterministic algorithm on CUDA."""

    operators: tuple[str, ...]
    """Names without `aten::` and without the overload."""
    when: Callable[[Arguments], bool] = lambda arguments: True
    """Returns whether a call is affected, from its arguments by name. Defaults may be missing."""


def backward_of(*operators: str) -> Hazard:
    """Make the hazard of operators whose gradient is affected."""
    return Hazard(tuple(f"{operator}_backward" for operator in operators))


HAZARDS: dict[str, Hazard] = {
    "torch.nn.AvgPool3d": backward_of("avg_pool3d"),
    # An output of one pixel is computed by `mean` and does not call this operator.
    "torch.nn.AdaptiveAvgPool2d": backward_of("_adaptive_avg_pool2d"),
    "torch.nn.AdaptiveAvgPool3d": backward_of("_adaptive_avg_pool3d"),
    "torch.nn.AdaptiveMaxPool2d": backward_of("adaptive_max_pool2d"),
    "torch.nn.FractionalMaxPool2d": backward_of("fractional_max_pool2d"),
    "torch.nn.FractionalMaxPool3d": backward_of("fractional_max_pool3d"),
    "torch.nn.MaxPool3d": backward_of("max_pool3d_with_indices"),
    "torch.nn.MaxUnpool1d": Hazard(("max_unpool2d",)),  # there is no operator for one dimension
    "torch.nn.MaxUnpool2d": Hazard(("max_unpool2d",)),
    "torch.nn.MaxUnpool3d": Hazard(("max_unpool3d",)),
    "torch.nn.functional.interpolate linear": backward_of("upsample_linear1d"),
    "torch.nn.functional.interpolate bilinear": backward_of("upsample_bilinear2d", "_upsample_bilinear2d_aa"),
    "torch.nn.functional.interpolate bicubic": backward_of("upsample_bicubic2d", "_upsample_bicubic2d_aa"),
    "torch.nn.functional.interpolate trilinear": backward_of("upsample_trilinear3d"),
    "torch.nn.ReflectionPad1d": backward_of("reflection_pad1d"),
    "torch.nn.ReflectionPad2d": backward_of("reflection_pad2d"),
    "torch.nn.ReflectionPad3d": backward_of("reflection_pad3d"),
    "torch.nn.ReplicationPad1d": backward_of("replication_pad1d"),
    "torch.nn.ReplicationPad2d": backward_of("replication_pad2d"),
    "torch.nn.ReplicationPad3d": backward_of("replication_pad3d"),
    # Only the loss of pixels: the kernel of `nll_loss_forward` has no atomic additions and raises no error.
    "torch.nn.NLLLoss": Hazard(("nll_loss2d_forward",)),
    "torch.nn.CTCLoss": backward_of("_ctc_loss"),
    "torch.nn.EmbeddingBag": Hazard(
        ("_embedding_bag_backward", "_embedding_bag_dense_backward"), lambda arguments: arguments["mode"] == 2
    ),
    "torch.Tensor.put_": Hazard(("put", "put_")),
    "torch.histc": Hazard(("histc",)),
    "torch.bincount": Hazard(("bincount",), lambda arguments: arguments.get("weights") is not None),
    "torch.kthvalue": Hazard(("kthvalue",)),
    "torch.median": Hazard(("median", "nanmedian"), lambda arguments: "dim" in arguments),
    "torch.nn.functional.grid_sample": backward_of("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler"),
    "torch.cumsum": Hazard(("cumsum", "cumsum_"), lambda arguments: not _is_integral(arguments)),
    "torch.Tensor.scatter_reduce": Hazard(
        ("scatter_reduce", "scatter_reduce_"), lambda arguments: arguments["reduce"] == "prod"
    ),
    "torch.Tensor.resize_": Hazard(("resize_",), lambda arguments: arguments["self"].is_quantized),
}
"""Every operation that torch documents as raising an error on CUDA, by its documented name.

Only those that the installed torch documents count. Earlier versions than 2.14.1 also list `torch.cumsum`,
`torch.kthvalue`, `torch.nn.MaxPool3d` and `torch.nn.ReplicationPad*`.
"""

UNDOCUMENTED: dict[str, Hazard] = {
    # These call `alertNotDeterministic` in libtorch_cuda.so 2.14.1. Its callers were read from the machine code.
    "torch.Tensor.index_reduce": Hazard(("index_reduce", "index_reduce_")),
    "torch.Tensor.scatter multiply": Hazard(
        ("scatter", "scatter_"), lambda arguments: arguments.get("reduce") == "multiply" and "src" in arguments
    ),
    "torch.nn.MaxPool3d": HAZARDS["torch.nn.MaxPool3d"],
    # This raises no error in 2.14.1, but its own documentation says that the indices are not deterministic.
    "torch.kthvalue": HAZARDS["torch.kthvalue"],
}
"""Operators that are missing in the list of torch 2.14.1, although they raise an error or are not deterministic."""

CHECKED: dict[tuple[str, ...], str] = {
    ("avg_pool2d_backward", "max_pool2d_with_indices_backward", "upsample_nearest2d_backward"): (
        "one thread computes all of a pixel's gradient, as the sources of the kernels show"
    ),
    ("convolution", "convolution_backward"): "cuDNN uses its deterministic algorithms, as documented",
    ("native_batch_norm", "native_batch_norm_backward"): (
        "NVIDIA's list of cuDNN routines that are not reproducible lacks batch norm"
    ),
    ("scatter", "scatter_", "scatter_add", "index_add_", "index_copy", "index_put"): (
        "torch sorts the indices or writes one number everywhere, as documented"
    ),
    ("gather", "index_select", "index"): "the gradient is one of the operators above",
    ("mm", "bmm", "addmm"): "cuBLAS is deterministic with the CUBLAS_WORKSPACE_CONFIG that Lightning sets",
    ("max", "argmax"): "the first of equal values is chosen, as documented",
    ("topk",): "prefix sums choose and place the values. Only top-5 accuracy sorts them, and it ignores their order",
    ("sort",): "the sort is stable, or only the values are used",
    ("_linalg_svd",): "cuSOLVER's deterministic mode is its default, and torch leaves it on",
}
"""Why operators of the project are deterministic on CUDA under the mode, although one could doubt it."""


def _is_integral(arguments: Arguments) -> bool:
    dtype = arguments.get("dtype") or arguments["self"].dtype
    return not (dtype.is_floating_point or dtype.is_complex)


@functools.cache
def documented() -> frozenset[str]:
    """Read from the installed torch which operations raise an error under `torch.use_deterministic_algorithms(True)`.

    An operation with a list of modes gives one name for each mode, such as "torch.nn.functional.interpolate linear".
    """
    text = inspect.cleandoc(torch.use_deterministic_algorithms.__doc__ or "")
    listed = re.search(r"throw a\s+:class:`RuntimeError` when ``mode=True``:\n(.*?)\n(?=\S)", text, re.DOTALL)
    assert listed, "torch.use_deterministic_algorithms lists in another form what raises an error: adapt `documented`"
    names = set()
    for entry in re.split(r"^ *\* ", listed[1], flags=re.MULTILINE)[1:]:
        name = re.match(r":\w+:`([\w.]+)`", entry)
        assert name, entry
        modes = re.findall(r"^ *- ``(\w+)``", entry, re.MULTILINE)
        names |= {f"{name[1]} {mode}" for mode in modes} or {name[1]}
    return frozenset(names)


def hazards() -> dict[str, Hazard]:
    """Return all hazards of the installed torch, by name."""
    return {name: hazard for name, hazard in HAZARDS.items() if name in documented()} | UNDOCUMENTED


class Recorder(TorchDispatchMode):
    """Record the operators that are called in the block, also in backward passes on the CPU."""

    def __init__(self, wanted: Mapping[str, Hazard]) -> None:
        super().__init__()
        self.wanted = wanted
        self.operators: set[str] = set()
        """Names without `aten::` and without the overload."""
        self.found: set[str] = set()
        """Names of the hazards among the calls."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record a call before it runs, because some operators raise an error on the CPU too."""
        operator = func._schema.name.removeprefix("aten::")
        names = (argument.name for argument in func._schema.arguments)
        arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
        self.operators.add(operator)
        self.found |= {
            name for name, hazard in self.wanted.items() if operator in hazard.operators and hazard.when(arguments)
        }
        return func(*args, **(kwargs or {}))


def record(function: Callable[[], Any], wanted: Mapping[str, Hazard] | None = None) -> Recorder:
    """Run a function in the deterministic mode and return its operators. `wanted` replaces `hazards()`."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with Recorder(hazards() if wanted is None else wanted) as recorder:
            function()
    finally:
        torch.use_deterministic_algorithms(before)
    return recorder
