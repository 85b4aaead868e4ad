"""Reading and writing of checkpoints. Reading never executes code from the file.

The weights are found by the names of the network (`src/models/unwrapping.py`), so checkpoints of all usual tools load
unchanged: of this project, RepDistiller, mdistiller, timm and Lightning; with names that DataParallel, torch.compile or
a user's own module has put a prefix before; and bare state dicts. Objects that lie beside the weights become inert
stubs (`src/models/unpickling.py`).
"""

import contextlib
import hashlib
import io
import logging
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.common.errors import UserError
from src.common.files import atomic_write, describe_foreign, list_members
from src.models.network import Network
from src.models.unpickling import Stub, load_plain, load_with_stubs, refuse_memory_bombs, refused_name
from src.models.unwrapping import Candidate, find_weights, state_dicts

log = logging.getLogger(__name__)

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that a wrapper puts before every name of a state dict."""
PROGRAM_MEMBERS = ("constants.pkl", "archive_format", "serialized_exported_program.json")
"""Members of a zip archive that only TorchScript or torch.export write."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint without a network to compare them with: tensors on the CPU, by name.

    Of several dicts with weights, `model` comes first, then `state_dict`, then the one with the most tensors. The
    prefixes of wrappers are removed. If a checkpoint holds a student among other modules, only the student is returned.
    Raises `UserError` if the file is missing or damaged, is a program, could execute code, or holds no weights.
    """
    content, stubs = _read_with_stubs(path)
    found = dict(state_dicts(content))
    if not found:
        raise _no_weights(path, content, stubs)
    usual = next((place for place in (("model",), ("state_dict",), ()) if place in found), None)
    place = max(found, key=lambda place: len(found[place])) if usual is None else usual
    return _without_prefixes(found[place])


def _no_weights(path: Path, content: Any, stubs: list[str]) -> UserError:
    if stubs and not isinstance(content, dict):
        kind = type(content)
        return _could_execute(path, f"{kind.__module__}.{kind.__name__}" if isinstance(content, Stub) else stubs[0])
    for key in ("model", "state_dict"):
        content = content[key] if isinstance(_get(content, key), dict) else content
    filled = isinstance(content, dict) and content
    found = f"a dict of {', '.join(map(repr, list(content)[:5]))}" if filled else f"a {type(content).__name__}"
    return UserError(f"{path} holds {found} but no weights: give a file that holds a state dict.")


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts that this project's checkpoints hold beside the weights.

    These are the lists `class_names`, `mean` and `std`; `image_size` in pixels; `data`, the digest of the data; and
    `classifies`, which is False for a student that does not predict by its own classifier. Malformed facts are left out
    with a warning. Raises `UserError` if the file is missing or damaged, is a program, or could execute code.
    """
    content, _ = _read_with_stubs(path)
    facts: dict[str, Any] = {}
    for name, kinds, count in (("class_names", str, None), ("mean", (int, float), 3), ("std", (int, float), 3)):
        values = _get(content, name)
        if not isinstance(values, (list, tuple)):
            continue
        if all(isinstance(value, kinds) for value in values) and len(values) == (count or len(values)) > 0:
            facts[name] = list(values)
        else:
            wanted = "names" if kinds is str else "3 numbers"
            log.warning("%s: %s is ignored, because it is not a list of %s.", path, name, wanted)
    for name, kind in (("data", str), ("image_size", int)):
        if isinstance(value := _get(content, name), kind):
            facts[name] = value
    if _get(content, "classifies") is False:
        facts["classifies"] = False
    return facts


def refuse_without_classifier(path: Path, facts: Mapping[str, Any], advice: str) -> None:
    """Raise `UserError` if a file states that its network does not predict by its own classifier."""
    if facts.get("classifies") is False:
        raise UserError(f"The classifier in {path} is not trained, because SimKD predicts through another: {advice}.")


def _get(content: Any, key: str) -> Any:
    """Return a value of a dict, or None. A file can hide the method `get` of a dict behind an attribute."""
    return dict.get(content, key) if isinstance(content, dict) else None


def read_file(path: Path, hint: str = "get the file again") -> Any:
    """Read a file that torch.save wrote and that holds nothing but tensors, on the CPU, and plain types.

    Raises `UserError` if the file is missing or damaged, is a program, or could execute code. `hint` is the advice for
    a damaged file.
    """
    with _report_unreadable(path, hint):
        return load_plain(path)


