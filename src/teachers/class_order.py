"""Match the teacher's classes with the classes of the data."""

from collections.abc import Sequence

import numpy as np
import torch

from src.common.errors import UserError
from src.data.imagenet import WNIDS
from src.teachers.answers import Answers


def class_index(names: Sequence[str] | None, outputs: int, wanted: Sequence[str]) -> list[int] | None:
    """Find the index of each of the data's classes among a teacher's logits, by name.

    Returns None if the teacher has the same classes in the same order. If the names do not match but the numbers of
    classes do, the order is assumed to be the same; `check_class_order` tests this later. A teacher without names and
    with 1,000 logits is assumed to be one of ImageNet if the data's classes are wnids. Raises `UserError` if neither
    the names nor the numbers of classes match.

    >>> class_index(["cat", "dog", "owl"], 3, ["owl", "cat"])
    [2, 0]
    """
    if names is None and outputs == len(WNIDS) and set(wanted) <= set(WNIDS):
        names = WNIDS
    if names is not None and set(wanted) <= set(names):
        found = [list(names).index(name) for name in wanted]
        return None if found == list(range(outputs)) else found
    if outputs != len(wanted):
        example = f" ({', '.join(names[:2])}, ...)" if names else ""
        raise UserError(
            f"The teacher has {outputs} classes{example} and the data has {len(wanted)} ({', '.join(wanted[:2])}, "
            "...): choose a teacher of the same classes, or give the data the teacher's class names (ImageNet: wnids)."
        )
    return None


def check_class_order(answers: Answers, name: str) -> None:
    """Raise `UserError` if the teacher's accuracy is much higher after a permutation of its classes.

    The permutation is found on one half of the images and tested on the other half, so that a weak teacher passes.
    """
    from scipy.optimize import linear_sum_assignment  # this import takes half a second

    classes = answers.logits.shape[1]
    shuffled = torch.randperm(len(answers.target), generator=torch.Generator().manual_seed(0))
    predicted, target = answers.logits.argmax(dim=1)[shuffled], answers.target[shuffled]
    half = len(target) // 2
    counts = torch.bincount(target[:half] * classes + predicted[:half], minlength=classes**2).view(classes, classes)
    renamed = torch.as_tensor(np.asarray(linear_sum_assignment(counts.T.numpy(), maximize=True)[1]))
    right, right_renamed = predicted[half:] == target[half:], renamed[predicted[half:]] == target[half:]
    plain, better = (float(answered.double().mean()) for answered in (right, right_renamed))
    # Only images on which the two orders differ tell them apart. The bound is four standard deviations of chance.
    chance = 4 * float((right != right_renamed).sum()) ** 0.5 / len(right)
    if better > plain + 0.1 + chance:
        raise UserError(
            f"The teacher {name} gets {100 * plain:.0f} % of the images right, but {100 * better:.0f} % if its classes "
            "are put into another order: it was trained with another class order than the data's. Add the list "
            "class_names to its checkpoint, or choose another teacher."
        )
