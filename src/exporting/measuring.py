"""Measure what teacher, student and exported files cost on this processor."""

import logging
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from src.analysis.predictions import count_macs
from src.common.errors import UserError
from src.config.names import teacher_is_program
from src.exporting import peak_memory
from src.exporting.activations import peak_activation_bytes
from src.exporting.card import describe
from src.exporting.checking import (
    accuracy,
    export_checked,
    predict_in_batches,
    sample_test_images,
    sample_training_images,
)
from src.exporting.forms import (
    BATCH,
    RUNTIMES,
    Classifier,
    Form,
    Predictor,
    load_form,
    make_classifier,
    require_runtime,
    write_form,
)
from src.setup.reopen import Opened, open_run_or_checkpoint, read_teacher
from src.setup.teacher import find_teacher, load_teacher
from src.teachers.teacher import Teacher
from src.training.summary import parameter_count

log = logging.getLogger(__name__)

NOTE = (
    "{networks}. top-1: % of {images:,} test images. MACs: multiply-accumulates of an image, by torch's counter. "
    "activations: the largest sum of live activations in a float32 forward pass of one image. 1 image, {batch} images: "
    "median time of {rounds} rounds on {processor}. The ratio to the first line is the median of the ratios of all "
    "rounds, with quartiles. Each round times all forms in one process. ExecuTorch computes {batch} images one by one. "
    "memory: the peak memory that the file and {batch} images add to a process that has imported the runtime "
    "({bases}). For a network in torch, this is the memory of its TorchScript file."
)
TEACHER_FORMS = (("onnx", "float32"), ("executorch", "float32"))
CALLS = 8
"""The largest number of calls that one round times for each form."""


class Contender(NamedTuple):
    """One form of one network."""

    name: str
    module: nn.Module
    file: Path
    network: str
    """`teacher` or `student`."""
    form: Form | None = None
    """None: the module itself, in torch."""

    def load(self, threads: int) -> Predictor:
        """Load the file in its runtime."""
        predictor: Predictor = torch.no_grad()(self.module)
        return predictor if self.form is None else load_form(self.file, self.form, self.module, threads)


class Row(NamedTuple):
    """The measurements of one form."""

    name: str
    network: str
    accuracy: float
    parameters: int
    macs: int
    activation_bytes: int
    file_bytes: int
    seconds: dict[int, dict[int, float]]
    """By number of threads and batch size, the median time of a call."""
    ratios: dict[int, dict[int, tuple[float, float, float]]]
    """Likewise, the quartiles of the time divided by the baseline's time in the same round."""
    memory: float
    """Peak memory in MB (10^6 bytes), minus the peak of a process that has only imported the runtime."""


class Workplace(NamedTuple):
    """A folder for files, and test images, which all measurements share."""

    folder: Path
    images: Tensor
    """uint8 [N, 3, H, W], at least BATCH of them unless the test set is smaller."""
    target: Tensor

    @property
    def images_file(self) -> Path:
        """The first BATCH images, for the process that measures memory."""
        return self.folder / "images.npy"


class TeacherModule(nn.Module):
    """A teacher as a module that maps uint8 images to the logits of the data's classes."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.network, self.teacher = teacher.network, teacher

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, C]."""
        return self.teacher.logits(images)


def parse_forms(names: Sequence[str]) -> list[Form]:
    """Read names such as `onnx` and `onnx-int8`. Raises `UserError` for a form that cannot run."""
    forms = []
    for name in names:
        format_name, _, precision = name.partition("-")
        if format_name in ("safetensors", "hub"):
            raise UserError(
                f"forms=[{format_name}] cannot be timed, because such a file holds weights alone: leave it out."
            )
        forms.append(Form.parse(format_name, precision or "float32"))
        require_runtime(forms[-1])
    return forms


