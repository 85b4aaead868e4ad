"""The options of all commands: their types, their defaults, their limits and their marks.

Hydra checks the types when it composes a configuration. The limits are part of the annotations, and
`src/config/validation.py` checks them. Groups typed `Any` are validated by the class that their `_target_` names.

By default, an option is part of a run's identity. The mark `no_effect` makes an exception. The mark `by_content` puts a
file's content into the identity instead of its path. The mark `added` keeps the names of earlier run folders. By
default, a teacher that has to be trained first is trained with the same option as the student. The mark `student_only`
makes an exception.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from src.common.duration import duration


def no_effect(default: Any = MISSING) -> Any:
    """Declare an option that cannot change a result, so that it is not part of a run's identity."""
    return field(default=default, metadata={"no_effect": True})


def student_only(default: Any) -> Any:
    """Declare an option of the student's training alone. A teacher that is trained first gets the default."""
    return field(default=default, metadata={"student_only": True})


def by_content(default: Any = None) -> Any:
    """Declare the path of a file whose content is part of a run's identity. The path itself is not."""
    return field(default=default, metadata={"by_content": True})


def added(default: Any = None, **marks: bool) -> Any:
    """Declare an option that earlier runs did not have. With its default it is not part of a run's identity."""
    return field(default=default, metadata={"added": True, **marks})


def marked(schema: type, mark: str) -> list[str]:
    """List the options of a schema that have a mark: `no_effect`, `student_only`, `by_content` or `added`.

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


def _check_name(name: str) -> str:
    if not name.strip(" .") or any(letter in name for letter in "/\\\0\n"):
        raise ValueError("it is the name of a folder, so give one without slashes")
    return name


def _check_max_steps(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("give a positive number of steps, or -1 for no limit")
    return value


def _check_fast_dev_run(value: Any) -> Any:
    if value:
        raise ValueError("it saves no checkpoint, so it cannot make a run; use trainer=debug")
    return value


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _check_function(value: Any) -> Any:
    if value is not None and not _is_call(value):
        raise ValueError("give a function as {_target_: NAME, _partial_: true}")
    return value


def _check_strategy(value: Any) -> Any:
    if isinstance(value, dict) and not _is_call(value):
        raise ValueError("give its name, or its class as {_target_: NAME}")
    return value


def _check_callbacks(value: Any) -> Any:
    if not isinstance(value or [], list) or not all(map(_is_call, value or ())):
        raise ValueError("give a list of classes, each as {_target_: NAME}")
    if any(str(callback.get("_target_")).endswith(".Timer") for callback in value or ()):
        raise ValueError("Lightning's Timer ends a run for good; use trainer.max_time=HH:MM:SS, which resumes")
    return value


def _check_size(value: float) -> float:
    if isinstance(value, float) and value >= 1:
        raise ValueError("give a whole number of images, or a share below 1")
    return value


def _check_limit(value: float) -> float:
    if value > 1 and value % 1:
        raise ValueError("give a number of batches, or a fraction of all batches between 0 and 1")
    return value


Name = Annotated[str, AfterValidator(_check_name)]
Channels = Annotated[list[float], AfterValidator(_check_channels)]
Share = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[int | float, Field(ge=0), AfterValidator(_check_size)]
Limit = Annotated[NonNegativeFloat, AfterValidator(_check_limit)]
PositiveLimit = Annotated[PositiveFloat, AfterValidator(_check_limit)]


@dataclass
class NetworkOptions:
    """The keys of a file of `conf/network`. All other keys are arguments of its `_target_`."""

    _target_: str
    name: Name
    learning_rate: PositiveFloat
    published_accuracy: dict[str, float] = field(default_factory=dict, metadata={"no_effect": True})
    """Top-1 accuracy in %, by data set."""
    mean: Channels | None = None
    """Normalisation of the published checkpoints. None: that of the data."""
    std: Channels | None = None
    weights: str | None = None
    """The default of `teacher.source` if this network is the teacher."""
    family: str | None = no_effect(None)
    """Tells a network from another of its name, so that methods do not take the other's constants."""


