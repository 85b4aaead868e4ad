"""What no file, log or message may show: passwords, keys, and what environment variables hold of them."""

import logging
import os
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

SECRET = re.compile(r"(?i)key$|token|secret|password|credential")
"""Environment variables that no file, log or message may show."""


class DiscreetRecord(logging.LogRecord):
    """What is logged, by whomever, without secrets."""

    def getMessage(self) -> str:  # noqa: N802
        """The text."""
        return without_secrets(super().getMessage())


class DiscreetStream:
    """A text stream that shows no secrets: Python's tracebacks and Hydra's complaints pass no logger."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> Any:
        """Write it without them."""
        return self.stream.write(without_secrets(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def without_secrets(text: str, variables: Iterable[str] = ()) -> str:
    """A text without users, passwords and queries of URLs, and with references to environment variables that are secret
    by their name, or among the `variables`, instead of their values.
    """
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
    text = re.sub(r"(://[^\s'\"?]*)\?[^\s'\")]*", r"\1", text)
    for name in {*variables, *filter(SECRET.search, os.environ)}:
        value = os.environ.get(name, "")
        if len(value) >= 8:  # a shorter one would be found where it is not meant
            text = text.replace(value, f"${{oc.env:{name}}}")
    return text


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A configuration, resolved, as plain types that may be kept and shown: without secrets."""
    named = set(re.findall(r"oc\.env:\s*(\w+)", OmegaConf.to_yaml(cfg))) - {"AEKT_DATA"}

    def shown(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: shown(value) for key, value in node.items()}
        if isinstance(node, list):
            return [shown(value) for value in node]
        return without_secrets(node, named) if isinstance(node, str) else node

    return shown(OmegaConf.to_container(cfg, resolve=True))