def _read_with_stubs(path: Path) -> tuple[Any, list[str]]:
    """Read a file of any tool. Returns the content, and the names of the objects in it that became inert stubs."""
    with _report_unreadable(path):
        return load_with_stubs(path)


@contextlib.contextmanager
def _report_unreadable(path: Path, hint: str | None = None) -> Iterator[None]:
    """Raise `UserError` if a file is no checkpoint, or if reading it in the block raises an error.

    `hint` is the advice for a damaged file. A file without one comes from a user, who may have taken the wrong file.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the path of a checkpoint file in it.")
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of a checkpoint.")
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        refuse_memory_bombs(path)
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read, because you lack the permission: change its permissions.") from error
    except Exception as error:  # a damaged file can raise any exception of the zip and pickle readers
        if hint is None and (foreign := describe_foreign(path)):
            raise UserError(f"{path} is not a checkpoint, but {foreign}.") from error
        if hint is None and isinstance(error, TypeError) and zipfile.is_zipfile(path):  # its checksums are right
            raise UserError(
                f"{path} holds objects that cannot be read without executing code: save only the state dict."
            ) from error
        refused = refused_name(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if imported := refused or _first_import(path):
            raise _could_execute(path, imported) from error
        raise UserError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}): {hint or 'get the file again'}."
        ) from error


def _could_execute(path: Path, name: str) -> UserError:
    return UserError(
        f"{path} asks for {name}, which could execute code, and is refused: give a file that holds only a state dict."
    )


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


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers from all names. If some names start with `student.`, keep only those."""
    while True:
        prefix = next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in tensors)), None)
        if prefix is None and any(name.startswith("student.") for name in tensors):
            prefix = "student."
        if prefix is None:
            return tensors
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


OTHER_CLASSES = "give a checkpoint of a network with the same classes"


def load_weights(network: Network, path: Path, *, new_head: bool = False, other_classes: str = OTHER_CLASSES) -> None:
    """Load the weights of a checkpoint into a network. Names and shapes must match. Dtypes become the network's.

    With `new_head`, the network keeps its own classifier. `other_classes` is the advice for a file of another number of
    classes. Raises `UserError` if that number, a name or a shape differs, if a weight is not finite, or if the file is
    unreadable. The network is then unchanged.
    """
    expected = network.state_dict()
    content, stubs = _read_with_stubs(path)
    kept = classifier_names(network) if new_head else []
    found = find_weights(content, expected, path, without=kept)
    if found is None and not any(state_dicts(content)):
        raise _no_weights(path, content, stubs)
    fitting = _refuse_misfit(network, path, found, other_classes)
    tensors = {name: value.to(expected[name].dtype) for name, value in fitting.tensors.items()}
    bad = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise UserError(f"{path} holds NaN or infinite weights, the first in {bad}: give another checkpoint.")
    network.load_state_dict({name: expected[name] for name in kept} | tensors)


def classifier_names(network: Network) -> list[str]:
    """List the names of the parameters of a network's classifier, the weight first."""
    layer = list(network.classifier_layer.parameters())
    names = {id(value): name for name, value in network.named_parameters()}
    return [names[id(value)] for value in layer]


def _refuse_misfit(network: Network, path: Path, found: Candidate | None, other_classes: str) -> Candidate:
    """Return the best candidate of a file. Raises `UserError` if it does not fit the network."""
    if found is not None and not found.differences:
        return found
    tensors = found.tensors if found else {}
    head, *_ = classifier_names(network)
    classes, inputs = network.state_dict()[head].shape
    shape = list(tensors[head].shape) if head in tensors else []
    if shape[1:] == [inputs] and shape[0] != classes:
        raise UserError(f"{path} was trained on {shape[0]} classes, but the network has {classes}: {other_classes}.")
    if found is None:
        raise UserError(
            f"{path} does not hold {_describe(network)} (no name fits): choose the architecture of the file."
        )
    after = f", after the prefix {found.prefix!r}" if found.prefix else ""
    count = len(found.differences)
    summary = f"{count} names or shapes differ{after}, the first: {found.differences[0]}"
    rename = "give all its names one prefix"
    advice = rename if found.is_scattered else "choose the architecture of the file"
    raise UserError(f"{path} does not hold {_describe(network)} ({summary}): {advice}.")


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