@dataclass
class MethodOptions:
    """The keys of a file of `conf/method`. All other keys are arguments of its `_target_`."""

    _target_: str
    name: Name
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

    name: Name = MISSING
    root: str = no_effect("${oc.env:AEKT_DATA,data}")
    train_size: Size | None = None
    """A number of images, or a share of those that are not held out."""
    val_size: Size = 0
    """A number of images, or a share of them."""
    split_seed: int = 0
    workers: NonNegativeInt = no_effect(0)
    mean: Channels | None = None
    std: Channels | None = None
    flip: bool = True
    fixed_views: PositiveInt | None = added()
    """The number of different views of an image in the whole training. None: a new view in each epoch."""
    wrong_labels: Share = added(0.0)
    """The share of training images that get the label of another class, to study label noise."""
    unlabelled: str | None = added()
    """A folder of training photos without labels, or "rest": the training images that `train_size` leaves out."""
    unlabelled_share: Share | None = added()
    """The share of each batch without labels. None: their share of all training images. 0: they are left unread."""


@dataclass
class ArrayDataOptions(DataOptions):
    """Images in memory (`src/data/array_data.py`)."""

    _target_: str = "src.data.array_data.ArrayData"
    prepare: Annotated[Any, AfterValidator(_check_function)] = no_effect(None)
    path: str | None = no_effect(None)
    padding: NonNegativeInt = 4
    device_memory: Annotated[Any, one_of("auto", True, False)] = no_effect("auto")
    """Keep the images in the memory of the training device. "auto": on a GPU, if they fit."""


@dataclass
class PhotoDataOptions(DataOptions):
    """The options common to photos in folders and in shards."""

    workers: NonNegativeInt = no_effect("${processors:}")
    mean: Channels | None = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: Channels | None = field(default_factory=lambda: [0.229, 0.224, 0.225])
    image_size: PositiveInt = 224
    resize: PositiveInt = 256
    """Length of the short side before the central crop of evaluation, in pixels."""
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Smallest and largest share of a photo's area in a random crop of training."""
    cache: str = no_effect('${oc.env:AEKT_CACHE,"~/.cache/aekt"}')
    """The folder for shards from a URL, and for the results of the check of photos."""


@dataclass
class FolderDataOptions(PhotoDataOptions):
    """Photos in folders (`src/data/folder_data.py`)."""

    _target_: str = "src.data.folder_data.FolderData"
    train_folder: str | None = added()
    """The folders of the splits in `root`. None: train/, and val/ or test/ or both, as they are there."""
    val_folder: str | None = added()
    test_folder: str | None = added()
    skip_corrupt: bool = no_effect(False)
    """Leave out photos that cannot be read. Without it there is no run, so that no two results can differ by it."""


@dataclass
class StreamDataOptions(PhotoDataOptions):
    """Photos in shards (`src/data/stream_data.py`)."""

    _target_: str = "src.data.stream_data.StreamData"
    cache_gigabytes: NonNegativeFloat = no_effect(100)


@dataclass
class AugmentationOptions:
    """The augmentation of training images (`src/data/augmentation.py`). The defaults are conf/augmentation/standard."""

    name: Name = "standard"
    crop_and_flip: bool = True
    policy: Any = None
    policy_from_view: NonNegativeInt = 0
    """The number of the first view that the policy acts on, for methods with several views of each image."""
    mixing: Any = None


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
    limit_train_batches: PositiveLimit | None = None
    """As in Lightning, an integer is a number of batches, 0.5 is half of them, and 1.0 is all of them."""
    limit_val_batches: Limit | None = None
    """0: no validation. The test set is then scored at the end of the run."""
    limit_test_batches: PositiveLimit | None = None
    max_steps: Annotated[int, AfterValidator(_check_max_steps)] = -1
    """A run ends after so many steps if this is before its last epoch. -1: no limit."""
    max_time: Annotated[Any, AfterValidator(duration)] = no_effect(None)
    """The time that a command may train a run. The same command then resumes it."""
    fast_dev_run: Annotated[Any, AfterValidator(_check_fast_dev_run)] = False
    callbacks: Annotated[Any, AfterValidator(_check_callbacks)] = None
    """Callbacks of the main stage, in addition to those of this project."""
    accelerator: Any = no_effect()
    devices: Any = no_effect()
    strategy: Annotated[Any, AfterValidator(_check_strategy)] = no_effect()
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

    path: str | None = by_content()
    source: str | None = "${oc.select:model.teacher.weights,null}"
    allow_program: bool = no_effect(False)
    class_map: str | None = added(by_content=True)
    """A file that names the teacher's class for each class of the data (`src/teachers/class_order.py`)."""
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

    path: str | None = by_content()
    source: str | None = None
    new_head: bool = added(False)
    """Load the file at `path` without its last layer, which is trained from fresh weights."""
    pretrained: bool = added(True)
    """Start from the published weights of `source`. False: its network with fresh weights."""


