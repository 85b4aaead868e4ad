"""Instantiate a configuration node, after validating its keys against the signature of its `_target_`."""

import functools
import inspect
from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

import hydra
import pydantic
from omegaconf import DictConfig, OmegaConf

from src.common.errors import UserError, describe_error
from src.config.schema import MethodOptions, NetworkOptions

DESCRIPTIVE = {option.name for schema in (NetworkOptions, MethodOptions) for option in fields(schema)} | {"_partial_"}
"""Keys that describe a node. They are passed on only if the signature takes them."""
Made = TypeVar("Made")


def instantiate(node: DictConfig, option: str, **arguments: Any) -> Any:
    """Call the `_target_` of the node at `option` with the node's keys and `arguments`.

    With `_partial_: true`, return a partial of the target. Raises `UserError` if the target does not exist, if a key
    is not an option of the target, if a value has the wrong type, or if the target fails.
    """
    bound = bind(node, option, arguments)
    if node.get("_partial_"):
        return functools.partial(bound, **arguments)
    try:
        return bound(**arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{option}._target_={node._target_} cannot be made ({describe_error(error)}): correct its options or its "
            "code."
        ) from error


def instantiate_as(kind: type[Made], node: DictConfig, option: str, **arguments: Any) -> Made:
    """Do the same as `instantiate`, and raise `UserError` if the result is not a `kind`."""
    made = instantiate(node, option, **arguments)
    if not isinstance(made, kind):
        raise UserError(
            f"{option}._target_={node._target_} makes a {type(made).__name__}, which is not a {kind.__name__}: derive "
            f"it from {kind.__module__}.{kind.__name__}."
        )
    return made


def bind(node: DictConfig, option: str, given: Collection[str]) -> functools.partial[Any]:
    """Find the `_target_` of the node at `option`, and bind the node's keys to it.

    The caller passes the arguments named in `given` later. Raises `UserError` as `instantiate` does, and if an argument
    is missing, or if the target does not take one of the caller's.
    """
    bound = bind_keys(node, option, given)
    names = options_of(bound.func)
    for name in given:
        if names is not None and name not in names:
            raise UserError(
                f"{option}._target_={node._target_} does not take the argument {name!r}, which it gets from this "
                "project: name a function or a class that does."
            )
    if not node.get("_partial_"):
        check_required(bound.func, {*bound.keywords, *given}, option)
    return bound


def bind_keys(node: DictConfig, option: str, given: Collection[str] = ()) -> functools.partial[Any]:
    """Find the `_target_` of the node at `option`, and bind the node's keys to it. Other arguments may be missing."""
    target = find_target(node, option)
    container: Any = OmegaConf.to_container(node, resolve=True)
    return functools.partial(target, **validate_options(target, container, option, given=given))


def check_required(target: Any, given: Container[str], option: str) -> None:
    """Raise `UserError` if a required argument of the target of `option` is not among the given ones."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # of some functions in C
        return
    for parameter in parameters:
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and parameter.name not in given:
            name = f"{option}.{parameter.name}"
            raise UserError(f"{name} is missing: set it with +{name}=VALUE.")


def find_target(node: DictConfig, option: str) -> Any:
    """Import the `_target_` of the node at `option`.

    Raises `UserError` if the import fails, or if the target is neither a class nor a function.
    """
    try:
        target = hydra.utils.get_object(node._target_)
    except (ImportError, ValueError) as error:
        cause = error.__cause__ or error
        module, _, name = str(node._target_).rpartition(".")
        has_module = module and isinstance(cause, ModuleNotFoundError) and cause.name == node._target_
        reason = f"{module} has no {name}" if has_module else cause
        raise UserError(
            f"{option}._target_={node._target_} cannot be imported ({reason}): correct the name or the module."
        ) from None
    if not callable(target):
        kind = type(target).__name__
        raise UserError(f"{option}._target_={node._target_} is a {kind}: name a class or a function.")
    return target


def validate_options(
    target: Any, container: Mapping[str, Any], option: str, given: Container[str] = ()
) -> dict[str, Any]:
    """Select the keys of a node that its target takes, and convert their values to the annotated types.

    The caller passes the arguments named in `given` itself, so they are not options. Raises `UserError` if a key is not
    an option, if an argument has no annotation or one that cannot be resolved, or if a value has the wrong type.
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
            found[key] = _adapter(annotation).validate_python(value)
        except pydantic.ValidationError as error:
            raise UserError(f"{option}.{key}={value} does not fit: {reason(error.errors()[0]['msg'])}.") from None
    return found


