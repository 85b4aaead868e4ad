"""Files from elsewhere, damaged or made up: each loads to something valid or is refused in one sentence.

The fuzzer is seeded; `AEKT_FUZZ=N` tries N inputs of each kind instead of a few.
"""

import io
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
import yaml
from omegaconf import OmegaConf

from src.analysis.results import find_runs
from src.data.arrays import load_arrays, save_arrays
from src.data.stream_data import ShardPhotos, read_index
from src.errors import UserError
from src.evaluate import read_config, read_teacher
from src.models.checkpoints import load_weights, read_facts, read_state_dict, save_weights
from src.models.resnet import resnet8
from src.resume import read_checkpoint
from src.run import finished_result
from src.secrecy import plain, without_secrets
from src.teacher import Answers
from src.view_store import ViewStore
from tests.commands import assert_refused, run
from tests.test_commands import Hostile, Place, result_of
from tests.test_config import configure

INPUTS = int(os.environ.get("AEKT_FUZZ", 15))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Short runs of AEKT and of its teacher, on data of their own; read only."""
    folder = tmp_path_factory.mktemp("finished")
    place = Place(folder, folder / "data.npz")
    random_images = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"class_names": np.array([f"class {i}" for i in range(10)])}
    for split, count in (("train", 40), ("test", 20)):
        arrays[f"{split}_images"] = random_images.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 10
    save_arrays(place.data, **arrays)
    ran = place.train("method=aekt", "network@model.teacher=resnet8")
    assert (ran.code, ran.err) == (0, ""), ran.err
    return place


@pytest.fixture
def place(finished: Place, tmp_path: Path) -> Place:
    """A copy of the finished runs to do harm to."""
    shutil.copytree(finished.path, tmp_path / "copy")
    return Place(tmp_path / "copy", tmp_path / "copy" / "data.npz")


# Mutations


def mutated(content: bytes, choose: random.Random) -> bytes:
    """With bits flipped, blocks cut, moved, repeated or blanked, and sizes put in that claim a lot."""
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
            damaged[choose.randrange(len(damaged) + 1) :][:0] = block
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
    """An archive with the checksums in order and one member that is not."""
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


def restructured(node: Any, choose: random.Random) -> Any:
    """The same tree with one odd value, or without one of its branches."""
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
    """An input near the real one."""
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


# What loads is valid


def weights_load(file: Path) -> None:
    network = resnet8(10)
    read_facts(file)
    load_weights(network, file)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def arrays_load(file: Path) -> None:
    arrays = load_arrays(file)
    for labels in (arrays.train_labels, arrays.test_labels):
        assert 0 <= int(labels.min()) <= int(labels.max()) < len(arrays.class_names)
    assert len(arrays.train_images) == len(arrays.train_labels)


def answers_load(file: Path) -> None:
    answers = Answers.load(file, 20, 10)
    assert answers is None or (answers.predictions(20) < 10).all()


def index_loads(file: Path) -> None:
    index = read_index(str(file.parent))
    assert len(index["train_labels"]) == len(index["train_offsets"])


STORED = torch.arange(4 * 3 * 5).view(12, 5) + 0.5
PLACES = torch.arange(4).repeat(3), torch.arange(3).repeat_interleave(4)


def store_reads(file: Path) -> None:
    logits, unknown = ViewStore(file, 4, 3, 5).read(*PLACES)
    known = {tuple(row) for row in logits[~unknown].tolist()}
    assert known <= {tuple(row) for row in STORED.tolist()}


def run_reads(file: Path) -> None:
    runs, others = find_runs(file.parent)
    assert len(runs) + len(others) == 1
    assert all(0 <= found.result["test"]["accuracy"] <= 1 for found in runs)


def checkpoint_reads(file: Path) -> None:
    checkpoint = read_checkpoint(file.parents[1])
    assert checkpoint is None or all(isinstance(value, torch.Tensor) for value in checkpoint["state_dict"].values())


def config_reads(file: Path) -> None:
    assert read_config(file.parent, str(file.parent)).trainer.devices == 1


def teacher_reads(file: Path) -> None:
    about = read_teacher(file.parent)
    assert about is None or (0 <= about["accuracy"] <= 1 and about["sha256"] + about["source"] + about["name"])


LOADERS: dict[str, Callable[[Path], object]] = {
    "student.pth": weights_load,
    "legacy.pth": weights_load,
    "checkpoints/last.ckpt": checkpoint_reads,
    "data.npz": arrays_load,
    "answers.npz": answers_load,
    "index.npz": index_loads,
    "a.views": store_reads,
    "config.yaml": config_reads,
    "run.json": teacher_reads,
    "result.json": finished_result,
    "metrics.csv": run_reads,
    "result.json in a report": run_reads,
    "run.json in a report": run_reads,
}


@pytest.fixture(scope="module")
def files(finished: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one of each kind of file in it."""
    folder = tmp_path_factory.mktemp("files") / "run"
    shutil.copytree(finished.folder("aekt"), folder)
    shutil.copy(finished.data, folder / "data.npz")
    shutil.copy(next(finished.runs.glob("teachers/*-test-2.npz")), folder / "answers.npz")
    torch.save(
        {"model": resnet8(10).state_dict(), "epoch": 3}, folder / "legacy.pth", _use_new_zipfile_serialization=False
    )
    columns = {
        f"{split}_{name}": np.arange(4)
        for split in ("train", "test")
        for name in ("labels", "shards", "offsets", "sizes")
    }
    np.savez_compressed(folder / "index.npz", class_names=np.array(list("abcd")), digest=np.array("0" * 64), **columns)  # type: ignore[arg-type]
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
    "config.yaml": ("evaluate", "report"),
    "run.json": ("evaluate", "train", "report"),
    "result.json": ("evaluate", "train", "report"),
    "metrics.csv": ("report", "train"),
    "checkpoints/last.ckpt": ("evaluate", "resume", "report"),
    "student.pth": ("checkpoint",),
    "data.npz": ("train",),
}


