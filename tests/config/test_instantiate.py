"""A node is validated against the signature of its target, and then instantiated."""

import functools
import inspect
from typing import Any, Literal

import pytest
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf
from torch import nn

from src.common.errors import UserError
from src.config.instantiate import instantiate, instantiate_as, options_of, reason, report_misfit, validate_options
from src.methods.aekt import AEKT
from src.methods.method import Method
from tests.helpers.configure import METHODS, PAIRS, configure


class Base:
    """A class with options of its own."""

    def __init__(self, temperature: float, *, weighting: Literal["ratio", "constant"] = "ratio") -> None:
        self.temperature, self.weighting = temperature, weighting


class Derived(Base):
    """A class that passes `**options` on to its base class."""

    def __init__(self, gamma: float, **options: Any) -> None:
        super().__init__(**options)
        self.gamma = gamma


class Closed(Base):
    """A class that passes a fixed option on to its base class."""

    def __init__(self, gamma: float) -> None:
        super().__init__(temperature=4.0)
        self.gamma = gamma


class WithoutOptions:
    """A class without an `__init__`."""


class Unannotated:
    """A class with an argument of unknown type."""

    def __init__(self, gamma=0.5) -> None:
        self.gamma = gamma


class Fails:
    """A class whose constructor fails."""

    def __init__(self, weight: float = 1.0) -> None:
        raise ValueError("weight must be\nabove 2.")  # the line of this mistake is part of the sentence


class Refuses:
    """A class whose constructor knows what is wrong."""

    def __init__(self) -> None:
        raise UserError("Give another size.")


class Misspelt:
    """A class with an annotation that does not exist."""

    def __init__(self, gamma: "Flaot" = 0.5) -> None:  # type: ignore[name-defined]  # noqa: F821
        self.gamma = gamma


class WithModule:
    """A class with an argument that no file can give."""

    def __init__(self, loss: nn.Module | None = None) -> None:
        self.loss = loss


def make(num_classes: int, width: int = 16) -> tuple[int, int]:
    """Return the arguments."""
    return num_classes, width


def build(target: str, /, *, given: dict[str, Any] | None = None, **keys: Any) -> Any:
    """Instantiate a node with a target of this module, and with an option named `node`."""
    return instantiate(OmegaConf.create({"_target_": f"{__name__}.{target}", **keys}), "node", **given or {})


def test_values_become_the_annotated_types() -> None:
    built = build("Base", temperature=4, weighting="constant")
    assert (type(built.temperature), built.temperature, built.weighting) == (float, 4.0, "constant")


def test_a_class_that_takes_options_has_the_options_of_its_base_class_too() -> None:
    built = build("Derived", gamma=0.5, temperature=2)
    assert (built.gamma, built.temperature, built.weighting) == (0.5, 2.0, "ratio")
    aekt = instantiate(configure("method=aekt", "method.gamma=0.5", "method.temperature=2").method, "method")
    assert isinstance(aekt, AEKT)
    assert (aekt.gamma, aekt.temperature) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("Base", "temperature, weighting"),
        ("Derived", "temperature, weighting, gamma"),
        ("Closed", "gamma"),
        ("WithoutOptions", "none"),
        ("make", "num_classes, width"),
    ],
)
def test_an_unknown_key_is_answered_with_the_options(target: str, options: str) -> None:
    with pytest.raises(UserError) as caught:
        build(target, gama=0.5)
    assert str(caught.value) == f"node.gama=0.5 is not an option of {__name__}.{target}: its options are {options}."


def test_arguments_of_the_caller_are_no_options() -> None:
    assert build("make", given={"num_classes": 10}, width=8) == (10, 8)
    for key in ("num_classes", "depth"):
        with pytest.raises(UserError, match=rf"node\.{key}=5 is not an option of .*\.make: its options are width\.$"):
            build("make", given={"num_classes": 10}, **{key: 5})


def test_a_constructor_that_fails_is_one_sentence_with_file_and_line() -> None:
    lines, first = inspect.getsourcelines(Fails)
    line = first + next(number for number, text in enumerate(lines) if "the line of this mistake" in text)
    with pytest.raises(UserError) as caught:
        build("Fails", weight=1)
    assert str(caught.value) == (
        f"node._target_={__name__}.Fails cannot be made (ValueError: weight must be above 2 in "
        f"tests/config/test_instantiate.py, line {line}): correct its options or its code."
    )


def test_a_constructor_that_knows_what_is_wrong_says_it_itself() -> None:
    with pytest.raises(UserError, match=r"^Give another size\.$"):
        build("Refuses")


def test_the_made_object_is_of_the_wanted_kind() -> None:
    node = OmegaConf.create({"_target_": f"{__name__}.WithoutOptions"})
    assert type(instantiate_as(WithoutOptions, node, "method")) is WithoutOptions
    with pytest.raises(UserError) as caught:
        instantiate_as(Method, node, "method")
    assert str(caught.value) == (
        f"method._target_={__name__}.WithoutOptions makes a WithoutOptions, which is not a Method: derive it from "
        "src.methods.method.Method."
    )


@pytest.mark.parametrize("method", METHODS)
def test_no_method_lists_an_option_that_does_not_exist(method: str) -> None:
    node = configure(f"method={method}", "+method.nonsense=1").method
    with pytest.raises(UserError, match=rf"^method\.nonsense=1 is not an option of {node._target_}: ") as caught:
        instantiate(node, "method")
    options = str(caught.value).partition("its options are ")[2].rstrip(".").split(", ")
    described = {"name", "_target_", "year", "uses", "settings", "pairs", "standardized", "nonsense"}
    assert {*node} - described <= set(options)
    assert not {"return", "self", "options", "args", "kwargs", "networks"} & set(options)


