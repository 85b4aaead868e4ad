"""Stages and the main stage train the same student, each from its newest intact checkpoint."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import UserError
from src.data.array_data import ArrayData
from src.methods.method import Batch, Method, Networks, Stage
from src.methods.vanilla import Vanilla
from src.models.resnet import resnet14
from src.runs.checkpointing import checkpoint_file, previous_file
from src.runs.history import read_history
from src.training import fitting
from src.training.distiller import Distiller
from src.training.fitting import check_batch_norm, fit, make_logger, make_trainer, strategy_options
from tests.helpers.configure import changed, configure
from tests.helpers.tiny import CLASSES, kd, same, tiny_data, tiny_distiller, tiny_teacher, weights

LEARNING_RATE = 0.05
"""The learning rate of `tiny_distiller`."""


def config(**options: Any) -> DictConfig:
    """Compose the configuration of a short run on one CPU. `options` are those of `changed`."""
    cfg = configure("method=vanilla", "trainer=cpu", "logger=none", "gradients.every=0", "schedule.batch_size=8")
    return changed(cfg, **{"trainer__max_epochs": 2, **options})


class HeadOnly(Method):
    """A stage that trains the student's classifier and an adapter of the main method."""

    needs_teacher = False
    needs_features = True

    def __init__(self, adapter: nn.Linear) -> None:
        super().__init__()
        self.adapter = adapter

    def weights(self, epoch: int) -> dict[str, float]:
        return {"head": 1.0}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"head": F.cross_entropy(self.adapter(batch.student.logits), batch.target)}


class TwoStages(Vanilla):
    """Two stages before cross-entropy: two epochs at half the learning rate, and one at the full rate."""

    def allocate(self, networks: Networks) -> None:
        self.adapter = nn.Linear(CLASSES, CLASSES)

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage("slow", HeadOnly(self.adapter), epochs=2, learning_rate_scale=0.5),
            Stage("fast", HeadOnly(self.adapter), epochs=1),
        )


