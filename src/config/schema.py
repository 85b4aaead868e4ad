"""The options of all commands: their types, their defaults, their limits and two marks.

Hydra checks the types when it composes a configuration. The limits are part of the annotations, and
`src/config/validation.py` checks them. Groups typed `Any` are validated by the class that their `_target_` names.

By default, an option is part of a run's identity. The mark `no_effect` makes an exception. By default, a teacher that
has to be trained first is trained with the same option as the student. The mark `student_only` makes an exception.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from pydantic import AfterValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


def no_effect(default: Any = MISSING) -> Any:
    """Declare an option that cannot change a result, so that it is not part of a run's identity."""
    return field(default=default, metadata={"no_effect": True})


def student_only(default: Any) -> Any:
    """Declare an option of the student's training alone. A teacher that is trained first gets the default."""
    return field(default=default, metadata={"student_only": True})


def marked(schema: type, mark: str) -> list[str]:
    """List the options of a schema that have a mark: `no_effect` or `student_only`.

    >>> marked(TrainOptions, "no_effect")
    ['gradients', 'logger', 'runs', 'checkpoint_minutes', 'check_loss_every_n_steps', 'start_over']
    """
    return [option.name for option in fields(schema) if option.metadata.get(mark)]


def one_of(*choices: str | bool) -> AfterValidator:
    """Make a validator that allows only these values."""

    def check(value: str | bool) -> str | bool:
        if value not in choices:
            raise ValueError(f"choose one of {', '.join(str(choice).lower() for choice in choices)}")
        return value

    return AfterValidator(check)


def _check_channels(values: list[float]) -> list[float]:
    if len(values) != 3:
        raise ValueError("give one number for each of the 3 channels")
    return values


Channels = Annotated[list[float], AfterValidator(_check_channels)]


@dataclass
class NetworkOptions:
    """The keys of a file of `conf/network`. All other keys are arguments of its `_target_`."""

    _target_: str
    name: str
    learning_rate: PositiveFloat
    published_accuracy: dict[str, float] = field(default_factory=dict, metadata={"no_effect": True})
    """Top-1 accuracy in %, by data set."""
    mean: Channels | None = None
    """Normalisation of the published checkpoints. None: that of the data."""
    std: Channels | None = None
    weights: str | None = None
    """The default of `teacher.source` if this network is the teacher."""


@dataclass
class MethodOptions:
    """The keys of a file of `conf/method`. All other keys are arguments of its `_target_`."""

    _target_: str
    name: str
    year: int | None = no_effect(None)
    uses: str = no_effect("-")
    settings: str = no_effect("-")
    """The source of its constants."""
    pairs: Any = no_effect(None)
    """Constants by pair of networks. The resolver `of_pair` reads them."""
    standardized: Any = no_effect(None)
    """Constants by pair of networks for `standardize_logits=true`."""


@dataclass
class DataOptions:
    """The options common to all data: the location of the images, their splits, and their normalisation."""

    name: str = MISSING
    root: str = no_effect("${oc.env:AEKT_DATA,data}")
    train_size: NonNegativeInt | None = None
    val_size: NonNegativeInt = 0
    split_seed: int = 0
    workers: NonNegativeInt = no_effect(0)
    mean: Channels | None = None
    std: Channels | None = None
    flip: bool = True


@dataclass
class ArrayDataOptions(DataOptions):
    """Images in memory (`src/data/array_data.py`)."""

    _target_: str = "src.data.array_data.ArrayData"
    prepare: Any = no_effect(None)
    path: str | None = no_effect(None)
    padding: NonNegativeInt = 4
    device_memory: Annotated[Any, one_of("auto", True, False)] = no_effect("auto")
    """Keep the images in the memory of the training device. "auto": on a GPU, if they fit."""


@dataclass
class FolderDataOptions(DataOptions):
    """Photos in folders (`src/data/folder_data.py`)."""

    _target_: str = "src.data.folder_data.FolderData"
    workers: NonNegativeInt = no_effect("${processors:}")
    mean: Channels | None = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: Channels | None = field(default_factory=lambda: [0.229, 0.224, 0.225])
    image_size: PositiveInt = 224
    resize: PositiveInt = 256
    """Length of the short side before the central crop of evaluation, in pixels."""
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Smallest and largest share of a photo's area in a random crop of training."""


@dataclass
class StreamDataOptions(FolderDataOptions):
    """Photos in shards (`src/data/stream_data.py`)."""

    _target_: str = "src.data.stream_data.StreamData"
    cache: str = no_effect("~/.cache/aekt")
    cache_gigabytes: NonNegativeFloat = no_effect(100)


@dataclass
class ScheduleOptions:
    """Number of epochs, batch size, optimiser and learning rate."""

    epochs: PositiveInt = MISSING
    batch_size: PositiveInt = MISSING
    learning_rate: PositiveFloat = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    interval: Annotated[str, one_of("epoch", "step")] = MISSING
    distillation_warmup: NonNegativeFloat = MISSING