def command(place: Place, name: str, folder: Path) -> Any:
    """One of the commands on a damaged run folder."""
    if name == "evaluate":
        return place.evaluate(f"run={folder}")
    if name == "checkpoint":
        model = "network@model.student=resnet8"
        return place.evaluate("data=cifar10", model, f"checkpoint={folder / 'student.pth'}")
    if name == "report":
        return run("report", f"runs={place.runs}", f"out={place.path / 'reports'}", f"data_root={place.path}")
    if name == "resume":
        (folder / "result.json").unlink(missing_ok=True)
    return place.train("method=aekt", "network@model.teacher=resnet8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.filterwarnings("ignore")
def test_commands_on_damaged_files_end_in_success_or_one_sentence(finished: Place, tmp_path: Path, kind: str) -> None:
    content: bytes | None = None
    told = 0
    for seed in range(max(3, INPUTS // 15)):
        for name in COMMANDS[kind]:
            place = Place(tmp_path / f"{seed}-{name}", tmp_path / f"{seed}-{name}" / "data.npz")
            shutil.copytree(finished.path, place.path)
            folder = place.runs / finished.folder("aekt").relative_to(finished.runs)
            file = place.data if kind == "data.npz" else folder / kind
            content = content or file.read_bytes()
            file.write_bytes(fuzzed(file, content, random.Random(f"{kind} {seed}")))
            ran = command(place, name, folder)
            lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
            assert "Traceback" not in ran.err, f"{place.path}: {ran.err}"
            assert (ran.code == 0) == (not lines), f"{place.path}: {ran.err}"
            told += len(lines)
            shutil.rmtree(place.path)
    print(f"{kind}: {told} refused")


# Made up to do harm


def canary(folder: Path) -> Path:
    """What `Hostile` makes where it runs."""
    return folder / "executed"


@pytest.mark.filterwarnings("error")  # torch has a line to say about protocols
@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_is_said_to_ask_for_code(place: Place, protocol: int) -> None:
    file = place.path / "plain.pth"
    file.write_bytes(pickle.dumps({"model": Hostile(place.path)}, protocol=protocol))
    with pytest.raises(UserError, match=r"asks for posix\.system, which could execute code"):
        read_state_dict(file)
    assert not canary(place.path).exists()


@pytest.mark.parametrize("name", ["evaluate", "resume", "report"])
def test_a_checkpoint_of_a_run_executes_nothing(place: Place, name: str) -> None:
    folder = place.folder("aekt")
    file = folder / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(file, weights_only=True), "state_dict": Hostile(place.path)}, file)
    ran = command(place, name, folder)
    assert "could execute code" in ran.out + ran.err
    assert "Traceback" not in ran.err
    assert not canary(place.path).exists()


@pytest.mark.parametrize(
    ("node", "target"),
    [
        ({"_target_": "src.models.program.load_program", "path": "{tmp}/script.pt"}, "load_program"),
        ({"_target_": "src.run.write_text", "file": "{tmp}/executed", "text": "x"}, "write_text"),
        ({"_target_": "src.data.arrays.save_arrays", "path": "{tmp}/executed"}, "save_arrays"),
        ({"_target_": "torch.optim.sgd.torch.hub.load"}, "hub"),
        ({"a": [{"_target_": "torch.optim.Optimizer.__init__.__globals__"}]}, "globals"),
        ({"_target_": "${oc.env:AEKT_TARGET}"}, "os.system"),
    ],
)
def test_a_configuration_calls_only_what_conf_calls(
    place: Place, monkeypatch: pytest.MonkeyPatch, node: Any, target: str
) -> None:
    monkeypatch.setenv("AEKT_TARGET", "os.system")
    folder = place.folder("aekt")
    config: Any = OmegaConf.load(folder / "config.yaml")
    config.data.prepare = json.loads(json.dumps(node).replace("{tmp}", str(place.path)))
    OmegaConf.save(config, folder / "config.yaml")
    assert_refused(place.evaluate(f"run={folder}"), "wants to call", target, "refused")
    assert not canary(place.path).exists()


def test_what_conf_calls_may_be_called_and_other_optimisers_of_torch(finished: Place, tmp_path: Path) -> None:
    folder = finished.folder("aekt")
    config: Any = OmegaConf.load(folder / "config.yaml")
    for target in ("torch.optim.AdamW", "torch.optim.lr_scheduler.StepLR", "src.methods.kd.KD"):
        config.schedule.optimizer["_target_"] = target
        OmegaConf.save(config, tmp_path / "config.yaml")
        assert read_config(tmp_path, str(tmp_path)).schedule.optimizer._target_ == target


def test_a_configuration_that_grows_without_end_is_refused(place: Place) -> None:
    folder = place.folder("aekt")
    levels = "\n".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    (folder / "config.yaml").write_text(f"data:\n  a0: &a0 [x]\n{levels}\n")
    assert_refused(place.evaluate(f"run={folder}"), "has aliases", "refused")


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_nesting_without_end_is_refused(place: Place, name: str) -> None:
    (place.folder("aekt") / name).write_text('{"a":' * 100_000)
    for ran in (command(place, "train", place.folder("aekt")), command(place, "report", place.folder("aekt"))):
        assert "Traceback" not in ran.err
    assert_refused(command(place, "train", place.folder("aekt")), f"{name} is damaged", "start_over=true")


def test_a_bomb_among_checkpoints_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "bomb.pth"
    torch.save({"model": resnet8(10).state_dict()}, file)
    with (
        zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("bomb/data/99", "w") as member,
    ):
        for _ in range(257):
            member.write(bytes(2**20))
    with pytest.raises(UserError, match=r"bomb\.pth claims to hold 26\d,\d{3},\d{3} bytes, more than is believable"):
        read_state_dict(file)


@pytest.mark.parametrize("flipped", [0.3, 0.6, 0.9])
def test_a_flipped_bit_in_the_weights_is_found(tmp_path: Path, flipped: float) -> None:
    """Torch itself loads them: it compares no checksums."""
    file = tmp_path / "a.pth"
    save_weights(resnet8(10), file)
    with zipfile.ZipFile(file) as archive:
        weights = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(file.read_bytes())
    content[weights.header_offset + int(flipped * weights.file_size)] ^= 1
    file.write_bytes(content)
    torch.load(file, weights_only=True)
    with pytest.raises(UserError, match="is damaged"):
        read_state_dict(file)


def test_claims_of_huge_arrays_are_refused(tmp_path: Path, finished: Place) -> None:
    with zipfile.ZipFile(finished.data) as old:
        members = {name: old.read(name) for name in old.namelist()}
    for shape in ("(1000000000000, 8, 8, 3)", "(4000000000, 8, 8, 3)", "(-1, 8, 8, 3)"):
        buffer = io.BytesIO()
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        buffer.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(100))
        with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
            for name, content in {**members, "train_images.npy": buffer.getvalue()}.items():
                archive.writestr(name, content)
        with pytest.raises(UserError, match=r"huge\.npz"):
            load_arrays(tmp_path / "huge.npz")


