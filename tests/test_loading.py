"""Teachers and students from elsewhere are fed as they were trained, and asked for the data's classes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from src.data.imagenet import WNIDS
from src.errors import UserError
from src.loading import check_class_order, class_index, find_teacher, load_student, load_teacher
from src.models.checkpoints import save_weights
from src.models.resnet import resnet8
from src.models.torchvision_networks import TorchvisionNetwork, resnet18
from src.teacher import Answers
from tests.test_config import configure
from tests.tiny import same, weights

DATA: Any = SimpleNamespace(
    num_classes=2,
    class_names=("cat", "dog"),
    image_shape=(3, 16, 16),
    mean=[0.4, 0.4, 0.4],
    std=[0.2, 0.2, 0.2],
)
PHOTOS: Any = SimpleNamespace(**{**vars(DATA), "class_names": (WNIDS[217], WNIDS[0])})


def options(*overrides: str, **teacher: Any) -> Any:
    cfg = configure("model=resnet20_to_resnet8", "network@model.teacher=resnet8", *overrides).copy()
    OmegaConf.update(cfg, "teacher", teacher)
    return cfg


# Classes


def test_classes_are_found_by_name() -> None:
    assert class_index(("cat", "dog"), 2, ("cat", "dog")) is None
    assert class_index(("dog", "cat"), 2, ("cat", "dog")) == [1, 0]
    assert class_index(("ant", "dog", "cat"), 3, ("cat", "dog")) == [2, 1]
    assert class_index(None, 2, ("cat", "dog")) is None
    assert class_index(("0", "1"), 2, ("cat", "dog")) is None, "other names for as many classes: their order is checked"
    assert class_index(None, 1000, (WNIDS[217], WNIDS[0])) == [217, 0]
    assert class_index(WNIDS, 1000, WNIDS) is None


@pytest.mark.parametrize(("names", "outputs"), [(None, 1000), (("ant", "bee", "cat"), 3), (None, 1)])
def test_classes_that_do_not_match_are_refused(names: Any, outputs: int) -> None:
    with pytest.raises(UserError, match=f"The teacher knows {outputs} classes .*the data has 2 .*cat, dog"):
        class_index(names, outputs, ("cat", "dog"))


def said(predicted: Tensor, target: Tensor, classes: int) -> Answers:
    return Answers(torch.nn.functional.one_hot(predicted, classes).float(), target)


def test_a_teacher_of_another_class_order_is_found() -> None:
    target = torch.arange(400) % 10
    renamed = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match=r"right, and 100 % once its classes are put into another order"):
        check_class_order(said(renamed[target], target, 10), "resnet8")
    check_class_order(said(target, target, 10), "resnet8")


@settings(deadline=None, max_examples=50)
@example(seed=22, images=22, classes=2, skill=0.0)
@given(seed=st.integers(0, 2**32), images=st.integers(1, 300), classes=st.integers(2, 30), skill=st.floats(0, 1))
def test_a_weak_teacher_is_not_suspected(seed: int, images: int, classes: int, skill: float) -> None:
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (images,), generator=random)
    guess = torch.randint(classes, (images,), generator=random)
    predicted = torch.where(torch.rand(images, generator=random) < skill, target, guess)
    check_class_order(said(predicted, target, classes), "resnet8")


# What a teacher is fed


def saved(path: Path, classes: int = 2, **facts: Any) -> Path:
    torch.manual_seed(classes)
    save_weights(resnet8(classes), path, **facts)
    return path


def test_a_teacher_brings_the_normalisation_of_its_file(tmp_path: Path) -> None:
    own: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [0.7, 0.8, 0.9], "class_names": ["cat", "dog"]}
    file, bare = saved(tmp_path / "own.pth", **own), saved(tmp_path / "bare.pth")
    teacher = load_teacher(options(), DATA, file)
    assert (teacher.mean, teacher.std, teacher.image_size, teacher.class_index) == (
        (0.1, 0.2, 0.3), (0.7, 0.8, 0.9), None, None,
    )  # fmt: skip
    assert load_teacher(options(), DATA, bare).mean == tuple(DATA.mean)
    chosen = load_teacher(options(mean=[0.5, 0.5, 0.5], image_size=32), DATA, file)
    assert (chosen.mean, chosen.std, chosen.image_size) == ((0.5, 0.5, 0.5), (0.7, 0.8, 0.9), 32)


def test_a_published_network_brings_the_normalisation_of_its_yaml(tmp_path: Path) -> None:
    from src.models.resnet import resnet20_option_a

    save_weights(resnet20_option_a(2), tmp_path / "a.pth")
    cfg = options("network@model.teacher=resnet20_option_a")
    assert load_teacher(cfg, DATA, tmp_path / "a.pth").mean == (0.485, 0.456, 0.406)
    save_weights(resnet20_option_a(2), tmp_path / "b.pth", mean=[0.1, 0.1, 0.1], std=[0.2, 0.2, 0.2])
    assert load_teacher(cfg, DATA, tmp_path / "b.pth").mean == (0.1, 0.1, 0.1)


def test_a_teacher_of_more_classes_answers_for_those_of_the_data(tmp_path: Path) -> None:
    teacher = load_teacher(options(), DATA, saved(tmp_path / "a.pth", 3, class_names=["ant", "dog", "cat"]))
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    answer = teacher(images)
    inner = teacher.network((images / 255 - 0.4) / 0.2)
    assert answer.logits.shape == (4, 2)
    torch.testing.assert_close(answer.logits, inner[:, [2, 1]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(teacher.logits(images), answer.logits)
    torch.testing.assert_close(teacher.classifier()(answer.pooled), answer.logits)
    assert teacher.shapes((3, 16, 16)).logits == 2
    assert teacher.network.classifier_layer.out_features == 3


def test_images_are_brought_to_the_size_of_the_teacher(tmp_path: Path) -> None:
    teacher = load_teacher(options(image_size=32), DATA, saved(tmp_path / "a.pth"))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    features = teacher(images).features
    assert features[0].shape[2:] == (32, 32)
    assert teacher.shapes((3, 16, 16)).features == tuple(tuple(feature.shape[1:]) for feature in features)
    plain = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    expected = teacher.network((torch.full((1, 3, 32, 32), 77) / 255 - 0.4) / 0.2)
    torch.testing.assert_close(teacher.logits(plain), expected, atol=1e-4, rtol=1e-4)


def test_the_key_of_a_teacher_is_all_that_decides_its_answers(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pth", 3, class_names=["ant", "dog", "cat"])
    two = saved(tmp_path / "b.pth", 2)
    keys = [
        load_teacher(options(), DATA, file).key,
        load_teacher(options(image_size=32), DATA, file).key,
        load_teacher(options(std=[1, 1, 1]), DATA, file).key,
        load_teacher(options(), SimpleNamespace(**{**vars(DATA), "class_names": ("dog", "cat")}), file).key,  # type: ignore[arg-type]
        load_teacher(options(), DATA, two).key,
    ]
    assert len(set(keys)) == len(keys)
    assert load_teacher(options(), DATA, file).key == keys[0]


# Where a teacher comes from


def test_the_architecture_of_a_library_with_the_weights_of_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = resnet18()
    save_weights(network, tmp_path / "a.pth")
    cfg = options(source="torchvision/resnet18", path=str(tmp_path / "a.pth"))
    assert find_teacher(cfg) == tmp_path / "a.pth"
    teacher = load_teacher(cfg, PHOTOS, tmp_path / "a.pth")
    assert same(weights(teacher.network), weights(network))
    assert (teacher.mean, teacher.image_size) == ((0.485, 0.456, 0.406), 224)
    assert teacher.class_index == [217, 0]
    assert teacher.logits(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).shape == (1, 2)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean((2, 3)))


def test_a_program_is_run_only_where_that_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.manual_seed(0)
    torch.jit.script(Flat()).save(file)
    with pytest.raises(UserError, match="is a program"):
        load_teacher(options(), DATA, file)
    teacher = load_teacher(options(allow_program=True), DATA, file)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(0)
    expected = Flat()((images / 255 - 0.4) / 0.2)
    torch.testing.assert_close(teacher.logits(images), expected, atol=1e-5, rtol=1e-5)
    assert teacher.shapes((3, 16, 16)).features == ()


def test_the_release_of_mdistiller_fills_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(*what: Any) -> Path:
        asked.append(what)
        return tmp_path / "found.pth"

    monkeypatch.setattr("src.models.mdistiller.fetch", fetch)
    assert find_teacher(options(source="mdistiller", store=str(tmp_path))) == tmp_path / "found.pth"
    assert asked == [("resnet8", tmp_path / "cifar100")]
    with pytest.raises(UserError, match=r"teacher\.source=mdistiller has teachers for cifar100, not for cifar10"):
        find_teacher(options("data=cifar10", source="mdistiller"))


# Where a student starts


def test_a_student_starts_from_a_file(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pth", 2, mean=[0.1, 0.2, 0.3], std=[0.7, 0.8, 0.9])
    cfg = options()
    cfg.student.path = str(file)
    student = load_student(cfg, DATA)
    torch.manual_seed(2)
    assert same(weights(student.network), weights(resnet8(2)))
    assert (student.mean, student.std) == ([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])


def test_a_student_starts_from_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    published = resnet18()
    state = published.state_dict()
    monkeypatch.setattr("torchvision.models.ResNet18_Weights.get_state_dict", lambda *_, **__: state)
    cfg = options()
    cfg.student.source = "torchvision/resnet18"
    student = load_student(cfg, DATA)
    assert isinstance(student.network, TorchvisionNetwork)
    assert student.network.classifier_layer.out_features == 2
    body = {name: value for name, value in state.items() if not name.startswith("fc.")}
    assert all(torch.equal(student.network.state_dict()[name], value) for name, value in body.items())
    assert student.mean == (0.485, 0.456, 0.406)


def test_fresh_weights_and_the_normalisation_of_the_data_are_the_default() -> None:
    torch.manual_seed(3)
    student = load_student(options(), DATA)
    torch.manual_seed(3)
    assert same(weights(student.network), weights(resnet8(2)))
    assert student.mean == DATA.mean
