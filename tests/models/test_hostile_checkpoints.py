"""Checkpoints with objects that no reader can build, that fill the memory, or that hide methods are no trouble."""

import collections
from pathlib import Path
from typing import Any

import pytest
import torch

from src.common.errors import UserError
from src.models.checkpoints import load_weights, read_facts, read_file, read_state_dict
from src.models.resnet import resnet8
from tests.helpers.checkpoints import State


class Odd(dict[str, Any]):
    """A dict with a state that torch's reader cannot set."""

    def __reduce__(self) -> Any:
        return Odd, (), (1, 2, 3), None, iter([("a", 1)])


def test_objects_that_cannot_be_read_are_not_called_damage(file: Path, state: State):
    torch.save({"model": state, "x": Odd()}, file)
    with pytest.raises(UserError, match=r"holds objects that cannot be read without executing code: save only the st"):
        read_state_dict(file)


def test_a_memory_bomb_is_refused_before_it_is_loaded(file: Path, state: State, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "load", None)
    torch.save({"model": state, "x": bytearray(b"abc")}, file)
    for read in (read_state_dict, read_facts, read_file):
        with pytest.raises(UserError, match="bytearray, which could fill the memory, and is refused"):
            read(file)


class Hides:
    """A dict whose pickle hides the methods of the dict."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return collections.OrderedDict, (list(self.content.items()),), {"items": 5, "get": 5}


def test_attributes_that_hide_the_methods_of_a_dict_are_ignored(file: Path, state: State):
    torch.save(Hides({"model": Hides(state), "class_names": ["a"]}), file)
    assert read_state_dict(file).keys() == state.keys()
    assert read_facts(file) == {"class_names": ["a"]}
    network = resnet8(10)
    load_weights(network, file)
    assert torch.equal(network.state_dict()["fc.bias"], state["fc.bias"])