def test_names_in_an_archive_reach_nothing_outside(tmp_path: Path, finished: Place) -> None:
    inner = tmp_path / "a" / "b" / "data.npz"
    inner.parent.mkdir(parents=True)
    shutil.copy(finished.data, inner)
    with zipfile.ZipFile(inner, "a") as archive:
        for name in ("../../evil.npy", str(tmp_path / "evil.npy")):
            array = io.BytesIO()
            np.save(array, np.zeros(3))
            archive.writestr(name, array.getvalue())
    load_arrays(inner)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [inner]


def test_an_index_of_shards_cannot_choose_the_folder_of_the_cache(files: Path, tmp_path: Path) -> None:
    index = {**np.load(files / "index.npz")}
    np.savez(tmp_path / "index.npz", **{**index, "digest": np.array("../../../../../evil")})
    with pytest.raises(UserError, match=r"is not what python -m src\.convert writes"):
        read_index(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, finished: Place) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "loop", tmp_path / "nothing"):
        link = tmp_path / "loop"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        for load in (read_state_dict, load_arrays):
            with pytest.raises(UserError, match=r"is no file|does not exist"):
                load(link)
        (tmp_path / "config.yaml").unlink(missing_ok=True)
        (tmp_path / "config.yaml").symlink_to(target)
        with pytest.raises(UserError, match=r"has no config\.yaml"):
            read_config(tmp_path, str(tmp_path))
        assert Answers.load(link, 20, 10) is None