def measure(cfg: DictConfig) -> tuple[list[Row], str]:
    """Measure all forms. Returns their rows, the baseline first, and a note on how they were measured.

    A teacher that is a program is not measured, because not every program can be exported again.
    """
    forms = parse_forms(cfg.forms)
    opened = open_run_or_checkpoint(cfg)
    teacher = None
    if teacher_is_program(opened.cfg):
        log.info("The teacher is a program, so the student is measured alone.")
    else:
        teacher = load_original_teacher(cfg, opened, as_in_training=False)
    images, target = sample_test_images(opened.data, max(cfg.images, BATCH))
    networks: dict[str, nn.Module] = {"teacher": TeacherModule(teacher).eval()} if teacher else {}
    networks["student"] = make_classifier(opened.distiller)
    with tempfile.TemporaryDirectory() as name:
        place = Workplace(Path(name), images, target)
        np.save(place.images_file, images[:BATCH].numpy())
        contenders = write_contenders(cfg, opened, networks, forms, place)
        log.info("Timing %d forms, %d rounds.", len(contenders), cfg.rounds)
        seconds = {threads: time_forms(contenders, images, threads, cfg.rounds) for threads in sorted({1, cfg.threads})}
        peaks = [measure_memory(contender, place) for contender in contenders]
        rows = make_rows(contenders, networks, place, seconds, peaks)
    bases = {RUNTIMES[c.form.format] if c.form else "torch": p[0] for c, p in zip(contenders, peaks, strict=True)}
    note = NOTE.format(
        networks="; ".join(f"{role}: {opened.cfg.model[role].name}" for role in networks),
        images=len(images),
        rounds=cfg.rounds,
        processor=processor_name(),
        batch=BATCH,
        bases=", ".join(f"{name} {peak:.0f} MB" for name, peak in bases.items()),
    )
    return rows, note


def load_original_teacher(cfg: DictConfig, opened: Opened, as_in_training: bool = True) -> Teacher | None:
    """Load the teacher of a run, or the teacher that the command names for a checkpoint. Returns None without one.

    With `as_in_training`, it computes by the run's `teacher.precision` and `teacher.fold`. Raises `UserError` if it is
    not found, if it is not the teacher that the run had, or if it is a program and the command does not set
    `teacher.allow_program=true`.
    """
    run_cfg = opened.cfg.copy()
    facts = read_teacher(Path(cfg.run).expanduser()) if cfg.run else None
    if facts is not None:
        is_library = facts.source == run_cfg.teacher.source
        run_cfg.teacher.path = cfg.teacher.path or (None if is_library else facts.source)
        run_cfg.teacher.class_map = cfg.teacher.class_map or run_cfg.teacher.class_map
        _check_program_is_allowed(cfg, run_cfg)
    elif cfg.run or (cfg.teacher.path is None and cfg.teacher.source is None):
        return None
    run_cfg.teacher.winograd = False  # exported files consist of torch's own operators
    if not as_in_training:
        run_cfg.teacher.update(precision=None, fold=False)
    path = find_teacher(run_cfg)
    teacher = load_teacher(run_cfg, opened.data, path)
    if facts is not None and teacher.digest != facts.sha256:
        raise UserError(
            f"{path or facts.source} is not the teacher of {cfg.run}: give the teacher's file with teacher.path=FILE."
        )
    return teacher


def _check_program_is_allowed(cfg: DictConfig, run_cfg: DictConfig) -> None:
    """Raise `UserError` if the teacher is a program and the command does not allow programs.

    The run's own permission is not enough, because run folders may come from elsewhere.
    """
    if run_cfg.teacher.allow_program and not cfg.teacher.allow_program:
        raise UserError(
            f"The teacher of {cfg.run} is a program ({run_cfg.teacher.path or run_cfg.teacher.source}), and loading it "
            "executes its code: add teacher.allow_program=true if you trust that file."
        )


def write_contenders(
    cfg: DictConfig, opened: Opened, networks: Mapping[str, nn.Module], forms: Sequence[Form], place: Workplace
) -> list[Contender]:
    """Write and load all forms of all networks.

    If the student is measured in ONNX or ExecuTorch, the teacher is too: a runtime's gain is not a gain of
    distillation.
    """
    facts = describe(cfg, opened)
    calibration = sample_training_images(opened.data, cfg.calibration_images)
    student_logits = predict_in_batches(networks["student"], place.images)
    contenders = []
    for role, network in networks.items():
        weights = place.folder / f"{role}.safetensors"
        write_form(network, weights, Form("safetensors", "float32"), place.images, {})
        write_form(network, _torchscript_file(role, place), Form("torchscript", "float32"), place.images, {})
        contenders.append(Contender(f"{role}, torch", network, weights, role))
        for form in forms if role == "student" else [form for form in forms if form in TEACHER_FORMS]:
            file = place.folder / f"{role}-{form.file_name}"
            if isinstance(network, Classifier):
                export_checked(network, file, form, calibration, facts, place.images, student_logits)
            else:
                write_form(network, file, form, place.images, {})
            contenders.append(Contender(f"{role}, {form}", network, file, role, form))
    return contenders


