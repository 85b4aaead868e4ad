"""The teacher's classes are matched with those of the data by name, and their order is tested by the accuracy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.common.errors import UserError
from src.data.imagenet import WNIDS, english_names
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


def test_imagenets_classes_are_found_by_their_english_names() -> None:
    assert class_index(WNIDS, 1000, ("English springer", "tench")) == [217, 0]
    assert class_index(english_names(WNIDS), 1000, WNIDS) is None


@pytest.mark.parametrize("names", [("crane", "dog", "crane"), ("dog", "dog", "dog")])
def test_classes_that_share_a_name_keep_their_positions(names: Any) -> None:
    assert class_index(names, 3, names) is None


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("dog", "crane", "crane"), ("crane", "dog", "crane")),
        (("crane", "dog"), ("crane", "dog", "crane")),
        (("dog", "crane", "owl", "crane"), ("crane", "dog")),
    ],
)
def test_names_that_two_classes_share_are_refused_if_only_they_could_tell_the_order(names: Any, wanted: Any) -> None:
    with pytest.raises(UserError, match=r"^Two classes are called crane, .*teacher\.class_map=FILE"):
        class_index(names, len(names), wanted)
    assert class_index(("dog", "crane", "owl", "crane"), 4, ("owl", "dog")) == [2, 0], "other names stay usable"


@pytest.mark.parametrize(
    ("names", "unknown"), [(("car", "plane"), "2, such as cat"), (("cat", "plane"), "1, such as dog")]
)
def test_as_many_classes_of_other_names_are_refused(names: Any, unknown: str) -> None:
    with pytest.raises(
        UserError, match=rf"of which the teacher does not know {unknown}: .*teacher\.class_map=FILE \(see docs/data\.md"
    ):
        class_index(names, 2, ("cat", "dog"))


def test_numbers_in_place_of_names_are_no_names() -> None:
    assert class_index(("cat", "dog"), 2, ("0", "1")) is None
    assert class_index(("0", "1"), 2, ("cat", "dog")) is None
    assert class_index(("0", "1"), 2, ("1", "0")) == [1, 0], "as many classes: the numbers tell their order"
    for wanted in (tuple("01234"), ("3", "7")):
        with pytest.raises(UserError, match=rf"^The teacher has 10 classes \(0, 1, .*the data has {len(wanted)} "):
            class_index(tuple("0123456789"), 10, wanted)


# The class map


def class_map(folder: Path, content: str, name: str = "map.csv") -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("cat,tabby\ndog,poodle\n", "map.csv"),
        ("dog, 3\n\ncat ,tabby", "map.txt"),
        ('\ufeff"dog","poodle"\r\n"cat",1\r\n', "map.csv"),
        ('{"cat": "tabby", "dog": 3}', "map.json"),
        ('{"1": "poodle", "0": 1}', "map.json"),
    ],
)
def test_a_class_map_names_the_teachers_class_for_each_class_of_the_data(
    tmp_path: Path, content: str, name: str
) -> None:
    names = ("ant", "tabby", "bee", "poodle")
    assert class_index(names, 4, ("cat", "dog"), class_map(tmp_path, content, name)) == [1, 3]


def test_a_class_map_of_numbers_serves_teachers_without_names_and_names_that_repeat(tmp_path: Path) -> None:
    file = class_map(tmp_path, "0,2\n1,0\n2,1\n")
    assert class_index(None, 3, ("crane", "dog", "crane"), file) == [2, 0, 1]
    assert class_index(("crane", "crane", "dog"), 3, ("crane", "dog", "crane"), file) == [2, 0, 1]
    assert class_index(WNIDS, 1000, ("fish",), class_map(tmp_path, "fish,tench")) == [0]


def test_a_name_comes_before_a_number(tmp_path: Path) -> None:
    assert class_index(("1", "0"), 2, ("cat", "dog"), class_map(tmp_path, "cat,0\ndog,1")) == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat,ant", "lacks 1 of the 2 classes of the data, such as dog: name"),
        ("", "lacks 2 of the 2 classes"),
        ("cat,ant\ndog,bee\ncat,bee", "holds the class 'cat' of the data twice"),
        ("cat,ant\n0,bee\ndog,bee", "holds the class '0' of the data twice"),
        ("cat,ant\nowl,bee", "'owl' is no class of the data: give a name such as cat, dog, or a number from 0 to 1"),
        ("cat,ant\ndog,owl", "'owl' is no class of the teacher: give a name such as ant, bee, ..., or a number"),
        ("cat,ant\ndog,4", "'4' is no class of the teacher"),
        ("cat,ant\ndog,-1", "'-1' is no class of the teacher"),
        ("cat,ant\ndog,crane", "no class of the teacher that a name can tell from others: give its number .*2, 3"),
        ("cat,ant\ndog,ant", "gives several classes of the data the teacher's class ant"),
        ("cat;ant\ndog;bee", "is not a class map: write one line 'class of the data,class of the teacher'"),
        ('"cat,ant\n', "is not a class map"),
    ],
)
def test_a_class_map_that_does_not_fit_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = class_map(tmp_path, content)
    with pytest.raises(UserError, match=rf"^teacher\.class_map={file}.*{message}"):
        class_index(("ant", "bee", "crane", "crane"), 4, ("cat", "dog"), file)


@pytest.mark.parametrize(
    "content",
    ["{", "[" * 10**5, '["cat", "dog"]', '{"cat": true, "dog": 1}', '{"cat": {"a": 1}}', '{"cat": 1.5}', "3"],
)
def test_a_class_map_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match="is not a class map"):
        class_index(None, 2, ("cat", "dog"), class_map(tmp_path, content, "map.json"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for file, message in (("binary.csv", "is not a class map"), ("missing.csv", "cannot be read"), (".", "cannot be")):
        with pytest.raises(UserError, match=message):
            class_index(None, 2, ("cat", "dog"), tmp_path / file)


# The order by accuracy


def answers(predicted: Tensor, target: Tensor, classes: int) -> Answers:
    return Answers(torch.nn.functional.one_hot(predicted, classes).float(), target)


def test_a_teacher_of_another_class_order_is_refused() -> None:
    target = torch.arange(400) % 10
    renamed = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match=r"right, but 100 % .*teacher\.class_map=FILE"):
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
