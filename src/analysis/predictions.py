"""A student's predictions for the test images, and the cost of one image."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from src.data.image_data import ImageData
from src.training.distiller import Distiller


class Predictions(NamedTuple):
    """The K likeliest classes of each of N images."""

    classes: np.ndarray
    """[N, K] int64, the likeliest first."""
    probabilities: np.ndarray
    """[N, K], the probabilities of these classes."""
    target: np.ndarray
    """[N] int64, the class of each label."""

    @property
    def predicted(self) -> np.ndarray:
        """The likeliest class, [N]."""
        likeliest: np.ndarray = self.classes[:, 0]
        return likeliest

    @property
    def confidence(self) -> np.ndarray:
        """The probability of the likeliest class, [N]."""
        largest: np.ndarray = self.probabilities[:, 0]
        return largest

    @property
    def correct(self) -> np.ndarray:
        """True for each image whose likeliest class is the target, [N] bool."""
        correct: np.ndarray = np.equal(self.predicted, self.target)
        return correct


@torch.no_grad()
def predict(distiller: Distiller, data: ImageData, likeliest: int = 3, batches: int | None = None) -> Predictions:
    """Predict the test images in order, on the device of the module.

    Keeps the `likeliest` classes of each image. `batches` limits the number of batches. None means all.
    """
    distiller.eval()
    answers = []
    for batch in itertools.islice(data.evaluation_loader("test"), batches):
        probabilities = distiller.predict_logits(batch.images[0].to(distiller.device)).softmax(dim=1)
        top = probabilities.topk(min(likeliest, probabilities.shape[1]))
        answers.append([part.cpu() for part in top] + [batch.target])
    values, classes, target = (torch.cat(parts).numpy() for parts in zip(*answers, strict=True))
    return Predictions(classes, values, target)


@torch.no_grad()
def count_macs(predictor: Callable[[Tensor], Tensor], image: Tensor) -> int:
    """Count the multiply-accumulates of a network for one image [1, 3, H, W].

    torch's counter counts two operations for each multiply-accumulate. It does not know the fused operators of
    attention on a CPU, so attention is computed by single operators here.
    """
    is_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            predictor(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)
    return int(counter.get_total_flops()) // 2


def student_and_teacher_macs(distiller: Distiller, data: ImageData) -> tuple[int, int | None]:
    """Count the multiply-accumulates of student and teacher for one image. Returns None for a missing teacher."""
    image = data.test_images([0]).to(distiller.device)
    student = count_macs(distiller.eval().predict_logits, image)
    if distiller.teacher is None:
        return student, None
    distiller.teacher.to(distiller.device, torch.contiguous_format)
    return student, count_macs(distiller.teacher.logits, image)
