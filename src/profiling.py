"""Where the time of a training step goes: `trainer=profile`."""

import logging
import math

from lightning.pytorch.profilers import SimpleProfiler

log = logging.getLogger(__name__)

WARM_UP = 3
"""Steps that are left out."""


class StepProfiler(SimpleProfiler):
    """Lightning's profiler, with a short table in place of all hooks: the parts of a step, which add up to it.

    On a GPU a part's time is that of starting its kernels, unless something in it waits for them.
    """

    def describe(self) -> None:
        """Log the table after training."""
        if self._seconds("run_training_batch"):
            log.info("%s", self.summary())
        self.recorded_durations.clear()

    def summary(self) -> str:
        """A line for each part: milliseconds of a step, and its share."""
        parts = self.parts()
        step = math.fsum(parts.values()) or math.nan
        lines = [f"{name:<36}{1000 * seconds:9.2f} ms{100 * seconds / step:7.1f} %" for name, seconds in parts.items()]
        return "\n".join(["Where a training step's time goes:", *lines, f"{'a step':<36}{1000 * step:9.2f} ms"])

    def parts(self) -> dict[str, float]:
        """Mean seconds that each part of a step takes."""
        views, moved = self._seconds(".on_after_batch_transfer"), self._seconds(".batch_to_device")
        student, teacher, terms = (self._seconds(name) for name in ("student", "teacher", "terms"))
        forward, backward = self._seconds(".training_step"), self._seconds(".backward")
        around = self._seconds(".on_train_batch_start") + self._seconds(".on_train_batch_end")
        closure, whole = self._seconds(".optimizer_step"), self._seconds("run_training_batch")
        return {
            "read the batch": self._seconds(".train_dataloader_next"),
            "move it to the device": moved - views,
            "crop and flip": views,
            "student": student,
            "teacher, or its stored answers": teacher,
            "the method's terms": terms,
            "backward": backward,
            "optimiser": closure - forward - backward,
            "checks and logging": forward - student - teacher - terms,
            "callbacks": whole - closure + around,
        }

    def _seconds(self, ending: str) -> float:
        """Of all actions with this ending, in a step."""
        steps = len(self.recorded_durations.get("run_training_batch", ())) - WARM_UP
        found = (durations for name, durations in self.recorded_durations.items() if name.endswith(ending))
        # one that is called several times a step is so in every step
        seconds = math.fsum(
            math.fsum(durations[WARM_UP * (len(durations) // (steps + WARM_UP)) :]) for durations in found
        )
        return seconds / steps if steps > 0 else 0.0
