"""Instantiate a configuration node, after validating its keys against the signature of its `_target_`."""

import functools
import inspect
from collections.abc import Container, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

import hydra
import pydantic
from omegaconf import DictConfig, OmegaConf

from src.common.errors import UserError
from src.config.schema import MethodOptions, NetworkOptions

DESCRIPTIVE = {option.name for schema in (NetworkOptions, MethodOptions) for option in fields(schema)} | {"_partial_"}
"""Keys that describe a node. They are passed on only if the signature takes them."""


def instantiate(node: DictConfig, option: str, **arguments: Any) -> Any:
    """Call the `_target_` of the node at `option` with the node's keys and `arguments`.

    With `_partial_: true`, return a partial of the target. Raises `UserError` if the target does not exist, if a key
    is not an option of the target, or if a value has the wrong type.
    """
    target = find_target(node, option)
    container: Any = OmegaConf.to_container(node, resolve=True)
    options = validate_options(target, container, option, given=arguments)
    if container.get("_partial_"):
        return functools.partial(target, **options, **arguments)
    return target(**options, **arguments)


def find_target(node: DictConfig, option: str) -> Any:
    """Import the `_target_` of the node at `option`. Raises `UserError` if the import fails."""
    try:
        return hydra.utils.get_object(node._target_)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{option}._target_={node._target_} cannot be imported ({error.__cause__ or error}): correct the name or "
            "the module."
        ) from None


def validate_options(
    target: Any, container: Mapping[str, Any], option: str, given: Container[str] = ()
) -> dict[str, Any]:
    """Select the keys of a node that its target takes, and convert their values to the annotated types.

    The caller passes the arguments named in `given` itself, so they are not options. Raises `UserError` if a key is not
    an option, if an argument has no annotation, or if a value has the wrong type.
    """
    parameters = {name: kind for name, kind in _keyword_parameters(target).items() if name not in given}
    found = {}
    for key, value in container.items():
        if key not in parameters:
            if key in DESCRIPTIVE:
                continue
            known = ", ".join(parameters) or "none"
            raise UserError(
                f"{option}.{key}={value} is not an option of {container['_target_']}: its options are {known}."
            )
        annotation = parameters[key]
        if annotation is inspect.Parameter.empty:
            raise UserError(
                f"The argument {key!r} of {container['_target_']} has no type: annotate it, for example {key}: float."
            )
        try:
            found[key] = pydantic.TypeAdapter(annotation).validate_python(value)
        except pydantic.ValidationError as error:
            raise UserError(f"{option}.{key}={value} does not fit: {reason(error.errors()[0]['msg'])}.") from None
    return found


def reason(message: str) -> str:
    """Rewrite a message of pydantic so that it can end a sentence.

    >>> reason("Value error, choose one of a, b")
    'choose one of a, b'
    >>> reason("Input should be greater than 0")
    'input should be greater than 0'
    """
    message = message.removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _keyword_parameters(target: Any) -> dict[str, Any]:
    """Map the names of a target's arguments to their annotations.

    A class whose `__init__` takes `**options` passes them on, so it has the arguments of its base class too.
    """
    if not isinstance(target, type):
        return _annotations(target)
    parameters: dict[str, Any] = {}
    for cls in target.__mro__:
        if "__init__" not in vars(cls):
            continue
        constructor = vars(cls)["__init__"]
        parameters = {**_annotations(constructor), **parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(constructor).parameters.values()):
            break
    return parameters


def _annotations(function: Any) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    named = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return {name: hints.get(name, inspect.Parameter.empty) for name in named}