@dataclass
class GradientOptions:
    """The interval of the rows in `gradients.csv`, and their temperature (`src/training/gradient_anatomy.py`)."""

    every: NonNegativeInt = 100
    temperature: float = "${number:${oc.select:method.temperature,null},1.0}"  # type: ignore[assignment]


@dataclass
class TrainOptions:
    """The options of `conf/train.yaml`."""

    data: Any = MISSING
    model: Any = MISSING
    method: Any = MISSING
    also: Any = student_only(None)
    serialization: Any = MISSING
    augmentation: AugmentationOptions = field(
        default_factory=AugmentationOptions, metadata={"added": True, "student_only": True}
    )
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    optimizer: Any = student_only(None)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    student: StudentOptions = field(default_factory=StudentOptions, metadata={"student_only": True})
    gradients: GradientOptions = field(default_factory=GradientOptions, metadata={"no_effect": True})
    trainer: Any = MISSING
    logger: Any = no_effect()
    averaging: Any = student_only(None)
    standardize_logits: bool = student_only(False)
    label_smoothing: Share = added(0.0, student_only=True)
    """The share of each label that cross-entropy spreads over all classes. A teacher is trained without."""
    keep_best: bool = added(False, student_only=True)
    """Keep the student of the epoch with the highest validation accuracy too (`src/runs/best_student.py`)."""
    class_weights: Annotated[str, one_of("balanced")] | None = added()
    """"balanced": each class has the same total weight in cross-entropy. None: each image."""
    seed: int = 0
    channels_last: bool = True
    compile: bool = False
    tf32: bool = added(True)
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
    finetune_epochs: NonNegativeInt = MISSING


@dataclass
class MeasureOptions(EvaluateOptions):
    """The options of `conf/measure.yaml`."""

    forms: list[str] = MISSING
    out: str = MISSING
    images: PositiveInt = MISSING
    calibration_images: PositiveInt = MISSING
    rounds: PositiveInt = MISSING
    threads: PositiveInt = MISSING


@dataclass
class RelationOptions:
    """The classes whose strongest relations a report draws."""

    classes: list[str] | None = None


@dataclass
class ReportOptions:
    """The options of `conf/report.yaml`."""

    runs: str = MISSING
    out: str = MISSING
    title: str = MISSING
    against: str | None = None
    scores: list[str] = MISSING
    answers: bool = MISSING
    relations: RelationOptions = field(default_factory=RelationOptions)
    data_root: str = MISSING


@dataclass
class ConvertOptions:
    """The options of `conf/convert.yaml`."""

    data: Any = MISSING
    out: str = MISSING


COMMAND_SCHEMAS = {
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
    "export": ExportOptions,
    "measure": MeasureOptions,
    "report": ReportOptions,
    "convert": ConvertOptions,
}
DATA_SCHEMAS = (ArrayDataOptions, FolderDataOptions, StreamDataOptions)


def data_schema(target: str) -> type[DataOptions]:
    """Find the schema of a data node by its `_target_`. Any other class has the options common to all data."""
    return next((schema for schema in DATA_SCHEMAS if schema._target_ == target), DataOptions)


_store = ConfigStore.instance()
for _command, _schema in COMMAND_SCHEMAS.items():
    _store.store(f"{_command}_schema", _schema)
_store.store("array_data_schema", ArrayDataOptions)
_store.store("folder_data_schema", FolderDataOptions)
_store.store("stream_data_schema", StreamDataOptions)
