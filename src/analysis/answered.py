"""Predictions of finished runs for the test images, computed again for a report."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from src.analysis.predictions import Predictions, predict, student_and_teacher_macs
from src.analysis.results import Finished
from src.common.errors import UserError
from src.config.names import teacher_is_program
from src.data.image_data import ImageData
from src.setup.reopen import open_run, read_config

log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """The predictions of one run, with its test images and the cost of its networks."""

    predictions: Predictions
    """The student's predictions for all test images."""
    teacher: np.ndarray | None
    """[N], the teacher's class for each test image, or -1 if unknown. None if no teacher's answers are stored."""
    macs: int
    """Multiply-accumulates of the student for one image."""
    teacher_macs: int | None
    """Multiply-accumulates of the teacher for one image. None without a teacher."""
    data: ImageData

    @property
    def complete_teacher(self) -> np.ndarray | None:
        """The teacher's classes [N], or None unless the teacher has answered every test image."""
        return self.teacher if self.teacher is not None and (self.teacher >= 0).all() else None


def answer(groups: Mapping[str, Sequence[Finished]], data_root: str) -> tuple[dict[str, Answered], list[str]]:
    """Let the first run of each setting predict the test images.

    Returns the predictions by the setting's name, and one sentence for each run that could not be opened.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answered: dict[str, Answered] = {}
    failures = []
    for name, runs in groups.items():
        try:
            answered[name] = _answer_run(runs[0], data_root, device)
        except Exception as error:  # a folder of another version can fail in any way, but the other runs are reported
            log.warning("%s cannot predict the test images: %s", name, error)
            failures.append(f"{name} is left out of the pictures of predictions ({type(error).__name__}).")
            continue
        # The runs of a report share their test images: keep only the last copy in memory.
        answered = {other: each._replace(data=answered[name].data) for other, each in answered.items()}
    return answered, failures


def _answer_run(run: Finished, data_root: str, device: str) -> Answered:
    cfg, distiller, data = open_run(run.folder, read_config(run.folder, data_root))
    if run.data is not None and run.data != data.source.digest:
        raise UserError("the data has changed since the run, so its pictures would not show what the run did")
    distiller.to(device)
    teacher = distiller.teacher_predictions.get("test")
    macs, teacher_macs = student_and_teacher_macs(distiller, data)
    if teacher_is_program(cfg):
        teacher_macs = None  # the cost of a program is unknown: a network of the pair stands for it here
    return Answered(predict(distiller, data), None if teacher is None else teacher.numpy(), macs, teacher_macs, data)
