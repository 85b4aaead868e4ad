"""Relations between classes from finished runs: the weights of serial layers, and confusion matrices."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.analysis.answered import Answered
from src.analysis.class_relations import confusion, relations
from src.analysis.results import Finished
from src.common.errors import UserError
from src.runs.checkpointing import read_checkpoint

log = logging.getLogger(__name__)


def serial_layers(groups: Mapping[str, Sequence[Finished]]) -> Iterator[tuple[str, Finished, np.ndarray]]:
    """Read the serial layer of the first run of each setting.

    Yields the setting's name, the run, and the weights [C, C]. Settings without a serial layer are skipped, and so are
    runs with an unusable checkpoint or unusable weights.
    """
    for name, runs in groups.items():
        if runs[0].result.serialization != "serial":
            continue
        try:
            checkpoint = read_checkpoint(runs[0].folder)
        except UserError as error:
            log.warning("The class relations of %s are left out: %s", name, error)
            continue
        weight = (checkpoint or {}).get("state_dict", {}).get("serialization.layer.weight")
        if _is_layer(weight, len(runs[0].result.class_names)):
            yield name, runs[0], weight.detach().numpy()


def _is_layer(weight: Any, classes: int) -> bool:
    """Return whether `weight` is a finite matrix [C, C]. Foreign checkpoints can hold sparse or quantised tensors."""
    if not isinstance(weight, Tensor) or weight.shape != (classes, classes):
        return False
    is_plain = (
        weight.layout is torch.strided
        and weight.dtype in (torch.float32, torch.float64)
        and weight.device.type == "cpu"
    )
    return is_plain and bool(weight.isfinite().all())


def class_matrices(weight: np.ndarray, answered: Answered | None) -> dict[str, np.ndarray]:
    """Collect matrices by title: the relations in the layer, and the known confusions of teacher and student."""
    matrices = {"Serialization layer: w_ij": relations(weight)}
    if answered is None:
        return matrices
    target, student, teacher = answered.predictions.target, answered.predictions.predicted, answered.complete_teacher
    if teacher is not None:
        matrices["Teacher: i taken for j"] = confusion(target, teacher, len(weight))
    return {**matrices, "Student: i taken for j": confusion(target, student, len(weight))}