@pytest.fixture
def data(tmp_path: Path) -> ArrayData:
    return tiny_data(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


# Stages


def learning_rates(folder: Path) -> list[float]:
    return [row["learning_rate"] for row in read_history(folder)]


def test_each_stage_trains_at_its_own_rate_in_its_own_folder(data: ArrayData, folder: Path) -> None:
    fit(config(), tiny_distiller(data, TwoStages()), data, folder)
    assert learning_rates(folder / "stages" / "slow") == pytest.approx([LEARNING_RATE / 2] * 2)
    assert learning_rates(folder / "stages" / "fast") == pytest.approx([LEARNING_RATE])
    assert learning_rates(folder) == pytest.approx([LEARNING_RATE] * 2)
    assert {"train/head"} <= read_history(folder / "stages" / "slow")[0].keys()
    assert {"train/cross_entropy"} <= read_history(folder)[0].keys()


def test_stages_train_the_student_and_the_modules_of_the_main_method(
    data: ArrayData, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = TwoStages()
    distiller = tiny_distiller(data, method)
    start = weights(distiller)
    before_main: dict[str, Tensor] = {}
    original = fitting._fit_stage

    def remember(cfg: DictConfig, module: Distiller, *arguments: Any, **options: Any) -> Any:
        assert module.student is distiller.student
        assert module.serialization is distiller.serialization
        if module is distiller:
            before_main.update(weights(distiller))
        return original(cfg, module, *arguments, **options)

    monkeypatch.setattr(fitting, "_fit_stage", remember)
    fit(config(), distiller, data, folder)
    changes = {name for name, value in start.items() if not torch.equal(before_main[name], value)}
    assert {"student.fc.weight", "student.conv1.weight", "method.adapter.weight"} <= changes


def test_stages_leave_the_method_and_the_learning_rate_of_the_main_module(data: ArrayData, folder: Path) -> None:
    method = TwoStages()
    distiller = tiny_distiller(data, method)
    recipe, settings = distiller.recipe, distiller.settings
    fit(config(), distiller, data, folder)
    assert distiller.method is method
    assert (distiller.recipe, distiller.settings) == (recipe, settings)
    assert set(distiller.weighted_terms) == {"cross_entropy"}


def test_a_stage_has_at_most_the_epochs_of_the_trainer(data: ArrayData, folder: Path) -> None:
    fit(config(trainer__max_epochs=1), tiny_distiller(data, TwoStages()), data, folder)
    assert [len(read_history(folder / place)) for place in ("stages/slow", "stages/fast", ".")] == [1, 1, 1]


def test_finished_stages_are_not_trained_again(data: ArrayData, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    distiller = tiny_distiller(data, TwoStages())
    fit(config(), distiller, data, folder)
    expected, rows = weights(distiller), read_history(folder / "stages" / "slow")
    caplog.set_level(logging.INFO, "src.runs.history")
    caplog.clear()
    again = tiny_distiller(data, TwoStages())
    fit(config(), again, data, folder)
    assert same(weights(again), expected)
    assert read_history(folder / "stages" / "slow") == rows
    assert not [record for record in caplog.records if record.name == "src.runs.history"], "no epoch was trained"


@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
def test_ddp_does_not_wait_for_the_parameters_of_other_stages(
    data: ArrayData, folder: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    chosen: list[str | None] = []
    monkeypatch.setattr(fitting, "_fit_stage", lambda *_, **options: chosen.append(options.get("strategy")))
    cfg = config(trainer__strategy=strategy)
    fit(cfg, tiny_distiller(data, TwoStages()), data, folder)
    fit(cfg, tiny_distiller(data, Vanilla()), data, folder)
    assert chosen == [f"{strategy}_find_unused_parameters_true"] * 3 + [None]


class Fading(Vanilla):
    """A second term that has no weight from epoch 1 on."""

    def weights(self, epoch: int) -> dict[str, float]:
        return {"cross_entropy": 1.0, "fading": 1.0 if epoch == 0 else 0.0}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Vanilla(), {"static_graph": True}),
        (Fading(), {"static_graph": False}),
        (TwoStages(), {"find_unused_parameters": True}),
    ],
    ids=["one graph", "a term loses its weight", "stages"],
)
def test_ddp_assumes_what_the_method_allows(method: Method, options: dict[str, bool]) -> None:
    node = {"_target_": "lightning.pytorch.strategies.DDPStrategy", "gradient_as_bucket_view": True}
    method.adapter = nn.Identity()  # the stages refer to it
    strategy = strategy_options(config(trainer__strategy=node), method)["strategy"]
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, **options}
    cfg = config(trainer__strategy=node)
    with open_dict(cfg):
        cfg.trainer.accumulate_grad_batches = 2
    assert not strategy_options(cfg, method)["strategy"]._ddp_kwargs.get("static_graph"), "DDP fails with both"


