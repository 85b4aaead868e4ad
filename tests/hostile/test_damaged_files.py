"""Damaged files: each loads to something valid, or is refused in one sentence. None ends in a traceback.

The fuzzer is seeded. `AEKT_FUZZ=N` tries N inputs of each kind instead of a few.
"""

import functools
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from src.analysis.results import find_runs
from src.common.errors import UserError
from src.data.array_file import load_arrays
from src.data.stream_data import read_index
from src.models.checkpoints import load_weights, read_facts
from src.models.resnet import resnet8
from src.runs.checkpointing import read_checkpoint
from src.runs.result import Result, read_record
from src.setup.reopen import read_config, read_teacher
from src.teachers.answers import Answers
from src.teachers.view_store import ViewStore
from tests.helpers.hostile import run_on, write_shard_index
from tests.helpers.place import Place

INPUTS = int(os.environ.get("AEKT_FUZZ", 15))


def mutated(content: bytes, choose: random.Random) -> bytes:
    """Damage up to three blocks of bytes: flip bits, cut, move, repeat or blank them, or insert sizes or syntax."""
    damaged = bytearray(content)
    for _ in range(choose.randint(1, 3)):
        start = choose.randrange(len(damaged) + 1)
        end = min(len(damaged), start + choose.choice([1, 4, 16, 256, len(damaged)]))
        block = bytes(damaged[start:end])
        kind = choose.randrange(7)
        if kind == 0:
            for place in range(start, end, max(1, (end - start) // 8)):
                damaged[place] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del damaged[start:end]
        elif kind == 2:
            del damaged[start:end]
            start = choose.randrange(len(damaged) + 1)
            damaged[start:start] = block
        elif kind == 3:
            damaged[end:end] = block * choose.choice([1, 1, 20])
        elif kind == 4:
            damaged[start:end] = bytes([choose.choice([0, 32, 255])]) * len(block)
        elif kind == 5:
            size = choose.choice([2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1, 10**15])
            put = choose.choice([size.to_bytes(8, "little"), str(size).encode(), str(-size).encode()])
            damaged[start : start + len(put)] = put
        else:
            damaged[start:start] = choose.choice(
                [b"\0", b"\n", b",", b"- ", b": ", b"{", b"]", b'"', b"*", b"&a ", b"$"]
            )
    return bytes(damaged)


def rezipped(content: bytes, choose: random.Random) -> bytes:
    """Damage one member of a zip archive, and write valid checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        chosen = choose.choice(sorted(old.namelist(), key=lambda name: not name.endswith((".pkl", ".npy")))[:12])
        for name in old.namelist():
            new.writestr(name, mutated(old.read(name), choose) if name == chosen else old.read(name))
    return buffer.getvalue()


ODD: list[Any] = [
    None, "", "x", "../../../x", "${oc.env:HOME}", "${seed}", True, -1, 0, 10**9, 10**30, 1e308, float("nan"),
    float("-inf"), [], [None], [[]], {}, {"_target_": "os.system"}, {"x": 1}, ["a"] * 3, "\x00", "é" * 50, "1.5",
]  # fmt: skip
"""Values that a file of a run never holds in most places."""


def restructured(node: Any, choose: random.Random) -> Any:
    """Copy a tree with one odd value, or without one of its branches."""
    if isinstance(node, (dict, list)) and node and choose.random() < 0.9:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = choose.choice(keys)
        changed: Any = node.copy()
        if choose.random() < 0.15:
            del changed[key]
        else:
            changed[key] = restructured(node[key], choose)
        return changed
    return choose.choice(ODD)


def fuzzed(file: Path, content: bytes, choose: random.Random) -> bytes:
    """Damage the content of a file, in a way that fits its format or in any way."""
    if choose.random() < 0.4:
        return mutated(content, choose)
    if file.suffix == ".json":
        return json.dumps(restructured(json.loads(content), choose)).encode()
    if file.suffix == ".yaml":
        return yaml.safe_dump(restructured(yaml.safe_load(content), choose)).encode()
    if file.suffix == ".ckpt" and choose.random() < 0.5:
        buffer = io.BytesIO()
        torch.save(restructured(torch.load(io.BytesIO(content), weights_only=True), choose), buffer)
        return buffer.getvalue()
    return rezipped(content, choose) if zipfile.is_zipfile(io.BytesIO(content)) else mutated(content, choose)


# Each loader reads a file and checks that everything it returns is valid.


def load_network(file: Path) -> None:
    network = resnet8(10)
    read_facts(file)
    load_weights(network, file)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def load_array_file(file: Path) -> None:
    arrays = load_arrays(file)
    for labels in (arrays.train_labels, arrays.test_labels):
        assert 0 <= int(labels.min()) <= int(labels.max()) < len(arrays.class_names)
    assert len(arrays.train_images) == len(arrays.train_labels)


def load_answers(file: Path) -> None:
    answers = Answers.load(file, 20, 10)
    assert answers is None or (answers.predictions(20) < 10).all()


def load_shard_index(file: Path) -> None:
    index = read_index(str(file.parent))
    assert len(index["train_labels"]) == len(index["train_offsets"])


STORED = torch.arange(4 * 3 * 5).view(12, 5) + 0.5
PLACES = torch.arange(4).repeat(3), torch.arange(3).repeat_interleave(4)


def load_view_store(file: Path) -> None:
    logits, unknown = ViewStore(file, 4, 3, 5).read(*PLACES)
    known = {tuple(row) for row in logits[~unknown].tolist()}
    assert known <= {tuple(row) for row in STORED.tolist()}


def find_run(file: Path) -> None:
    runs, others = find_runs(file.parent)
    assert len(runs) + len(others) == 1
    assert all(0 <= found.result.test.accuracy <= 1 and found.label and found.setting for found in runs)
    assert all(other.state in ("damaged", "foreign") and other.detail for other in others)


def find_unfinished_run(file: Path) -> None:
    (file.parent / "result.json").unlink(missing_ok=True)
    runs, (other,) = find_runs(file.parent)
    assert not runs
    assert other.state in ("stopped", "failed", "damaged", "foreign")
    assert other.detail


def load_checkpoint(file: Path) -> None:
    checkpoint = read_checkpoint(file.parents[1])
    assert checkpoint is None or all(isinstance(value, torch.Tensor) for value in checkpoint["state_dict"].values())


def load_config(file: Path) -> None:
    assert read_config(file.parent, str(file.parent)).trainer.devices == 1


def load_teacher_facts(file: Path) -> None:
    facts = read_teacher(file.parent)
    assert facts is None or (0 <= facts.accuracy <= 1 and isinstance(facts.sha256 + facts.name, str))


LOADERS: dict[str, Callable[[Path], object]] = {
    "student.pth": load_network,
    "legacy.pth": load_network,
    "checkpoints/last.ckpt": load_checkpoint,
    "data.npz": load_array_file,
    "answers.npz": load_answers,
    "index.npz": load_shard_index,
    "a.views": load_view_store,
    "config.yaml": load_config,
    "run.json": load_teacher_facts,
    "result.json": functools.partial(read_record, Result),
    "metrics.csv": find_run,
    "result.json in a report": find_run,
    "run.json in a report": find_unfinished_run,
    "config.yaml in a report": find_unfinished_run,
    "failure.txt in a report": find_unfinished_run,
}


@pytest.fixture(scope="module")
def files(originals: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one of each kind of file in it."""
    folder = tmp_path_factory.mktemp("files") / "run"
    shutil.copytree(originals.folder("aekt"), folder)
    shutil.copy(originals.data, folder / "data.npz")
    shutil.copy(next(originals.runs.glob("teachers/*-test-*.npz")), folder / "answers.npz")
    torch.save(
        {"model": resnet8(10).state_dict(), "epoch": 3}, folder / "legacy.pth", _use_new_zipfile_serialization=False
    )
    (folder / "failure.txt").write_text("Traceback\nValueError: the loss is NaN\n")
    write_shard_index(folder / "index.npz")
    ViewStore(folder / "a.views", 4, 3, 5).write(*PLACES, STORED)
    return folder


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_load_to_something_valid_or_are_refused(files: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(files, folder)
    file = folder / kind.partition(" ")[0]
    content = file.read_bytes()
    LOADERS[kind](file)
    refused = 0
    for seed in range(INPUTS):
        file.write_bytes(fuzzed(file, content, random.Random(f"{kind} {seed}")))
        try:
            LOADERS[kind](file)
        except UserError as error:
            refused += bool(str(error))
        except BaseException as error:
            kept = Path(os.environ.get("AEKT_FUZZ_KEEP", tmp_path)) / f"{seed}-{file.name}"
            shutil.copy(file, kept)
            raise AssertionError(f"input {seed}, kept as {kept}") from error
    print(f"{kind}: {INPUTS} inputs, {refused} refused")


COMMANDS = {
    "config.yaml": ("evaluate", "report", "export"),
    "run.json": ("evaluate", "train", "report", "export"),
    "result.json": ("evaluate", "train", "report", "export"),
    "metrics.csv": ("report", "train"),
    "checkpoints/last.ckpt": ("evaluate", "resume", "report"),
    "student.pth": ("checkpoint",),
    "data.npz": ("train",),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.filterwarnings("ignore")
def test_commands_on_damaged_files_end_in_success_or_one_sentence(originals: Place, tmp_path: Path, kind: str) -> None:
    content: bytes | None = None
    errors = 0
    for seed in range(max(3, INPUTS // 15)):
        for name in COMMANDS[kind]:
            place = Place(tmp_path / f"{seed}-{name}", tmp_path / f"{seed}-{name}" / "data.npz")
            shutil.copytree(originals.path, place.path)
            folder = place.runs / originals.folder("aekt").relative_to(originals.runs)
            file = place.data if kind == "data.npz" else folder / kind
            content = content or file.read_bytes()
            file.write_bytes(fuzzed(file, content, random.Random(f"{kind} {seed}")))
            ran = run_on(place, name, folder)
            lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
            assert "Traceback" not in ran.err, f"{place.path}: {ran.err}"
            assert (ran.code == 0) == (not lines), f"{place.path}: {ran.err}"
            errors += len(lines)
            shutil.rmtree(place.path)
    print(f"{kind}: {errors} refused")
