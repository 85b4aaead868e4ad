"""Checkpoints of the formats in use, read without executing anything, and ours.

Read unchanged: RepDistiller and mdistiller (`model` beside epoch, accuracy, optimizer, options; with `module.` or with
`module.student.` beside `module.teacher.`), DataParallel (`state_dict` with `module.`), torch.compile (`_orig_mod.`),
Lightning (`state_dict` with `student.`), bare state dicts, and ours (`model` beside facts).
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

from src.errors import UserError
from src.files import believable_members, written_whole
from src.models.network import Network


class _Ignored:
    """Stands in for what published checkpoints hold beside their weights: nothing of the real types is built."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


IGNORED: list[Any] = [
    (_Ignored, name)
    for name in ("argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
WRAPPERS = ("module.", "_orig_mod.", "model.")
PROGRAM_MEMBERS = ("constants.pkl", "archive_format", "serialized_exported_program.json")
"""Members of a zip archive that only TorchScript or torch.export write."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The student's, or only, network in a checkpoint: names without prefixes to tensors on the CPU.

    Raises `UserError` where the file is missing, damaged, a program, asks for code, or holds no tensors.
    """
    content = read_file(path, ignored=IGNORED)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = content if isinstance(content, dict) else {}
    tensors = {name: value for name, value in named.items() if isinstance(name, str) and _is_plain(value)}
    if not tensors:
        found = f"a dict of {', '.join(map(repr, list(named)[:5]))}" if named else f"a {type(content).__name__}"
        raise UserError(f"{path} holds {found} but no weights by name: give a file that holds a state dict.")
    return _without_prefixes(tensors)


def read_facts(path: Path) -> dict[str, list[Any]]:
    """What our files say beside their weights of how a network is fed: `class_names`, `mean`, `std`, where it is there.

    Raises `UserError` for each reason of `read_state_dict`.
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


def read_file(path: Path, hint: str = "get it again", ignored: Sequence[Any] = ()) -> Any:
    """What torch.save wrote, on the CPU: tensors, plain types, and `_Ignored` for what is `ignored`.

    Raises `UserError` where the file is missing, damaged (with a `hint`), a program, or asks for code.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the checkpoint file in it.")
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of a checkpoint.")
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with torch.serialization.safe_globals(list(ignored)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what follows from them is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} may not be read: give yourself the permission.") from error
    except Exception as error:  # a damaged file fails in every way that readers of zip and pickle can
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        asked = wanted[1] if wanted else _called_by_pickle(path)
        if asked:
            hint = "give a file that holds a state dict alone"
            raise UserError(f"{path} asks for {asked}, which could execute code, refused: {hint}.") from error
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__}): {hint}.") from error


def _check_archive(path: Path) -> None:
    """Raises `UserError` for a program or a bomb, `BadZipFile` for a wrong checksum, which torch does not look at."""
    members = believable_members(path)
    if any(member.filename.rsplit("/", 1)[-1] in PROGRAM_MEMBERS for member in members):
        raise UserError(f"{path} is a program (TorchScript or torch.export), refused: give a file of weights only.")
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile


def _called_by_pickle(path: Path) -> str | None:
    """The first thing that a plain pickle, such as torch.save never wrote, would import; None if there is none."""
    strings: list[str] = []
    with path.open("rb") as file, contextlib.suppress(Exception):  # it ends, or is no pickle at all
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    return None


def _is_plain(value: object) -> bool:
    """Whether this is a tensor such as weights are; a file can rebuild sparse, quantised and nested ones too."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.is_nested:
        return False
    return value.layout is torch.strided and value.device.type == "cpu"


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip what wrappers put before names; where a student stands among others, keep the student alone."""
    while True:
        prefix = next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in tensors)), None)
        if prefix is None and any(name.startswith("student.") for name in tensors):
            prefix = "student."
        if prefix is None:
            return tensors
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_weights(network: Network, path: Path) -> None:
    """Put a checkpoint's weights into a network, all of them and no others; they take the network's dtype.

    Raises `UserError` where class counts, names or shapes differ, where a weight is not finite, and for each reason of
    `read_state_dict`. The network is unchanged then.
    """
    tensors = read_state_dict(path)
    expected = network.state_dict()
    head = next(name for name, value in network.named_parameters() if value is network.classifier_layer.weight)
    classes, inputs = expected[head].shape
    found = list(tensors[head].shape) if head in tensors else []
    if found[1:] == [inputs] and found[0] != classes:
        counts = f"{found[0]} classes and the network has {classes}"
        raise UserError(f"{path} was trained on {counts}: give a checkpoint of a network for the same classes.")
    wrong = _differences(expected, tensors)
    if wrong:
        count = f"{len(wrong)} names or shapes differ, the first: {wrong[0]}"
        raise UserError(f"{path} does not hold {_describe(network)} ({count}): choose the architecture of the file.")
    tensors = {name: value.to(expected[name].dtype) for name, value in tensors.items()}
    bad = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise UserError(f"{path} holds NaN or infinite weights, the first in {bad}: give another checkpoint.")
    network.load_state_dict(tensors)


def _differences(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """A phrase for each name that does not fit, in the network's order."""
    wrong = []  # without batch norm's counters, which files of 2019 lack and load_state_dict fills in
    for name, value in expected.items():
        if name not in tensors and not name.endswith("num_batches_tracked"):
            wrong.append(f"{name} is missing")
        elif name in tensors and tensors[name].shape != value.shape:
            wrong.append(f"{name} is {list(tensors[name].shape)} instead of {list(value.shape)}")
    return wrong + [f"{name!r} is unknown" for name in tensors if name not in expected]


def _describe(network: nn.Module) -> str:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"the weights of a {type(network).__name__} of {parameters:,} parameters"


def save_weights(network: nn.Module, path: Path, /, **facts: Any) -> None:
    """Write `{"model": state dict, **facts}` as a whole or not at all.

    Facts are plain types (numbers, strings, lists and dicts of them), so that `torch.load(weights_only=True)` reads it.
    """
    state = {
        name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in network.state_dict().items()
    }
    content = serialized({"model": state, **facts})
    with written_whole(path) as partial:
        partial.write_bytes(content)


def serialized(content: Any) -> memoryview:
    """What torch.save writes: where it writes to a disk itself, it does not say that the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def weights_digest(network: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of a state dict, whatever its container, device or memory format."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
