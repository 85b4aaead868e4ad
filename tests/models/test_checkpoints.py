"""Checkpoints of every supported format load. Any other file is refused with a `UserError`, and runs no code."""

import argparse
import collections
import functools
import gzip
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from src.common.errors import UserError
from src.models.checkpoints import (
    load_weights,
    read_facts,
    read_file,
    read_state_dict,
    save_weights,
    serialize,
    weights_digest,
)
from src.models.network import Network
from src.models.resnet import resnet8, resnet20, resnet56
from src.models.slimnet import slimnet_300k
from src.models.wide_resnet import wrn_16_1
from tests.helpers.checkpoints import State, prefixed, trained


def optimizer_state() -> dict[str, Any]:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def lightning(state: State, prefix: str) -> dict[str, Any]:
    others = {"method.classifier.weight": torch.ones(2), "serialization.layer.weight": torch.ones(2, 2)}
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {**others, **prefixed(prefix, state)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [optimizer_state()],
        "lr_schedulers": [],
    }


def teacher_state() -> State:
    return {"conv1.weight": torch.zeros(16, 3, 3, 3), "fc.bias": torch.zeros(10)}


FORMATS: dict[str, Callable[[State], Any]] = {
    "last epoch of RepDistiller and mdistiller": lambda state: {
        "epoch": 240,
        "model": state,
        "accuracy": torch.tensor(72.3),
        "optimizer": optimizer_state(),
    },
    "best of RepDistiller": lambda state: {"epoch": 199, "model": state, "best_acc": torch.tensor(72.3)},
    "best as a numpy double": lambda state: {"model": state, "best_acc": np.float64(72.3)},
    "best as a numpy float": lambda state: {"model": state, "best_acc": np.float32(72.3), "epoch": np.int64(3)},
    "last of RepDistiller": lambda state: {
        "opt": argparse.Namespace(model="resnet8", lr_decay_epochs=[150, 180], learning_rate=0.05, gpu=None),
        "model": state,
    },
    "student of mdistiller": lambda state: {"model": state},
    "distiller of mdistiller": lambda state: {
        "model": {**prefixed("module.student.", state), **prefixed("module.teacher.", teacher_state())}
    },
    "DataParallel": lambda state: {"best_prec1": 91.7, "state_dict": prefixed("module.", state)},
    "DataParallel under model": lambda state: {"model": prefixed("module.", state)},
    "torch.compile": lambda state: {"state_dict": prefixed("_orig_mod.", state)},
    "torch.compile in DDP": lambda state: {"model": prefixed("module._orig_mod.", state)},
    "Lightning": lambda state: lightning(state, "student."),
    "Lightning with torch.compile": lambda state: lightning(state, "student._orig_mod."),
    "bare": lambda state: state,
    "bare with a prefix": lambda state: prefixed("module.", state),
    "net of a user's own training": lambda state: {"net": state, "acc": 91.2, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": optimizer_state()},
    "two dicts deep": lambda state: {"checkpoint": {"state_dict": prefixed("module.", state)}},
    "hyper-parameters of any class": lambda state: {
        "state_dict": prefixed("student.", state),
        "hyper_parameters": {
            "optimizer": functools.partial(torch.optim.SGD, lr=0.1),
            "config": OmegaConf.create({"a": {"b": [1, 2]}}),
            "path": Path("a/b"),
            "counts": collections.defaultdict(list, {"a": [1]}),
        },
    },
    "other things beside weights": lambda state: {**state, "note": "x", "epoch": 3},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_supported_format_loads(form: str, zipped: bool, file: Path, state: State):
    torch.save(FORMATS[form](state), file, _use_new_zipfile_serialization=zipped)
    read = read_state_dict(file)
    assert type(read) is dict
    assert list(read) == list(state)
    assert all(torch.equal(read[name], state[name]) for name in state)

    network = resnet8(10)
    load_weights(network, file)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_numbers_of_numpy_1_and_numpy_2_load(file: Path, state: State):
    torch.save({"model": state, "best_acc": np.float64(1)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert (new in content) != (old in content)
    for one, other in ((new, old), (old, new)):
        file.write_bytes(content.replace(one, other))
        assert list(read_state_dict(file)) == list(state)


def test_files_without_the_counters_of_batch_norms_load(file: Path, state: State):
    torch.save({"model": {name: value for name, value in state.items() if "num_batches" not in name}}, file)
    network = resnet8(10)
    load_weights(network, file)
    restored = network.state_dict()
    assert all(torch.equal(restored[name], state[name]) for name in state if "num_batches" not in name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_as_float32(dtype: torch.dtype, file: Path, state: State):
    torch.save({name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}, file)
    network = resnet8(10)
    load_weights(network, file)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    weight = state["layer3.0.conv2.weight"]
    assert torch.equal(network.state_dict()["layer3.0.conv2.weight"], weight.to(dtype).float())


# ----------------------------------------------------------------------------------------------- files that are refused


class Hostile:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["top", "beside", "inside", "options"])
def test_a_hostile_pickle_is_not_executed(place: str, zipped: bool, file: Path, state: State, tmp_path: Path):
    marker = tmp_path / "executed"
    hostile = Hostile(marker)
    content = {
        "top": hostile,
        "beside": {"model": state, "epoch": hostile},
        "inside": {"model": {**state, "fc.bias": hostile}},
        "options": {"model": state, "opt": argparse.Namespace(x=hostile)},
    }[place]
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"asks for \S*open, which could execute code, and is refused"):
        read_state_dict(file)
    assert not marker.exists()

    torch.load(file, weights_only=False)
    assert marker.exists(), "the payload works, if it is executed"


def test_a_pickled_network_is_refused_and_its_class_is_named(file: Path):
    torch.save(resnet8(10), file)
    with pytest.raises(UserError, match=r"asks for src\.models\.resnet\.CifarResNet, .*refused.*state dict"):
        read_state_dict(file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_programs_are_refused(tmp_path: Path):
    network = nn.Linear(3, 2).eval()
    script, exported = tmp_path / "script.pt", tmp_path / "exported.pt2"
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3)), script)
    torch.export.save(torch.export.export(network, (torch.zeros(1, 3),)), exported)
    for file in (script, exported):
        with pytest.raises(UserError, match=r"is a program .*, not weights: give a file that holds only a state dict"):
            read_state_dict(file)


@pytest.mark.parametrize(("name", "message"), [("nothing.pth", r"nothing\.pth does not exist"), ("", "is a folder")])
def test_a_missing_file_and_a_folder_are_refused(name: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / name)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root can read every file")
def test_a_file_without_read_permission_is_refused(file: Path):
    save_weights(resnet8(10), file)
    file.chmod(0)
    with pytest.raises(UserError, match="cannot be read, because you lack the permission"):
        read_state_dict(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "a dict but no weights"),
        ({"epoch": 3, "net": {"step": 3}}, "a dict of 'epoch', 'net' but no weights"),
        ({"model": {"epoch": 3}}, "a dict of 'epoch' but no weights"),
        ({"model": {0: torch.ones(2)}}, "but no weights"),
        ([torch.ones(2)], "a list but no weights"),
        (torch.ones(2), "a Tensor but no weights"),
        (None, "a NoneType but no weights"),
        ({"w": torch.ones(2, device="meta")}, "but no weights"),
        ({"w": torch.eye(2).to_sparse()}, "but no weights"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "but no weights"),
        ({"w": torch.ones(2, dtype=torch.bool)}, "but no weights"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_without_weights_are_refused(content: Any, message: str, file: Path):
    torch.save(content, file)
    with pytest.raises(UserError, match=message):
        read_state_dict(file)


@pytest.mark.parametrize(
    "content",
    [
        b"hello world\n",
        pickle.dumps({"model": 1}, protocol=2),
        pickle.dumps({"model": 1}, protocol=4),
        b"PK\x03\x04" + bytes(60),
        bytes(1000),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_of_other_kinds_are_refused(content: bytes, file: Path):
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        read_state_dict(file)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\n<!DOCTYPE html>\n<html>404</html>", "an HTML page, as of a failed download: get the file again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "a pointer of git LFS .* git lfs pull",
        ),
        (b"", "an empty file: get it again"),
        (gzip.compress(b"weights"), "a compressed file: unpack it"),
        (b"\x10" + bytes(7) + b'{"conv1.weight":', "a safetensors file: load it with safetensors.torch"),
    ],
    ids=["HTML", "LFS", "empty", "gzip", "safetensors"],
)
def test_the_refusal_of_a_foreign_file_says_what_it_is(content: bytes, kind: str, file: Path):
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"network\.pth is not a checkpoint, but {kind}"):
        read_state_dict(file)


