"""Resolvers: functions that `conf/` calls as `${name:arguments}`. Importing this module registers them."""

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src.common.gpus import visible_gpus


def scaled(epoch: int, of: int, epochs: int) -> int:
    """Scale an epoch of a published schedule of `of` epochs to the same fraction of `epochs`.

    >>> scaled(150, 240, 20)
    12
    """
    return round(epoch * epochs / of)


def stem(path: str | None, default: str) -> str:
    """Return the name of a file or folder without its suffix, or `default` if there is no path.

    >>> stem("photos/birds.npz", "arrays")
    'birds'
    """
    return default if path is None else Path(path).stem or default


def of_pair(constant: str, default: Any, *, _parent_: Any, _root_: Any) -> Any:
    """Look up a method's constant for the configured pair in the method's table `pairs`, with a default.

    The pairs of a student with a `family` begin with it. This tells CIFAR's ResNets from ImageNet's of that name.
    With `standardize_logits=true`, the method's table `standardized` takes precedence. A pair without a row of its own
    in that table gets its row `default`.
    """
    family = _root_.model.student.get("family")
    pair = f"{family}/{_root_.model.name}" if family else _root_.model.name
    found = {constant: default, **(_parent_.get("pairs") or {}).get(pair, {})}
    if _root_.standardize_logits and (standardized := _parent_.get("standardized")):
        found |= {**standardized.default, **standardized.get(pair, {})}
    return found[constant]


def number(value: Any, default: float) -> float:
    """Return `value` if it is a number, else `default`.

    >>> number(4, 1.0), number([2.0, 4.0], 1.0), number(None, 1.0)
    (4.0, 1.0, 1.0)
    """
    return float(value) if isinstance(value, (int, float)) else default


def processors() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def terminal() -> bool:
    """Return whether messages go to a terminal, and come from a process that does not share it with other runs."""
    return sys.stderr.isatty() and multiprocessing.parent_process() is None


def gpus() -> int:
    """Count the GPUs that this process may use, or return 1 if there is none."""
    return max(1, len(visible_gpus()))


for resolver in (scaled, stem, of_pair, number, processors, terminal, gpus):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
