"""Classifiers of timm as networks of this project. timm is imported only if one is requested."""

from typing import Any

from torch import Tensor, nn

from src.common.errors import UserError
from src.models.network import Output
from src.models.torchvision_networks import LibraryNetwork, last_map


class TimmNetwork(LibraryNetwork):
    """A classifier of timm that ends in a linear layer. Names in the state dict are timm's.

    The features come from timm's `forward_intermediates`: the last output of each resolution, the largest first.
    """

    def __init__(self, model: Any) -> None:
        classifier = model.get_classifier()
        if isinstance(classifier, nn.Identity):
            raise UserError(f"{type(model).__name__} has no classifier of its own: give a number of classes.")
        super().__init__(model, classifier)
        last = {info["reduction"]: index for index, info in enumerate(model.feature_info)}
        self.indices = list(last.values())

    def forward_features(self, images: Tensor) -> Output:
        """Compute logits, features of each resolution, and pooled features (the classifier's input)."""
        model: Any = self.model
        pooled: list[Tensor] = []
        final, features = model.forward_intermediates(images, indices=self.indices)
        with self.classifier_layer.register_forward_pre_hook(lambda _, x: pooled.append(x[0])):
            logits = model.forward_head(final)
        return Output(logits, tuple(features), pooled[0], unpooled=last_map([final], pooled[0]))


def import_timm() -> Any:
    """Import timm. Raises `UserError` if it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UserError("A network timm/NAME needs the package timm: pip install timm") from error
    return timm
