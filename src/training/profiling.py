"""`trainer=profile`: a table of the time that each part of a training step takes."""

import logging
import math

from lightning.pytorch.profilers import SimpleProfiler

log = logging.getLogger(__name__)

WARM_UP = 3
"""Steps at the start that are not counted."""


class StepProfiler(SimpleProfiler):
    """Lightning's profiler, with the parts of a training step instead of a long list of hooks.

    The parts add up to the time of a step. On a GPU, the time of a part is the time to launch its kernels, unless the
    part waits for their results.
    """

    def describe(self) -> None:
        """Log the table after training, and forget the durations."""
        if self._seconds("run_training_batch"):
            log.info("%s", self.summary())
        self.recorded_durations.clear()

    def summary(self) -> str:
        """Format the table: for each part, its milliseconds per step and its share of the step."""
        parts = self.parts()
        step = math.fsum(parts.values()) or math.nan
        lines = [f"{name:<36}{1000 * seconds:9.2f} ms{100 * seconds / step:7.1f} %" for name, seconds in parts.items()]
        return "\n".join(["Time of a training step:", *lines, f"{'one step':<36}{1000 * step:9.2f} ms"])

    def parts(self) -> dict[str, float]:
        """Return the mean seconds per step of each part.

        Lightning times whole hooks, and some hooks contain others. The time of any other part is the time of a hook
        minus the times of the hooks inside it.
        """
        augmentation, transfer = self._seconds(".on_after_batch_transfer"), self._seconds(".batch_to_device")
        student, teacher, terms = (self._seconds(name) for name in ("student", "teacher", "terms"))
        forward, backward = self._seconds(".training_step"), self._seconds(".backward")
        callbacks = self._seconds(".on_train_batch_start") + self._seconds(".on_train_batch_end")
        optimizer_step, whole = self._seconds(".optimizer_step"), self._seconds("run_training_batch")
        return {
            "read the batch": self._seconds(".train_dataloader_next"),
            "move it to the device": transfer - augmentation,
            "crop and flip": augmentation,
            "student": student,
            "teacher, or its stored answers": teacher,
            "the method's terms": terms,
            "backward": backward,
            "optimiser": optimizer_step - forward - backward,
            "checks and logging": forward - student - teacher - terms,
            "callbacks": whole - optimizer_step + callbacks,
        }

    def _seconds(self, ending: str) -> float:
        """Return the mean seconds per step of all actions whose name has this ending, without the warm-up."""
        steps = len(self.recorded_durations.get("run_training_batch", ())) - WARM_UP
        found = (durations for name, durations in self.recorded_durations.items() if name.endswith(ending))
        # An action that runs n times in a step has n times as many durations, so the warm-up is n times as long.
        seconds = math.fsum(
            math.fsum(durations[WARM_UP * (len(durations) // (steps + WARM_UP)) :]) for durations in found
        )
        return seconds / steps if steps > 0 else 0.0
