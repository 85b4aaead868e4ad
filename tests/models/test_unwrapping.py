"""The weights of a network are found by its names and shapes, at any place of a file and after any prefix."""

import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.common.errors import UserError
from src.models.unwrapping import find_weights, is_weight, state_dicts
from tests.helpers.checkpoints import prefixed

FILE = Path("a.pth")
EXPECTED = {"conv.weight": torch.zeros(2, 3), "fc.weight": torch.zeros(4, 2), "bn.num_batches_tracked": torch.tensor(0)}


def weights(value: float = 1.0, classes: int = 4) -> dict[str, Tensor]:
    return {"conv.weight": torch.full((2, 3), value), "fc.weight": torch.full((classes, 2), value)}


@pytest.mark.parametrize(
    ("content", "place", "prefix"),
    [
        (weights(), (), ""),
        ({"a": {"b": prefixed("c.d.", weights())}}, ("a", "b"), "c.d."),
        ({"a": weights(), "b": {"conv.weight": torch.ones(2, 3)}}, ("a",), ""),
        ({**prefixed("big.", weights(classes=7)), **prefixed("small.", weights())}, (), "small."),
        ({**prefixed("x.", weights()), **prefixed("y.", {**weights(), "more": torch.ones(1)})}, (), "x."),
    ],
)
def test_the_place_and_the_prefix_are_found(content: Any, place: tuple[str, ...], prefix: str) -> None:
    found = find_weights(content, EXPECTED, FILE)
    assert found is not None
    assert (found.place, found.prefix, found.differences) == (place, prefix, [])
    assert {name: value.tolist() for name, value in found.tensors.items()} == {
        name: value.tolist() for name, value in weights().items()
    }


def test_the_best_candidate_is_returned_with_its_differences() -> None:
    content = {"part": {"conv.weight": torch.ones(2, 3)}, "other": weights(classes=7)}
    found = find_weights({**content, "more": {**weights(), "new": torch.ones(1)}}, EXPECTED, FILE)
    assert found is not None
    assert (found.label, found.differences) == ("more.*", ["'new' is unknown"])


def test_names_can_be_left_out() -> None:
    found = find_weights(weights(classes=7), EXPECTED, FILE, without=["fc.weight"])
    assert found is not None
    assert (list(found.tensors), found.differences) == (["conv.weight"], [])


@pytest.mark.parametrize("content", [None, [], {}, {"a": torch.ones(1)}, {"a": {"b": {}}}, {0: weights()}])
def test_files_without_a_name_of_the_network_have_no_candidate(content: Any) -> None:
    assert find_weights(content, EXPECTED, FILE) is None


def test_a_tie_is_refused() -> None:
    with pytest.raises(UserError, match=r"^a\.pth holds .* more than once \(x\.\*, y\.\*\): give a file"):
        find_weights({"x": weights(1), "y": weights(2)}, EXPECTED, FILE)


def test_a_dict_in_itself_ends_the_search() -> None:
    content: dict[str, Any] = {"w": torch.ones(1)}
    content["self"] = content
    assert len(list(state_dicts(content))) < 10


def test_a_dict_at_millions_of_places_does_not_slow_the_search() -> None:
    content: dict[str, Any] = weights()
    for _ in range(5):
        content = dict.fromkeys(map(str, range(25)), content)
    start = time.monotonic()
    found = find_weights(content, EXPECTED, FILE)
    assert found is not None
    assert (found.place, found.differences) == (("0",) * 5, [])
    assert time.monotonic() - start < 2


def test_a_dict_at_several_places_is_found_at_each() -> None:
    state = weights()
    found = find_weights({"ema": state, "old": weights(2), "model": state}, EXPECTED, FILE)
    assert found is not None
    assert found.place == ("model",)


def test_attributes_of_a_file_do_not_hide_methods() -> None:
    content = OrderedDict(weights())
    vars(content).update(dict.fromkeys(("items", "get", "keys", "values"), 5))
    vars(content["conv.weight"]).update(to=5, numel=5)
    ((place, tensors),) = state_dicts(OrderedDict(a=content))
    assert place == ("a",)
    assert {name: value.to("cpu").tolist() for name, value in tensors.items()} == {
        name: value.tolist() for name, value in weights().items()
    }


@pytest.mark.parametrize("value", [1, torch.ones(2).bool(), torch.eye(2).to_sparse(), torch.ones(2, device="meta")])
def test_other_tensors_are_not_weights(value: Any) -> None:
    assert not is_weight(value)
