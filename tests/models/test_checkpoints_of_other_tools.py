"""Checkpoints load whatever a tool has put around the weights: keys, prefixes, other modules, other copies."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.common.errors import UserError
from src.models.checkpoints import load_weights
from src.models.resnet import resnet8, resnet20
from tests.helpers.checkpoints import State, prefixed, trained

PREFIXED: dict[str, Callable[[State], Any]] = {
    "net.": lambda state: {"state_dict": prefixed("net.", state)},
    "backbone.": lambda state: {"state_dict": prefixed("backbone.", state), "epoch": 3},
    "any prefix": lambda state: prefixed("my.own.module.", state),
    "model. beside a criterion": lambda state: {
        "state_dict": {"criterion.weight": torch.ones(10), **prefixed("model.", state)}
    },
    "a bare criterion": lambda state: {**state, "criterion.weight": torch.ones(10)},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.", state)},
    "thop": lambda state: {**state, "total_ops": torch.zeros(1).double(), "bn1.total_params": torch.zeros(1).double()},
    "a module as hyper-parameter": lambda state: {"state_dict": state, "hyper_parameters": {"network": resnet20(10)}},
    "equal weights twice": lambda state: {"net": state, "best": dict(state)},
}


@pytest.mark.parametrize("form", PREFIXED)
def test_weights_are_found_by_the_names_of_the_network(form: str, file: Path, state: State):
    torch.save(PREFIXED[form](state), file)
    network = resnet8(10)
    load_weights(network, file)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def zeros(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


@pytest.mark.parametrize(
    ("make", "taken"),
    [
        (lambda s: {"state_dict_ema": zeros(s), "state_dict": s}, r"state_dict\.\*"),
        (lambda s: {"ema": zeros(s), "net": s}, r"net\.\*"),
        (lambda s: {**prefixed("teacher.", zeros(s)), **prefixed("student.", s)}, r"student\.\*"),
        (lambda s: {"best": zeros(s), "model": s}, r"model\.\*"),
    ],
)
def test_of_several_fitting_weights_a_rule_takes_one_and_says_so(
    make: Callable[[State], Any], taken: str, file: Path, state: State, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "src.models.unwrapping")
    torch.save(make(state), file)
    network = resnet8(10)
    load_weights(network, file)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert re.search(rf"fit the network more than once \(.*\): taking {taken}\.$", caplog.text.strip())


def test_several_fitting_weights_without_a_rule_are_refused_by_name(file: Path, state: State):
    torch.save({"net_a": state, "net_b": zeros(state)}, file)
    with pytest.raises(UserError, match=r"more than once \(net_a\.\*, net_b\.\*\): give a file that holds one of them"):
        load_weights(resnet8(10), file)


def test_a_teacher_is_found_beside_a_smaller_student(file: Path, state: State):
    teacher = trained(resnet20(10)).state_dict()
    torch.save({"model": {**prefixed("module.student.", state), **prefixed("module.teacher.", teacher)}}, file)
    network = resnet20(10)
    load_weights(network, file)
    assert all(torch.equal(value, teacher[name]) for name, value in network.state_dict().items())


def test_a_classifier_under_another_prefix_is_not_taken_for_another_architecture(file: Path, state: State):
    body = {name: value for name, value in state.items() if not name.startswith("fc.")}
    torch.save({**prefixed("features.", body), "head.fc.weight": state["fc.weight"]}, file)
    with pytest.raises(
        UserError,
        match=r"\(2 names .*, after the prefix 'features\.', the first: fc\.weight is missing\): give all its names",
    ):
        load_weights(resnet8(10), file)


def test_a_new_head_keeps_the_networks_classifier_and_loads_the_rest(file: Path):
    torch.manual_seed(3)
    other, network = trained(resnet8(1000)).state_dict(), resnet8(10)
    head = network.fc.weight.detach().clone()  # type: ignore[union-attr,operator]
    torch.save(prefixed("module.", other), file)
    with pytest.raises(UserError, match=r"trained on 1000 classes, but the network has 10: add the option\.$"):
        load_weights(network, file, other_classes="add the option")
    load_weights(network, file, new_head=True)
    loaded = network.state_dict()
    assert torch.equal(loaded.pop("fc.weight"), head)
    assert all(torch.equal(value, other[name]) for name, value in loaded.items() if not name.startswith("fc."))
