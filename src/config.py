"""The typed part of the configuration, its resolvers, and how its nodes become objects."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import pydantic
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from src.errors import UserError

METHOD_FACTS = {"year", "uses", "settings", "pairs", "standardized"}
"""Keys of a method that tell about it, or that its other keys are read from."""
FACTS = {
    "_target_",
    "_partial_",
    "name",
    "learning_rate",
    "published_accuracy",
    "mean",
    "std",
    "weights",
} | METHOD_FACTS
"""Keys of a node that describe it and are no arguments of what it builds."""
POSITIVE = (
    "schedule.epochs", "schedule.batch_size", "schedule.learning_rate", "trainer.max_epochs", "data.image_size",
    "data.resize", "teacher.image_size", "images", "calibration_images", "rounds", "threads",
)  # fmt: skip
CHOICES = {
    "schedule.interval": ("epoch", "step"),
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed"),
    "teacher.precision": (None, "float32", "bfloat16"),
    "teacher.answer_dtype": ("float32", "float16"),
}
NOT_NEGATIVE = ("data.padding", "data.workers", "gradients.every", "checkpoint_minutes")


@dataclass
class Data:
    """A source of images and how they are split and fed."""

    name: str = MISSING
    root: str = "${oc.env:AEKT_DATA,data}"
    train_size: int | None = None
    val_size: int = 0
    split_seed: int = 0
    workers: int = 0
    mean: list[float] | None = None
    std: list[float] | None = None
    flip: bool = True


@dataclass
class ArrayData(Data):
    """Images in memory."""

    _target_: str = "src.data.array_data.ArrayData"
    prepare: Any = None
    path: str | None = None
    padding: int = 4


@dataclass
class FolderData(Data):
    """Photos in folders."""

    _target_: str = "src.data.folder_data.FolderData"
    workers: int = "${processors:}"  # type: ignore[assignment]
    image_size: int = 224
    resize: int = 256
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])


@dataclass
class StreamData(FolderData):
    """Photos in shards."""

    _target_: str = "src.data.stream_data.StreamData"
    cache: str = "~/.cache/aekt"
    cache_gigabytes: float = 100


@dataclass
class Schedule:
    """How long and with which optimiser."""

    epochs: int = MISSING
    batch_size: int = MISSING
    learning_rate: float = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    interval: str = MISSING
    distillation_warmup: float = MISSING


@dataclass
class Teacher:
    """Where the teacher comes from."""

    path: str | None = None
    source: str | None = "${oc.select:model.teacher.weights,null}"
    allow_program: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None
    store: str = "teachers"
    train_if_missing: bool = True
    precision: str | None = None
    fold: bool = False
    winograd: bool = False
    view_store: bool = False
    answer_dtype: str = "float32"
    store_gigabytes: float = 100
    seed: int = 0
    method: Any = MISSING
    serialization: Any = MISSING


@dataclass
class Student:
    """Where the student starts."""

    path: str | None = None
    source: str | None = None


@dataclass
class Gradients:
    """What is measured of the gradients at the logits (`src/analysis/gradients.py`)."""

    every: int = 100
    temperature: float = "${oc.select:method.temperature,1.0}"  # type: ignore[assignment]


@dataclass
class Train:
    """`conf/train.yaml`; groups that are left open here are checked by what they build."""

    data: Any = MISSING
    model: Any = MISSING
    method: Any = MISSING
    also: Any = None
    serialization: Any = MISSING
    schedule: Schedule = field(default_factory=Schedule)
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    gradients: Gradients = field(default_factory=Gradients)
    trainer: Any = MISSING
    logger: Any = MISSING
    averaging: Any = None
    standardize_logits: bool = False
    seed: int = 0
    channels_last: bool = True
    compile: bool = False
    winograd: bool = False
    runs: str = "runs"
    checkpoint_minutes: float = 10
    start_over: bool = False


@dataclass
class Evaluate(Train):
    """`conf/evaluate.yaml`: one of the two is given."""

    run: str | None = None
    checkpoint: str | None = None


@dataclass
class Export(Evaluate):
    """`conf/export.yaml`."""

    format: str = MISSING
    precision: str = MISSING
    out: str | None = None
    images: int = MISSING
    calibration_images: int = MISSING


@dataclass
class Measure(Evaluate):
    """`conf/measure.yaml`."""

    forms: list[str] = MISSING
    out: str = MISSING
    images: int = MISSING
    calibration_images: int = MISSING
    rounds: int = MISSING
    threads: int = MISSING


def _scaled(epoch: int, of: int, epochs: int) -> int:
    """An epoch of a published schedule of `of` epochs, at the same fraction of `epochs`."""
    return round(epoch * epochs / of)


def _stem(path: str | None, without: str) -> str:
    """The name of a file or folder without its suffix."""
    return without if path is None else Path(path).stem or without


def _of_pair(constant: str, default: Any, *, _parent_: Any, _root_: Any) -> Any:
    """A method's constant for the pair of networks, from the table `pairs` beside it; `default` where that has none.

    With standardized logits the table `standardized` comes first, with the row `default` for pairs that it lacks.
    """
    pairs = _parent_.get("pairs") or {}
    found = {constant: default, **pairs.get(_root_.model.name, {})}
    if _root_.standardize_logits and (standardized := _parent_.get("standardized")):
        found |= {**standardized.default, **standardized.get(_root_.model.name, {})}
    return found[constant]


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


OmegaConf.register_new_resolver("scaled", _scaled, replace=True)
OmegaConf.register_new_resolver("of_pair", _of_pair, replace=True)
OmegaConf.register_new_resolver("stem", _stem, replace=True)
OmegaConf.register_new_resolver("processors", _processors, replace=True)
OmegaConf.register_new_resolver("terminal", lambda: sys.stderr.isatty(), replace=True)
ConfigStore.instance().store("train_schema", Train)
for kind, schema in (("arrays", ArrayData), ("folder", FolderData), ("stream", StreamData)):
    ConfigStore.instance().store(kind, schema, group="data_schema")
ConfigStore.instance().store("evaluate_schema", Evaluate)
ConfigStore.instance().store("export_schema", Export)
ConfigStore.instance().store("measure_schema", Measure)


def check_ranges(cfg: DictConfig) -> None:
    """Numbers of the right type that would train forever, backwards or not at all. Raises `UserError`."""
    for option in (*POSITIVE, *NOT_NEGATIVE):
        value = OmegaConf.select(cfg, option)
        lowest = "be positive" if option in POSITIVE else "not be negative"
        if isinstance(value, (int, float)) and (value < 0 or (value == 0 and option in POSITIVE)):
            raise UserError(f"{option}={value} does not fit: it must {lowest}.")
    for option, known in CHOICES.items():
        if (value := OmegaConf.select(cfg, option)) not in known:
            raise UserError(f"{option}={value} does not fit: it is {' or '.join(map(str, known))}.")
    for option in ("data.mean", "data.std", "teacher.mean", "teacher.std"):
        value = OmegaConf.select(cfg, option)
        if value is not None and len(value) != 3:
            raise UserError(f"{option}={value} does not fit: give one number for each of 3 channels.")
    _check_winograd(cfg)


def _check_winograd(cfg: DictConfig) -> None:
    if cfg.winograd and cfg.compile:
        raise UserError("winograd=true is not for a student of compile=true: leave one of them out.")
    precisions = {"winograd": cfg.trainer.precision, "teacher.winograd": cfg.teacher.precision or cfg.trainer.precision}
    for option, precision in precisions.items():
        if OmegaConf.select(cfg, option) and precision not in ("32-true", "float32"):
            raise UserError(f"{option}=true computes in float32 and does not fit the precision {precision}.")


def build(node: DictConfig, group: str, **arguments: Any) -> Any:
    """Call a node's `_target_` with its keys and `arguments`, after checking the types that its signature states.

    Raises `UserError` where a value has the wrong type, naming the option, or the target does not exist.
    """
    try:
        target = hydra.utils.get_object(node._target_)
    except ImportError as error:
        raise UserError(f"{group}._target_={node._target_} cannot be imported: {error}") from None
    container: Any = OmegaConf.to_container(node, resolve=True)
    options: dict[str, Any] = {key: value for key, value in container.items() if key not in FACTS}
    hints = _argument_types(target)
    for key, value in options.items():
        if key not in hints:
            raise UserError(f"{group}.{key}={value} is no option of {node._target_}; it knows {', '.join(hints)}.")
        try:
            options[key] = pydantic.TypeAdapter(hints[key]).validate_python(value)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise UserError(f"{group}.{key}={value} does not fit: {problem[0].lower()}{problem[1:]}.") from None
    return target(**options, **arguments)


def _argument_types(target: Any) -> dict[str, Any]:
    """Names and types of the keyword arguments, those of the base classes too."""
    if not isinstance(target, type):
        return get_type_hints(target, include_extras=True)
    hints: dict[str, Any] = {}
    for cls in reversed(target.__mro__):
        if cls.__module__.startswith("src.") and "__init__" in vars(cls):
            hints |= get_type_hints(vars(cls)["__init__"], include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}
