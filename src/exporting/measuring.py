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
from src.exporting import peak_memory
from src.exporting.card import describe
from src.exporting.checking import (
    accuracy,
    export_checked,
    predict_in_batches,
    sample_test_images,
    sample_training_images,
)
from src.exporting.forms import BATCH, Classifier, Form, Predictor, load_form, make_classifier, write_form
from src.setup.reopen import Opened, open_run_or_checkpoint, read_teacher
from src.setup.teacher import find_teacher, load_teacher
from src.teachers.teacher import Teacher
from src.training.summary import parameter_count

log = logging.getLogger(__name__)

NOTE = (
    "{networks}. top-1: % of {images:,} test images. MACs: multiply-accumulates of an image, by torch's counter. "
    "1 image, {batch} images: median time of {rounds} rounds on {threads} thread(s) of {processor}. The ratio to the "
    "first line is the median of the ratios of all rounds, with quartiles. Each round times all forms in one process. "
    "images/s: with {batch} images per call. memory: the peak memory that the file and {batch} images add to a "
    "process that has imported the runtime ({bases}). For a network in torch, this is the memory of its TorchScript "
    "file."
)
CALLS = 8
"""The largest number of calls that one round times for each form."""


class Contender(NamedTuple):
    """One form of one network."""

    name: str
    predictor: Predictor
    file: Path
    network: str
    """`teacher` or `student`."""
    runtime: str


class Row(NamedTuple):
    """The measurements of one form."""

    name: str
    network: str
    accuracy: float
    parameters: int
    macs: int
    file_bytes: int
    seconds: dict[int, float]
    """By batch size, the median time of a call."""
    ratios: dict[int, tuple[float, float, float]]
    """By batch size, the quartiles of the time divided by the baseline's time in the same round."""
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
    """Read names such as `onnx` and `onnx-int8`. Raises `UserError` for a form that does not exist or cannot run."""
    forms = []
    for name in names:
        format_name, _, precision = name.partition("-")
        if format_name in ("safetensors", "hub"):
            raise UserError(
                f"forms=[{format_name}] cannot be timed, because such a file holds weights alone: leave it out."
            )
        forms.append(Form.parse(format_name, precision or "float32"))
    return forms


def measure(cfg: DictConfig) -> tuple[list[Row], str]:
    """Measure all forms. Returns their rows, the baseline first, and a note on how they were measured."""
    forms = parse_forms(cfg.forms)
    opened = open_run_or_checkpoint(cfg)
    teacher = load_original_teacher(cfg, opened)
    images, target = sample_test_images(opened.data, max(cfg.images, BATCH))
    torch.set_num_threads(cfg.threads)
    networks: dict[str, nn.Module] = {"teacher": TeacherModule(teacher).eval()} if teacher else {}
    networks["student"] = make_classifier(opened.distiller)
    with tempfile.TemporaryDirectory() as name:
        place = Workplace(Path(name), images, target)
        np.save(place.images_file, images[:BATCH].numpy())
        contenders = write_contenders(cfg, opened, networks, forms, place)
        log.info("Timing %d forms, %d rounds.", len(contenders), cfg.rounds)
        calls = [contender.predictor for contender in contenders]
        seconds = {batch: time_interleaved(calls, images, batch, cfg.rounds) for batch in (1, BATCH)}
        peaks = [measure_memory(contender, place) for contender in contenders]
        rows = make_rows(contenders, networks, place, seconds, peaks)
    bases = {"onnxruntime" if c.runtime == "onnx" else "torch": p[0] for c, p in zip(contenders, peaks, strict=True)}
    note = NOTE.format(
        networks="; ".join(f"{role}: {opened.cfg.model[role].name}" for role in networks),
        images=len(images),
        rounds=cfg.rounds,
        threads=cfg.threads,
        processor=processor_name(),
        batch=BATCH,
        bases=", ".join(f"{name} {peak:.0f} MB" for name, peak in bases.items()),
    )
    return rows, note


def load_original_teacher(cfg: DictConfig, opened: Opened) -> Teacher | None:
    """Load the teacher of a run, or the teacher that the command names for a checkpoint. Returns None without one.

    Raises `UserError` if it is not found, if it is not the teacher that the run had, or if it is a program and the
    command does not set `teacher.allow_program=true`.
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

    If the student is measured in ONNX, the teacher is too: a runtime's gain is not a gain of distillation.
    """
    facts = describe(cfg, opened)
    calibration = sample_training_images(opened.data, cfg.calibration_images)
    student_logits = predict_in_batches(networks["student"], place.images)
    contenders = []
    for role, network in networks.items():
        weights = place.folder / f"{role}.safetensors"
        write_form(network, weights, Form("safetensors", "float32"), place.images, {})
        write_form(network, _torchscript_file(role, place), Form("torchscript", "float32"), place.images, {})
        contenders.append(Contender(f"{role}, torch", torch.no_grad()(network), weights, role, "torch"))
        for form in forms if role == "student" else [form for form in forms if form == ("onnx", "float32")]:
            file = place.folder / f"{role}-{form.file_name}"
            if isinstance(network, Classifier):
                export_checked(network, file, form, calibration, facts, place.images, student_logits)
            else:
                write_form(network, file, form, place.images, {})
            predictor = load_form(file, form, network, cfg.threads)
            contenders.append(Contender(f"{role}, {form}", predictor, file, role, form.format))
    return contenders


def _torchscript_file(role: str, place: Workplace) -> Path:
    """Name the file that stands for a network in torch when memory is measured."""
    return place.folder / f"{role}.pt"


def make_rows(
    contenders: Sequence[Contender],
    networks: Mapping[str, nn.Module],
    place: Workplace,
    seconds: Mapping[int, np.ndarray],
    peaks: Sequence[tuple[float, float]],
) -> list[Row]:
    """Make a row of each form's measurements.

    `seconds` [rounds, forms] is given by batch size, and `peaks` are the results of `measure_memory`.
    """
    macs = {role: count_macs(network, place.images[:1]) for role, network in networks.items()}
    return [
        Row(
            name=contender.name,
            network=contender.network,
            accuracy=accuracy(predict_in_batches(contender.predictor, place.images), place.target),
            parameters=parameter_count(networks[contender.network]),
            macs=macs[contender.network],
            file_bytes=contender.file.stat().st_size,
            seconds={batch: float(np.median(times[:, column])) for batch, times in seconds.items()},
            ratios={batch: quartiles(times[:, column] / times[:, 0]) for batch, times in seconds.items()},
            memory=peaks[column][1] - peaks[column][0],
        )
        for column, contender in enumerate(contenders)
    ]


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
    in_torch = contender.runtime == "torch"
    kind = "torchscript" if in_torch else contender.runtime
    file = _torchscript_file(contender.network, place) if in_torch else contender.file
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
