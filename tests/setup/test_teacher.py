"""A teacher is found, fed as it was trained, asked for the data's classes, and measured."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from src.common.errors import UserError
from src.data import array_data
from src.data.image_data import ImageData
from src.data.imagenet import WNIDS
from src.models.checkpoints import save_weights, weights_digest
from src.models.resnet import resnet8, resnet20, resnet20_option_a
from src.models.torchvision_networks import resnet18
from src.setup import teacher as setup_teacher
from src.setup.assemble import make_data, make_method
from src.setup.teacher import (
    evaluation_answers,
    find_teacher,
    load_teacher,
    make_untrained_teacher,
    measure_teacher,
    open_store,
    teacher_facts,
    teacher_places,
)
from src.teachers.answers import Answers
from src.teachers.device_view_store import DeviceViewStore
from src.teachers.view_store import ViewStore
from src.training.fitting import make_trainer
from tests.helpers.commands import assert_refused
from tests.helpers.configure import changed, configure, without
from tests.helpers.place import Place, result_of
from tests.helpers.tiny import same, weights, write_arrays

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


def saved(path: Path, classes: int = 2, **facts: Any) -> Path:
    torch.manual_seed(classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(resnet8(classes), path, **facts)
    return path


# Where a teacher comes from


def test_a_given_file_takes_precedence_over_the_store(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    cfg = options(path=str(saved(tmp_path / "given.pth")), store=store)
    assert teacher_places(cfg) == [
        tmp_path / "store" / "cifar100" / "resnet8.pth",
        tmp_path / "store" / "cifar100" / "resnet8_vanilla" / "ckpt_epoch_240.pth",
    ]
    for place in teacher_places(cfg):
        saved(place)
    assert find_teacher(cfg) == tmp_path / "given.pth"
    assert find_teacher(options(store=store)) == teacher_places(cfg)[0]
    teacher_places(cfg)[0].unlink()
    assert find_teacher(options(store=store)) == teacher_places(cfg)[1]


def test_a_missing_file_is_refused_and_a_missing_teacher_is_trained(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^teacher\.path=.*missing\.pth does not exist: give a checkpoint of resnet8\.$"
    ):
        find_teacher(options(path=str(tmp_path / "missing.pth")))
    assert find_teacher(options(store=str(tmp_path))) is None
    with pytest.raises(
        UserError, match=r"^There is no teacher resnet8 for cifar100 at .*resnet8\.pth and .*train_if_mi"
    ):
        find_teacher(options(store=str(tmp_path), train_if_missing=False))


def test_a_teacher_of_a_library_has_no_file(tmp_path: Path) -> None:
    assert find_teacher(options(source="torchvision/resnet18", store=str(tmp_path), train_if_missing=False)) is None


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


@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_a_fine_tuned_network_of_a_library(tmp_path: Path, names: list[str] | None) -> None:
    torch.manual_seed(0)
    network = resnet18(num_classes=2)
    save_weights(network, tmp_path / "a.pth", class_names=names)
    cfg = options(source="torchvision/resnet18", path=str(tmp_path / "a.pth"))
    teacher = load_teacher(cfg, DATA, tmp_path / "a.pth")
    assert same(weights(teacher.network), weights(network))
    assert teacher.shapes((3, 16, 16)).logits == 2
    assert teacher.class_index is None


def test_a_teacher_has_the_image_size_of_its_file(tmp_path: Path) -> None:
    for size, expected in ((64, 64), (16, None)):
        file = saved(tmp_path / f"{size}.pth", image_size=size)
        assert load_teacher(options(), DATA, file).image_size == expected


def test_a_teacher_in_which_nothing_is_folded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = saved(tmp_path / "a.pth")
    load_teacher(options(fold=True), DATA, file)
    assert not caplog.messages
    monkeypatch.setattr("src.teachers.teacher.fold_batch_norms", lambda *_: 0)
    load_teacher(options(fold=True), DATA, file)
    assert caplog.messages == [
        "teacher.fold=true changes nothing: this teacher has no batch norm that could be folded."
    ]


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean((2, 3)))


def test_a_program_is_run_only_if_that_is_allowed(tmp_path: Path) -> None:
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
    requested: list[Any] = []

    def fetch(*arguments: Any) -> Path:
        requested.append(arguments)
        return tmp_path / "found.pth"

    monkeypatch.setattr("src.teachers.mdistiller.fetch", fetch)
    assert find_teacher(options(source="mdistiller", store=str(tmp_path))) == tmp_path / "found.pth"
    assert requested == [("resnet8", tmp_path / "cifar100")]
    with pytest.raises(
        UserError,
        match=r"teacher\.source=mdistiller has teachers for cifar100 only, not for cifar10: give teacher.path",
    ):
        find_teacher(options("data=cifar10", source="mdistiller"))


# How a teacher is fed


def test_a_teacher_has_the_normalisation_of_its_file(tmp_path: Path) -> None:
    own: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [0.7, 0.8, 0.9], "class_names": ["cat", "dog"]}
    file, bare = saved(tmp_path / "own.pth", **own), saved(tmp_path / "bare.pth")
    teacher = load_teacher(options(), DATA, file)
    assert (teacher.mean, teacher.std, teacher.image_size, teacher.class_index) == (
        (0.1, 0.2, 0.3), (0.7, 0.8, 0.9), None, None,
    )  # fmt: skip
    assert load_teacher(options(), DATA, bare).mean == tuple(DATA.mean)
    chosen = load_teacher(options(mean=[0.5, 0.5, 0.5], image_size=32), DATA, file)
    assert (chosen.mean, chosen.std, chosen.image_size) == ((0.5, 0.5, 0.5), (0.7, 0.8, 0.9), 32)


def test_a_published_network_has_the_normalisation_of_its_yaml(tmp_path: Path) -> None:
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


def test_images_are_resized_for_the_teacher(tmp_path: Path) -> None:
    teacher = load_teacher(options(image_size=32), DATA, saved(tmp_path / "a.pth"))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    features = teacher(images).features
    assert features[0].shape[2:] == (32, 32)
    assert teacher.shapes((3, 16, 16)).features == tuple(tuple(feature.shape[1:]) for feature in features)
    plain = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    expected = teacher.network((torch.full((1, 3, 32, 32), 77) / 255 - 0.4) / 0.2)
    torch.testing.assert_close(teacher.logits(plain), expected, atol=1e-4, rtol=1e-4)


def test_the_key_of_a_teacher_depends_on_everything_that_changes_its_answers(tmp_path: Path) -> None:
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


def test_options_decide_how_a_teacher_computes(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pth")
    plain = load_teacher(options(), DATA, file)
    folded = load_teacher(options(fold=True, answer_dtype="float16", precision="bfloat16"), DATA, file)
    assert (plain.answer_dtype, folded.answer_dtype) == (torch.float32, torch.float16)
    assert (plain.precision, folded.precision) == (None, "bfloat16")
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in teacher.network.modules()) for teacher in (plain, folded)]
    assert norms[0] > norms[1]


def test_an_untrained_teacher_has_the_sizes_of_the_data() -> None:
    teacher = make_untrained_teacher(options(), DATA)
    assert teacher.shapes((3, 16, 16)).logits == 2
    assert teacher.mean == tuple(DATA.mean)


# The measured teacher


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    """A small pair on tiny arrays."""
    composed = configure(
        "model=resnet20_to_resnet8", "data=arrays", "method=kd", "trainer=cpu", "schedule.batch_size=8"
    )
    values = {"data__path": str(write_arrays(tmp_path / "tiny.npz")), "runs": str(tmp_path / "runs")}
    return changed(composed, **values)


def measure(cfg: DictConfig, file: Path, trained_here: bool = False) -> Any:
    data = make_data(cfg)
    trainer = make_trainer(cfg, logger=False, enable_checkpointing=False)
    return measure_teacher(cfg, data, make_method(cfg), file, trainer, trained_here=trained_here)


def test_a_measured_teacher_has_facts_and_predictions(cfg: DictConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = resnet20(4)
    save_weights(network, tmp_path / "teacher.pth", mean=[0.1, 0.2, 0.3])
    teacher, facts, predictions = measure(cfg, tmp_path / "teacher.pth")
    assert (facts.name, facts.source) == ("resnet20", str(tmp_path / "teacher.pth"))
    assert (facts.sha256, facts.key) == (weights_digest(network), teacher.key)
    assert (facts.mean, facts.image_size, facts.class_index, facts.published_accuracy) == (
        [0.1, 0.2, 0.3], None, None, None,
    )  # fmt: skip
    labels = make_data(cfg).source.test_labels
    assert set(predictions) == {"test"}
    assert facts.accuracy == pytest.approx((predictions["test"] == labels).float().mean().item())
    assert teacher.view_store is None
    held_out = measure(changed(cfg, data__val_size=8), tmp_path / "teacher.pth").predictions
    assert {split: len(classes) for split, classes in held_out.items()} == {"val": 8, "test": 17}


def test_answers_to_evaluation_images_are_computed_once(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data, trainer = make_data(cfg), make_trainer(cfg, logger=False, enable_checkpointing=False)
    teacher = make_untrained_teacher(cfg, data)
    first = evaluation_answers(cfg, data, teacher, "test", trainer)
    assert len(list(Path(cfg.runs).rglob("*.npz"))) == 1
    monkeypatch.setattr(Answers, "compute", lambda *_: pytest.fail("the answers are stored"))
    again = evaluation_answers(cfg, data, teacher, "test", trainer)
    assert again.logits.equal(first.logits)


def test_facts_state_the_published_accuracy_if_there_is_one(cfg: DictConfig) -> None:
    teacher = make_untrained_teacher(cfg, make_data(cfg))
    published = {"published_accuracy": {"tiny": 91.5, "cifar10": 92.0}}
    stated = changed(cfg, model__teacher={**OmegaConf.to_container(cfg.model.teacher), **published})  # type: ignore[dict-item]
    assert teacher_facts(stated, teacher, "here", {"accuracy": 0.5}).published_accuracy == 91.5
    unknown = without(cfg, "model.teacher.published_accuracy")
    assert teacher_facts(unknown, teacher, "here", {"accuracy": 0.5}).published_accuracy is None


def test_a_method_on_features_has_no_view_store(cfg: DictConfig, caplog: pytest.LogCaptureFixture) -> None:
    data = make_data(cfg)
    teacher = make_untrained_teacher(cfg, data)
    assert open_store(cfg, data, teacher, make_method(cfg), torch.device("cpu")) is not None
    with caplog.at_level(logging.INFO):
        on_features = changed(cfg, method=configure("method=at").method)
        assert open_store(on_features, data, teacher, make_method(on_features), torch.device("cpu")) is None
    assert "method=at needs the teacher's features, so it does not use the view store." in caplog.messages


@pytest.mark.parametrize(
    ("memory", "free", "kind"),
    [(True, 0, DeviceViewStore), ("auto", 10**6, DeviceViewStore), ("auto", 10**5, ViewStore)],
)
def test_the_view_store_is_copied_to_the_device_that_holds_the_images_if_it_fits(
    cfg: DictConfig, monkeypatch: pytest.MonkeyPatch, memory: object, free: int, kind: type
) -> None:
    """The images take 47 kB, and the 162 views of 44 images with their records about 280 kB."""
    cfg.data.device_memory = memory
    data = make_data(cfg)
    monkeypatch.setattr(array_data, "fits_in_memory", lambda size, device: size <= free)
    monkeypatch.setattr(setup_teacher, "fits_in_memory", lambda size, device: size <= free)
    opened = open_store(cfg, data, make_untrained_teacher(cfg, data), make_method(cfg), torch.device("cpu"))
    assert type(opened) is kind
    if isinstance(opened, DeviceViewStore):
        assert len(opened.logits) == len(data.view_records(cfg.schedule.epochs)) + 1


def test_a_difference_from_the_published_accuracy_is_a_warning_that_says_what_to_check(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    save_weights(resnet20(10), place.path / "teacher.pth")
    published = "+model.teacher.published_accuracy.cifar10=90"
    common = ("method=kd", f"teacher.path={place.path / 'teacher.pth'}", published)
    ran = place.train(*common, "trainer.limit_val_batches=null", "teacher.mean=[0.1,0.2,0.3]")
    assert (ran.code, ran.err) == (0, "")
    assert "(published: 90.00 %)." in ran.out
    assert "The measured and the published accuracy differ by more than 1 point" in ran.out
    assert "teacher.mean=[0.1,0.2,0.3] teacher.std=[" in ran.out
    monkeypatch.setattr(ImageData, "evaluation_batch_size", 5)
    assert "differ by more than" not in place.train(*common).out, "two batches are too few for a comparison"


@pytest.mark.parametrize("limit", [0, 0.5])
def test_the_teacher_answers_all_images_that_a_run_with_limited_validation_scores(place: Place, limit: float) -> None:
    torch.manual_seed(0)
    save_weights(resnet20(10), place.path / "teacher.pth")
    limits = (f"trainer.limit_val_batches={limit}", "trainer.limit_test_batches=null", "data.val_size=20")
    ran = place.train("method=kd", f"teacher.path={place.path / 'teacher.pth'}", *limits)
    if limit:  # the 20 images are one batch
        assert_refused(ran, "trainer.limit_val_batches=0.5 is less than one batch, because there are only 1")
        return
    assert (ran.code, ran.err) == (0, "")
    result = result_of(place.folder("kd"))
    assert "val" not in result
    assert 0 <= result["test"]["agreement"] <= 1
    assert [file.name[-12:] for file in (place.runs / "teachers").iterdir()] == ["test-all.npz"]


# The teacher's classes


def test_classes_that_share_a_name_are_taught_by_their_own_logits(cfg: DictConfig, tmp_path: Path) -> None:
    """The teacher's accuracy is the same whether its classes have distinct names or not."""
    torch.manual_seed(0)
    network, found = resnet20(4), {}
    for name, names in (("distinct", ["red", "green", "blue", "yellow"]), ("shared", ["red", "green", "red", "blue"])):
        with np.load(cfg.data.path) as arrays:
            np.savez(tmp_path / f"{name}.npz", **{**arrays, "class_names": np.array(names)})
        save_weights(network, tmp_path / f"{name}.pth", class_names=names)
        found[name] = measure(changed(cfg, data__path=str(tmp_path / f"{name}.npz")), tmp_path / f"{name}.pth")
    distinct, shared = found.values()
    assert distinct.facts.class_index is shared.facts.class_index is None
    assert shared.facts.accuracy == distinct.facts.accuracy
    assert same_predictions(shared, distinct)