@pytest.mark.parametrize("form", ["zip", "tar", "gztar"])
def test_an_archive_of_checkpoints_is_refused_with_the_name_of_one(form: str, tmp_path: Path):
    (tmp_path / "packed").mkdir()
    save_weights(resnet8(10), tmp_path / "packed" / "resnet8.pth")
    archive = shutil.make_archive(str(tmp_path / "all"), form, tmp_path / "packed", "resnet8.pth")
    with pytest.raises(UserError, match=r"not a checkpoint, but an archive of files such as resnet8\.pth: unpack it"):
        load_weights(resnet8(10), Path(archive))


def test_a_zip_of_arrays_is_refused(tmp_path: Path):
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        read_state_dict(tmp_path / "arrays.npz")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_truncated_file_loads(zipped: bool, file: Path):
    torch.save({"model": nn.Linear(2, 2).state_dict()}, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    assert len(read_state_dict(file)) == 2
    for length in (*range(0, len(content), 7), len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"network\.pth"):
            read_state_dict(file)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_flipped_bit_never_raises_anything_but_a_user_error(zipped: bool, file: Path):
    torch.save({"model": nn.Linear(2, 2).state_dict()}, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    refused = 0
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            assert all(isinstance(value, Tensor) for value in read_state_dict(file).values())
        except UserError:
            refused += 1
    assert refused > 20


# -------------------------------------------------------------------------------------------- weights that do not match


def change(state: State, **changes: Tensor | None) -> State:
    """Replace entries of a state dict, or remove those that are None. `__` in a name stands for a dot."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in {**state, **named}.items() if value is not None}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: change(s, fc__weight=torch.ones(7, 64), fc__bias=torch.ones(7)), "on 7 classes, but .* has 10"),
        (lambda s: change(s, bn1__bias=None), r"of 78,042 parameters \(1 names .* first: bn1\.bias is missing"),
        (
            lambda s: change(s, bn1__bias=None, fc__bias=None),
            r"\(2 names or shapes differ, the first: bn1\.bias is missing",
        ),
        (lambda s: change(s, more=torch.ones(1)), r"\(1 names .* first: 'more' is unknown"),
        (lambda s: change(s, bn1__bias=torch.ones(3)), r"\(1 names .* first: bn1\.bias is \[3\] instead of \[16\]"),
        (lambda s: change(s, fc__weight=torch.ones(10, 3)), r"fc\.weight is \[10, 3\] instead of \[10, 64\]"),
        (lambda s: change(s, bn1__bias=torch.full((16,), torch.nan)), r"NaN or infinite .* in bn1\.bias"),
        (lambda s: change(s, bn1__running_var=torch.full((16,), torch.inf)), r"infinite .* bn1\.running_var"),
        (
            lambda s: change(s, bn1__bias=torch.full((16,), 1e300, dtype=torch.float64)),
            r"NaN or infinite .* in bn1\.bias",
        ),
        (
            lambda s: resnet20(10).state_dict(),
            r"\(72 names .* 'layer1\.1\.conv1\.weight' is unk",
        ),
        (lambda s: wrn_16_1(10).state_dict(), "does not hold the weights of a CifarResNet of"),
        (lambda s: slimnet_300k(100).state_dict(), "does not hold the weights of a CifarResNet of"),
    ],
)
def test_weights_that_do_not_match_are_refused_and_change_nothing(
    make: Callable[[State], State], message: str, file: Path, state: State
):
    torch.save({"model": make(state)}, file)
    network = resnet8(10)
    before = weights_digest(network)
    with pytest.raises(UserError, match=message) as error:
        load_weights(network, file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert weights_digest(network) == before


# -------------------------------------------------------------------------------------------- the files of this project


@pytest.mark.parametrize("make", [resnet8, wrn_16_1, slimnet_300k])
def test_saved_weights_load_with_plain_torch_and_give_the_same_logits(make: Callable[[int], Network], file: Path):
    network = trained(make(10)).to(memory_format=torch.channels_last)
    save_weights(network, file, network="student", class_names=["a", "b"], accuracy=0.5)

    content = torch.load(file, weights_only=True)
    assert {key: value for key, value in content.items() if key != "model"} == {
        "network": "student",
        "class_names": ["a", "b"],
        "accuracy": 0.5,
    }
    assert type(content["model"]) is dict
    assert all(value.is_contiguous() and not value.requires_grad for value in content["model"].values())
    make(10).load_state_dict(content["model"])

    copy = make(10).eval()
    load_weights(copy, file)
    assert weights_digest(copy) == weights_digest(network)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(copy(images), network(images))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"class_names": ["a", "b"], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}, {"class_names", "mean", "std"}),
        ({"class_names": ["a"], "epoch": 3, "accuracy": 0.5}, {"class_names"}),
        ({"class_names": [], "mean": [0.5], "std": [1, 1, 1], "image_size": 64}, {"std", "image_size"}),
        ({"class_names": ["a", 2], "mean": "abc", "std": None}, set()),
        ({}, set()),
    ],
)
def test_only_well_formed_facts_are_read(written: dict[str, Any], expected: set[str], file: Path):
    save_weights(nn.Linear(2, 2), file, **written)
    assert read_facts(file) == {name: value for name, value in written.items() if name in expected}


def test_facts_stand_beside_weights_at_any_key(file: Path, caplog: pytest.LogCaptureFixture):
    written = {"state_dict": {"fc.weight": torch.ones(2)}, "mean": (0.5, 0.4, 0.3), "std": [0.2], "class_names": ["a"]}
    torch.save(written, file)
    assert read_facts(file) == {"mean": [0.5, 0.4, 0.3], "class_names": ["a"]}
    assert caplog.messages == [f"{file}: std is ignored, because it is not a list of 3 numbers."]


@pytest.mark.parametrize("content", [{"conv.weight": torch.ones(2), "mean": torch.ones(3)}, [1, 2], 3])
def test_files_of_other_tools_state_no_facts(content: Any, file: Path):
    torch.save(content, file)
    assert read_facts(file) == {}


def test_any_plain_content_can_be_read_with_advice_for_damage(file: Path):
    content: dict[str, Any] = {"epoch": 3, "names": ["a"], "values": torch.arange(3)}
    file.write_bytes(serialize(content))
    read = read_file(file)
    assert read.keys() == content.keys()
    assert torch.equal(read["values"], content["values"])
    file.write_bytes(serialize(content)[:-30])
    with pytest.raises(UserError, match=r"network\.pth is damaged .*: train again\.$"):
        read_file(file, hint="train again")


def test_saving_is_atomic(file: Path):
    first, second = resnet8(10), resnet8(10)
    save_weights(first, file)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_weights(second, file, fact=lambda: None)
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    loaded = resnet8(10)
    load_weights(loaded, file)
    assert weights_digest(loaded) == weights_digest(first)

    save_weights(second, file)
    load_weights(loaded, file)
    assert weights_digest(loaded) == weights_digest(second)
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_the_digest_depends_only_on_the_weights():
    network, other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(3, 4, 3))
    digest = weights_digest(network)
    assert len(digest) == 64
    assert weights_digest(network.to(memory_format=torch.channels_last)) == digest
    assert weights_digest(network.train().requires_grad_(False)) == digest
    assert weights_digest(other) != digest


@pytest.mark.parametrize(
    "alter",
    [
        lambda network: network[0].weight.data[0, 0, 0, 0].add_(1e-6),
        lambda network: network[1].running_mean[0].add_(1e-6),
        lambda network: network[1].num_batches_tracked.add_(1),
        lambda network: network[0].weight.data.copy_(network[0].weight.data.flip(0)),
        lambda network: network.half(),
        lambda network: network.register_module("2", nn.BatchNorm2d(4)),
    ],
)
def test_every_change_of_the_weights_changes_the_digest(alter: Callable[[nn.Sequential], Any]):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    digest = weights_digest(network)
    alter(network)
    assert weights_digest(network) != digest


def test_the_digest_of_given_weights_is_a_fixed_number():
    layer = nn.Linear(2, 1)
    layer.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([0.5])})
    assert weights_digest(layer) == "5c2c34ff2e955b1c180be428ae1fedef70d06fad13ceea73b8b8686aeee15afe"


# ------------------------------------------------------------------------------------------------ a real published file


def test_a_published_network_of_another_architecture_is_read_and_refused(real_data: Path):
    file = real_data / "teachers" / "resnet56_cifar10_option_a.th"
    assert next(iter(read_state_dict(file))) == "conv1.weight"
    with pytest.raises(UserError, match="does not hold the weights of a CifarResNet"):
        load_weights(resnet56(10), file)
