"""Command-line overrides: read what Hydra's grammar refuses but can mean only one thing, and explain the rest."""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from src.common.errors import UserError
from src.config.schema import COMMAND_SCHEMAS, DATA_SCHEMAS

OPTION = re.compile(r"(\+\+|\+|~)?(\w[\w./@:-]*)=(.*)", re.DOTALL)
"""Prefix, name and value of an override."""
NOT_FOUND = re.compile(r"Could not override '([^'@]+)'\.\nTo append to your config use ")
EXPLANATIONS = {
    NOT_FOUND.pattern: "{0} is not an option: check its name. --help lists the options.",
    r"Ambiguous value for argument '([^=]+)=(.*)'\n1": "{0}={1} gives several values: add --multirun (-m) to run each "
    "of them. If the value is one text with a comma, quote it twice, for the shell and for Hydra: \"{0}='{1}'\".",
    r"Could not append to config. An item is already at '([^']+)'": "{0} is an option already: remove the + before it.",
    r"Error merging override \+*([\w.]+)\.\w+=.*'dict' ": "{0} is a single value, which has no options of its own.",
}
"""Errors of Hydra about overrides, and a sentence without its advice to add what is unknown."""


def readable(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with the flags first, and with quotes around values that need them.

    Hydra's grammar refuses `teacher.path=epoch=9.ckpt`. A value gets quotes if it can only be a text. It also gets
    quotes if its option is a text and Hydra would read a number: `runs=1_0` is not the folder 10.

    Raises `UserError` for an unknown flag, and for an argument that Hydra cannot read with quotes either.
    """
    parsed, unknown = get_args_parser().parse_known_intermixed_args(list(arguments))
    overrides: list[str] = parsed.overrides or []
    for flag in unknown:
        raise UserError(f"{flag} is not a flag of this command: an option has no dashes, as in option=value.")
    flags = [argument for argument in arguments if argument not in overrides]
    return [*flags, *map(_readable, overrides)]


def _readable(override: str) -> str:
    option, parsed = OPTION.fullmatch(override), _parse(override)
    if option is None:
        _check_name(override, parsed)
        return override
    prefix, name, value = option.groups(default="")
    is_text = name in text_options()
    if parsed is not None:
        return f"{prefix}{name}={_quoted(value)}" if is_text and _is_number(parsed, value) else override
    if not _is_ambiguous(value, is_text):
        quoted = f"{prefix}{name}=" + ",".join(_quoted(part) for part in value.split(","))
        if _parse(quoted) is not None:
            return quoted
    raise UserError(
        f"{override} cannot be read: close its brackets and quotes. If the value is a text, quote it twice, for the "
        f"shell and for Hydra: {in_both_quotes(name, value)}."
    )


def _check_name(override: str, parsed: Override | None) -> None:
    """Raise `UserError` unless an argument without `option=value` is one that Hydra knows, such as `~option`."""
    if parsed is not None and parsed.key_or_group:
        return
    if re.fullmatch(r"[\w./@]+", override):
        raise UserError(f"{override} has no value: write {override}=value, without spaces around the equals sign.")
    raise UserError(f"{override} does not name an option: write option=value. --help lists the options.")


def forced(arguments: Sequence[str], error: Exception) -> list[str] | None:
    """Return the arguments with `++` before the option that Hydra does not find in the configuration.

    `check_options` can then judge it, with the whole configuration at hand. Returns None if the error is another one,
    if the arguments do not hold the option, or if they ask for the configuration instead of a job.
    """
    missing = NOT_FOUND.match(str(error))
    asked = get_args_parser().parse_known_intermixed_args(list(arguments))[0]
    if missing is None or missing[1].startswith("hydra.") or asked.cfg or asked.info:
        return None
    changed = [f"++{each}" if each.startswith(f"{missing[1]}=") else each for each in arguments]
    return changed if changed != list(arguments) else None


def explain(error: Exception) -> str | None:
    """Rewrite an error of Hydra about an override. Returns None for any other error."""
    text = f"{error}\n{error.__cause__ or ''}"
    for pattern, sentence in EXPLANATIONS.items():
        if found := re.match(pattern, text, re.DOTALL):
            return sentence.format(*found.groups())
    return None


def in_both_quotes(name: str, value: str) -> str:
    """Write an override as it is typed, with quotes for the shell and for Hydra.

    >>> print(in_both_quotes("data.path", "a,b.npz"))
    "data.path='a,b.npz'"
    """
    return f'"{name}={_quoted(value)}"'


@functools.cache
def text_options() -> frozenset[str]:
    """List the options of all commands whose value is a text, such as a path.

    >>> {"teacher.path", "data.root", "runs", "out"} <= text_options(), "seed" in text_options()
    (True, False)
    """
    commands = (name for schema in COMMAND_SCHEMAS.values() for name in _texts(schema))
    return frozenset([*commands, *(f"data.{name}" for schema in DATA_SCHEMAS for name in _texts(schema))])


def _texts(schema: type) -> Iterator[str]:
    for name, kind in get_type_hints(schema).items():
        if kind in (str, str | None):
            yield name
        elif is_dataclass(kind):
            yield from (f"{name}.{inner}" for inner in _texts(kind))  # type: ignore[arg-type]


def _parse(override: str) -> Override | None:
    """Parse an override. Returns None if Hydra's grammar refuses it."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def _is_number(parsed: Override, text: str) -> bool:
    """Return whether Hydra reads a number or a truth value whose text differs from the one that was typed."""
    value: Any = None if parsed.is_sweep_override() else parsed.value()
    return isinstance(value, (bool, int, float)) and str(value) != text


def _is_ambiguous(value: str, is_text: bool) -> bool:
    """Return whether a value that Hydra refuses may be a damaged list, mapping, function, interpolation or quotation.

    A text may hold brackets and quotes, unless a comma makes it look like several values.
    """
    holds_marks = bool(set("()[]{}'\"") & set(value))
    if is_text:
        return "${" in value or value.startswith(("'", '"')) or ("," in value and holds_marks)
    return "," in value or bool(set("[]{}'\"$") & set(value))


def _quoted(text: str) -> str:
    quoted: str = QuotedString(text, Quote.single).with_quotes()
    return quoted
