"""Find a network's weights in the content of a checkpoint, by the network's own names.

Tools put the weights at many places (`state_dict`, `model`, `net`, ...) and put many prefixes before the names
(`module.`, `model.`, `backbone.`, ...). Instead of a list of these, each dict of tensors and each prefix in it is
compared with the names and shapes of the network.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.common.errors import UserError

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
DEEPEST = 5
"""The number of nested dicts that are searched."""
MOST_PLACES = 10
"""The number of places of one dict that are searched. A tiny file can put one dict at millions of places."""
NOT_WEIGHTS = ("total_ops", "total_params", "n_averaged")
"""Last parts of names that tools add to a state dict: counters of operations and of averages."""
NOT_THE_NETWORK = ("criterion", "loss", "loss_fn")
"""First parts of names of modules that users train beside a network."""
AVERAGES = ("ema", "swa", "average", "averaged", "avg")
USUAL_PLACES: list[tuple[str, ...]] = [("model",), ("state_dict",), ()]
"""Keys of the dicts that come before all others, in this order. The last is the whole file."""


class Candidate(NamedTuple):
    """The tensors of one dict of a checkpoint that share a prefix, by their names without it."""

    place: tuple[str, ...]
    """The keys of the dicts around them."""
    prefix: str
    tensors: dict[str, Tensor]
    differences: list[str]
    """The names and shapes in which they differ from the network's weights."""
    matching: int
    """The number of names and shapes that are the network's."""
    is_scattered: bool
    """Whether a missing name is in the same dict, but after another prefix."""

    @property
    def label(self) -> str:
        """Describe where the tensors are in the file."""
        return ".".join([*self.place, f"{self.prefix}*"])


def find_weights(
    content: Any, expected: Mapping[str, Tensor], path: Path, without: Collection[str] = ()
) -> Candidate | None:
    """Find the tensors that fit a network in a checkpoint: all its names and shapes, and no unknown name beside them.

    `expected` is the network's state dict. Names in `without` are left out. If several dicts or prefixes fit, the
    weights of a student come before others, plain weights before averaged ones, and the usual keys before others. If no
    such rule decides, raises `UserError`. If nothing fits, returns the best candidate, with its differences. Returns
    None if no name of the file is one of the network's.
    """
    candidates = [
        _compare(place, prefix, tensors, expected, without)
        for place, tensors in state_dicts(content)
        for prefix in _prefixes(tensors, expected)
    ]
    fitting = [candidate for candidate in candidates if not candidate.differences]
    if not fitting:
        return max(candidates, key=lambda found: (found.matching, -len(found.differences)), default=None)
    fitting.sort(key=_rank)
    best = fitting[0]
    others = [other for other in fitting[1:] if not _same(best.tensors, other.tensors)]
    if not others:
        return best
    names = ", ".join(candidate.label for candidate in [best, *others])
    if _rank(others[0]) == _rank(best):
        raise UserError(
            f"{path} holds weights that fit the network more than once ({names}): give a file that holds one of them."
        )
    log.info("%s holds weights that fit the network more than once (%s): taking %s.", path, names, best.label)
    return best


def state_dicts(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """List the nested dicts of a checkpoint that hold weights: their keys in the file, and their tensors by name."""
    yield from _state_dicts(content, (), Counter())


def _state_dicts(
    content: Any, place: tuple[str, ...], visits: Counter[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    if not isinstance(content, dict) or len(place) > DEEPEST or visits[id(content)] == MOST_PLACES:
        return
    visits[id(content)] += 1
    # A file can hide the methods of its dicts and tensors behind attributes of the same names.
    named = {key: value for key, value in dict.items(content) if isinstance(key, str)}
    if tensors := {name: torch.detach(value) for name, value in named.items() if is_weight(value)}:
        yield place, tensors
    for key, value in named.items():
        yield from _state_dicts(value, (*place, key), visits)


def is_weight(value: object) -> bool:
    """Return whether `value` is a dense tensor of a usual dtype. Files can hold sparse, quantised or nested ones."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.is_nested:
        return False
    return value.layout is torch.strided and value.device.type == "cpu"


def _prefixes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """List the prefixes after which some name is one of the network's, in the order of the file."""
    found: dict[str, None] = {}
    for name in tensors:
        parts = name.split(".")
        for number in range(len(parts)):
            if ".".join(parts[number:]) in expected:
                found["".join(f"{part}." for part in parts[:number])] = None
    return list(found)


def _compare(
    place: tuple[str, ...],
    prefix: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    without: Collection[str],
) -> Candidate:
    named = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    kept = {
        name: value
        for name, value in named.items()
        if name in expected or not (name.rpartition(".")[2] in NOT_WEIGHTS or name.partition(".")[0] in NOT_THE_NETWORK)
    }
    kept = {name: value for name, value in kept.items() if name not in without}
    wanted = {name: value for name, value in expected.items() if name not in without}
    matching = sum(name in kept and kept[name].shape == value.shape for name, value in wanted.items())
    missing = tuple(f".{name}" for name in wanted if name not in kept)
    is_scattered = any(f".{name}".endswith(missing) for name in tensors)
    return Candidate(place, prefix, kept, _differences(wanted, kept), matching, is_scattered)


def _differences(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Describe each name that is missing, unknown or has another shape, in the network's order."""
    wrong = []
    for name, value in expected.items():
        # Files of 2019 lack the counters of batch norm. load_state_dict fills them in.
        if name not in tensors and not name.endswith("num_batches_tracked"):
            wrong.append(f"{name} is missing")
        elif name in tensors and tensors[name].shape != value.shape:
            wrong.append(f"{name} is {list(tensors[name].shape)} instead of {list(value.shape)}")
    return wrong + [f"{name!r} is unknown" for name in tensors if name not in expected]


def _rank(candidate: Candidate) -> tuple[bool, bool, int]:
    """Rank candidates that fit. The lowest rank is taken."""
    parts = {part for text in (*candidate.place, candidate.prefix) for part in text.replace(".", "_").split("_")}
    usual = USUAL_PLACES.index(candidate.place) if candidate.place in USUAL_PLACES else len(USUAL_PLACES)
    return "student" not in parts, not parts.isdisjoint(AVERAGES), usual


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
