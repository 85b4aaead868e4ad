"""What a finished run's student says about every test image, and what it costs to ask it."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from src.data.image_data import ImageData
from src.distiller import Distiller


class Predictions(NamedTuple):
    """The K likeliest classes of N images."""

    classes: np.ndarray
    """[N, K] int64, the likeliest first."""
    probabilities: np.ndarray
    """[N, K] of these classes."""
    target: np.ndarray
    """[N] int64, the labelled class."""

    @property
    def predicted(self) -> np.ndarray:
        """[N], the likeliest class."""
        return self.classes[:, 0]

    @property
    def confidence(self) -> np.ndarray:
        """[N], its probability."""
        return self.probabilities[:, 0]

    @property
    def correct(self) -> np.ndarray:
        """[N] bool."""
        return self.predicted == self.target


@torch.no_grad()
def predict(distiller: Distiller, data: ImageData, likeliest: int = 3, batches: int | None = None) -> Predictions:
    """Ask the student, on the device that it is on, about all test images in order, or those of the first `batches`."""
    distiller.eval()
    answers = []
    for batch in itertools.islice(data.evaluation_loader("test"), batches):
        said = distiller.predict_logits(batch.images[0].to(distiller.device)).softmax(dim=1)
        answers.append([part.cpu() for part in said.topk(min(likeliest, said.shape[1]))] + [batch.target])
    probabilities, classes, target = (torch.cat(parts).numpy() for parts in zip(*answers, strict=True))
    return Predictions(classes, probabilities, target)


@torch.no_grad()
def macs(answer: Callable[[Tensor], Tensor], image: Tensor) -> int:
    """Multiply-accumulates for one image [1, 3, H, W], by torch's counter, which counts two operations for each."""
    with FlopCounterMode(display=False) as counter:
        answer(image)
    return counter.get_total_flops() // 2


def multiply_accumulates(distiller: Distiller, data: ImageData) -> tuple[int, int | None]:
    """Those of one image's way through the student and the teacher (None without one): convolutions and products."""
    image = data.test_images([0]).to(distiller.device)
    student = macs(distiller.eval().predict_logits, image)
    if distiller.teacher is None:
        return student, None
    distiller.teacher.to(distiller.device, torch.contiguous_format)
    return student, macs(distiller.teacher.logits, image)