def same_predictions(one: Any, other: Any) -> bool:
    return bool(one.predictions["test"].equal(other.predictions["test"]))


def test_a_class_map_selects_the_teachers_classes(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("cat,tabby\ndog,0\n")
    file = saved(tmp_path / "a.pth", 3, class_names=["poodle", "ant", "tabby"])
    teacher = load_teacher(options(class_map=str(tmp_path / "map.csv")), DATA, file)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    inner = teacher.network((images / 255 - 0.4) / 0.2)
    torch.testing.assert_close(teacher.logits(images), inner[:, [2, 0]], atol=1e-4, rtol=1e-4)
    assert make_untrained_teacher(options(class_map=str(tmp_path / "map.csv")), DATA).class_index is None


def test_a_class_map_without_a_teacher_is_refused_before_one_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^teacher\.class_map=map\.csv needs a teacher that exists"):
        find_teacher(options(store=str(tmp_path), class_map="map.csv"))


def test_the_facts_of_a_file_come_before_those_of_its_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [f"class {number}" for number in range(1000)]
    save_weights(resnet18(), tmp_path / "a.pth", class_names=names, mean=[0.1, 0.2, 0.3])
    cfg = options(source="torchvision/resnet18", path=str(tmp_path / "a.pth"))
    own = SimpleNamespace(**{**vars(DATA), "class_names": ("class 7", "class 5")})
    teacher = load_teacher(cfg, own, tmp_path / "a.pth")  # type: ignore[arg-type]
    assert (teacher.class_index, teacher.mean) == ([7, 5], (0.1, 0.2, 0.3))
    with pytest.raises(UserError, match=r"the teacher does not know 2, such as n02102040"):
        load_teacher(cfg, PHOTOS, tmp_path / "a.pth")


def test_a_file_in_the_store_that_states_other_data_is_refused(tmp_path: Path) -> None:
    source = SimpleNamespace(digest="a" * 64)
    data: Any = SimpleNamespace(**vars(DATA), source=source, labelled_digest="c" * 64)
    for digest, is_refused in (("a" * 64, False), ("c" * 64, False), ("b" * 64, True)):
        file = saved(tmp_path / f"{digest[0]}.pth", data=digest)
        if not is_refused:
            assert load_teacher(options(), data, file).shapes((3, 16, 16)).logits == 2
            continue
        with pytest.raises(UserError, match=r"b\.pth was trained on other data that is called cifar100 too"):
            load_teacher(options(), data, file)
        load_teacher(options(path=str(file)), data, file)  # the user has named this very file
