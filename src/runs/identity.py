"""The identity of a run: the part of its configuration that decides its result, and the folder named after it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.common.files import file_digest
from src.common.secrecy import plain_config
from src.config.names import method_name, needs_teacher, serialization_name, teacher_is_program
from src.config.schema import (
    MethodOptions,
    NetworkOptions,
    StudentOptions,
    TeacherOptions,
    TrainerOptions,
    TrainOptions,
    data_schema,
    marked,
)


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of a configuration that decides the result, as plain types."""
    decides: dict[str, Any] = _without_marked(plain_config(cfg), TrainOptions)
    for group, schema in (
        ("data", data_schema(cfg.data._target_)),
        ("trainer", TrainerOptions),
        ("teacher", TeacherOptions),
        ("student", StudentOptions),
        ("method", MethodOptions),
        ("also", MethodOptions),
    ):
        decides[group] = _without_marked(decides[group], schema)
    decides["teacher"]["method"] = _without_marked(decides["teacher"]["method"], MethodOptions)
    for role, network in decides["model"].items():
        if role in ("student", "teacher"):
            decides["model"][role] = _without_marked(network, NetworkOptions)
    if decides["data"].get("unlabelled") not in (None, "rest"):  # the digest of the data tells folders apart
        decides["data"]["unlabelled"] = "a folder"
    if decides["trainer"].get("sync_batchnorm"):  # with it, several devices compute the same as one device
        del decides["trainer"]["sync_batchnorm"]
    if not needs_teacher(cfg):
        decides["model"] = {"student": decides["model"]["student"]}
        del decides["teacher"]
    elif teacher_is_program(cfg):  # a program is named after its file, whose content counts
        del decides["model"]["teacher"]["name"]
    for group, options in (("teacher", TeacherOptions), ("student", StudentOptions)):
        for option in set(marked(options, "by_content")) & decides.get(group, {}).keys():
            decides[group][option] = _content(cfg[group][option], decides[group][option])
    return decides


def _content(path: str | None, name: str | None) -> str | None:
    """Return the digest of a file, so that a copy of it is the same setting.

    Returns `name`, the path without secrets, for a file that cannot be read: whoever opens it reports that.
    """
    if path is None:
        return None
    try:
        return f"sha256:{file_digest(Path(path).expanduser())[:16]}"
    except OSError:
        return name


def _without_marked(options: Any, schema: type) -> Any:
    """Drop the options that cannot change a result, and added options that have their default.

    A group that is switched off stays None.
    """
    if options is None:
        return None
    added = [option for option in fields(schema) if option.metadata.get("added")]
    unchanged = {option.name for option in added if options.get(option.name) == _default(option)}
    dropped = {*marked(schema, "no_effect"), *unchanged}
    return {name: value for name, value in options.items() if name not in dropped}


def _default(option: Field[Any]) -> Any:
    """Return the default of an option as plain types. The default of a group is a dataclass."""
    return option.default if option.default_factory is MISSING else asdict(option.default_factory())


def setting_digest(cfg: DictConfig) -> str:
    """Return a digest of the identity without the seed, which the repetitions of a setting share."""
    decides = {name: value for name, value in identity(cfg).items() if name != "seed"}
    return _digest(decides)


def _digest(decides: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]


def run_path(cfg: DictConfig, decides: Mapping[str, Any] | None = None) -> Path:
    """Return `<runs>/<data>/<pair or network>/<method>/<serialization>-seed<seed>-<digest of the identity>`.

    `decides` is the identity, if it is known already.
    """
    pair = cfg.model.name if needs_teacher(cfg) else cfg.model.student.name
    decides = identity(cfg) if decides is None else decides
    run = f"{serialization_name(cfg)}-seed{cfg.seed}-{_digest(decides)}"
    return Path(cfg.runs).expanduser().joinpath(cfg.data.name, pair, method_name(cfg), run)
