"""The table of operators that are not deterministic on CUDA, and the recorder that finds them."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.operators import CHECKED, HAZARDS, UNDOCUMENTED, documented, hazards, record

ALL = {**HAZARDS, **UNDOCUMENTED}
INDEX, ONES = torch.tensor([1, 2]), torch.ones(2)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def gradient_of(module: Callable[[Tensor], Tensor], *shape: int) -> Callable[[], None]:
    """Compute the gradient of a module at random values of a shape."""
    return lambda: module(leaf(*shape)).sum().backward()


def unpooled(dimensions: int) -> Callable[[], object]:
    pool, unpool = getattr(F, f"max_pool{dimensions}d"), getattr(F, f"max_unpool{dimensions}d")
    return lambda: unpool(*pool(torch.randn(1, 1, *[4] * dimensions), 2, return_indices=True), 2)


def resized(mode: str, dimensions: int, **options: bool) -> Callable[[], None]:
    return gradient_of(lambda x: F.interpolate(x, scale_factor=2, mode=mode, **options), 1, 1, *[4] * dimensions)


def embedding_bag(mode: str) -> Callable[[], None]:
    return gradient_of(lambda x: F.embedding_bag(INDEX, x, torch.tensor([0]), mode=mode), 4, 3)


def ctc_loss() -> None:
    lengths = (torch.tensor([5]), torch.tensor([2]))
    F.ctc_loss(leaf(5, 1, 4).log_softmax(2), torch.tensor([[1, 2]]), *lengths).backward()


EXAMPLES: dict[str, Callable[[], object]] = {
    "torch.nn.AvgPool3d": gradient_of(nn.AvgPool3d(2), 1, 1, 4, 4, 4),
    "torch.nn.AdaptiveAvgPool2d": gradient_of(nn.AdaptiveAvgPool2d(2), 1, 1, 4, 4),
    "torch.nn.AdaptiveAvgPool3d": gradient_of(nn.AdaptiveAvgPool3d(2), 1, 1, 4, 4, 4),
    "torch.nn.AdaptiveMaxPool2d": gradient_of(nn.AdaptiveMaxPool2d(2), 1, 1, 4, 4),
    "torch.nn.FractionalMaxPool2d": gradient_of(nn.FractionalMaxPool2d(2, 2), 1, 1, 6, 6),
    "torch.nn.FractionalMaxPool3d": gradient_of(nn.FractionalMaxPool3d(2, 2), 1, 1, 6, 6, 6),
    "torch.nn.MaxPool3d": gradient_of(nn.MaxPool3d(2), 1, 1, 4, 4, 4),
    "torch.nn.MaxUnpool1d": unpooled(1),
    "torch.nn.MaxUnpool2d": unpooled(2),
    "torch.nn.MaxUnpool3d": unpooled(3),
    "torch.nn.functional.interpolate linear": resized("linear", 1),
    "torch.nn.functional.interpolate bilinear": resized("bilinear", 2),
    "torch.nn.functional.interpolate bicubic": resized("bicubic", 2),
    "torch.nn.functional.interpolate trilinear": resized("trilinear", 3),
    "torch.nn.ReflectionPad1d": gradient_of(nn.ReflectionPad1d(1), 1, 1, 4),
    "torch.nn.ReflectionPad2d": gradient_of(nn.ReflectionPad2d(1), 1, 1, 4, 4),
    "torch.nn.ReflectionPad3d": gradient_of(nn.ReflectionPad3d(1), 1, 1, 4, 4, 4),
    "torch.nn.ReplicationPad1d": gradient_of(nn.ReplicationPad1d(1), 1, 1, 4),
    "torch.nn.ReplicationPad2d": gradient_of(nn.ReplicationPad2d(1), 1, 1, 4, 4),
    "torch.nn.ReplicationPad3d": gradient_of(nn.ReplicationPad3d(1), 1, 1, 4, 4, 4),
    "torch.nn.NLLLoss": lambda: F.nll_loss(torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)),
    "torch.nn.CTCLoss": ctc_loss,
    "torch.nn.EmbeddingBag": embedding_bag("max"),
    "torch.Tensor.put_": lambda: torch.zeros(4).put_(INDEX, ONES),
    "torch.histc": lambda: ONES.histc(3),
    "torch.bincount": lambda: INDEX.bincount(ONES),
    "torch.kthvalue": lambda: ONES.kthvalue(1),
    "torch.median": lambda: ONES.median(0),
    "torch.nn.functional.grid_sample": gradient_of(
        lambda x: F.grid_sample(x, torch.zeros(1, 2, 2, 2), align_corners=False), 1, 1, 3, 3
    ),
    "torch.cumsum": lambda: ONES.cumsum(0),
    "torch.Tensor.scatter_reduce": lambda: torch.zeros(3).scatter_reduce(0, INDEX, ONES, "prod"),
    "torch.Tensor.resize_": lambda: torch.empty(2, dtype=torch.quint8).resize_(3),
    "torch.Tensor.index_reduce": lambda: torch.zeros(3).index_reduce(0, INDEX, ONES, "mean"),
    "torch.Tensor.scatter multiply": lambda: torch.zeros(3).scatter(0, INDEX, ONES, reduce="multiply"),
}
HARMLESS: dict[str, Callable[[], object]] = {
    "adaptive pooling to one pixel": gradient_of(nn.AdaptiveAvgPool2d(1), 1, 1, 4, 4),
    "average pooling": gradient_of(nn.AvgPool2d(2), 1, 1, 4, 4),
    "max pooling": gradient_of(nn.MaxPool2d(2), 1, 1, 4, 4),
    "nearest pixels": resized("nearest", 2),
    "zero padding": gradient_of(nn.ZeroPad2d(1), 1, 1, 4, 4),
    "bilinear without a gradient": lambda: F.interpolate(torch.randn(1, 1, 4, 4), 8, mode="bilinear"),
    "loss of classes": lambda: F.cross_entropy(leaf(2, 3), INDEX).backward(),
    "mean of embeddings": embedding_bag("mean"),
    "counts": lambda: INDEX.bincount(),
    "median without indices": lambda: ONES.median(),
    "cumulative sum of integers": lambda: INDEX.cumsum(0),
    "scatter_reduce of a sum": lambda: torch.zeros(3).scatter_reduce(0, INDEX, ONES, "sum"),
    "scatter without a reduction": lambda: torch.zeros(3).scatter(0, INDEX, ONES),
}


def test_every_operation_that_torch_documents_is_in_the_table() -> None:
    missing = documented() - HAZARDS.keys()
    assert not missing, f"torch {torch.__version__} documents {sorted(missing)}: add them to HAZARDS, with an example"
    assert documented() <= hazards().keys()
    assert len(documented()) > 20


def test_every_entry_has_an_example() -> None:
    assert EXAMPLES.keys() == ALL.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_entry_is_found_by_its_example(name: str) -> None:
    def example() -> None:
        with contextlib.suppress(RuntimeError):  # a few raise an error on the CPU too
            EXAMPLES[name]()

    assert record(example, {name: ALL[name]}).found == {name}


def test_antialiased_interpolation_is_found() -> None:
    for mode in ("bilinear", "bicubic"):
        found = record(resized(mode, 2, antialias=True)).found
        assert found == {f"torch.nn.functional.interpolate {mode}"}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_deterministic_relative_is_not_found(name: str) -> None:
    recorded = record(HARMLESS[name], ALL)
    assert recorded.operators
    assert not recorded.found


def test_operators_that_were_checked_are_no_hazards() -> None:
    always = {name for hazard in hazards().values() for name in hazard.operators}
    conditional = {"scatter", "scatter_"}
    assert not always & {name for names in CHECKED for name in names} - conditional


def test_a_recording_restores_the_deterministic_mode() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    modes: list[bool] = []
    record(lambda: modes.append(torch.are_deterministic_algorithms_enabled()))
    assert modes == [True]
    assert torch.are_deterministic_algorithms_enabled() is before
