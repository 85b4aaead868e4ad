"""Objects of any class become inert stubs: nothing of a file is imported, called or executed."""

import argparse
import collections
import enum
import functools
import io
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from src.models.unpickling import Stub, load_plain, load_with_stubs

EXECUTED: list[str] = []


class Color(enum.Enum):
    """An enumeration of a user's project."""

    RED = 1


class OwnDict(dict[str, Any]):
    """A dict of a user's project."""


class OwnList(list[Any]):
    """A list of a user's project."""


class Noisy:
    """An object whose every way into memory leaves a trace."""

    def __new__(cls, *_: object) -> "Noisy":
        EXECUTED.append("new")
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        EXECUTED.append("setstate")

    def __reduce__(self) -> Any:
        return Noisy, (1,), {"a": 1}


def noisy(*_: object) -> None:
    """Leave a trace."""
    EXECUTED.append("call")


class Calls:
    """An object whose pickle calls a function."""

    def __reduce__(self) -> Any:
        return noisy, (1,)


OBJECTS: dict[str, Any] = {
    "partial": functools.partial(torch.optim.SGD, lr=0.1),
    "module": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
    "DictConfig": OmegaConf.create({"a": {"b": [1, 2]}, "c": "${a.b}"}),
    "Path": Path("a/b"),
    "defaultdict": collections.defaultdict(list, {"a": [1], "b": [2]}),
    "dict": OwnDict(a=1, b=2),
    "list": OwnList([1, 2]),
    "enum": Color.RED,
    "class": nn.ReLU,
    "bound method": ", ".join,
    "array": np.arange(3),
    "generator": np.random.default_rng(0),
    "options": argparse.Namespace(x=OwnDict(a=OwnList([1, 2]))),
    "noisy": Noisy(),
    "call": Calls(),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.pth"


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_of_any_class_become_stubs_and_execute_nothing(kind: str, file: Path) -> None:
    torch.save({"state_dict": {"w": torch.arange(3)}, "hyper_parameters": {"x": [OBJECTS[kind]]}, "epoch": 3}, file)
    EXECUTED.clear()
    content, stubs = load_with_stubs(file)
    assert EXECUTED == []
    assert content["state_dict"]["w"].tolist() == [0, 1, 2]
    assert content["epoch"] == 3
    assert stubs


def test_nothing_is_imported(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("not_here")
    module.Thing = type("Thing", (), {"__module__": "not_here"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "not_here", module)
    torch.save({"x": module.Thing()}, file)
    monkeypatch.delitem(sys.modules, "not_here")
    content, stubs = load_with_stubs(file)
    assert "not_here" not in sys.modules
    assert stubs == ["not_here.Thing"]
    assert isinstance(content["x"], Stub)
    assert vars(content["x"]) == {}


class Asks:
    """An object whose pickle calls a function of the given name."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize(
    "hostile",
    [
        Asks(eval, "1/0"), Asks(exec, "1/0"), Asks(open, "x", "w"), Asks(__import__, "os"),
        Asks(__import__("os").system, "true"), Asks(__import__("subprocess").check_output, "true"),
    ],
    ids=lambda hostile: hostile.call.__name__,
)  # fmt: skip
def test_names_that_no_checkpoint_needs_are_refused(hostile: Asks, file: Path) -> None:
    torch.save({"w": torch.ones(1), "x": hostile}, file)
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL [\w.]*" + hostile.call.__name__):
        load_with_stubs(file)


def hostile_pickle(code: bytes) -> bytes:
    """Make a file of torch.save whose content is this pickle."""
    buffer = io.BytesIO()
    torch.save(0, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue().replace(pickle.dumps(0, 2), b"\x80\x02" + code + b".", 1)


@pytest.mark.parametrize(
    "code",
    [
        b"ca\nB\n)R}X\x01\x00\x00\x00xK\x01sb",  # BUILD on an instance of a stub
        b"ca\nB\n}X\x01\x00\x00\x00xK\x01sb",  # BUILD on the stub itself
        b"ca\nB\n)R)R",  # REDUCE on an instance of a stub
        b"ccollections\nOrderedDict\n}X\x06\x00\x00\x00updateK\x01sb",  # BUILD on a class that torch allows
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00xK\x01sb",  # BUILD on a function that torch allows
    ],
)
def test_states_reach_neither_stubs_nor_real_classes(code: bytes, file: Path) -> None:
    file.write_bytes(hostile_pickle(code))
    before = vars(torch._utils._rebuild_tensor_v2).copy()
    try:
        content, _ = load_with_stubs(file)
    except pickle.UnpicklingError:
        content = None
    assert content is None or vars(content) == {}
    assert vars(torch._utils._rebuild_tensor_v2) == before
    assert callable(collections.OrderedDict.update)
    assert not hasattr(Stub, "x")


def test_without_stubs_other_classes_are_refused(file: Path) -> None:
    torch.save({"x": Path("a")}, file)
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL pathlib\.\w+"):
        load_plain(file)
    torch.save({"x": [1, "a"], "w": torch.ones(1)}, file)
    assert load_plain(file)["x"] == [1, "a"]
