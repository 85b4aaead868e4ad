"""SimKD: D. Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, arXiv 2203.14001.

    loss = |f_t - P(f_s)|^2, the mean over all elements as in the authors' code

Notation: f_s and f_t are the last feature maps of student and teacher before pooling, P is a projector.

The student has no classifier of its own: the projector maps its last map to the teacher's, and the teacher's
classifier, unchanged, makes the logits. The loss does not read labels. If the two maps differ in resolution, the larger
is averaged down to the smaller, before P.

The maps are those from which the classifiers' inputs are pooled. The authors' code takes the last of RepDistiller's
feature points. For a student of MobileNetV2 or ShuffleNetV2, that point is before the last convolution.
"""

from collections.abc import Callable

from pydantic import PositiveInt
from torch import Tensor, nn

from src.methods.features import averaged_to, last_map_shapes, last_maps
from src.methods.fitnet import hint_loss
from src.methods.method import Batch, Method, Networks
from src.models.network import Network


def projector(student_channels: int, teacher_channels: int, factor: int) -> nn.Sequential:
    """Make 1x1, 3x3 and 1x1 convolutions. The hidden maps have teacher_channels / factor channels."""
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
    """SimKD's network for inference: a student up to its last map, the projector, and the teacher's classifier."""

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
        """Compute logits [B, C] of normalised images [B, 3, H, W]."""
        unpooled = self.student.forward_features(images).unpooled
        assert unpooled is not None
        logits: Tensor = self.classifier(self.pool(self.projector(averaged_to(unpooled, *self.size))))
        return logits


class SimKD(Method):
    """feature_weight * |f_t - P(f_s)|^2. The student's own classifier is not trained."""

    needs_features = True
    projector: nn.Module
    classifier: nn.Linear

    def __init__(self, *, feature_weight: float, factor: PositiveInt) -> None:
        super().__init__()
        self.feature_weight = feature_weight
        self.factor = factor

    def allocate(self, networks: Networks) -> None:
        """Make the projector and copy the teacher's classifier. Raises `UserError` if a network has no last map."""
        student, teacher = last_map_shapes(networks, "simkd")
        self.size = (min(student[1], teacher[1]), min(student[2], teacher[2]))
        self.projector = projector(student[0], teacher[0], self.factor)
        self.classifier = networks.teacher_classifier()
        self.pool = networks.required_teacher.network.pool
        networks.student.classifier_layer.requires_grad_(False)  # else several devices wait for its gradients

    def weights(self, epoch: int) -> dict[str, float]:
        """Return a constant weight."""
        return {"feature": self.feature_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the distance of the last maps."""
        student, teacher = (averaged_to(last, *self.size) for last in last_maps(batch))
        return {"feature": hint_loss(self.projector(student), teacher)}

    def predictor(self, student: Network) -> ReusedClassifier:
        """Return the student up to its last map, followed by the projector and the teacher's classifier."""
        return ReusedClassifier(student, self.projector, self.size, self.pool, self.classifier)
