"""Describe an exported file: its metadata, and the model card beside it."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.common.markup import plain
from src.config.names import method_name, serialization_name
from src.data.imagenet import english_names
from src.exporting.checking import Check
from src.exporting.forms import RUNTIMES, Form
from src.runs.fingerprints import versions
from src.runs.identity import run_path
from src.setup.reopen import Opened, read_result, read_teacher

REPORTED = ("test", "epochs", "train_images", "unlabelled_images")
"""Keys of a run's result that are part of the metadata."""
PREDICTED = ("onnx", "executorch")
"""The formats of files that `python -m src.predict` reads."""


def describe(cfg: DictConfig, opened: Opened) -> dict[str, Any]:
    """Collect the metadata: the use of the student, its origin, and its accuracy."""
    run_cfg, distiller, data = opened
    size = list(data.image_shape[1:])
    facts = {
        "network": run_cfg.model.student.name,
        "class_names": english_names(data.class_names),
        "image_size": size,
        "resize": [run_cfg.data.resize] * 2 if "resize" in run_cfg.data else size,
        "mean": list(distiller.settings.mean),
        "std": list(distiller.settings.std),
        "data": {"name": run_cfg.data.name, "digest": data.source.digest[:16]},
        "versions": versions(),
        **dict.fromkeys(("method", "serialization", "teacher", "initial_weights", "seed", *REPORTED)),
    }
    if cfg.run is None:
        return {**facts, "source": Path(cfg.checkpoint).name}
    folder = Path(cfg.run).expanduser().resolve()
    result, teacher = read_result(cfg.run), read_teacher(folder)
    return {
        **facts,
        "source": "/".join([*run_path(run_cfg, {}).parts[-4:-1], folder.name]),  # a moved run has another path
        "method": method_name(run_cfg),
        "serialization": serialization_name(run_cfg),
        "teacher": teacher.model_dump(include={"name", "sha256", "accuracy"}) if teacher else None,
        "initial_weights": _initial_weights(result.settings if result else run_cfg),
        "seed": run_cfg.seed,
        **(result.model_dump(include=set(REPORTED), exclude_unset=True) if result else dict.fromkeys(REPORTED)),
    }


def _initial_weights(settings: Mapping[str, Any]) -> str | None:
    """Return the library's weights that a student started from, as `student.source` names them, if there are any."""
    student = settings.get("student")
    if not isinstance(student, Mapping) or student.get("path") or not student.get("pretrained", True):
        return None
    source = student.get("source")
    return source if isinstance(source, str) else None


def model_card(file: Path, form: Form, metadata: Mapping[str, Any], check: Check, usage: str = "") -> str:
    """Write the model card, in Markdown. `usage` replaces the lines that say how the file is used."""
    rows = {**_use_rows(file, form, metadata), **_accuracy_rows(form, metadata, check), **_origin_rows(metadata)}
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    if form.format in PREDICTED:
        usage = f"\n    python -m src.predict {file.name} image.png\n"
    use = f"\n## Use\n{usage}" if usage else ""
    title = f"# {plain(metadata['network'])} for {plain(metadata['data']['name'])}\n\n"
    names = plain(", ".join(metadata["class_names"]))
    return f"{title}| | |\n|---|---|\n" + "\n".join(lines) + f"\n{use}\n## Classes\n\n{names}\n"


def _use_rows(file: Path, form: Form, metadata: Mapping[str, Any]) -> dict[str, str]:
    height, width = metadata["image_size"]
    resize_height, resize_width = metadata["resize"]
    numbers = f"mean {metadata['mean']}, std {metadata['std']} of pixels between 0 and 1"
    weights_alone = form.format == "safetensors"
    batch, note = ("1", "one image per call") if form.format == "executorch" else ("batch", "any batch size")
    pixels = f"float, normalised by {numbers}" if weights_alone else f"uint8, 0 to 255, normalised inside by {numbers}"
    return {
        "file": f"`{file.name}`: {form.format}, {form.precision}, {file.stat().st_size:,} bytes, sha256 "
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}",
        "network": plain(metadata["network"]) + (" (weights alone)" if weights_alone else ""),
        "input": f"`images` [{batch}, 3, {height}, {width}], {note}, RGB, {pixels}",
        "pictures": f"resized to cover {resize_width} x {resize_height} pixels, then cropped to the central {width} x "
        f"{height}",
        "output": f"`logits` [{batch}, {len(metadata['class_names'])}], before softmax",
    }


def _accuracy_rows(form: Form, metadata: Mapping[str, Any], check: Check) -> dict[str, str]:
    test, runtime = metadata["test"], RUNTIMES[form.format]
    reported = f"{100 * test['accuracy']:.2f} % of the test images, as the run reported; " if test else ""
    return {
        "top-1": f"{reported}{100 * check.accuracy:.2f} % by this file on {check.images:,} test images, "
        f"{100 * check.student_accuracy:.2f} % by the student in torch",
        "checked": f"by {runtime} {version(runtime)}: {check}",
    }


def _origin_rows(metadata: Mapping[str, Any]) -> dict[str, str]:
    data = "{name} (digest {digest})".format(**metadata["data"])
    rows = {"from": plain(metadata["source"]), "data": plain(data)}
    if metadata["method"]:
        rows["trained by"] = plain("{method}, serialization {serialization}, seed {seed}".format(**metadata))
    if metadata["test"]:
        rows["trained by"] += ", {epochs} epochs of {train_images:,} images".format(**metadata)
        if metadata.get("unlabelled_images"):
            rows["trained by"] += " with labels and {unlabelled_images:,} without".format(**metadata)
    if epochs := metadata.get("finetune_epochs"):
        rows["fine-tuned"] = f"{epochs} epochs of quantisation-aware training by the same method"
    if teacher := metadata["teacher"]:
        rows["teacher"] = (
            f"{plain(teacher['name'])}, top-1 {100 * teacher['accuracy']:.2f} %, sha256 {teacher['sha256']}"
        )
    if metadata["initial_weights"]:
        rows["initial weights"] = f"those of {plain(metadata['initial_weights'])}"
    rows["versions"] = ", ".join(f"{name} {number}" for name, number in metadata["versions"].items())
    return rows
