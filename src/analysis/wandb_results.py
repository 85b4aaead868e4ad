"""Log the result of a finished run to W&B: a summary, figures, tables of classes, and both networks with lineage."""

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
from src.data.imagenet import english_names
from src.data.source import distinct_names
from src.models.checkpoints import weights_digest
from src.runs.loggers import wandb_name
from src.runs.result import Result
from src.training.distiller import Distiller

log = logging.getLogger(__name__)

STRONGEST = 100
"""The number of relations in the table of the strongest ones."""


def publish(
    run: wandb.Run,
    distiller: Distiller,
    data: ImageData,
    result: Result,
    student_file: Path,
    batches: int | None,
) -> None:
    """Add a run's result to W&B.

    A failure is logged as a warning, because the run is finished by now and must not fail because of W&B.
    `batches` limits the number of test batches that are predicted. None means all.
    """
    if run.disabled:
        return
    try:
        run.summary.update(_summary(result))
        _log_classes(run, distiller, data, predict(distiller, data, batches=batches))
        _log_networks(run, distiller, result, student_file)
    except Exception as error:
        log.warning("W&B did not accept the run's result (%s). It is in the run folder.", str(error).splitlines()[:1])


def _summary(result: Result) -> dict[str, Any]:
    """Collect the numbers for W&B's table of runs. W&B adds the last value of every curve."""
    best, teacher = result.best_epoch, result.teacher
    return {
        **{f"last/{name}": value for name, value in result.test.model_dump(exclude_unset=True).items()},
        **({f"best_epoch/{name}": value for name, value in best.model_dump().items()} if best else {}),
        **({"teacher/accuracy": teacher.accuracy, "teacher/name": teacher.name} if teacher else {}),
        "seconds": result.seconds,
        "parameters": result.parameters.student,
    }


def _log_classes(run: wandb.Run, distiller: Distiller, data: ImageData, predictions: Predictions) -> None:
    names = distinct_names(english_names(data.class_names))
    columns: Any = ["class", "images", "accuracy", "most often taken for"]
    tables = {"classes": wandb.Table(columns, class_rows(predictions, names))}
    figures = {"calibration": reliability({"student": predictions})}
    weight = distiller.state_dict().get("serialization.layer.weight")
    if weight is not None and weight.shape == (len(names), len(names)):
        matrix = relations(weight.cpu().numpy())
        figures["class_relations"] = relation_matrices({"w_ij": matrix}, names, data.superclasses)
        targets, sources = np.unravel_index(np.argsort(-np.abs(matrix), axis=None)[:STRONGEST], matrix.shape)
        related = [[names[j], names[i], float(matrix[i, j])] for i, j in zip(targets, sources, strict=True)]
        tables["strongest_relations"] = wandb.Table(["from", "to", "weight"], related)
    run.log({f"results/{name}": table for name, table in tables.items()})
    run.log({f"results/{name}": wandb.Image(figure) for name, figure in figures.items()})
    for figure in figures.values():
        plt.close(figure)


def class_rows(predictions: Predictions, names: list[str]) -> list[list[Any]]:
    """Make one row per class: name, number of test images, accuracy, and the most frequent mistake.

    The accuracy is None for a class without images. The mistake is None for a class without mistakes.
    """
    rows = []
    for number, name in enumerate(names):
        predicted = predictions.predicted[predictions.target == number]
        wrong = np.bincount(predicted[predicted != number], minlength=len(names))
        accuracy = float(np.mean(predicted == number)) if len(predicted) else None
        rows.append([name, len(predicted), accuracy, names[int(wrong.argmax())] if wrong.any() else None])
    return rows


def _log_networks(run: wandb.Run, distiller: Distiller, result: Result, student_file: Path) -> None:
    """Log the student as the run's output artifact, and the teacher as its input artifact.

    Both are named by their weights. A teacher from an earlier run is therefore the same artifact as that run's student.
    """
    test = {"accuracy": result.test.accuracy}
    student = _network(result.student, weights_digest(distiller.student), student_file, test)
    run.log_artifact(student, aliases=[f"seed{result.seed}"])
    teacher = result.teacher
    if teacher is None:
        return
    if run.offline:  # `use_artifact` needs the server; the digest in the configuration identifies the teacher
        run.config.update({"teacher_sha256": teacher.sha256})
        return
    facts = {"accuracy": teacher.accuracy}
    run.use_artifact(_network(teacher.name, teacher.sha256, Path(teacher.source or ""), facts))


def _network(name: str, digest: str, file: Path, facts: Mapping[str, Any]) -> wandb.Artifact:
    allowed = wandb_name(f"{name}-{digest[:12]}").replace("+", "-")  # a plus sign is allowed in ids only
    artifact = wandb.Artifact(allowed, "model", metadata={"sha256": digest, **facts})
    if file.is_file():
        artifact.add_file(str(file), name=f"{wandb_name(name)}.pth")
    return artifact
