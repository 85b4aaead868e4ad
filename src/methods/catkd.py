"""Class attention transfer (CAT-KD): Z. Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023,
arXiv 2304.12777.

    CAM_c = sum_k W_ck f_k
    loss  = mean of (CAM_s - CAM_t)^2 over samples, classes and pixels

Notation: f is the last feature map, W are the weights of the classifier without its bias, and CAM_c is the class
activation map of class c. The maps are first averaged down to a few pixels. With `normalize`, each map is then scaled
to length 1.

The authors replace each classifier by a 1x1 convolution without bias before pooling. The networks here keep their
classifiers, which gives the same maps. The authors' normalisation divides by at least 1e-12. Here zeros stay zeros.
"""

from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from src.methods.features import averaged_to, exact_products, last_map_shapes, last_maps, unit
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy


def class_activation_maps(last: Tensor, weight: Tensor) -> Tensor:
    """Compute CAM [B, C, height, width] of a last map [B, D, height, width] and a classifier's weights [C, D]."""
    last, weight = at_least_float32(last), at_least_float32(weight)
    with exact_products(last):
        return F.conv2d(last, weight[:, :, None, None])


def class_attention_loss(student_maps: Tensor, teacher_maps: Tensor, resolution: int, normalize: bool) -> Tensor:
    """Compute the mean of (CAM_s - CAM_t)^2 at resolution x resolution pixels.

    The maps are [B, C, height, width] of any size. With `normalize`, the scale of a map does not matter on either side.
    """
    student, teacher = (averaged_to(maps, resolution, resolution).flatten(2) for maps in (student_maps, teacher_maps))
    if normalize:
        student, teacher = unit(student, dim=2), unit(teacher, dim=2)
    return F.mse_loss(student, teacher)


class CATKD(Method):
    """cross_entropy_weight * CE + attention_weight * class attention."""

    needs_features = True
    teacher_classifier: nn.Linear

    def __init__(
        self, *, cross_entropy_weight: float, attention_weight: float, resolution: PositiveInt, normalize: bool
    ) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.attention_weight = attention_weight
        self.resolution = resolution
        self.normalize = normalize

    def allocate(self, networks: Networks) -> None:
        """Keep both classifiers. Raises `UserError` if a network has no last map."""
        last_map_shapes(networks, "catkd")
        self.student_classifier = (networks.student.classifier_layer,)  # a tuple hides it: it belongs to the student
        self.teacher_classifier = networks.teacher_classifier()

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {"cross_entropy": self.cross_entropy_weight, "class_attention": self.attention_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and class attention of the last maps."""
        student, teacher = last_maps(batch)
        student = class_activation_maps(student, self.student_classifier[0].weight)
        teacher = class_activation_maps(teacher, self.teacher_classifier.weight)
        return {
            "cross_entropy": cross_entropy(batch),
            "class_attention": class_attention_loss(student, teacher, self.resolution, self.normalize),
        }
