"""`python -m src.evaluate`: a run or a checkpoint is evaluated again."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from src.evaluate import evaluate
from src.models.checkpoints import save_weights
from src.models.resnet import resnet14
from tests.helpers.commands import assert_refused
from tests.helpers.configure import changed, configure
from tests.helpers.place import Place, result_of

AGREES = "The metrics agree with those that the run reported."


@pytest.mark.parametrize(
    ("method", "layer"),
    [("vanilla", "none"), pytest.param("kd", "parallel", marks=pytest.mark.slow), ("aekt", "serial")],
)
def test_evaluation_agrees_with_the_run(finished: Place, method: str, layer: str) -> None:
    folder = next(path for path in finished.folders(method, layer) if "resnet8" in path.parts[-3])
    before = finished.contents()
    ran = finished.evaluate(f"run={folder}")
    assert (ran.code, ran.err) == (0, "")
    assert AGREES in ran.out
    assert f"{result_of(folder)['test']['nll']:.6f}" in ran.out
    assert ("agreement" in ran.out) == (method != "vanilla")
    assert finished.contents() == before


def test_measured_and_reported_metrics_have_the_same_names(finished: Place) -> None:
    folder = finished.folder("aekt", "serial")
    cfg = changed(configure(command="evaluate"), run=str(folder), data__path=str(finished.data))
    measured, reported = evaluate(cfg)
    assert measured.keys() == reported.keys() == {"accuracy", "top5", "nll", "ece", "agreement"}
    assert measured == pytest.approx(reported, abs=1e-6)


def test_evaluation_of_a_bare_checkpoint(finished: Place) -> None:
    folder = finished.folder("aekt", "serial")
    ran = finished.evaluate("data=cifar10", "network@model.student=resnet8", f"checkpoint={folder / 'student.pth'}")
    assert (ran.code, ran.err) == (0, "")
    for name in ("accuracy", "nll", "ece"):
        assert f"{result_of(folder)['test'][name]:.6f}" in ran.out
    assert "reported by the run" not in ran.out
    assert AGREES not in ran.out


def test_a_run_that_is_not_finished_is_evaluated_without_a_comparison(copies: Place) -> None:
    folder = copies.folder("aekt", "serial")
    accuracy = result_of(folder)["test"]["accuracy"]
    (folder / "result.json").unlink()
    ran = copies.evaluate(f"run={folder}")
    assert (ran.code, ran.err) == (0, "")
    assert f"{folder} is not finished: its last checkpoint is used." in ran.out
    assert f"{accuracy:.6f}" in ran.out
    assert AGREES not in ran.out


def test_metrics_that_differ_from_the_reported_ones_are_an_error(copies: Place) -> None:
    folder = copies.folder("aekt", "serial")
    result = result_of(folder)
    result["test"]["accuracy"] += 0.1
    (folder / "result.json").write_text(json.dumps(result))
    assert_refused(copies.evaluate(f"run={folder}"), "The metrics differ from those that the run reported: accuracy.")


def test_a_metric_that_is_not_a_number_differs(copies: Place) -> None:
    folder = copies.folder("aekt", "serial")
    result = result_of(folder)
    result["test"]["nll"] = float("nan")
    (folder / "result.json").write_text(json.dumps(result))
    ran = copies.evaluate(f"run={folder}")
    assert ran.code == 1
    assert "nll" in ran.err


@pytest.mark.parametrize("target", ["os.system", "src.config.os.system", "builtins.exec"])
def test_evaluation_calls_only_targets_that_conf_calls(copies: Place, target: str) -> None:
    folder = copies.folder("aekt", "serial")
    config: Any = OmegaConf.load(folder / "config.yaml")
    canary = copies.path / "executed"
    command = f"open({str(canary)!r}, 'w')" if target == "builtins.exec" else f"touch {canary}"
    config.data.prepare = {"_target_": target, "_args_": [command]}
    OmegaConf.save(config, folder / "config.yaml")
    assert_refused(copies.evaluate(f"run={folder}"), f"would call {target}, which no file in conf/ names")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ([], "Give exactly one of run=FOLDER"),
        (["run={tmp}", "checkpoint=x.pth"], "Give exactly one of run=FOLDER"),
        (["run={tmp}"], "is not a run folder, because it has no config.yaml"),
        (["run={tmp}", "data.val_size=5"], "data.val_size cannot be given together with run=..., because a run is"),
        (["checkpoint={tmp}/missing.pth", "data=cifar10"], "missing.pth does not exist"),
        (["checkpoint={tmp}/resnet14.pth", "data=cifar10"], "does not hold the weights of a"),
    ],
)
def test_an_evaluation_of_nothing_is_refused(
    finished: Place, tmp_path: Path, arguments: list[str], phrase: str
) -> None:
    save_weights(resnet14(10), tmp_path / "resnet14.pth")
    assert_refused(finished.evaluate(*(argument.format(tmp=tmp_path) for argument in arguments)), phrase)


def test_an_evaluation_of_no_image_is_refused(finished: Place) -> None:
    ran = finished.evaluate(
        f"checkpoint={finished.folder('dkd') / 'student.pth'}",
        "data=cifar10",
        "network@model.student=resnet8",
        "trainer.limit_test_batches=0",
    )
    assert_refused(ran, "trainer.limit_test_batches=0 does not fit: input should be greater than 0.")


def test_evaluation_without_a_checkpoint(copies: Place) -> None:
    folder = copies.folder("aekt", "serial")
    (folder / "checkpoints" / "last.ckpt").unlink()
    assert_refused(copies.evaluate(f"run={folder}"), "has no checkpoints/last.ckpt, so there is nothing to open")


def test_evaluation_of_a_checkpoint_that_does_not_fit(copies: Place) -> None:
    folder = copies.folder("aekt", "serial")
    config: Any = OmegaConf.load(folder / "config.yaml")
    config.model.student._target_ = "src.models.resnet.resnet14"
    OmegaConf.save(config, folder / "config.yaml")
    assert_refused(copies.evaluate(f"run={folder}"), "last.ckpt does not fit the networks of")
