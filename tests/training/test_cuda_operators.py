"""No operator of a run raises an error or is non-deterministic on CUDA under `trainer.deterministic=true`.

A new method is checked once `STEPS` lists it, a new network once it is in conf/network. results/operators.md lists all
operators.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch

from src.methods.combined import Combined
from src.training.dot import DOT
from src.training.gradient_anatomy import GradientAnatomy
from src.training.serialization import Parallel, Serial, Serialization
from tests.helpers.configure import METHODS, configure, options
from tests.helpers.methods import FAMILY, LOGIT_METHODS, Pair, configured, method_of, taught_by
from tests.helpers.operators import record
from tests.helpers.tiny import kd, tiny_data, tiny_distiller, tiny_trainer
from tests.helpers.workloads import (
    CASES,
    NETWORKS,
    data_work,
    evaluation_work,
    gradients_work,
    layers_work,
    made_for_work,
    method_work,
    network_work,
)


def assert_deterministic(work: Callable[[], object]) -> set[str]:
    """Check the operators of a computation, and return them."""
    recorded = record(work)
    assert not recorded.found, f"not deterministic on CUDA: {sorted(recorded.found)}"
    return recorded.operators


def test_every_method_is_checked() -> None:
    assert {method_of(case) for case, _ in CASES.values()} == set(METHODS)


@pytest.mark.parametrize(("case", "pair"), CASES.values(), ids=CASES.keys())
def test_methods(case: str, pair: Pair) -> None:
    operators = assert_deterministic(method_work(made_for_work(case), pair))
    assert any(operator.endswith(("_backward", "_backward_data")) for operator in operators)


def test_crd_with_too_few_negatives() -> None:
    assert "multinomial" in assert_deterministic(method_work(configured("crd", negatives=12), FAMILY))


@pytest.mark.parametrize("method", LOGIT_METHODS)
@pytest.mark.parametrize(("layer", "standardized"), [(Serial, True), (Parallel, True), (Serial, False)])
def test_methods_behind_layers(method: str, layer: Callable[[float], Serialization], standardized: bool) -> None:
    assert_deterministic(method_work(configured(method), FAMILY, layer(0.1), standardized=standardized))


@pytest.mark.parametrize(("main", "also"), [("aekt", "sp"), ("crd", "kd"), ("dkd", "reviewkd"), ("ft", "ab")])
def test_combined_methods(main: str, also: str) -> None:
    assert_deterministic(method_work(Combined(configured(main), configured(also)), FAMILY))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    operators = assert_deterministic(network_work(name))
    assert "convolution_backward" in operators


def test_layers_metrics_and_gradients() -> None:
    for work in (layers_work(), evaluation_work(), gradients_work()):
        assert_deterministic(work)


def test_the_data_path(tmp_path: Path) -> None:
    assert_deterministic(data_work(tmp_path))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, foreach=True),  # as on a GPU
    "dot": DOT,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_whole_run(optimizer: str, tmp_path: Path) -> None:
    """Two training steps and an evaluation, with all callbacks and a weight average."""
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(
        data, kd(), teacher=taught_by(), serialization=Serial(0.1), optimizer=OPTIMIZERS[optimizer]
    )
    average: Any = hydra.utils.instantiate(configure("averaging=ema").averaging)
    callbacks = [GradientAnatomy(tmp_path, every=1, temperature=4.0), average]

    def run() -> None:
        trainer = tiny_trainer(1, limit_train_batches=2, limit_val_batches=1, callbacks=callbacks)
        trainer.fit(distiller, datamodule=data)

    operators = assert_deterministic(run)
    assert {"convolution_backward", "index_select", "index_add_"} <= operators
    assert ("_foreach_mul_" in operators) == (optimizer == "sgd")


@pytest.mark.parametrize("trainer", options("trainer"))
def test_every_trainer_is_deterministic(trainer: str) -> None:
    assert configure(f"trainer={trainer}").trainer.deterministic is True


def test_a_deterministic_trainer_makes_matrix_products_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    tiny_trainer(deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    assert torch.are_deterministic_algorithms_enabled()
