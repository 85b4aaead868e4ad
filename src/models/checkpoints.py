"""Reading and writing of checkpoints. Reading never executes code from the file.

The checkpoints of these tools load unchanged:

- RepDistiller and mdistiller: the weights are in `model`, beside epoch, accuracy, optimizer and options. Names may
  start with `module.`, or with `module.student.` and `module.teacher.`.
- DataParallel: the weights are in `state_dict`, and names start with `module.`.
- torch.compile: names start with `_orig_mod.`.
- Lightning: the weights are in `state_dict`, and names start with `student.`.
- Bare state dicts.
- This project: the weights are in `model`, beside facts about the network.
"""

import contextlib
import hashlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.common.files import atomic_write, list_members
from src.models.network import Network


class _Ignored:
    """Placeholder for an object that a published checkpoint holds beside its weights. The real one is never built."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


IGNORED: list[Any] = [
    (_Ignored, name)
    for name in ("argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
]
"""Types that `_Ignored` replaces, in the form that `torch.serialization.safe_globals` takes."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that a wrapper puts before every name of a state dict."""
PROGRAM_MEMBERS = ("constants.pkl", "archive_format", "serialized_exported_program.json")
"""Members of a zip archive that only TorchScript or torch.export write."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint: tensors on the CPU, by name, without the prefixes of wrappers.

    If a checkpoint holds a student among other modules, only the student is returned. Raises `UserError` if the file
    is missing or damaged, is a program, could execute code, or holds no weights.
    """
    content = read_file(path, ignored=IGNORED)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = content if isinstance(content, dict) else {}
    tensors = {name: value for name, value in named.items() if isinstance(name, str) and _is_weight(value)}
    if not tensors:
        found = f"a dict of {', '.join(map(repr, list(named)[:5]))}" if named else f"a {type(content).__name__}"
        raise UserError(f"{path} holds {found} but no weights: give a file that holds a state dict.")
    return _without_prefixes(tensors)


def read_facts(path: Path) -> dict[str, list[Any]]:
    """Read the facts that this project's checkpoints hold beside the weights: `class_names`, `mean` and `std`.

    Missing and malformed facts are left out. Raises `UserError` if the file is missing or damaged, is a program, or
    could execute code.
    """
    content = read_file(path, ignored=IGNORED)
    found = content if isinstance(content, dict) and isinstance(content.get("model"), dict) else {}
    facts = {}
    for name, kind, count in (("class_names", str, None), ("mean", float, 3), ("std", float, 3)):
        values: Any = found.get(name)
        fits = isinstance(values, list) and all(isinstance(value, kind) for value in values)
        if fits and len(values) == (count or len(values)) > 0:
            facts[name] = values
    return facts


def read_file(path: Path, hint: str = "get the file again", ignored: Sequence[Any] = ()) -> Any:
    """Read a file that torch.save wrote: tensors on the CPU, and plain types.

    `ignored` lists further types that may occur, with their replacements (see `IGNORED`). Raises `UserError` if the
    file is missing or damaged, is a program, or could execute code. `hint` is the advice for a damaged file.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the path of a checkpoint file in it.")
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of a checkpoint.")
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with torch.serialization.safe_globals(list(ignored)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old pickle protocols; errors are reported below
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read, because you lack the permission: change its permissions.") from error
    except Exception as error:  # a damaged file can raise any exception of the zip and pickle readers
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        imported = refused[1] if refused else _first_import(path)
        if imported:
            raise UserError(
                f"{path} asks for {imported}, which could execute code, and is refused: give a file that holds only a "
                "state dict."
            ) from error
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}): {hint}.") from error


def _check_archive(path: Path) -> None:
    """Raise `UserError` for a program or a zip bomb, and `BadZipFile` for a wrong checksum.

    torch does not verify the checksums itself.
    """
    members = list_members(path)
    if any(member.filename.rsplit("/", 1)[-1] in PROGRAM_MEMBERS for member in members):
        raise UserError(
            f"{path} is a program (TorchScript or torch.export), not weights: give a file that holds only a state dict."
        )
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile


def _first_import(path: Path) -> str | None:
    """Find the first object that a plain pickle would import. A plain pickle is one that torch.save did not write.

    Returns None if the file imports nothing or is not a pickle.
    """
    strings: list[str] = []
    with path.open("rb") as file, contextlib.suppress(Exception):  # truncated, or not a pickle
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    return None


def _is_weight(value: object) -> bool:
    """Return whether `value` is a dense tensor of a usual dtype. Files can hold sparse, quantised or nested ones."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.is_nested:
        return False
    return value.layout is torch.strided and value.device.type == "cpu"


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers from all names. If some names start with `student.`, keep only those."""
    while True:
        prefix = next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in tensors)), None)
        if prefix is None and any(name.startswith("student.") for name in tensors):
            prefix = "student."
        if prefix is None:
            return tensors
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_weights(network: Network, path: Path) -> None:
    """Load the weights of a checkpoint into a network. Names must match exactly. Dtypes become the network's.

    Raises `UserError` if the number of classes, a name or a shape differs, if a weight is not finite, or if
    `read_state_dict` raises it. The network is then unchanged.
    """
    tensors = read_state_dict(path)
    expected = network.state_dict()
    head = next(name for name, value in network.named_parameters() if value is network.classifier_layer.weight)
    classes, inputs = expected[head].shape
    found = list(tensors[head].shape) if head in tensors else []
    if found[1:] == [inputs] and found[0] != classes:
        raise UserError(
            f"{path} was trained on {found[0]} classes, but the network has {classes}: give a checkpoint of a network "
            "with the same classes."
        )
    differences = _differences(expected, tensors)
    if differences:
        summary = f"{len(differences)} names or shapes differ, the first: {differences[0]}"
        raise UserError(f"{path} does not hold {_describe(network)} ({summary}): choose the architecture of the file.")
    tensors = {name: value.to(expected[name].dtype) for name, value in tensors.items()}
    bad = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise UserError(f"{path} holds NaN or infinite weights, the first in {bad}: give another checkpoint.")
    network.load_state_dict(tensors)


def _differences(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Describe each name that is missing, unknown or has another shape, in the network's order."""
    wrong = []
    for name, value in expected.items():
        # Files of 2019 lack the counters of batch norm. load_state_dict fills them in.
        if name not in tensors and not name.endswith("num_batches_tracked"):
            wrong.append(f"{name} is missing")
        elif name in tensors and tensors[name].shape != value.shape:
            wrong.append(f"{name} is {list(tensors[name].shape)} instead of {list(value.shape)}")
    return wrong + [f"{name!r} is unknown" for name in tensors if name not in expected]


def _describe(network: nn.Module) -> str:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"the weights of a {type(network).__name__} of {parameters:,} parameters"


def save_weights(network: nn.Module, path: Path, /, **facts: Any) -> None:
    """Write `{"model": state dict, **facts}` atomically.

    Facts are plain types (numbers, strings, and lists and dicts of them), so that `torch.load(weights_only=True)` reads
    the file.
    """
    state = {
        name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in network.state_dict().items()
    }
    content = serialize({"model": state, **facts})
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def serialize(content: Any) -> memoryview:
    """Return the bytes that torch.save would write.

    Write these bytes instead of calling torch.save with a path, because torch.save does not report a full disk.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def weights_digest(network: nn.Module) -> str:
    """Compute the SHA-256 of the names, dtypes, shapes and bytes of a network's state dict.

    The digest does not depend on device, memory format or the order of names.

    >>> weights_digest(nn.ReLU()) == hashlib.sha256().hexdigest()
    True
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
