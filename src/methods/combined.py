"""Train with two methods at once, as published tables do: CRD + KD, for example."""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from src.common.errors import UserError
from src.methods.method import Batch, DistillationLogits, Method, Networks, Stage
from src.models.network import Network

Value = TypeVar("Value")


class Combined(Method):
    """All terms of `main`, and the distillation terms of `also`.

    Cross-entropy counts once, with the weight of `main`. If both have a term of the same name, the term of `also` is
    renamed to `also_<name>`. Gradients and predictor come from `main`.
    """

    def __init__(self, main: Method, also: Method) -> None:
        """Combine two methods. Raises `UserError` if `also` changes gradients or prediction: only one method can."""
        super().__init__()
        kind = type(also)
        if kind.backward is not Method.backward or kind.predictor is not Method.predictor:
            raise UserError(
                f"method@also={kind.__name__.lower()} changes gradients or prediction: choose it with method= instead."
            )
        self.main, self.also = main, also
        self.needs_teacher = main.needs_teacher or also.needs_teacher
        self.distils = main.distils or also.distils
        self.needs_labels = main.needs_labels or also.needs_labels
        self.needs_unmixed = main.needs_unmixed or also.needs_unmixed
        self.reads_teacher = main.reads_teacher or also.reads_teacher
        self.needs_features = main.needs_features or also.needs_features
        self.needs_preactivations = main.needs_preactivations or also.needs_preactivations
        self.can_be_standardized = main.can_be_standardized and also.can_be_standardized
        self.views_per_image = max(main.views_per_image, also.views_per_image)

    def check(self) -> None:
        """Raise `UserError` if `also` distils logits with which the student of `main` does not predict."""
        if type(self.main).predictor is not Method.predictor and self.also.distils_logits:
            raise UserError(
                f"method@also={type(self.also).__name__.lower()} distils the student's own logits, but a student of "
                f"method={type(self.main).__name__.lower()} does not predict with them: choose a method on features."
            )

    @property
    def distils_logits(self) -> bool:
        """True if at least one of the two methods distils logits."""
        return self.main.distils_logits or self.also.distils_logits

    def allocate(self, networks: Networks) -> None:
        """Allocate the parameters of both methods."""
        self.main.allocate(networks)
        self.also.allocate(networks)

    def stages(self) -> tuple[Stage, ...]:
        """List the stages of `main`, then those of `also`."""
        return (*self.main.stages(), *self.also.stages())

    def weights(self, epoch: int) -> dict[str, float]:
        """Return the weights of all terms."""
        return _joined(self.main.weights(epoch), self.also.weights(epoch))

    def all_terms(self, batch: Batch, logits: DistillationLogits) -> dict[str, Tensor]:
        """Compute the terms of both methods."""
        return _joined(self.main.all_terms(batch, logits), self.also.all_terms(batch, logits))

    def backward(self, loss: Tensor, weighted_terms: Mapping[str, Tensor]) -> None:
        """Compute gradients as `main` does."""
        self.main.backward(loss, weighted_terms)

    def predictor(self, student: Network) -> nn.Module:
        """Return the predictor of `main`."""
        return self.main.predictor(student)


def _joined(main: Mapping[str, Value], also: Mapping[str, Value]) -> dict[str, Value]:
    added = {name: value for name, value in also.items() if name != "cross_entropy"}
    return {**main, **{f"also_{name}" if name in main else name: value for name, value in added.items()}}
