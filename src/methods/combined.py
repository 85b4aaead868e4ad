"""Two methods at once, as the published tables combine them: CRD + KD, for one."""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from src.errors import UserError
from src.methods.method import Batch, Method, Networks, Stage
from src.models.network import Network

Value = TypeVar("Value")


class Combined(Method):
    """All of `main`, and the distillation terms of `also`: cross-entropy counts once, weighted by `main`.

    Terms that both have by one name are `also`'s under `also_<name>`. Gradients and predictor are those of `main`.
    """

    def __init__(self, main: Method, also: Method) -> None:
        """Raises `UserError` where `also` wants a say in gradients or prediction, which `main` has."""
        super().__init__()
        kind = type(also)
        if kind.backward is not Method.backward or kind.predictor is not Method.predictor:
            raise UserError(
                f"method@also={kind.__name__.lower()} changes gradients or prediction: choose it by method=."
            )
        self.main, self.also = main, also
        self.needs_teacher = main.needs_teacher or also.needs_teacher
        self.reads_teacher = main.reads_teacher or also.reads_teacher
        self.distils_logits = main.distils_logits or also.distils_logits
        self.needs_features = main.needs_features or also.needs_features
        self.needs_preactivations = main.needs_preactivations or also.needs_preactivations
        self.views = max(main.views, also.views)

    def build(self, networks: Networks) -> None:
        """Both."""
        self.main.build(networks)
        self.also.build(networks)

    def stages(self) -> tuple[Stage, ...]:
        """Those of `main`, then those of `also`."""
        return (*self.main.stages(), *self.also.stages())

    def weights(self, epoch: int) -> dict[str, float]:
        """Of all terms."""
        return _joined(self.main.weights(epoch), self.also.weights(epoch))

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Of both."""
        return _joined(self.main.terms(batch), self.also.terms(batch))

    def backward(self, loss: Tensor, weighted_terms: Mapping[str, Tensor]) -> None:
        """As `main` has it."""
        self.main.backward(loss, weighted_terms)

    def predictor(self, student: Network) -> nn.Module:
        """As `main` has it."""
        return self.main.predictor(student)


def _joined(main: Mapping[str, Value], also: Mapping[str, Value]) -> dict[str, Value]:
    added = {name: value for name, value in also.items() if name != "cross_entropy"}
    return {**main, **{f"also_{name}" if name in main else name: value for name, value in added.items()}}
