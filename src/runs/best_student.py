"""`keep_best=true`: the student of the epoch with the highest validation accuracy, beside that of the last epoch."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

FILE = "student_best.pth"


class BestStudent(Callback):
    """Keep the student's weights of the best epoch so far, in the checkpoints and for the end of the run.

    The first of several equal epochs counts. With an average of the weights, it is the average that is scored and kept.
    For this, the callback must come before the one that averages.
    """

    def __init__(self) -> None:
        self.accuracy = -1.0
        """Validation accuracy of the best epoch so far, as a fraction."""
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}
        self.scored: dict[str, Tensor] = {}
        """The weights of the last validation."""

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch so far."""
        return {"accuracy": self.accuracy, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best epoch up to the checkpoint."""
        self.accuracy, self.epoch, self.weights = (state_dict[key] for key in ("accuracy", "epoch", "weights"))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the scored weights. Their metrics are computed after this, when an average has been swapped out."""
        student: Any = pl_module.student
        self.scored = {name: value.cpu().clone() for name, value in student.state_dict().items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights if no earlier epoch was as good."""
        scored, self.scored = self.scored, {}
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        accuracy = float(trainer.callback_metrics["val/accuracy"])
        if accuracy > self.accuracy:
            self.accuracy, self.epoch, self.weights = accuracy, trainer.current_epoch, scored
