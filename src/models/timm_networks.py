"""timm's classifiers as networks of this project; timm is imported only where one is asked for."""

from typing import Any

from torch import Tensor, nn

from src.errors import UserError
from src.models.network import Output
from src.models.torchvision_networks import LibraryNetwork, last_map


class TimmNetwork(LibraryNetwork):
    """A classifier of timm that ends in a linear layer; names in the state dict are timm's.

    Features: what timm's `forward_intermediates` gives, the last of each resolution, the largest first.
    """

    def __init__(self, model: Any) -> None:
        classifier = model.get_classifier()
        if isinstance(classifier, nn.Identity):
            raise UserError(f"{type(model).__name__} has no classifier of its own: give it a number of classes.")
        super().__init__(model, classifier)
        last = {info["reduction"]: index for index, info in enumerate(model.feature_info)}
        self.indices = list(last.values())

    def forward_features(self, images: Tensor) -> Output:
        """Logits, features of each resolution, pooled features (the classifier's input)."""
        model: Any = self.model
        pooled: list[Tensor] = []
        final, features = model.forward_intermediates(images, indices=self.indices)
        with self.classifier_layer.register_forward_pre_hook(lambda _, x: pooled.append(x[0])):
            logits = model.forward_head(final)
        return Output(logits, tuple(features), pooled[0], unpooled=last_map([final], pooled[0]))


def import_timm() -> Any:
    """The library; raises `UserError` where it is missing."""
    try:
        import timm
    except ImportError as error:
        raise UserError("teacher.source=timm/... needs timm: pip install timm") from error
    return timm
