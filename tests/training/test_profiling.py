"""The parts of a training step add up to its time, and the table lists them."""

import logging
from pathlib import Path

import pytest

from src.training.profiling import WARM_UP, StepProfiler
from tests.helpers.tiny import kd, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer

WHOLE = ("run_training_batch", ".on_train_batch_start", ".on_train_batch_end", "_dataloader_next", ".batch_to_device")


class Keeping(StepProfiler):
    """Keep the parts and the durations before they are cleared."""

    def describe(self) -> None:
        if self.recorded_durations["run_training_batch"]:
            self.kept = self.parts()
            self.timed = {name: list(durations) for name, durations in self.recorded_durations.items()}
        super().describe()


def test_the_parts_of_a_step_add_up_to_its_time_and_are_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiler, data = Keeping(), tiny_data(tmp_path)
    with caplog.at_level(logging.INFO, "src.training.profiling"):
        trainer = tiny_trainer(1, profiler=profiler, limit_val_batches=0)
        trainer.fit(tiny_distiller(data, kd(), teacher=tiny_teacher()), datamodule=data)
    steps = len(profiler.timed["run_training_batch"])
    assert steps == 6
    once = [durations[WARM_UP:steps] for name, durations in profiler.timed.items() if name.endswith(WHOLE)]
    assert sum(profiler.kept.values()) == pytest.approx(sum(map(sum, once)) / (steps - WARM_UP))
    assert all(seconds > 0 for seconds in profiler.kept.values())
    (table,) = [record.getMessage() for record in caplog.records if record.name == "src.training.profiling"]
    assert [line.split("  ")[0] for line in table.splitlines()[1:]] == [*profiler.kept, "one step"]


def test_the_warm_up_is_not_counted() -> None:
    """The student runs twice a step and everything else once. The first steps are a hundred times slower."""
    profiler = StepProfiler()
    slow, steps = [100.0] * WARM_UP, 4
    profiler.recorded_durations.update(
        {
            "run_training_batch": [*slow, *[10.0] * steps],
            "[LightningModule]Distiller.optimizer_step": [*slow, *[8.0] * steps],
            "[LightningModule]Distiller.training_step": [*slow, *[5.0] * steps],
            "student": [*slow, *slow, *[1.0, 2.0] * steps],
        }
    )
    parts = profiler.parts()
    assert (parts["student"], parts["checks and logging"], parts["optimiser"]) == (3.0, 2.0, 3.0)
    assert sum(parts.values()) == 10.0


def test_fewer_steps_than_the_warm_up_give_no_table(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "src.training.profiling")
    profiler = StepProfiler()
    profiler.recorded_durations["run_training_batch"] = [1.0] * WARM_UP
    assert set(profiler.parts().values()) == {0.0}
    profiler.describe()
    assert caplog.messages == []