@contextmanager
def report_misfit(node: DictConfig, option: str) -> Iterator[None]:
    """Raise a `UserError` that names the option and its target instead of any error of a constructor."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # Hydra's error only names the cause
        why = " ".join(str(cause).split()).rstrip(".")
        raise UserError(f"The options of {option} do not fit {node._target_}: {why}.") from error


def reason(message: str) -> str:
    """Rewrite a message of pydantic so that it can end a sentence.

    >>> reason("Value error, choose one of a, b")
    'choose one of a, b'
    >>> reason("Input should be greater than 0")
    'input should be greater than 0'
    """
    message = message.removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def options_of(target: Any) -> frozenset[str] | None:
    """Return the names of a target's arguments, or None if it takes any name.

    A class of this project passes `**options` on to its base class. A library may do anything with them.

    >>> options_of(reason), options_of(dict)
    (frozenset({'message'}), None)
    """
    constructors = list(_constructors(target)) if isinstance(target, type) else [target]
    is_own = isinstance(target, type) and any(cls.__module__.startswith("src.") for cls in target.__mro__)
    names: set[str] = set()
    for constructor in constructors:
        try:
            parameters = inspect.signature(constructor).parameters.values()
        except (TypeError, ValueError):  # of some functions in C
            return None
        if any(p.kind is p.VAR_KEYWORD for p in parameters) and not is_own:
            return None
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return frozenset(names - {"self"})


def _keyword_parameters(target: Any) -> dict[str, Any]:
    """Map the names of a target's arguments to their annotations.

    A class whose `__init__` takes `**options` passes them on, so it has the arguments of its base class too.
    """
    if not isinstance(target, type):
        return _annotations(target)
    parameters: dict[str, Any] = {}
    for constructor in _constructors(target):
        parameters = {**_annotations(constructor), **parameters}
    return parameters


def _constructors(cls: type) -> Iterator[Any]:
    """Yield the `__init__` of a class, and those of its base classes as far as `**options` are passed on to them."""
    for base in cls.__mro__:
        if base is not object and "__init__" in vars(base):
            yield (constructor := vars(base)["__init__"])
            if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(constructor).parameters.values()):
                return


def _annotations(function: Any) -> dict[str, Any]:
    return {
        parameter.name: _resolve(function, parameter)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _resolve(function: Any, parameter: inspect.Parameter) -> Any:
    """Return the annotation of a parameter, which may be the text of one. Raises `UserError` if that is no type."""
    alone = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return get_type_hints(alone, names, include_extras=True)[parameter.name]
    except Exception as error:  # the text is code
        owner = f"{function.__module__}.{function.__qualname__}".removesuffix(".__init__")
        raise UserError(
            f"The type {parameter.annotation} of the argument {parameter.name!r} of {owner} cannot be resolved "
            f"({error}): correct or import it."
        ) from None


def _adapter(annotation: Any) -> pydantic.TypeAdapter[Any]:
    """Return pydantic's validator for a type. A class that pydantic does not know, such as `nn.Module`, is allowed."""
    try:
        return pydantic.TypeAdapter(annotation)
    except pydantic.errors.PydanticSchemaGenerationError:
        return pydantic.TypeAdapter(annotation, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
