"""`python -m src.measure`: what teacher, student and exported files cost on this processor. `--help` is the guide."""

import json
import logging
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from src.analysis import figures
from src.analysis.predictions import macs
from src.command import job, run_command
from src.config import check_ranges
from src.data.image_data import ImageData
from src.errors import UserError
from src.evaluate import load, read_teacher
from src.export import (
    BATCH,
    Answer,
    Form,
    accuracy,
    answers,
    classifier,
    describe,
    export,
    load_form,
    some_test_images,
    some_training_images,
    write,
)
from src.loading import find_teacher, load_teacher
from src.run import write_text
from src.teacher import Teacher

log = logging.getLogger(__name__)

COLUMNS = ("form", "top-1", "parameters", "MACs", "file", "1 image", "quartiles", f"{BATCH} images", "quartiles",
           "images/s", "memory")  # fmt: skip
PRINTED = (0, 1, 5, 7, 10)
"""What fits into a terminal; the file has all columns."""
NOTE = (
    "{networks}. top-1: % of {images:,} test images. MACs: multiply-accumulates of an image, by torch's counter. "
    "1 image, {batch} images: median time of {rounds} rounds on {threads} thread(s) of {processor}; the ratio to the "
    "first line is the median, with quartiles, of the rounds' own, all forms in turn in one process. images/s: at "
    "{batch}. memory: what the file and {batch} images add to the peak of a process that has imported the runtime "
    "({bases}); of a network in torch, by its TorchScript file."
)
CALLS = 8
PEAK = """
import sys, resource, numpy as np
def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with open("/proc/self/status") as status:  # Linux's ru_maxrss knows the parent's peak too
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6
file, kind, images = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
if kind == "onnx":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
else:
    import torch, torch.export
    torch.set_num_threads(1)
before = peak()
if kind == "onnx":
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run(None, {"images": images})
else:
    program = torch.export.load(file).module() if kind == "exported_program" else torch.jit.load(file)
    with torch.no_grad():
        program(torch.from_numpy(images))
print(before, peak())
"""
"""A process of its own, since a process never forgets its peak."""


class Contender(NamedTuple):
    """One form of one network."""

    name: str
    answer: Answer
    file: Path
    network: str
    """`teacher` or `student`."""
    runtime: str


class Row(NamedTuple):
    """What was measured of a form."""

    name: str
    network: str
    accuracy: float
    parameters: int
    macs: int
    file_bytes: int
    seconds: dict[int, float]
    """By batch size, the median of a call."""
    ratios: dict[int, tuple[float, float, float]]
    """By batch size, quartiles of the time over the baseline's of the same round."""
    memory: float
    """MB (10^6 bytes) above the imported runtime."""


