"""A mistake in a method or a network is reported in one sentence, before any teacher is trained."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

from src.common.errors import UserError
from src.methods.method import Method
from src.models.resnet import CifarResNet
from src.setup import dry_run as module
from src.setup.assemble import make_data, make_method, make_parts
from src.setup.dry_run import dry_run, random_views, trial_teacher
from src.setup.teacher import make_untrained_teacher
from src.training.serialization import Serialization
from tests.helpers.commands import assert_refused
from tests.helpers.configure import METHODS, changed, configure
from tests.helpers.mistaken_methods import (
    FAILURES,
    MISTAKES,
    SCALAR,
    BrokenGradient,
    CountsCalls,
    CrossEntropy,
    InfiniteButOff,
    MissingKey,
    ModuleInAList,
    ModuleMadeOnFirstUse,
    NotANumber,
    SomeNeighbours,
    TermThatComesLater,
    TermWithoutWeight,
    ZeroAtFirst,
    line_of,
)
from tests.helpers.place import Place
from tests.helpers.tiny import same, weights, write_arrays


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    """A small pair on tiny arrays."""
    composed = configure("model=resnet20_to_resnet8", "data=arrays", "method=vanilla", "schedule.batch_size=8")
    return changed(composed, data__path=str(write_arrays(tmp_path / "tiny.npz")))


def tried(cfg: DictConfig, method: type[Method] | None = None) -> tuple[Any, Any]:
    """Make the data and the parts, and try the method."""
    if method:
        cfg = changed(cfg, method___target_=f"{method.__module__}.{method.__name__}", method__name="mine")
    made = make_method(cfg)
    data = make_data(cfg, made.views_per_image)
    parts = make_parts(cfg, data, made)
    dry_run(cfg, data, parts)
    return data, parts


# Mistakes in methods


@pytest.mark.parametrize("method", MISTAKES, ids=lambda method: method.__name__)
def test_a_mistake_in_a_method_is_one_sentence(cfg: DictConfig, method: type[Method]) -> None:
    with pytest.raises(UserError) as caught:
        tried(cfg, method)
    assert str(caught.value) == f"method=mine: {MISTAKES[method]}"


@pytest.mark.parametrize("method", FAILURES, ids=lambda method: method.__name__)
def test_a_method_that_fails_is_one_sentence_with_file_and_line(cfg: DictConfig, method: type[Method]) -> None:
    with pytest.raises(UserError) as caught:
        tried(cfg, method)
    sentence = str(caught.value)
    assert sentence.startswith("method=mine fails on random images: ")
    assert FAILURES[method] in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("method", [ModuleInAList, ModuleMadeOnFirstUse])
def test_a_parameter_that_would_not_be_trained_is_refused(cfg: DictConfig, method: type[Method]) -> None:
    sentence = r"^A term depends on a parameter of shape \[4(, 4)?\] that no module holds, so it would not be trained: "
    with pytest.raises(UserError, match=sentence):
        tried(cfg, method)


def test_a_term_that_is_not_finite_is_refused_unless_it_is_off(cfg: DictConfig) -> None:
    with pytest.raises(UserError, match=r"^The term 'cross_entropy' is nan on random images: look for a division by 0"):
        tried(cfg, NotANumber)
    tried(cfg, InfiniteButOff)


def test_a_method_may_need_many_images(cfg: DictConfig) -> None:
    tried(changed(cfg, schedule__batch_size=64), SomeNeighbours)


def test_a_term_may_have_no_gradient_for_a_while(cfg: DictConfig) -> None:
    tried(cfg, ZeroAtFirst)


def test_a_term_may_come_later(cfg: DictConfig) -> None:
    tried(cfg, TermThatComesLater)


def test_gradients_are_not_tried_before_a_fork(cfg: DictConfig) -> None:
    with pytest.raises(UserError, match="modified by an inplace operation"):
        tried(cfg, BrokenGradient)
    tried(changed(cfg, trainer__strategy="ddp_fork"), BrokenGradient)


def test_an_error_in_code_outside_of_the_project_is_named_with_its_full_path(
    cfg: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "elsewhere.py"
    file.write_text("def fail(batch):\n    return {}['key']\n")
    names: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    monkeypatch.setattr(CrossEntropy, "terms", lambda self, batch: names["fail"](batch))
    with pytest.raises(UserError) as caught:
        tried(cfg, CrossEntropy)
    assert str(caught.value) == f"method=mine fails on random images: KeyError: 'key' in {file}, line 2."


@pytest.mark.parametrize("method", [TermWithoutWeight, MissingKey])
def test_a_mistake_shows_before_a_teacher_is_trained(place: Place, method: type[Method]) -> None:
    ran = place.train("method=vanilla", f"method._target_={method.__module__}.{method.__name__}", "method.name=mine")
    assert_refused(ran, "method=mine")
    assert "There is no teacher" not in ran.out
    assert "Training" not in ran.out
    assert not list(place.runs.rglob("*"))


# Mistakes elsewhere


def test_a_sentence_that_is_not_about_the_method_stays_as_it_is(cfg: DictConfig) -> None:
    with pytest.raises(UserError, match=r"^model\.teacher\.nonsense=1 is not an option of src\.models\.resnet\."):
        tried(changed(cfg, method=configure("method=kd").method, model__teacher=with_key(cfg.model.teacher)))


NO_DECAY = "~schedule.optimizer.weight_decay"
LBFGS = ("schedule.optimizer._target_=torch.optim.LBFGS", "~schedule.optimizer.momentum", NO_DECAY)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("averaging=ema", "averaging.decay=3"),
            r"The options of averaging do not fit .*EMAWeightAveraging: Invalid decay value 3 provided",
        ),
        (
            ("averaging=ema", "+averaging.dekay=0.9"),
            r"The options of averaging do not fit .*EMAWeightAveraging: .* unexpected keyword argument 'dekay'",
        ),
        (
            ("logger=csv", "logger._target_=lightning.pytorch.loggers.CSVLogger"),
            r"logger\._target_=lightning\.pytorch\.loggers\.CSVLogger does not take the argument 'folder'",
        ),
        (("logger=wandb", "~logger.project"), r"logger\.project is missing: set it with \+logger\.project=VALUE\."),
        (
            ("schedule.optimizer._target_=torch.optim.Muon",),
            r"The options of schedule\.optimizer do not fit torch\.optim\.Muon: Muon only supports 2D parameters",
        ),
        (
            LBFGS,
            r"The options of schedule\.optimizer do not fit torch\.optim\.LBFGS: view size is not compatible",
        ),
        (
            (
                "schedule.optimizer._target_=torch.optim.LBFGS",
                "~schedule.optimizer.momentum",
                NO_DECAY,
                "serialization=serial",
            ),
            r"The options of schedule\.optimizer do not fit torch\.optim\.LBFGS: LBFGS doesn't support per-parameter",
        ),
        (("optimizer=dot", "+trainer.gradient_clip_val=1.0"), r"optimizer=dot does not support trainer\.gradient_clip"),
    ],
)
def test_what_fit_makes_later_is_tried_before_a_teacher_is_trained(
    cfg: DictConfig, overrides: tuple[str, ...], sentence: str
) -> None:
    composed = configure("model=resnet20_to_resnet8", "data=arrays", "method=kd", "schedule.batch_size=8", *overrides)
    with pytest.raises(UserError, match=f"^{sentence}"):
        tried(changed(composed, data__path=cfg.data.path))


def test_averaging_that_fits_passes(cfg: DictConfig) -> None:
    averaged = configure("model=resnet20_to_resnet8", "data=arrays", "method=kd", "averaging=ema", "optimizer=dot")
    tried(changed(averaged, data__path=cfg.data.path))


def with_key(node: DictConfig) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(node)
    return {**found, "nonsense": 1}


def test_a_network_that_fails_is_named_by_file_and_line(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any) -> Tensor:
        raise RuntimeError("the sizes do not match")  # in a network

    monkeypatch.setattr("src.models.resnet.CifarResNet.forward_features", forward)
    line = line_of(test_a_network_that_fails_is_named_by_file_and_line, "# in a network")  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=rf"RuntimeError: the sizes do not match in tests/setup/test_dry_run\.py, line {line}\.$"
    ):
        tried(cfg)


class NoOutput(CifarResNet):
    def forward_features(self, images):
        return super().forward_features(images).logits


class OtherClasses(CifarResNet):
    def forward_features(self, images):
        output = super().forward_features(images)
        return output._replace(logits=output.logits.repeat(1, 2))


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (
            NoOutput,
            "forward_features of NoOutput returns a tensor of shape [2, 4]: return an Output of src.models.network.",
        ),
        (
            OtherClasses,
            "OtherClasses returns logits of shape [2, 8] for 2 images of 4 classes: give its last layer num_classes "
            "outputs.",
        ),
    ],
)
def test_a_network_that_returns_something_else_is_refused(cfg: DictConfig, network: type, sentence: str) -> None:
    student = {
        "name": "mine",
        "_target_": f"{__name__}.{network.__name__}",
        "learning_rate": 0.1,
        "blocks": 1,
        "widths": [4, 4, 4, 4],
    }
    with pytest.raises(UserError) as caught:
        tried(changed(cfg, model__student=student))
    assert str(caught.value) == sentence


class Layer(Serialization):
    def forward(self, logits, pooled):
        return logits


class LayerOfOtherClasses(Layer):
    def forward(self, logits, pooled):
        return logits.repeat(1, 2)


class NoForward(Serialization):
    pass


class PenaltyThatIsAFloat(Layer):
    def penalties(self):
        return {"size": 1.0}


class PenaltyWithoutAName(Layer):
    def penalties(self):
        return torch.ones(())


class PenaltyOfATermsName(Layer):
    def penalties(self):
        return {"kd": torch.ones(())}


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (
            LayerOfOtherClasses,
            "The serialization layer returns a tensor of shape [2, 8]: return logits of shape [2, 4].",
        ),
        (NoForward, "method=kd fails on random images: NotImplementedError: NoForward defines no forward() in "),
        (PenaltyThatIsAFloat, f"The serialization layer's term 'size' is a float: {SCALAR}"),
        (
            PenaltyWithoutAName,
            "The serialization layer's terms are a tensor of shape []: return a dict of scalar tensors by name.",
        ),
        (PenaltyOfATermsName, "The serialization layer and the method both have a term 'kd': rename one."),
    ],
)
def test_a_mistake_in_a_layer_is_one_sentence(cfg: DictConfig, layer: type, sentence: str) -> None:
    serialization = {"_target_": f"{__name__}.{layer.__name__}"}
    with pytest.raises(UserError) as caught:
        tried(changed(cfg, method=configure("method=kd").method, serialization=serialization))
    assert str(caught.value).startswith(sentence)


# Methods without mistakes


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes(cfg: DictConfig, method: str) -> None:
    composed = configure(f"method={method}", "model=resnet20_to_resnet8")
    tried(changed(cfg, method=composed.method, serialization=composed.serialization))


def test_every_stage_needs_cross_entropy_for_dot(cfg: DictConfig) -> None:
    composed = configure("method=ab", "model=resnet20_to_resnet8", "optimizer=dot")
    chosen = {"method": composed.method, "serialization": composed.serialization, "optimizer": composed.optimizer}
    with pytest.raises(UserError, match=r"optimizer=dot needs the term cross_entropy, but a stage of this method has"):
        tried(changed(cfg, **chosen))


def test_a_student_that_does_not_predict_alone_is_not_kept(cfg: DictConfig) -> None:
    composed = configure("method=simkd", "model=resnet20_to_resnet8")
    chosen = {"method": composed.method, "serialization": composed.serialization, "keep_best": True}
    with pytest.raises(UserError, match=r"^keep_best=true keeps the student alone, but method=simkd predicts through"):
        tried(changed(cfg, **chosen))


def test_a_dry_run_changes_nothing(cfg: DictConfig) -> None:
    cfg = changed(cfg, method___target_=f"{CountsCalls.__module__}.CountsCalls", compile=True)
    before = copy.deepcopy(cfg)
    data = make_data(cfg)
    parts = make_parts(cfg, data, make_method(cfg))
    modules = nn.ModuleList([parts.student.network, parts.method, parts.serialization])
    trained = weights(modules)
    dry_run(cfg, data, parts)
    assert cfg == before
    assert same(weights(modules), trained)
    assert data.trainer is None


def test_several_methods_and_their_stages_are_tried_together(cfg: DictConfig) -> None:
    composed = configure("method=kd", "method@also=ab", "model=resnet20_to_resnet8")
    tried(changed(cfg, method=composed.method, also=composed.also))


# What a method is tried on


def test_random_views_have_the_shape_and_the_labels_of_training_images(cfg: DictConfig) -> None:
    data = make_data(cfg, views_per_image=2)
    one, again = random_views(data), random_views(data)
    assert [images.shape for images in one.images] == [(module.IMAGES, 3, 16, 16)] * 2
    assert one.index.max() == data.train_index.max()
    assert {images.dtype for images in one.images} == {torch.uint8}
    assert not one.images[0].equal(one.images[1])
    assert one.target.equal(data.source.train_labels[one.index])
    assert all(images.equal(other) for images, other in zip(one.images, again.images, strict=True))


def test_the_trial_teacher_has_random_weights_even_if_there_is_a_file(cfg: DictConfig, tmp_path: Path) -> None:
    teacher = trial_teacher(changed(cfg, teacher__path=str(tmp_path / "missing.pth")), make_data(cfg))
    assert teacher.network.classifier_layer.out_features == 4


def test_the_trial_teacher_has_a_last_layer_without_zeros(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def zero(*arguments: Any) -> Any:
        teacher = make_untrained_teacher(*arguments)
        teacher.network.classifier_layer.weight.data.zero_()
        return teacher

    monkeypatch.setattr(module, "make_untrained_teacher", zero)
    composed = configure("method=kd", "serialization=serial", "serialization.start=teacher")
    tried(changed(cfg, method=composed.method, serialization=composed.serialization))


def test_a_program_is_loaded_because_it_cannot_be_made_again(cfg: DictConfig, tmp_path: Path) -> None:
    cfg = changed(cfg, teacher__path=str(tmp_path / "missing.pt"), teacher__allow_program=True)
    with pytest.raises(UserError, match=r"missing\.pt does not exist"):
        trial_teacher(cfg, make_data(cfg))


EARLY_STOPPING = "lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("monitor", "limit", "advice"),
    [
        ("val_loss", None, "choose one of test/accuracy, test/ece, test/nll, test/top5, test/agreement."),
        ("val/nll", None, "choose one of test/accuracy"),
        ("test/nll", 0, "leave trainer.limit_val_batches=0 out."),
        ("test/nll", None, None),
        ("test/agreement", None, None),
        ("train/cross_entropy_epoch", None, None),
    ],
)
def test_a_callback_that_waits_for_an_unknown_metric_is_refused(
    cfg: DictConfig, monitor: str, limit: int | None, advice: str | None
) -> None:
    given = changed(cfg, method=configure("method=kd").method)
    with open_dict(given):
        given.trainer.update(callbacks=[{"_target_": EARLY_STOPPING, "monitor": monitor}], limit_val_batches=limit)
    if advice is None:
        tried(given)
        return
    with pytest.raises(UserError) as caught:
        tried(given)
    assert str(caught.value).startswith(f"trainer.callbacks[0].monitor={monitor} is not a metric of this run: {advice}")


def test_a_batch_of_one_image_is_tried(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    single = changed(cfg, schedule__batch_size=1)
    tried(single)
    student = configure("network@model.student=imagenet/resnet18").model.student
    with pytest.raises(UserError, match=r"^schedule\.batch_size=1 is too small for these networks \(Expected more"):
        tried(changed(single, model__student=student))
