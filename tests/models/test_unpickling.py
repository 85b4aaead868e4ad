"""Objects of any class become inert stubs: nothing of a file is imported, called or executed."""

import argparse
import collections
import enum
import functools
import io
import linecache
import pickle
import sys
import traceback
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision import tv_tensors

from src.common.errors import UserError
from src.models import unpickling
from src.models.unpickling import Stub, load_plain, load_with_stubs, refuse_memory_bombs

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
    "tensor": tv_tensors.Image(torch.zeros(3, 2, 2)),
    "exception": ValueError("x"),
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


def hostile_archive(code: bytes) -> bytes:
    """Make a zip archive of torch.save whose content is this pickle."""
    plain, buffer = io.BytesIO(), io.BytesIO()
    torch.save(0, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x80\x02" + code + b"." if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


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


@pytest.mark.parametrize("wrap", [hostile_pickle, hostile_archive], ids=["legacy", "zip"])
def test_classes_that_torch_itself_adds_to_its_table_are_not_built(wrap: Any, file: Path) -> None:
    """A frame summary opens the file that it names."""
    assert traceback.FrameSummary in torch.serialization.get_safe_globals(), "else this test shows nothing"
    kept = set(torch.serialization.get_safe_globals())
    code = f"ctraceback\nFrameSummary\n(X{chr(len(__file__))}\0\0\0{__file__}K\1X\1\0\0\0ftR"
    file.write_bytes(wrap(code.encode()))
    linecache.clearcache()
    content, stubs = load_with_stubs(file)
    assert (isinstance(content, Stub), stubs) == (True, ["traceback.FrameSummary"])
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL traceback\.FrameSummary"):
        load_plain(file)
    assert __file__ not in linecache.cache
    assert set(torch.serialization.get_safe_globals()) == kept


def test_a_file_of_many_classes_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"own.Class{number}" for number in range(300)]
    code = b"".join(f"cown\nClass{number}\n)R".encode() for number in range(300))
    file.write_bytes(hostile_archive(b"(" + code + b"t"))
    monkeypatch.setattr(unpickling, "MOST_READS", 1)
    content, stubs = load_with_stubs(file)
    assert (len(content), stubs) == (300, sorted(names))


def test_a_file_that_must_be_read_very_often_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickling, "MOST_READS", 4)
    for count in (3, 4):  # a dict of a class is found by an error, one in each attempt
        code = b"".join(f"cown\nClass{number}\n)RK\0K\0s".encode() for number in range(count))
        file.write_bytes(hostile_archive(b"(" + code + b"t"))
        if count == 3:
            assert load_with_stubs(file)[0] == ({0: 0},) * 3
    with pytest.raises(pickle.UnpicklingError, match="too many classes"):
        load_with_stubs(file)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


@pytest.mark.parametrize("wrap", [hostile_pickle, hostile_archive], ids=["legacy", "zip"])
@pytest.mark.parametrize(
    ("code", "name"),
    [
        (b"c__builtin__\nbytearray\nK\1\x85R", r"__builtin__\.bytearray"),
        (b"cbuiltins\nbytearray\nK\1\x85R", r"builtins\.bytearray"),
        (b"c_codecs\nencode\n" + text("a") + text("HEX") + b"\x86R", r"_codecs\.encode"),
        (b"c_codecs\nencode\n" + text("urk") + text("-" * 99 + "rot-13") + b"\x86R", r"_codecs\.encode"),
        (b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n", r"torch._utils\.\w+"),
    ],
)
def test_functions_that_fill_the_memory_are_refused(code: bytes, name: str, wrap: Any, file: Path) -> None:
    """Torch's reader calls them. A tiny file can ask for a terabyte, or double a text forty times."""
    file.write_bytes(wrap(code))
    with pytest.raises(UserError, match=rf"a\.pth asks for {name}, which could fill the memory, and is refused: give"):
        refuse_memory_bombs(file)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bytes_and_names_of_codecs_are_no_bombs(zipped: bool, file: Path) -> None:
    for content in ({"w": torch.ones(1), "x": np.float64(3), "y": b"abc"}, {"codec": "hex"}):
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        refuse_memory_bombs(file)


def test_a_tensor_of_an_unknown_class_keeps_its_values(file: Path) -> None:
    torch.save({"image": tv_tensors.Image(torch.ones(3, 2, 2)), "w": torch.ones(1)}, file)
    content, stubs = load_with_stubs(file)
    assert stubs == ["torchvision.tv_tensors._image.Image"]
    assert isinstance(content["image"], Stub)
    copy: object = torch.detach(content["image"])  # type: ignore[arg-type]
    assert type(copy) is torch.Tensor
    assert torch.equal(copy, torch.ones(3, 2, 2))
