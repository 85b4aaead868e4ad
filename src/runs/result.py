"""The records of a run: `run.json`, written when it starts, and `result.json`, written when it is finished."""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from src.common.errors import UserError
from src.common.files import write_text

START_OVER = "add start_over=true to train again"
Fraction = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """A JSON file of a run folder. Unknown keys are ignored, so that files of later versions can be read."""

    model_config = ConfigDict(strict=True, frozen=True)

    def write(self, file: Path) -> None:
        """Write the values that were set, atomically."""
        write_text(file, json.dumps(self.model_dump(exclude_unset=True), indent=2))


class Metrics(Record):
    """The metrics of one split, as fractions of 1. The NLL is in nats."""

    accuracy: Fraction
    top5: Fraction
    nll: float
    ece: float
    agreement: Fraction | None = None
    """The share of images for which student and teacher predict the same class."""


class BestEpoch(Record):
    """The epoch of the highest accuracy. It is chosen with hindsight."""

    split: str
    epoch: int
    accuracy: Fraction


class Parameters(Record):
    """Numbers of parameters."""

    student: int
    teacher: int | None
    training_only: int
    """Parameters of the method and the serialization layer."""


class TeacherFacts(Record):
    """The identity of a teacher, its normalisation, and its metrics on the test images."""

    name: str
    source: str | None = None
    """Its file, or the library that has its weights."""
    sha256: str
    """Digest of its weights."""
    key: Sha256 | None = None
    """Cache key of its answers."""
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None
    class_index: list[int] | None = None
    published_accuracy: float | None = None
    """Top-1, in %."""
    accuracy: Fraction
    top5: Fraction | None = None
    nll: float | None = None
    ece: float | None = None


class Result(Record):
    """`result.json`: the metrics of the last epoch, and separately the best epoch."""

    test: Metrics
    val: Metrics | None = None
    best_epoch: BestEpoch | None
    """None if no epoch was scored."""
    seconds: float
    """Time of training and validation."""
    parameters: Parameters
    data: str
    method: str
    serialization: str
    teacher: TeacherFacts | None
    student: str
    seed: int
    epochs: int
    """Rows of metrics.csv. `trainer.max_steps` or a callback may have cut the last epoch short."""
    epochs_wanted: int | None = None
    """`trainer.max_epochs`. The run trained for less if `trainer.max_steps` or a callback ended it."""
    steps: int | None = None
    """Optimiser steps, if `trainer.max_steps` limited them."""
    train_images: int
    """The training images with a label."""
    unlabelled_images: int = 0
    """The training images without a label."""
    train_duplicates: dict[str, int] | None = None
    """By split, the number of images that are training images too."""
    class_names: list[str]
    superclasses: list[str] | None = None
    """The superclass of each class."""
    settings: dict[str, Any]
    """The part of the configuration that decides the result, without the seed."""

    @property
    def end(self) -> str:
        """Say at which point of its epochs the run ended."""
        if self.steps is not None:
            return f"{self.steps} steps, in epoch {self.epochs} of {self.epochs_wanted}"
        if self.epochs_wanted is not None and self.epochs < self.epochs_wanted:
            return f"epoch {self.epochs} of {self.epochs_wanted}, in which a callback ended the run"
        return "the last epoch"

    @pydantic.model_validator(mode="after")
    def _check_superclasses(self) -> "Result":
        if self.superclasses is not None and len(self.superclasses) != len(self.class_names):
            raise ValueError("superclasses must name one superclass for each class")
        return self


class Fingerprints(Record):
    """Digests of the code, the data and the teacher that a run was made with."""

    code: str
    data: str
    teacher: str | None


class RunRecord(Record):
    """`run.json`: the facts about a run that are known when it starts."""

    fingerprints: Fingerprints
    versions: dict[str, str] = {}
    seed: int
    teacher: TeacherFacts | None = None
    class_names: list[str] = []
    train_duplicates: dict[str, int] | None = None


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(kind: type[AnyRecord], file: Path, advice: str = START_OVER) -> AnyRecord:
    """Read a JSON file of a run folder. Raises `UserError` if it is damaged or lacks a required key."""
    try:
        return kind.model_validate_json(file.read_bytes())
    except pydantic.ValidationError as error:
        raise UserError(f"{file} {describe_damage(error)}: {advice}.") from None


def describe_damage(error: pydantic.ValidationError) -> str:
    """Describe what is wrong with a JSON file, as the end of a sentence that starts with the file's name."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "is damaged (it is not valid JSON)"
    where = ".".join(map(str, first["loc"])) or "the file"
    return f"was not written by a run ({where}: {first['msg'][0].lower()}{first['msg'][1:]})"
