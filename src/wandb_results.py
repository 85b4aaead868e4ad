"""What a finished run shows in W&B beside its curves: pictures, tables of classes, and both networks with lineage."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import wandb

from src.analysis.class_relations import relations
from src.analysis.figures import reliability
from src.analysis.predictions import Predictions, predict
from src.analysis.relation_figures import relation_matrices
from src.data.image_data import ImageData
from src.data.imagenet import readable
from src.distiller import Distiller
from src.models.checkpoints import weights_digest

log = logging.getLogger(__name__)


def publish(
    run: wandb.Run,
    distiller: Distiller,
    data: ImageData,
    result: Mapping[str, Any],
    student_file: Path,
    batches: int | None,
) -> None:
    """Add a run's result to it. Whatever W&B raises, the run itself is finished and does not end because of it.

    `batches` limits the test images that are asked about; None: all.
    """
    if run.disabled:
        return
    try:
        run.summary.update(_summary(result))
        _log_classes(run, distiller, data, predict(distiller, data, batches=batches))
        _log_networks(run, distiller, result, student_file)
    except Exception as error:
        log.warning("W&B did not take the run's result (%s): it is in its folder.", str(error).splitlines()[:1])


def _summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers for the table of runs, in which those of the curves stand already."""
    best, teacher = result["best_epoch"], result["teacher"]
    return {
        **{f"last/{name}": value for name, value in result["test"].items()},
        **({f"best_epoch/{name}": value for name, value in best.items()} if best else {}),
        **({"teacher/accuracy": teacher["accuracy"], "teacher/name": teacher["name"]} if teacher else {}),
        "seconds": result["seconds"],
        "parameters": result["parameters"]["student"],
    }


def _log_classes(run: wandb.Run, distiller: Distiller, data: ImageData, said: Predictions) -> None:
    names = readable(data.class_names)
    shown = {"classes": wandb.Table(["class", "images", "accuracy", "most often taken for"], class_rows(said, names))}
    figures = {"calibration": reliability({"student": said})}
    weight = distiller.state_dict().get("serialization.layer.weight")
    if weight is not None and weight.shape == (len(names), len(names)):
        matrix = relations(weight.cpu().numpy())
        figures["class_relations"] = relation_matrices({"w_ij": matrix}, names, data.superclasses)
        rows, columns = np.unravel_index(np.argsort(-np.abs(matrix), axis=None)[:100], matrix.shape)
        related = [[names[j], names[i], float(matrix[i, j])] for i, j in zip(rows, columns, strict=True)]
        shown["strongest_relations"] = wandb.Table(["from", "to", "weight"], related)
    run.log({f"results/{name}": item for name, item in shown.items()})
    run.log({f"results/{name}": wandb.Image(figure) for name, figure in figures.items()})
    for figure in figures.values():
        plt.close(figure)


def class_rows(said: Predictions, names: list[str]) -> list[list[Any]]:
    """For each class its name, number of test images, accuracy (None without images) and most frequent mistake."""
    rows = []
    for number, name in enumerate(names):
        predicted = said.predicted[said.target == number]
        wrong = np.bincount(predicted[predicted != number], minlength=len(names))
        accuracy = float(np.mean(predicted == number)) if len(predicted) else None
        rows.append([name, len(predicted), accuracy, names[int(wrong.argmax())] if wrong.any() else None])
    return rows


def _log_networks(run: wandb.Run, distiller: Distiller, result: Mapping[str, Any], student_file: Path) -> None:
    """The student as what the run made, the teacher as what it used.

    Both are named by their weights, so that a teacher that an earlier run made is that run's student.
    """
    student = _network(result["student"], weights_digest(distiller.student), student_file, result["test"])
    run.log_artifact(student, aliases=[f"seed{result['seed']}"])
    teacher = result["teacher"]
    if teacher is None:
        return
    if run.offline:  # `use_artifact` is refused: the digest in the configuration is what tells them apart
        run.config.update({"teacher_sha256": teacher["sha256"]})
        return
    run.use_artifact(_network(teacher["name"], teacher["sha256"], Path(teacher["source"]), teacher))


def _network(name: str, digest: str, file: Path, about: Mapping[str, Any]) -> wandb.Artifact:
    artifact = wandb.Artifact(
        f"{name}-{digest[:12]}", "model", metadata={"sha256": digest, "accuracy": about["accuracy"]}
    )
    if file.is_file():
        artifact.add_file(str(file), name=f"{name}.pth")
    return artifact
