"""The table of where a step's time goes."""

import logging

import pytest

from src.profiling import WARM_UP, StepProfiler
from tests.test_view_store import kd
from tests.tiny import tiny_data, tiny_distiller, tiny_teacher, tiny_trainer

WHOLE = ("run_training_batch", ".on_train_batch_start", ".on_train_batch_end", "_dataloader_next", ".batch_to_device")


class Kept(StepProfiler):
    """Remembers what it said."""

    def describe(self) -> None:
        if self.recorded_durations["run_training_batch"]:
            self.said = self.parts()
            self.timed = {name: list(durations) for name, durations in self.recorded_durations.items()}
        super().describe()


def test_the_parts_of_a_step_add_up_to_it_and_each_is_told(tmp_path, caplog) -> None:
    profiler, data = Kept(), tiny_data(tmp_path)
    with caplog.at_level(logging.INFO, "src.profiling"):
        trainer = tiny_trainer(1, profiler=profiler, limit_val_batches=0)
        trainer.fit(tiny_distiller(data, kd(), teacher=tiny_teacher()), datamodule=data)
    steps = len(profiler.timed["run_training_batch"])
    assert steps == 6
    once = [durations[WARM_UP:steps] for name, durations in profiler.timed.items() if name.endswith(WHOLE)]
    assert sum(profiler.said.values()) == pytest.approx(sum(map(sum, once)) / (steps - WARM_UP))
    assert all(seconds > 0 for seconds in profiler.said.values())
    (table,) = [record.getMessage() for record in caplog.records if record.name == "src.profiling"]
    assert [line.split("  ")[0] for line in table.splitlines()[1:]] == [*profiler.said, "a step"]
