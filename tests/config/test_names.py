"""Names of the parts of a run, and whether the run needs a teacher."""

import pytest
from omegaconf import OmegaConf

from src.config.names import class_name, method_name, needs_teacher, serialization_name
from tests.helpers.configure import LAYERS, METHODS, configure


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["method=kd"], "kd"),
        (["method=dkd", "method@also=kd"], "dkd+kd"),
        (["method=kd", "standardize_logits=true"], "kd+standardized"),
        (["method=kd", "optimizer=dot", "averaging=ema"], "kd+dot+averaged"),
        (["method=kd", "method@also=sp", "averaging=ema"], "kd+sp+averaged"),
    ],
)
def test_a_methods_name_lists_the_switches_that_change_the_training(overrides: list[str], name: str) -> None:
    assert method_name(configure(*overrides)) == name


@pytest.mark.parametrize("layer", LAYERS)
def test_a_serialization_layer_has_the_name_of_its_option(layer: str) -> None:
    assert serialization_name(configure("method=kd", f"serialization={layer}")) == layer


def test_methods_without_a_teacher() -> None:
    assert {method for method in METHODS if not needs_teacher(configure(f"method={method}"))} == {
        "dml",
        "tfkd",
        "vanilla",
    }


def test_an_added_method_may_need_a_teacher() -> None:
    assert not needs_teacher(configure("method=vanilla"))
    assert needs_teacher(configure("method=vanilla", "method@also=sp"))


def test_a_class_name_is_the_last_part_of_the_target() -> None:
    assert class_name(OmegaConf.create({"_target_": "package.module.Name"})) == "Name"
    assert class_name(OmegaConf.create({"_target_": "Name"})) == "Name"
