"""Refuse options that nothing reads, and suggest those that were meant.

Hydra refuses an unknown option only without `+`. This module knows what every node of a composed configuration can
hold: the fields of its schema, and the arguments of its `_target_`.
"""

import difflib
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from typing import NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from src.common.errors import UserError
from src.config.instantiate import find_target, options_of
from src.config.schema import (
    EvaluateOptions,
    ExportOptions,
    MeasureOptions,
    MethodOptions,
    NetworkOptions,
    TrainOptions,
)

HYDRA_KEYS = frozenset({"_target_", "_partial_", "_args_", "_recursive_", "_convert_"})
GIVEN = {
    "data": {"batch_size", "seed", "views_per_image"},
    "model.student": {"num_classes"},
    "model.teacher": {"num_classes"},
    "optimizer": {"params", "lr"},
    "schedule.optimizer": {"params", "lr"},
    "schedule.scheduler": {"optimizer"},
    "logger": {"folder"},
    "trainer": {"logger"},
}
"""Arguments of a node's `_target_` that the code passes itself, so that an option of this name would do nothing."""
DESCRIBED = {
    **dict.fromkeys(("model.student", "model.teacher"), NetworkOptions),
    **dict.fromkeys(("method", "also", "teacher.method"), MethodOptions),
}
"""Nodes with keys that describe them, beside the arguments of their `_target_`."""
OPTIONAL = ("also", "optimizer", "averaging", "logger")
"""Groups that may be switched off."""
READ_WITH_RUN = ("data.root", "data.path", "data.unlabelled", "trainer", "trainer.accelerator")
"""Options of a training that are read together with `run=`. All others are those of the run."""
WITH_TEACHER = ("teacher.path", "teacher.class_map", "teacher.allow_program")
"""Options that `src.measure` reads too, and `src.export` for fine-tuning."""
SUGGESTED = 3
"""The largest number of suggestions."""


class Node(NamedTuple):
    """A node of a configuration, and the names of the options that it can hold. None: any."""

    option: str
    keys: list[str]
    known: frozenset[str] | None
    target: str | None


def check_options(cfg: DictConfig, given: Collection[str] = ()) -> None:
    """Raise `UserError` for the first option of a composed configuration that nothing reads.

    `given` are the options of the command line. Any other option comes from a file of `conf/`.
    """
    nodes = list(_nodes(cfg, ""))
    unknown = [(node, key) for node in nodes for key in node.keys if node.known is not None and key not in node.known]
    if not unknown:
        return
    node, key = unknown[0]
    option = _join(node.option, key)
    if node.option in OPTIONAL and node.target is None:
        if not any(each == node.option or f"{each}.".startswith(f"{option}.") for each in given):
            raise UserError(f"{node.option}._target_ is missing: add the key '_target_' to its file in conf/.")
        raise UserError(
            f"{option} is not an option while {node.option} is switched off: choose a file of conf/ for it first. "
            "--help lists the groups."
        )
    of = f" of {node.target}" if node.target else ""
    if "[" in node.option:  # an override cannot name what lies within a list
        raise UserError(f"{option} is not an option{of}: remove it from {node.option.partition('[')[0]}.")
    if node.target and option not in given:
        raise UserError(f"{option} is not an option{of}: remove it with ~{option}, or choose another _target_.")
    readers = [each for each in nodes if each.known is not None or each.target]  # no free tables, such as `pairs`
    names = {_join(each.option, name) for each in readers for name in each.known or each.keys if name[0] != "_"}
    names -= {_join(each.option, name) for each, name in unknown}
    raise UserError(f"{option} is not an option{of}: {_advice(node, option, names)}")


def check_run_options(cfg: DictConfig, given: Collection[str]) -> None:
    """Raise `UserError` if an option of the command line is replaced by the configuration of the run that is opened."""
    kind = OmegaConf.get_type(cfg)
    if kind is None or not issubclass(kind, EvaluateOptions) or cfg.run is None:
        return
    own = [field.name for field in fields(kind) if field.name not in {field.name for field in fields(TrainOptions)}]
    reads_teacher = kind is MeasureOptions or (kind is ExportOptions and cfg.finetune_epochs)
    read = [*own, *READ_WITH_RUN, *(WITH_TEACHER if reads_teacher else ())]
    if ignored := sorted(option for option in given if option not in read):
        raise UserError(
            f"{ignored[0]} cannot be given together with run=..., because a run is opened with its own configuration: "
            f"leave it out. The options that are read are {', '.join(read)}."
        )


def _nodes(node: DictConfig, option: str) -> Iterator[Node]:
    """Yield a node and all nodes below it."""
    keys = [str(key) for key in node]
    target = node._target_ if "_target_" in node else None
    yield Node(option, keys, _known(node, option, target), target)
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        child, name = node[key], _join(option, key)
        items = enumerate(child) if isinstance(child, ListConfig) else ()
        for below, its_name in [(child, name), *((item, f"{name}[{number}]") for number, item in items)]:
            if isinstance(below, DictConfig):
                yield from _nodes(below, its_name)


def _known(node: DictConfig, option: str, target: str | None) -> frozenset[str] | None:
    schemas = [kind for kind in (OmegaConf.get_type(node), DESCRIBED.get(option)) if is_dataclass(kind)]
    names = frozenset(field.name for schema in schemas for field in fields(schema))
    if target is not None:
        taken = options_of(find_target(node, option))
        return None if taken is None else names | (taken - GIVEN.get(option, set())) | HYDRA_KEYS
    if option == "model":
        return frozenset({"student", "teacher", "name"})
    return names if names or option in OPTIONAL else None


def _advice(node: Node, option: str, names: Collection[str]) -> str:
    """Suggest the options that were perhaps meant, or else list those of the node."""
    if close := close_options(option, names):
        return f"did you mean {' or '.join(close)}?"
    if node.option:
        known = sorted((node.known or frozenset()) - HYDRA_KEYS)
        return f"the options of {node.option} are {', '.join(known) or 'none'}."
    return "--help lists the options."


def close_options(option: str, names: Collection[str]) -> list[str]:
    """List the names that are most similar to an unknown option, the most similar first.

    The last parts of the names are compared. Names in the place of the option itself are preferred.

    >>> names = ["schedule.epochs", "schedule.learning_rate", "method.temperature", "runs"]
    >>> [close_options(option, names) for option in ("num_epochs", "schedule.lr", "teacher.temperature", "method.none")]
    [['schedule.epochs'], ['schedule.learning_rate'], ['method.temperature'], []]
    """
    place, _, key = option.rpartition(".")

    def likeness(name: str) -> float:
        its_place, _, its_key = name.rpartition(".")
        words, is_near = its_key.split("_"), place == its_place
        is_short = len(key) > 1 and key == "".join(word[:1] for word in words)
        is_part = len(key) > 2 and is_near and (key in words or its_key.startswith(key))
        is_end = len(its_key) > 2 and key.endswith(f"_{its_key}")
        alike = 1.0 if key == its_key else difflib.SequenceMatcher(None, key, its_key).ratio()
        alike = max(alike, 0.85 * (is_short or is_part or is_end))
        return alike + 0.1 * is_near if alike >= (0.7 if is_near else 0.85) else 0.0

    found = sorted(((likeness(name), -name.count("."), name) for name in names), reverse=True)
    best = found[0][0] if found else 0.0
    return [name for like, _, name in found if best and like > best - 0.05][:SUGGESTED]


def _join(option: str, key: str) -> str:
    return f"{option}.{key}" if option else key