def test_a_link_among_the_files_of_a_run_is_replaced_and_not_written_through(place: Place) -> None:
    folder = place.folder("aekt")
    precious = place.path / "precious"
    precious.write_text("keep me")
    (folder / "result.json").unlink()
    for name in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "student.pth"):
        (folder / name).unlink()
        (folder / name).symlink_to(precious)
    assert place.train("method=aekt", "network@model.teacher=resnet8", "start_over=true").code == 0
    assert precious.read_text() == "keep me"
    assert not any(file.is_symlink() for file in folder.rglob("*"))


def test_a_tar_that_leads_outside_is_only_read(tmp_path: Path) -> None:
    """Shards are read by ranges of bytes: nothing is ever unpacked."""
    with tarfile.open(tmp_path / "train-00000.tar", "w") as tar:
        member = tarfile.TarInfo("../../evil")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    photos = ShardPhotos(
        str(tmp_path), "train", np.zeros(2, np.int32), np.array([512, 512]), np.array([3, 2**50]), None, 0
    )
    assert photos.read([0]) == [b"abc"]
    with pytest.raises(UserError, match=r"train-00000\.tar"):
        photos.read([1])
    assert {file.name for file in tmp_path.parent.rglob("evil")} == set()


@pytest.mark.filterwarnings("ignore")
def test_names_of_classes_are_text_wherever_they_are_shown(finished: Place, place: Place) -> None:
    for folder in place.folders("aekt") + place.folders("vanilla"):
        result = result_of(folder)
        result["class_names"] = ["$\\frac{", "\\input{/etc/passwd}", "_^", "<b>", "%d", "{x}", "|", "\n", "é", "$$"]
        (folder / "result.json").write_text(json.dumps(result))
    ran = command(place, "report", place.folder("aekt"))
    assert (ran.code, ran.err) == (0, ""), ran.err


# Secrets


TOKEN = "s3cr3t-t0ken-of-mine"


def contains(folder: Path, text: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def test_secrets_reach_neither_files_nor_messages(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("UNSUSPICIOUS", "another-" + TOKEN[::-1])
    ran = place.train(
        "method=vanilla",
        "logger=wandb",
        f"data.root='https://user:{TOKEN}@host/data/${{oc.env:UNSUSPICIOUS}}?sig={TOKEN}'",
        "seed=5",
    )
    wandb.finish()
    wandb.teardown()
    assert ran.code == 0, ran.err
    for secret in (TOKEN, TOKEN[::-1]):
        assert contains(place.path, secret) == []
        assert secret not in ran.out + ran.err
        assert not any(secret in str(file) for file in place.path.rglob("*"))
    (folder,) = [folder for folder in place.runs.glob("*/*/vanilla/*seed5*") if folder.is_dir()]
    config = OmegaConf.load(folder / "config.yaml")
    assert OmegaConf.to_container(config)["data"]["root"] == "https://host/data/${oc.env:UNSUSPICIOUS}"  # type: ignore[call-overload,index]


@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_secrets_are_not_shown_by_complaints(place: Place, flags: tuple[str, ...]) -> None:
    root = f"data.root='https://user:{TOKEN}@127.0.0.1:9/x?sig={TOKEN}'"
    ran = run("train", *flags, "data=stream", root, f"runs={place.runs}")
    assert ran.code == 1
    assert "https://127.0.0.1:9/x" in ran.err
    assert TOKEN not in ran.out + ran.err
    assert contains(place.path, TOKEN) == []


def test_texts_lose_their_secrets_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MY_TOKEN": TOKEN, "HF_KEY": "short", "OTHER": "long enough"}.items():
        monkeypatch.setenv(name, value)
    assert without_secrets(f"see s3://me:{TOKEN}@bucket/a?x={TOKEN}&y=1 and b") == "see s3://bucket/a and b"
    assert without_secrets(f"a {TOKEN} b") == "a ${oc.env:MY_TOKEN} b"
    text = "short, long enough, user@host, a?b=c, hf://datasets/x@main/y, http://x.org/a (why?)"
    assert without_secrets(text) == text
    assert without_secrets("long enough", ["OTHER"]) == "${oc.env:OTHER}"


def test_a_configuration_without_secrets_means_the_same() -> None:
    cfg = configure("model=resnet20_to_resnet8")
    assert plain(cfg) == OmegaConf.to_container(cfg, resolve=True)
