"""SimKD: D. Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, arXiv 2203.14001.

The student has no classifier of its own: a projector P leads its last feature map to the teacher's and the teacher's
classifier, unchanged, does the rest. All that is trained for is |f_t - P(f_s)|^2 before pooling, the mean over all
elements here as in the authors' code; labels are not looked at. Where the two maps differ in resolution, the larger is
averaged down to the smaller, before P.

The maps are those that the classifiers' inputs are made of. The authors' code takes the last of RepDistiller's feature
points, which for a student of MobileNetV2 or ShuffleNetV2 is the one before the last convolution.
"""

from collections.abc import Callable

from pydantic import PositiveInt
from torch import Tensor, nn

from src.methods.features import averaged_to, last_map_shapes, last_maps
from src.methods.fitnet import hint_loss
from src.methods.method import Batch, Method, Networks
from src.models.network import Network


def projector(student_channels: int, teacher_channels: int, factor: int) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolutions, the middle ones of teacher_channels / factor channels."""
    middle = max(teacher_channels // factor, 1)
    return nn.Sequential(
        nn.Conv2d(student_channels, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, middle, 3, padding=1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, teacher_channels, 1, bias=False),
        nn.BatchNorm2d(teacher_channels),
        nn.ReLU(),
    )


class ReusedClassifier(nn.Module):
    """The network that SimKD trains: a student up to its last map, the projector, and the teacher's classifier."""

    def __init__(
        self,
        student: Network,
        projector: nn.Module,
        size: tuple[int, int],
        pool: Callable[[Tensor], Tensor],
        classifier: nn.Module,
    ) -> None:
        super().__init__()
        self.student = student
        self.projector = projector
        self.size = size
        self.pool = pool
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, H, W]."""
        unpooled = self.student.forward_features(images).unpooled
        assert unpooled is not None
        return self.classifier(self.pool(self.projector(averaged_to(unpooled, *self.size))))


class SimKD(Method):
    """feature_weight * |f_t - P(f_s)|^2; the student's own classifier is left as it was."""

    needs_features = True
    projector: nn.Module
    classifier: nn.Linear

    def __init__(self, *, feature_weight: float, factor: PositiveInt) -> None:
        super().__init__()
        self.feature_weight = feature_weight
        self.factor = factor

    def build(self, networks: Networks) -> None:
        """The projector and the teacher's classifier. Raises `UserError` where a network has no last map."""
        assert networks.teacher is not None
        student, teacher = last_map_shapes(networks, "simkd")
        self.size = (min(student[1], teacher[1]), min(student[2], teacher[2]))
        self.projector = projector(student[0], teacher[0], self.factor)
        self.classifier = networks.teacher_classifier()
        self.pool = networks.teacher.network.pool
        networks.student.classifier_layer.requires_grad_(False)  # several devices would wait for its gradients

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        return {"feature": self.feature_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The distance of the last maps."""
        student, teacher = (averaged_to(last, *self.size) for last in last_maps(batch))
        return {"feature": hint_loss(self.projector(student), teacher)}

    def predictor(self, student: Network) -> ReusedClassifier:
        """The student up to its last map, the projector, and the teacher's classifier."""
        return ReusedClassifier(student, self.projector, self.size, self.pool, self.classifier)
