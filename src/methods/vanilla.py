"""Training a network alone: the baseline of every comparison, and how teachers are made."""

from torch import Tensor

from src.methods.method import Batch, Method, cross_entropy


class Vanilla(Method):
    """Cross-entropy on the labels."""

    needs_teacher = False

    def weights(self, epoch: int) -> dict[str, float]:
        """One term, weight 1."""
        return {"cross_entropy": 1.0}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE = -log softmax(z)_t, gradient p - onehot(t)."""
        return {"cross_entropy": cross_entropy(batch)}