@dataclass
class TrainerOptions:
    """The arguments of Lightning's Trainer that need a limit or a mark. All others are allowed too."""

    max_epochs: PositiveInt
    precision: Annotated[str, one_of("32-true", "bf16-mixed", "16-mixed")]
    limit_train_batches: PositiveFloat | None = None
    """A number of batches, or a fraction of all batches if it is not an integer."""
    limit_val_batches: PositiveInt | None = None
    """A number of batches. The teacher answers only these batches."""
    limit_test_batches: PositiveFloat | None = None
    accelerator: Any = no_effect()
    devices: Any = no_effect()
    strategy: Any = no_effect()
    num_nodes: Any = no_effect()
    plugins: Any = no_effect()
    use_distributed_sampler: Any = no_effect()
    log_every_n_steps: Any = no_effect()
    enable_progress_bar: Any = no_effect()
    enable_model_summary: Any = no_effect()
    profiler: Any = no_effect()


@dataclass
class TeacherOptions:
    """The source of the teacher, its computation, and its training if it is missing."""

    path: str | None = None
    source: str | None = "${oc.select:model.teacher.weights,null}"
    allow_program: bool = no_effect(False)
    mean: Channels | None = None
    std: Channels | None = None
    image_size: PositiveInt | None = None
    store: str = no_effect("teachers")
    train_if_missing: bool = no_effect(True)
    precision: Annotated[str, one_of("float32", "bfloat16")] | None = None
    fold: bool = False
    winograd: bool = False
    view_store: bool = no_effect(False)
    answer_dtype: Annotated[str, one_of("float32", "float16")] = "float32"
    view_store_gigabytes: NonNegativeFloat = no_effect(100)
    seed: int = 0
    method: Any = MISSING
    serialization: Any = MISSING


@dataclass
class StudentOptions:
    """The source of the student's initial weights."""

    path: str | None = None
    source: str | None = None


@dataclass
class GradientOptions:
    """The interval of the rows in `gradients.csv`, and their temperature (`src/training/gradient_anatomy.py`)."""

    every: NonNegativeInt = 100
    temperature: float = "${oc.select:method.temperature,1.0}"  # type: ignore[assignment]


@dataclass
class TrainOptions:
    """The options of `conf/train.yaml`."""

    data: Any = MISSING
    model: Any = MISSING
    method: Any = MISSING
    also: Any = student_only(None)
    serialization: Any = MISSING
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    optimizer: Any = student_only(None)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    student: StudentOptions = field(default_factory=StudentOptions, metadata={"student_only": True})
    gradients: GradientOptions = field(default_factory=GradientOptions, metadata={"no_effect": True})
    trainer: Any = MISSING
    logger: Any = no_effect()
    averaging: Any = student_only(None)
    standardize_logits: bool = student_only(False)
    seed: int = 0
    channels_last: bool = True
    compile: bool = False
    tf32: bool = True
    winograd: bool = False
    runs: str = no_effect("runs")
    checkpoint_minutes: NonNegativeFloat = no_effect(10)
    check_loss_every_n_steps: PositiveInt | None = no_effect(None)
    start_over: bool = no_effect(False)


@dataclass
class EvaluateOptions(TrainOptions):
    """The options of `conf/evaluate.yaml`. Exactly one of `run` and `checkpoint` must be given."""

    run: str | None = None
    checkpoint: str | None = None


@dataclass
class ExportOptions(EvaluateOptions):
    """The options of `conf/export.yaml`."""

    format: str = MISSING
    precision: str = MISSING
    out: str | None = None
    images: PositiveInt = MISSING
    calibration_images: PositiveInt = MISSING


@dataclass
class MeasureOptions(EvaluateOptions):
    """The options of `conf/measure.yaml`."""

    forms: list[str] = MISSING
    out: str = MISSING
    images: PositiveInt = MISSING
    calibration_images: PositiveInt = MISSING
    rounds: PositiveInt = MISSING
    threads: PositiveInt = MISSING


DATA_SCHEMAS = (ArrayDataOptions, FolderDataOptions, StreamDataOptions)


def data_schema(target: str) -> type[DataOptions]:
    """Find the schema of a data node by its `_target_`. Any other class has the options common to all data."""
    return next((schema for schema in DATA_SCHEMAS if schema._target_ == target), DataOptions)


_store = ConfigStore.instance()
_store.store("train_schema", TrainOptions)
_store.store("evaluate_schema", EvaluateOptions)
_store.store("export_schema", ExportOptions)
_store.store("measure_schema", MeasureOptions)
_store.store("array_data_schema", ArrayDataOptions)
_store.store("folder_data_schema", FolderDataOptions)
_store.store("stream_data_schema", StreamDataOptions)
