"""Train a network alone: the baseline of every comparison, and the way teachers are made."""

from torch import Tensor

from src.methods.method import Batch, Method, cross_entropy


class Vanilla(Method):
    """Cross-entropy on the labels."""

    needs_teacher = False
    distils = False

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weight 1 of the only term."""
        return {"cross_entropy": 1.0}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return CE = -log softmax(z)_t of the student's own logits z. Gradient: p - onehot(t)."""
        return {"cross_entropy": cross_entropy(batch)}
