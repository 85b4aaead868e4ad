"""The teacher's classes are matched with those of the data by name, and their order is tested by the accuracy."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.common.errors import UserError
from src.data.imagenet import WNIDS
from src.teachers.answers import Answers
from src.teachers.class_order import check_class_order, class_index


def test_classes_are_found_by_name() -> None:
    assert class_index(("cat", "dog"), 2, ("cat", "dog")) is None
    assert class_index(("dog", "cat"), 2, ("cat", "dog")) == [1, 0]
    assert class_index(("ant", "dog", "cat"), 3, ("cat", "dog")) == [2, 1]
    assert class_index(None, 2, ("cat", "dog")) is None
    assert class_index(("0", "1"), 2, ("cat", "dog")) is None, "as many classes of other names: their order is tested"
    assert class_index(None, 1000, (WNIDS[217], WNIDS[0])) == [217, 0]
    assert class_index(WNIDS, 1000, WNIDS) is None


@pytest.mark.parametrize(("names", "outputs"), [(None, 1000), (("ant", "bee", "cat"), 3), (None, 1)])
def test_classes_that_do_not_match_are_refused(names: Any, outputs: int) -> None:
    with pytest.raises(UserError, match=f"The teacher has {outputs} classes .*the data has 2 .*cat, dog"):
        class_index(names, outputs, ("cat", "dog"))


def answers(predicted: Tensor, target: Tensor, classes: int) -> Answers:
    return Answers(torch.nn.functional.one_hot(predicted, classes).float(), target)


def test_a_teacher_of_another_class_order_is_refused() -> None:
    target = torch.arange(400) % 10
    renamed = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match=r"right, but 100 % if its classes are put into another order"):
        check_class_order(answers(renamed[target], target, 10), "resnet8")
    check_class_order(answers(target, target, 10), "resnet8")


@settings(deadline=None, max_examples=50)
@example(seed=22, images=22, classes=2, skill=0.0)
@given(seed=st.integers(0, 2**32), images=st.integers(1, 300), classes=st.integers(2, 30), skill=st.floats(0, 1))
def test_a_weak_teacher_is_not_suspected(seed: int, images: int, classes: int, skill: float) -> None:
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (images,), generator=random)
    guess = torch.randint(classes, (images,), generator=random)
    predicted = torch.where(torch.rand(images, generator=random) < skill, target, guess)
    check_class_order(answers(predicted, target, classes), "resnet8")