class TeacherModule(nn.Module):
    """A teacher as a module from uint8 images to the logits of the data's classes, with all that it does to images."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.network, self.teacher = teacher.network, teacher

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.teacher.logits(images)


def find(cfg: DictConfig, run_cfg: DictConfig, data: ImageData) -> Teacher | None:
    """The teacher of a run, or the one that the command names for a checkpoint; None where there is none.

    Raises `UserError` where it is not found, or is not the one that taught.
    """
    about = read_teacher(Path(cfg.run).expanduser()) if cfg.run else None
    if about is not None:
        library = about["source"] == run_cfg.teacher.source
        run_cfg.teacher.path = cfg.teacher.path or (None if library else about["source"])
    elif cfg.run or (cfg.teacher.path is None and cfg.teacher.source is None):
        return None
    run_cfg.teacher.winograd = False  # what is exported is made of torch's own convolutions
    path = find_teacher(run_cfg)
    teacher = load_teacher(run_cfg, data, path)
    if about is not None and teacher.digest != about["sha256"]:
        raise UserError(f"{path or about['source']} is not the teacher of {cfg.run}: give that by teacher.path=FILE.")
    return teacher


def interleaved(forms: Sequence[Answer], images: Tensor, batch: int, rounds: int) -> np.ndarray:
    """Seconds a call on `batch` images, [rounds, forms]; each round times every form, in up to CALLS calls."""
    batches = images[:BATCH].split(batch)[:CALLS]
    seconds = np.empty((rounds, len(forms)))
    with torch.no_grad():
        for answer in forms:
            answer(batches[0])  # the first call plans and allocates
        for round_number in range(rounds):
            for place, answer in enumerate(forms):
                start = time.perf_counter()
                for part in batches:
                    answer(part)
                seconds[round_number, place] = (time.perf_counter() - start) / len(batches)
    return seconds


def memory(contender: Contender, torchscript: Path, images: Path) -> tuple[float, float]:
    """Peak MB of a process after it has imported the runtime, and after it has loaded the file and answered."""
    kind = "torchscript" if contender.runtime == "torch" else contender.runtime
    file = torchscript if contender.runtime == "torch" else contender.file
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, file, kind, images], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise UserError(f"{contender.name} fails in a process of its own: {ran.stderr.strip().splitlines()[-1:]}")
    before, after = map(float, ran.stdout.split())
    return before, after


def parse(form: str) -> Form:
    """`onnx`, `onnx-int8`, ... Raises `UserError` where there is no such form, or it cannot run by itself."""
    name, _, precision = form.partition("-")
    if name == "safetensors":
        raise UserError("forms=[safetensors] has nothing to time: it holds weights alone.")
    return Form.parse(name, precision or "float32")


def measure(cfg: DictConfig) -> tuple[list[Row], str]:
    """The rows, the baseline first, and the note on how they were made."""
    forms = [parse(form) for form in cfg.forms]
    run_cfg, distiller, data = load(cfg)
    teacher = find(cfg, run_cfg, data)
    student = classifier(distiller)
    images, target = some_test_images(data, max(cfg.images, BATCH))
    torch.set_num_threads(cfg.threads)
    ours = answers(student, images)
    facts = describe(cfg, run_cfg, distiller, data)
    calibration = some_training_images(data, cfg.calibration_images)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "images.npy", images[:BATCH].numpy())
        networks: dict[str, nn.Module] = {}
        contenders: list[Contender] = []
        if teacher is not None:
            networks["teacher"] = TeacherModule(teacher).eval()
        networks["student"] = student
        for role, network in networks.items():
            weights, script = folder / f"{role}.safetensors", folder / f"{role}.pt"
            write(network, weights, Form("safetensors", "float32"), images, {})
            write(network, script, Form("torchscript", "float32"), images, {})
            contenders.append(Contender(f"{role}, torch", torch.no_grad()(network), weights, role, "torch"))
            # the teacher also by the runtime of the exports: what is gained by it is no gain of distillation
            wanted = forms if role == "student" else [form for form in forms if form == ("onnx", "float32")]
            for form in wanted:
                file = folder / f"{role}-{form.file_name}"
                if role == "student":
                    export(student, file, form, calibration, facts, images, ours)
                else:
                    write(network, file, form, images, {})
                answer = load_form(file, form, network, cfg.threads)
                contenders.append(Contender(f"{role}, {form}", answer, file, role, form.format))
        log.info("Timing %d forms, %d rounds.", len(contenders), cfg.rounds)
        calls = [contender.answer for contender in contenders]
        seconds = {batch: interleaved(calls, images, batch, cfg.rounds) for batch in (1, BATCH)}
        peaks = [memory(c, folder / f"{c.network}.pt", folder / "images.npy") for c in contenders]
        counted = {
            role: (sum(p.numel() for p in network.parameters()), macs(network, images[:1]))
            for role, network in networks.items()
        }
        rows = [
            Row(
                name=contender.name,
                network=contender.network,
                accuracy=accuracy(answers(contender.answer, images), target),
                parameters=counted[contender.network][0],
                macs=counted[contender.network][1],
                file_bytes=contender.file.stat().st_size,
                seconds={batch: float(np.median(times[:, place])) for batch, times in seconds.items()},
                ratios={batch: quartiles(times[:, place] / times[:, 0]) for batch, times in seconds.items()},
                memory=peaks[place][1] - peaks[place][0],
            )
            for place, contender in enumerate(contenders)
        ]
    bases = {"onnxruntime" if c.runtime == "onnx" else "torch": p[0] for c, p in zip(contenders, peaks, strict=True)}
    described = [f"{role}: {run_cfg.model[role].name}" for role in networks]
    note = NOTE.format(
        networks="; ".join(described), images=len(images), rounds=cfg.rounds, threads=cfg.threads,
        processor=processor(), batch=BATCH, bases=", ".join(f"{name} {peak:.0f} MB" for name, peak in bases.items()),
    )  # fmt: skip
    return rows, note


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """25 %, 50 % and 75 %."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def processor() -> str:
    """Its name, where the system tells."""
    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return named[0].partition(": ")[2].strip() if named else platform.processor() or platform.machine()


def cells(row: Row, baseline: Row) -> list[str]:
    """The table's texts."""

    def of(value: float, whole: float) -> str:
        return "" if row is baseline else f", {value / whole:.2g}x"

    def timed(batch: int) -> list[str]:
        low, middle, high = row.ratios[batch]
        time = 1e3 * row.seconds[batch]
        milliseconds = f"{time:,.0f} ms" if time >= 100 else f"{time:.3g} ms"
        return [milliseconds, ""] if row is baseline else [f"{milliseconds}, {middle:.2g}x", f"{low:.2g} to {high:.2g}"]

    return [
        row.name,
        f"{100 * row.accuracy:.1f}",
        f"{row.parameters / 1e3:,.0f}k{of(row.parameters, baseline.parameters)}",
        f"{row.macs / 1e6:,.1f}M{of(row.macs, baseline.macs)}",
        f"{row.file_bytes / 1e3:,.0f} kB{of(row.file_bytes, baseline.file_bytes)}",
        *timed(1),
        *timed(BATCH),
        f"{BATCH / row.seconds[BATCH]:,.0f}",
        f"{row.memory:,.0f} MB{of(row.memory, baseline.memory)}",
    ]


def markdown(rows: Sequence[Row], note: str) -> str:
    """The table with what it was made of."""
    lines = [cells(row, rows[0]) for row in rows]
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines), "", note]) + "\n"


@hydra.main(version_base="1.3", config_path="../conf", config_name="measure")
@job
def main(cfg: DictConfig) -> None:
    """Print the table, write it and the figure."""
    check_ranges(cfg)
    rows, note = measure(cfg)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place in PRINTED:
        table.add_column(COLUMNS[place], justify="right" if place else "left", no_wrap=True)
    for row in rows:
        texts = cells(row, rows[0])
        table.add_row(*(texts[place] for place in PRINTED))
    Console().print(table)
    Console().print(note, style="dim")
    out = Path(cfg.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", markdown(rows, note))
    write_text(out / "measured.json", json.dumps({"rows": [row._asdict() for row in rows], "note": note}, indent=2))
    points = {row.name: (1e3 * row.seconds[1], row.ratios[1], 100 * row.accuracy) for row in rows}
    picture = figures.save(figures.accuracy_against_latency(points), out / "accuracy_latency.png")
    log.info("Written: %s, %s, %s", out / "table.md", out / "measured.json", picture)


if __name__ == "__main__":
    run_command(main)
