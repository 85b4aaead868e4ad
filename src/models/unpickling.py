"""Unpickle a file that torch.save wrote, with an inert stub in place of every object that is not weights.

The reader is torch's own for `weights_only=True`. It imports nothing that a file names: a file can only name the
classes that torch allows, or those in a table that the caller passes. The table used here maps each name of the file to
a stub, an empty class that was made for that name. Calling a stub, setting its state or filling it does nothing.
"""

import collections
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

MOST_STUBS = 1000
"""A file that names more classes is refused."""
REFUSED_MODULES = ("_io", "commands", "ctypes", "importlib", "io", "marshal", "nt", "os", "posix", "pty", "runpy",
                   "shutil", "socket", "subprocess", "sys", "webbrowser")  # fmt: skip
REFUSED_BUILTINS = ("__import__", "breakpoint", "compile", "eval", "exec", "input", "open")
"""Names that no checkpoint needs. A stub would make them harmless too, but the user should doubt such a file."""


class Stub:
    """Placeholder for an object that a checkpoint holds beside its weights. The real one is never built."""

    def __new__(cls, *_: object, **__: object) -> Any:
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        """Ignore the arguments."""

    def __setstate__(self, _: object) -> None:
        """Ignore the state."""


class StubList(Stub, list[Any]):
    """Placeholder for a list of an unknown class."""


class StubDict(Stub):
    """Placeholder for a dict of an unknown class. Torch's reader fills only dicts of known classes."""

    def __new__(cls, *_: object, **__: object) -> Any:
        """Return an empty dict of a class that torch's reader fills."""
        return collections.OrderedDict()


def load_with_stubs(path: Path) -> tuple[Any, list[str]]:
    """Load a file: tensors on the CPU, plain types, and stubs. Returns the content and the names that became stubs.

    Torch's reader stops at the first name that it does not know. Each attempt therefore adds one stub. Raises what
    torch.load raises for a damaged file, and `UnpicklingError` for a name of `REFUSED_MODULES`.
    """
    stubs: dict[str, type] = {}
    while True:
        try:
            return load_plain(path, stubs), list(stubs)
        except pickle.UnpicklingError as error:
            changed = _stub_for(str(error), stubs)
            if changed is None or len(stubs) >= MOST_STUBS:
                raise
            stubs |= changed


def load_plain(path: Path, stubs: dict[str, type] | None = None) -> Any:
    """Load a file with torch's reader for weights. `stubs` maps further names that the file may use to their stubs."""
    allowed: list[Any] = [(stub, name) for name, stub in (stubs or {}).items()]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old pickle protocols; errors are reported by the caller
        return torch.load(path, map_location="cpu", weights_only=True)


def refused_name(message: str) -> str | None:
    """Find the name in torch's message about a class or function that it does not allow."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return found[1] if found else None


def _stub_for(message: str, stubs: dict[str, type]) -> dict[str, type] | None:
    """Return the stub that lets torch's reader get past its message, by name, or None if no stub does."""
    if name := refused_name(message):
        name = name if "." in name else f"builtins.{name}"  # torch leaves this module out of its message
        module, _, attribute = name.rpartition(".")
        builtin = module in ("builtins", "__builtin__") and attribute in REFUSED_BUILTINS
        if builtin or module.partition(".")[0] in REFUSED_MODULES or name in stubs:
            return None
        return {name: _make(name, Stub)}
    filled = re.search(r"Can only (SETITEM|append).*but got <class '(.+)'>", message)
    if filled is None or not issubclass(stubs.get(filled[2], object), Stub):
        return None
    return {filled[2]: _make(filled[2], StubDict if filled[1] == "SETITEM" else StubList)}


def _make(name: str, base: type) -> type:
    """Make a stub of its own for a name, so that a message about the stub contains the name."""
    module, _, attribute = name.rpartition(".")
    return type(attribute, (base,), {"__module__": module, "__qualname__": attribute})