def _torchscript_file(role: str, place: Workplace) -> Path:
    """Name the file that stands for a network in torch when memory is measured."""
    return place.folder / f"{role}.pt"


def make_rows(
    contenders: Sequence[Contender],
    networks: Mapping[str, nn.Module],
    place: Workplace,
    seconds: Mapping[int, Mapping[int, np.ndarray]],
    peaks: Sequence[tuple[float, float]],
) -> list[Row]:
    """Make a row of each form's measurements.

    `seconds` are the results of `time_forms` by number of threads, and `peaks` are the results of `measure_memory`.
    """
    image = place.images[:1]
    macs = {role: count_macs(network, image) for role, network in networks.items()}
    activations = {role: peak_activation_bytes(network, image) for role, network in networks.items()}
    return [
        Row(
            name=contender.name,
            network=contender.network,
            accuracy=accuracy(predict_in_batches(contender.load(1), place.images), place.target),
            parameters=parameter_count(networks[contender.network]),
            macs=macs[contender.network],
            activation_bytes=activations[contender.network],
            file_bytes=contender.file.stat().st_size,
            seconds={
                threads: {batch: float(np.median(times[:, column])) for batch, times in found.items()}
                for threads, found in seconds.items()
            },
            ratios={
                threads: {batch: quartiles(times[:, column] / times[:, 0]) for batch, times in found.items()}
                for threads, found in seconds.items()
            },
            memory=peaks[column][1] - peaks[column][0],
        )
        for column, contender in enumerate(contenders)
    ]


def time_forms(contenders: Sequence[Contender], images: Tensor, threads: int, rounds: int) -> dict[int, np.ndarray]:
    """Time all forms on a number of threads. By batch size: seconds [rounds, forms]."""
    torch.set_num_threads(threads)
    predictors = [contender.load(threads) for contender in contenders]
    return {batch: time_interleaved(predictors, images, batch, rounds) for batch in (1, BATCH)}


def time_interleaved(predictors: Sequence[Predictor], images: Tensor, batch: int, rounds: int) -> np.ndarray:
    """Time calls on `batch` images: seconds [rounds, forms]. Each round times every form, in up to CALLS calls."""
    batches = images[:BATCH].split(batch)[:CALLS]
    seconds = np.empty((rounds, len(predictors)))
    with torch.no_grad():
        for predictor in predictors:
            predictor(batches[0])  # the first call plans and allocates
        for round_number in range(rounds):
            for column, predictor in enumerate(predictors):
                start = time.perf_counter()
                for part in batches:
                    predictor(part)
                seconds[round_number, column] = (time.perf_counter() - start) / len(batches)
    return seconds


def measure_memory(contender: Contender, place: Workplace) -> tuple[float, float]:
    """Return the peak memory in MB of a process that has imported the runtime, and of one that has used the file.

    Raises `UserError` if the process fails.
    """
    form = contender.form
    kind, file = (form.format, contender.file) if form else ("torchscript", _torchscript_file(contender.network, place))
    command: list[str | Path] = [sys.executable, "-W", "ignore", peak_memory.__file__, file, kind, place.images_file]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        reason = [f"exit code {ran.returncode}", *ran.stderr.strip().splitlines()][-1]
        raise UserError(f"{contender.name} fails in a separate process ({reason}): leave this form out of forms=[...].")
    before, after = map(float, ran.stdout.split())
    return before, after


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """Compute the 25 %, 50 % and 75 % quantiles.

    >>> quartiles(np.array([5.0, 1, 2, 3, 4]))
    (2.0, 3.0, 4.0)
    """
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def processor_name() -> str:
    """Return the name of the processor. Falls back to its architecture if the system does not know the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line for line in lines if line.startswith("model name")]
    return named[0].partition(": ")[2].strip() if named else platform.processor() or platform.machine()
