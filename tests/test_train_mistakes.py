"""`python -m src.train`: a mistake of the user ends in one sentence before anything is trained."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from src.data import cifar
from src.data.array_file import save_arrays
from src.models.checkpoints import save_weights
from src.models.resnet import resnet14, resnet20
from tests.helpers.arrays import colour_arrays
from tests.helpers.commands import assert_refused, run
from tests.helpers.place import SMALL, Hostile, Place


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    """A folder with files of every kind that is refused."""
    arrays = colour_arrays(20, 10)
    save_arrays(
        tmp_path / "soft.npz", **{**arrays, "train_labels": np.eye(10, dtype=np.float32)[arrays["train_labels"]]}
    )
    save_arrays(tmp_path / "whole.npz", **arrays)
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(content[: len(content) // 2])
    save_arrays(tmp_path / "objects.npz", **{**arrays, "class_names": np.array([Hostile(tmp_path)] * 10, dtype=object)})
    save_weights(resnet14(10), tmp_path / "resnet14.pth")
    save_weights(resnet20(100), tmp_path / "hundred.pth")
    torch.save({"model": Hostile(tmp_path)}, tmp_path / "hostile.pth")
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)) * 8)
    return tmp_path


def check_bad_input(place: Place, bad_files: Path, arguments: list[str], phrases: list[str]) -> None:
    ran = place.train(*(argument.format(tmp=bad_files) for argument in arguments))
    assert_refused(ran, *phrases)
    assert not (bad_files / "executed").exists()
    assert not list(place.runs.rglob("result.json"))


WITHOUT_MILESTONES = ("~schedule.scheduler.milestones", "~schedule.scheduler.gamma")


def first(value: object) -> str | None:
    return value[0] if isinstance(value, list) else None


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["nonsense=1"], ["nonsense is not an option: --help lists the options."]),
        (["epochs=5"], ["epochs is not an option: did you mean schedule.epochs?"]),
        (["+epochs=5"], ["epochs is not an option: did you mean schedule.epochs?"]),
        (["method.temprature=3"], ["method.temprature is not an option of", "did you mean method.temperature?"]),
        (["schedule.lr=1"], ["schedule.lr is not an option: did you mean schedule.learning_rate?"]),
        (["trainer.max_epochs=20"], ["trainer.max_epochs=20 differs from the schedule of", "set schedule.epochs=20"]),
        (["trainer.limit_test_batches=0"], ["trainer.limit_test_batches=0 does not fit"]),
        (["teacher.path=epoch=9-step (1).ckpt"], ["teacher.path=epoch=9-step (1).ckpt does not exist"]),
        (["data.path={tmp}/a,b.npz"], ["gives several values", "/a,b.npz'\""]),
        (
            ["schedule.scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR", *WITHOUT_MILESTONES],
            ["schedule.scheduler.T_max is missing: set it with +schedule.scheduler.T_max=VALUE."],
        ),
        (["method=nonsense"], ["method/nonsense", "ab; aekt; at; catkd; cc"]),
        (["seed=abc"], ["seed=abc", "Integer"]),
        (["schedule.epochs=-1"], ["schedule.epochs=-1 does not fit: input should be greater than 0"]),
        (["method.beta=abc"], ["method.beta=abc does not fit"]),
        (["method=vanilla", "serialization=serial"], ["method=vanilla has no logit term", "serialization=none"]),
        (["data.path={tmp}/missing.npz"], ["missing.npz is not a file", "data.path"]),
        (["data.path={tmp}/soft.npz"], ["soft.npz", "train_labels", "float32"]),
        (["teacher.path={tmp}/missing.pth"], ["teacher.path=", "missing.pth does not exist"]),
        (["teacher.path={tmp}/resnet14.pth"], ["does not hold the weights of a", "choose the architecture"]),
        (["teacher.path={tmp}/hostile.pth"], ["hostile.pth asks for posix.system", "refused"]),
        (["teacher.train_if_missing=false"], ["There is no teacher resnet20 for cifar10", "teacher.path"]),
        (["runs={tmp}/noise.pth/below"], ["The run folder", "cannot be written", "runs=..."]),
        (["trainer.devices=3", "trainer.accelerator=cpu"], ["schedule.batch_size=8", "3 devices"]),
    ],
    ids=first,
)
def test_bad_input_ends_in_one_sentence(
    place: Place, bad_files: Path, arguments: list[str], phrases: list[str]
) -> None:
    check_bad_input(place, bad_files, arguments, phrases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["nonsense"], ["nonsense"]),
        (["schedule.epochs=abc"], ["schedule.epochs=abc", "Integer"]),
        (["method.weighting=foo"], ["method.weighting=foo", "'ratio', 'log_ratio' or 'constant'"]),
        (["data.path={tmp}/truncated.npz"], ["truncated.npz", "damaged"]),
        (["teacher.path={tmp}/hundred.pth"], ["100 classes, but the network has 10"]),
        (["schedule.nonsense=1"], ["schedule.nonsense"]),
        (["+method.nonsense=1"], ["method.nonsense is not an option of", "temperature"]),
        (["+trainer.nonsense=1"], ["nonsense"]),
        (["network@model.student=nonsense"], ["network/nonsense", "resnet110"]),
        (["method=vanilla,kd"], ["method=vanilla,kd", "--multirun"]),
        (["method.temperature=0"], ["method.temperature=0 does not fit", "greater than 0"]),
        (["method._target_=src.methods.nothing.Nothing"], ["src.methods.nothing"]),
        (["schedule.optimizer.momentum=abc"], ["schedule.optimizer", "torch.optim.SGD"]),
        (["data.val_size=1000"], ["data.val_size=1000 does not fit", "200 (all images)"]),
        (["data.train_size=1000"], ["data.train_size=1000 does not fit", "200 (all images)"]),
        (["data.path={tmp}/objects.npz"], ["objects.npz", "pickled objects"]),
        (["teacher.path={tmp}"], ["does not exist"]),
        (["teacher.path={tmp}/noise.pth"], ["noise.pth is damaged or not a checkpoint"]),
        (
            ["trainer.precision=64-true"],
            ["precision=64-true does not fit: choose one of 32-true, bf16-mixed, 16-mixed"],
        ),
        (["trainer.strategy=nonsense"], ["The options of trainer do not fit Lightning's Trainer", "nonsense"]),
        (["-m", "seed=abc"], ["seed=abc", "Integer"]),
    ],
    ids=first,
)
def test_more_bad_input_ends_in_one_sentence(
    place: Place, bad_files: Path, arguments: list[str], phrases: list[str]
) -> None:
    check_bad_input(place, bad_files, arguments, phrases)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("schedule.epochs=0", "schedule.epochs=0 does not fit: input should be greater than 0."),
        ("data.val_size=-1", "data.val_size=-1 does not fit: input should be greater than or equal to 0."),
        ("teacher.precision=float64", "teacher.precision=float64 does not fit: choose one of float32, bfloat16."),
        (
            "trainer.precision=64-true",
            "trainer.precision=64-true does not fit: choose one of 32-true, bf16-mixed, 16-mixed.",
        ),
        ("data.mean=[0.5]", "data.mean=[0.5] does not fit: give one number for each of the 3 channels."),
        ("checkpoint_minutes=-1", "checkpoint_minutes=-1.0 does not fit: input should be greater than or equal to 0."),
    ],
)
def test_an_option_beyond_its_limit_is_refused_with_its_name_its_value_and_the_reason(
    place: Place, option: str, sentence: str
) -> None:
    ran = place.train(option)
    assert_refused(ran)
    assert ran.err == f"error: {sentence}\n"
    assert not place.runs.exists()


def test_a_target_that_cannot_be_imported_is_reported_once(place: Place) -> None:
    ran = place.train("method._target_=src.methods.nothing.Nothing")
    assert_refused(
        ran, "method._target_=src.methods.nothing.Nothing cannot be imported (No module named 'src.methods.n"
    )
    assert ran.out == ""


def test_a_list_of_methods_is_refused_because_hydra_would_use_only_the_last_one(place: Place) -> None:
    ran = place.train("method=[dkd,aekt]")
    assert_refused(ran, "method=[dkd,aekt] would merge several choices into one", "method@also=")


def test_hydras_advice_to_add_an_unknown_option_is_not_passed_on(place: Place) -> None:
    for option in ("method.temprature=3", "epochs=5", "data.nonsense=1", "hydra.nonsense=1", "method@aslo=kd"):
        ran = place.train(option)
        assert_refused(ran, option.partition("=")[0])
        assert "+" not in ran.err
        assert "append" not in ran.err


@pytest.mark.parametrize("prefix", ["", "+"])
def test_an_argument_of_lightnings_trainer_is_an_option(place: Place, prefix: str) -> None:
    ran = place.train("method=vanilla", f"{prefix}trainer.gradient_clip_val=1.0", "schedule.epochs=1")
    assert (ran.code, ran.err) == (0, "")
    (config,) = place.runs.rglob("config.yaml")
    assert "gradient_clip_val: 1.0" in config.read_text()


def test_an_unknown_option_of_another_command_is_refused(tmp_path: Path) -> None:
    for command, option, sentence in (
        ("report", "runz=x", "runz is not an option: did you mean runs?"),
        ("report", "+relations.class=x", "relations.class is not an option: did you mean relations.classes?"),
        ("evaluate", "+chekpoint=x", "chekpoint is not an option: did you mean checkpoint?"),
        ("export", "+image=5", "image is not an option: did you mean images?"),
        ("convert", "outt=x", "outt is not an option: did you mean out?"),
    ):
        ran = run(command, option)
        assert_refused(ran)
        assert ran.err == f"error: {sentence}\n"


def test_a_run_in_a_folder_of_an_odd_name_can_be_evaluated(place: Place) -> None:
    runs = place.path / "runs (1) epoch=9 ü"
    ran = place.train("method=vanilla", "schedule.epochs=1", f"runs={runs}")
    assert (ran.code, ran.err) == (0, "")
    (folder,) = (file.parent for file in runs.rglob("result.json"))
    ran = place.evaluate(f"run={folder}")
    assert (ran.code, ran.err) == (0, "")


def test_neither_data_nor_a_network(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(cifar, "_download", no_network)
    ran = run("train", *SMALL, f"data.root={place.path}", f"runs={place.runs}")
    assert_refused(ran, "cifar10.npz", "data.root")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(place: Place) -> None:
    assert_refused(place.train("trainer=gpu", "method=vanilla"), "gpu", "try trainer=auto")