def test_the_trainers_of_several_devices_do_not_copy_gradients() -> None:
    for name in ("ddp", "ddp_cpu", "slurm"):
        assert configure(f"trainer={name}").trainer.strategy.gradient_as_bucket_view is True


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_an_option(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    make_trainer(config(tf32=tf32))
    assert torch.backends.cudnn.allow_tf32 is tf32


def test_the_deterministic_mode_does_not_fill_memory() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    make_trainer(config())
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


# Checkpoints


class FailsAt(Vanilla):
    """Cross-entropy, and an error in one step."""

    def __init__(self, step: int, error: Exception) -> None:
        super().__init__()
        self.step, self.error = step, error

    def terms(self, batch: Batch) -> Any:
        if batch.step == self.step:
            raise self.error
        return super().terms(batch)


def test_a_run_resumes_from_its_last_checkpoint(data: ArrayData, folder: Path) -> None:
    whole, resumed = tiny_distiller(data, Vanilla()), tiny_distiller(data, Vanilla())
    fit(config(), whole, data, folder.with_name("whole"))
    with pytest.raises(ZeroDivisionError):
        fit(config(), tiny_distiller(data, FailsAt(9, ZeroDivisionError())), data, folder)
    assert len(read_history(folder)) == 1
    fit(config(), resumed, data, folder)
    assert same(weights(resumed), weights(whole))


def test_a_damaged_checkpoint_is_deleted_and_the_intact_one_is_kept(
    data: ArrayData, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run fails at its first step after resuming. The intact checkpoint must still be there."""
    whole, resumed = tiny_distiller(data, Vanilla()), tiny_distiller(data, Vanilla())
    cfg = config(trainer__max_epochs=3)
    fit(cfg, whole, data, folder.with_name("whole"))
    with pytest.raises(ZeroDivisionError):
        fit(cfg, tiny_distiller(data, FailsAt(13, ZeroDivisionError())), data, folder)
    last = checkpoint_file(folder)
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(ZeroDivisionError):  # from the checkpoint of six steps
        fit(cfg, tiny_distiller(data, FailsAt(6, ZeroDivisionError())), data, folder)
    assert "last.ckpt is damaged" in caplog.text
    assert not last.exists()
    assert torch.load(previous_file(folder), weights_only=True)["global_step"] == 6
    fit(cfg, resumed, data, folder)
    assert same(weights(resumed), weights(whole))


def test_a_run_without_an_intact_checkpoint_says_how_to_start_over(data: ArrayData, folder: Path) -> None:
    fit(config(trainer__max_epochs=1), tiny_distiller(data, Vanilla()), data, folder)
    for file in (checkpoint_file(folder), previous_file(folder)):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"previous\.ckpt is damaged.*: add start_over=true to train again\."):
        fit(config(), tiny_distiller(data, Vanilla()), data, folder)


def test_a_checkpoint_of_another_network_does_not_fit(data: ArrayData, folder: Path) -> None:
    fit(config(trainer__max_epochs=1), tiny_distiller(data, Vanilla()), data, folder)
    other = tiny_distiller(data, Vanilla(), new_student=resnet14)
    with pytest.raises(UserError, match=r"last\.ckpt does not fit this run \(RuntimeError: .*\): add start_over=true"):
        fit(config(), other, data, folder)


@pytest.mark.parametrize("error", [RuntimeError("in a step"), UserError("The loss is not finite.")], ids=repr)
def test_an_error_of_the_training_is_not_taken_for_one_of_the_checkpoint(
    data: ArrayData, folder: Path, error: Exception
) -> None:
    fit(config(trainer__max_epochs=1), tiny_distiller(data, Vanilla()), data, folder)
    with pytest.raises(type(error)) as caught:
        fit(config(), tiny_distiller(data, FailsAt(7, error)), data, folder)
    assert caught.value is error


# Callbacks


@pytest.mark.parametrize("every", [0, 3])
def test_gradients_are_measured_if_asked_for(data: ArrayData, folder: Path, every: int) -> None:
    cfg = config(gradients__every=every, trainer__max_epochs=1)
    fit(cfg, tiny_distiller(data, kd(), teacher=tiny_teacher()), data, folder)
    assert (folder / "gradients.csv").exists() == bool(every)


# The trainer and the logger


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "src.training.fitting"]


@pytest.mark.parametrize("logger", ["none", "csv", "tensorboard"])
def test_a_run_without_wandb_says_that_it_is_off(tmp_path: Path, caplog: pytest.LogCaptureFixture, logger: str) -> None:
    caplog.set_level(logging.INFO, "src.training.fitting")
    made = make_logger(configure("method=vanilla", f"logger={logger}"), tmp_path)
    assert lines(caplog) == ["W&B: off."]
    assert (made is False) == (logger == "none")


def test_wandb_says_its_own_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "src.training.fitting")

    def wandb_logger(folder: Path, project: str) -> tuple[Path, str]:
        return folder, project

    monkeypatch.setattr("src.runs.loggers.wandb_logger", wandb_logger)
    assert make_logger(configure("method=vanilla", "logger=wandb"), tmp_path) == (tmp_path, "aekt")
    assert lines(caplog) == []


def test_a_logger_that_cannot_start_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def csv_logger(folder: Path) -> None:
        raise ConnectionError("There is no server.")

    monkeypatch.setattr("src.runs.loggers.csv_logger", csv_logger)
    assert make_logger(configure("method=vanilla", "logger=csv"), tmp_path) is False
    assert caplog.messages[-1].startswith("The logger failed (ConnectionError: There is no server). The run goes on")


def test_training_goes_on_without_a_logger_that_fails(
    data: ArrayData, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_metrics(*_: Any) -> None:
        raise BrokenPipeError("the service has ended")

    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger.log_metrics", log_metrics)
    with_logger, without_logger = tiny_distiller(data, Vanilla()), tiny_distiller(data, Vanilla())
    fit(changed(config(), logger=configure("logger=csv").logger), with_logger, data, folder)
    fit(config(), without_logger, data, folder.with_name("other"))
    assert same(weights(with_logger), weights(without_logger))
    assert sum("The logger failed (BrokenPipeError" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(("batch_size", "devices", "fits"), [(8, 2, True), (9, 2, False), (9, 1, True)])
def test_the_global_batch_must_divide_by_the_devices(batch_size: int, devices: int, fits: bool) -> None:
    strategy = "ddp_fork" if devices > 1 else "auto"
    cfg = config(schedule__batch_size=batch_size, trainer__devices=devices, trainer__strategy=strategy)
    cfg.trainer.sync_batchnorm = False
    if fits:
        assert make_trainer(cfg, logger=False, enable_checkpointing=False).world_size == devices
    else:
        with pytest.raises(UserError, match=r"schedule\.batch_size=9 .* 2 devices: choose a multiple of 2\."):
            make_trainer(cfg, logger=False, enable_checkpointing=False)


def test_batch_norm_cannot_be_synchronised_on_cpus() -> None:
    cfg = configure("method=vanilla", "trainer=ddp_cpu", "trainer.sync_batchnorm=true")
    with pytest.raises(UserError, match=r"synchronised on CPUs: add trainer\.sync_batchnorm=false\."):
        make_trainer(cfg, logger=False, enable_checkpointing=False)


def test_several_devices_need_a_strategy() -> None:
    cfg = configure("method=vanilla", "trainer=cpu", "trainer.devices=2")
    with pytest.raises(UserError, match=r"2 devices need a strategy: use trainer=ddp, or trainer=ddp_cpu on CPUs\."):
        make_trainer(cfg, logger=False, enable_checkpointing=False)


class NormWithActivation(nn.BatchNorm2d):
    """A batch norm like those of timm."""


def test_batch_norm_that_synchronising_would_replace_is_refused() -> None:
    cfg, student = configure("trainer=ddp"), nn.Sequential(nn.BatchNorm2d(3), NormWithActivation(3))
    with pytest.raises(UserError, match=r"would replace NormWithActivation in .*: add trainer\.sync_batchnorm=false\."):
        check_batch_norm(cfg, student, world_size=2)
    check_batch_norm(cfg, student, world_size=1)
    check_batch_norm(cfg, student[:1], world_size=2)
    check_batch_norm(configure("trainer=ddp", "trainer.sync_batchnorm=false"), student, world_size=2)


def test_a_missing_device_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"This machine cannot run the configured trainer \(.*\): try trainer=auto\."):
        make_trainer(config(trainer__accelerator="cuda"))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"gradient_clip_val": "abc"}, "`gradient_clip_val` should be an int or a float. Got abc"),
        ({"gradient_clip_algorithm": "abc"}, "`gradient_clip_algorithm` abc is invalid"),
        ({"limit_train_batches": 1.5}, "invalid value 1.5 for limit_train_batches"),
        ({"strategy": "nonsense"}, "`strategy='nonsense'`"),
        ({"devices": 0}, "`Trainer(devices=0)`"),
        ({"profiler": "abc"}, "`profiler`"),
    ],
)
def test_options_that_lightning_refuses_are_not_called_a_missing_device(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        make_trainer(config(), **{"logger": False, "enable_checkpointing": False, **overrides})
    message = str(caught.value)
    assert message.startswith("The options of trainer do not fit Lightning's Trainer: ")
    assert named in message
    assert message.endswith(".")
    assert not message.endswith("..")


def test_an_object_within_the_trainer_that_cannot_be_made_is_named() -> None:
    callbacks = "+trainer.callbacks=[{_target_:lightning.pytorch.callbacks.EarlyStopping}]"
    with pytest.raises(
        UserError, match=r"^The options of trainer\.callbacks\[0\] do not fit its _target_: .*'monitor'"
    ):
        make_trainer(configure("trainer=cpu", callbacks), logger=False, enable_checkpointing=False)


def test_arguments_override_the_configured_trainer() -> None:
    assert make_trainer(config(), max_epochs=7, logger=False, enable_checkpointing=False).max_epochs == 7