@pytest.mark.parametrize(
    ("target", "key", "value", "reason"),
    [
        ("Base", "temperature", "hot", "input should be a valid number"),
        ("Base", "weighting", "log", "input should be 'ratio' or 'constant'"),
        ("make", "width", 1.5, "input should be a valid integer, got a number with a fractional part"),
        ("make", "width", None, "input should be a valid integer"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(target: str, key: str, value: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^node\.{key}={value} does not fit: {reason}"):
        build(target, **{key: value})


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method.beta=abc", r"^method\.beta=abc does not fit: input should be a valid number"),
        ("+method.betta=2", r"^method\.betta=2 is not an option of src\.methods\.aekt\.AEKT: its options are .*beta"),
        ("method.weighting=foo", r"^method\.weighting=foo does not fit: input should be 'ratio', 'relative', 'excess'"),
        ("method.confidence_term=perhaps", r"^method\.confidence_term=perhaps does not fit"),
    ],
)
def test_options_of_a_method_are_validated_against_its_signature(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        instantiate(configure("method=aekt", override).method, "method")


def test_an_argument_without_a_type_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        build("Unannotated", gamma=1)
    assert str(caught.value) == (
        f"The argument 'gamma' of {__name__}.Unannotated has no type: annotate it, for example gamma: float."
    )
    assert build("Unannotated").gamma == 0.5


def test_a_type_that_cannot_be_resolved_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        build("Misspelt", gamma=1)
    assert str(caught.value) == (
        f"The type Flaot of the argument 'gamma' of {__name__}.Misspelt cannot be resolved (name 'Flaot' is not "
        "defined): correct or import it."
    )


def test_a_class_that_pydantic_does_not_know_is_a_type() -> None:
    assert build("WithModule", loss=None).loss is None
    with pytest.raises(UserError, match=r"^node\.loss=mse does not fit: input should be an instance of Module\.$"):
        build("WithModule", loss="mse")


def test_keys_that_describe_a_node_are_passed_on_only_if_the_target_takes_them() -> None:
    assert build("make", num_classes=10, name="mine", year=2026, published_accuracy={}) == (10, 16)
    assert validate_options(lambda name: name, {"_target_": "f"}, "node") == {}


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(UserError, match=r"^node\.num_classes is missing: set it with \+node\.num_classes=VALUE\.$"):
        build("make", width=8)
    with pytest.raises(UserError, match=r"^node\.temperature is missing"):
        build("Base", weighting="ratio")


def test_a_target_must_take_the_arguments_of_the_caller() -> None:
    with pytest.raises(
        UserError, match=r"^node\._target_=.*\.Closed does not take the argument 'folder', which it gets"
    ):
        build("Closed", gamma=1.0, given={"folder": "x"})


def test_options_of_a_target_are_its_arguments() -> None:
    assert options_of(make) == frozenset({"num_classes", "width"})
    assert {"temperature", "gamma", "cross_entropy_weight"} <= (options_of(AEKT) or set())
    assert options_of(WithoutOptions) == frozenset()
    assert options_of(DDPStrategy) is None, "a library's class may do anything with **kwargs"


def test_an_error_of_a_constructor_names_the_option() -> None:
    node = OmegaConf.create({"_target_": "a.B"})
    with (
        pytest.raises(UserError, match=r"^The options of averaging do not fit a\.B: the reason\.$"),
        report_misfit(node, "averaging"),
    ):
        raise ValueError("the\nreason.")


def test_a_partial_takes_the_missing_arguments_later() -> None:
    made = build("make", _partial_=True, width=8)
    assert isinstance(made, functools.partial)
    assert made(10) == (10, 8)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("src.methods.nothing.Nothing", "No module named 'src.methods.nothing'"),
        ("src.methods.kd.Nothing", "src.methods.kd has no Nothing"),
        ("src.methods.Nothing", "src.methods has no Nothing"),
        ("Nothing", "No module named 'Nothing'"),
        ("nonsense.KD", "No module named 'nonsense'"),
        ("src..KD", "Error loading 'src..KD': invalid dotstring."),
    ],
)
def test_a_target_that_cannot_be_imported_is_refused(target: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        instantiate(OmegaConf.create({"_target_": target}), "method")
    sentence = " ".join(str(caught.value).split())
    assert sentence.startswith(f"method._target_={target} cannot be imported ({reason}")
    assert sentence.endswith("): correct the name or the module.")


def test_a_module_is_no_target() -> None:
    with pytest.raises(
        UserError, match=r"^method\._target_=src\.methods\.kd is a module: name a class or a function\.$"
    ):
        instantiate(OmegaConf.create({"_target_": "src.methods.kd"}), "method")


@pytest.mark.parametrize("pair", PAIRS[:1])
def test_the_node_stays_as_it_is(pair: str) -> None:
    node = configure(f"model={pair}").model.student
    before = OmegaConf.to_yaml(node)
    instantiate(node, "model.student", num_classes=3)
    assert OmegaConf.to_yaml(node) == before


def test_a_message_of_pydantic_ends_a_sentence() -> None:
    assert reason("Value error, give one number") == "give one number"
