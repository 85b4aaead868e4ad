"""Keep passwords, tokens and secret environment variables out of files, logs and messages."""

import logging
import os
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

SECRET = re.compile(r"(?i)key$|token|secret|password|credential")
"""Names of environment variables whose values are secret."""
PLACES = frozenset({"AEKT_DATA", "AEKT_CACHE"})
"""Environment variables that name folders. Their values are stored, so that a run can be opened without them."""
SHORTEST_SECRET = 8
"""Characters. Shorter values are not replaced, because they would be found in unrelated text."""


class RedactingRecord(logging.LogRecord):
    """A log record whose message shows no secrets."""

    def getMessage(self) -> str:  # noqa: N802
        """Return the message without secrets."""
        return without_secrets(super().getMessage())


class RedactingStream:
    """A text stream that removes secrets from everything it writes. Tracebacks bypass logging, but not this stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> Any:
        """Write the text without secrets."""
        return self.stream.write(without_secrets(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def without_secrets(text: str, variables: Iterable[str] = ()) -> str:
    """Remove users, passwords and queries from URLs, and replace secret values by the names of their variables.

    A variable is secret if its name matches `SECRET` or is one of `variables`.

    >>> without_secrets("clone https://user:password@host/path?token=abc")
    'clone https://host/path'
    """
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
    text = re.sub(r"(://[^\s'\"?]*)\?[^\s'\")]*", r"\1", text)
    for name in {*variables, *filter(SECRET.search, os.environ)}:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, f"${{oc.env:{name}}}")
    return text


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a configuration to plain types without secrets, so that it can be stored and shown.

    The value of every environment variable that the configuration reads counts as secret, except those of `PLACES`.
    """
    named = set(re.findall(r"oc\.env:\s*(\w+)", OmegaConf.to_yaml(cfg))) - PLACES

    def redact(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: redact(value) for key, value in node.items()}
        if isinstance(node, list):
            return [redact(value) for value in node]
        return without_secrets(node, named) if isinstance(node, str) else node

    resolved: dict[str, Any] = redact(OmegaConf.to_container(cfg, resolve=True))
    return resolved
