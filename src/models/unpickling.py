"""Unpickle a file that torch.save wrote, with an inert stub in place of every object that is not weights.

The reader is torch's own for `weights_only=True`. It imports nothing that a file names: a file can only name the
classes that torch allows, or those in a table that the caller passes. The table used here maps each name of the file to
a stub, an empty class that was made for that name. Calling a stub, setting its state or filling it does nothing.

Modules can add real classes to torch's table, and torch itself adds some, of which one opens files. They are taken out
while a file is read.
"""

import collections
import contextlib
import io
import pickle
import pickletools
import re
import traceback
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from src.common.errors import UserError

MOST_STUBS = 1000
"""A file that names more classes is refused."""
MOST_READS = 100
"""A file that must be read more often to find a stub for each of its names is refused."""
REFUSED_MODULES = ("_io", "commands", "ctypes", "importlib", "io", "marshal", "nt", "os", "posix", "pty", "runpy",
                   "shutil", "socket", "subprocess", "sys", "webbrowser")  # fmt: skip
REFUSED_BUILTINS = ("__import__", "breakpoint", "compile", "eval", "exec", "input", "open")
"""Names that no checkpoint needs. A stub would make them harmless too, but the user should doubt such a file."""
ALLOCATORS = ("__builtin__.bytearray", "builtins.bytearray", "torch._utils._rebuild_device_tensor_from_cpu_tensor",
              "torch._utils._rebuild_device_tensor_from_numpy")  # fmt: skip
"""Functions that torch's reader calls, and that fill the memory if a few bytes ask for it."""
GROWING_CODECS = (b"base64", b"base64codec", b"hex", b"hexcodec", b"quopri", b"quopricodec", b"quotedprintable",
                  b"rot13", b"uu", b"uucodec")  # fmt: skip
"""Codecs whose output can be encoded again, and grows each time. `rot13` can spell the names of the others."""
LEGACY_PICKLES = 5
"""The number of pickles at the start of a file that torch.save wrote before it wrote zip archives."""


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


class StubTensor(Stub, Tensor):
    """Placeholder for a tensor of an unknown class. It keeps the values, and none of the class's behavior."""

    # Results of functions are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def load_with_stubs(path: Path) -> tuple[Any, list[str]]:
    """Load a file: tensors on the CPU, plain types, and stubs. Returns the content and the names that became stubs.

    A zip archive lists its names. Else torch's reader stops at the first name that it does not know, and each attempt
    adds one stub. Raises what torch.load raises for a damaged file, and `UnpicklingError` for a name of
    `REFUSED_MODULES`.
    """
    stubs = {name: _make(name, Stub) for name in _unknown_names(path)[:MOST_STUBS] if not _is_refused(name)}
    for _ in range(MOST_READS):
        try:
            return load_plain(path, stubs), list(stubs)
        except (pickle.UnpicklingError, TypeError) as error:
            changed = _stub_for(error, stubs)
            if changed is None or len(stubs | changed) > MOST_STUBS:
                raise
            stubs |= changed
    raise pickle.UnpicklingError(f"{path} names too many classes.")


def load_plain(path: Path, stubs: dict[str, type] | None = None) -> Any:
    """Load a file with torch's reader for weights. `stubs` maps further names that the file may use to their stubs."""
    with _allowed_globals(stubs or {}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old pickle protocols; errors are reported by the caller
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _allowed_globals(stubs: dict[str, type]) -> Iterator[None]:
    """Let torch's reader know these names, and no others beside its built-in ones, in the block."""
    allowed: list[Any] = [(stub, name) for name, stub in stubs.items()]
    kept = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(kept)


def _unknown_names(path: Path) -> list[str]:
    """List the names in a zip archive that torch's reader does not know. Other files have no list."""
    if not _is_archive(path):
        return []
    with _allowed_globals({}):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))


def _is_archive(path: Path) -> bool:
    """Return whether torch reads a file as a zip archive, whatever other readers find at its end."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def refuse_memory_bombs(path: Path) -> None:
    """Raise `UserError` if a file calls a function that makes a huge object from a few bytes.

    Raises `BadZipFile` or `ValueError` for a damaged file.
    """
    with path.open("rb") as file:
        if _is_archive(path):
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if member.filename.lower().endswith("data.pkl"):
                        _refuse_allocators(path, io.BytesIO(archive.read(member)))
            return
        for _ in range(LEGACY_PICKLES):
            if file.peek(1):
                _refuse_allocators(path, file)


def _refuse_allocators(path: Path, file: IO[bytes]) -> None:
    """Raise `UserError` if the next pickle of an open file names a function that fills the memory."""
    names: set[str] = set()
    texts: set[str] = set()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            names.add(str(argument).replace(" ", "."))
        elif isinstance(argument, str):
            texts.add(argument)
    allocators = sorted(names.intersection(ALLOCATORS))
    if "_codecs.encode" in names and any(_letters(text) in GROWING_CODECS for text in texts):
        allocators.append("_codecs.encode")
    if allocators:
        raise UserError(
            f"{path} asks for {allocators[0]}, which could fill the memory, and is refused: give a file that holds "
            "only a state dict."
        )


def _letters(text: str) -> bytes:
    """Return the letters and digits of a text. Python ignores all others in the name of a codec, or nearly so."""
    others = bytes(code for code in range(128) if not chr(code).isalnum())
    return text.lower().encode("ascii", "ignore").translate(None, others)


def refused_name(message: str) -> str | None:
    """Find the name in torch's message about a class or function that it does not allow."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return found[1] if found else None


def _stub_for(error: Exception, stubs: dict[str, type]) -> dict[str, type] | None:
    """Return the stub that lets torch's reader get past its error, by name, or None if no stub does."""
    if isinstance(error, TypeError):
        return _tensor_stub(error, stubs)
    if name := refused_name(str(error)):
        name = name if "." in name else f"builtins.{name}"  # torch leaves this module out of its message
        return None if name in stubs or _is_refused(name) else {name: _make(name, Stub)}
    filled = re.search(r"Can only (SETITEM|append).*but got <class '(.+)'>", str(error))
    if filled is None or not issubclass(stubs.get(filled[2], object), Stub):
        return None
    return {filled[2]: _make(filled[2], StubDict if filled[1] == "SETITEM" else StubList)}


def _tensor_stub(error: TypeError, stubs: dict[str, type]) -> dict[str, type] | None:
    """Return the stub that torch failed to give to a tensor as its class, made anew as a class of tensors."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    wanted = frame.f_locals.get("new_type")  # of torch._tensor._rebuild_from_type_v2; the message does not name it
    names = [name for name, stub in stubs.items() if stub is wanted and not issubclass(stub, StubTensor)]
    return {name: _make(name, StubTensor) for name in names} or None


def _is_refused(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    builtin = module in ("builtins", "__builtin__") and attribute in REFUSED_BUILTINS
    return builtin or module.partition(".")[0] in REFUSED_MODULES


def _make(name: str, base: type) -> type:
    """Make a stub of its own for a name, so that a message about the stub contains the name."""
    module, _, attribute = name.rpartition(".")
    return type(attribute, (base,), {"__module__": module, "__qualname__": attribute})
