"""SRRL: J. Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning", ICLR 2021 (OpenReview
ZzwDy_wiWv).

    feature matching   = |h_s - h_t|^2
    softmax regression = |W h_s - W h_t|^2

Notation: h_s is the pooled output of a connector (1x1 convolution, batch norm, ReLU) that gives the student's last
feature map the teacher's width. h_t are the teacher's pooled features, and W is the teacher's classifier, which does
not change.

Softmax regression has the L2 form that the paper settles on. Both losses are means over all elements, as in the
authors' code. The bare student predicts: connector and classifier exist in training only.
"""

from torch import Tensor, nn

from src.methods.features import connector, last_map_shapes, last_maps, pooled_pair
from src.methods.fitnet import hint_loss
from src.methods.method import Batch, Method, Networks, cross_entropy


class SRRL(Method):
    """cross_entropy_weight * CE + feature_weight * feature matching + regression_weight * softmax regression."""

    needs_features = True
    connector: nn.Module
    classifier: nn.Linear

    def __init__(self, *, cross_entropy_weight: float, feature_weight: float, regression_weight: float) -> None:
        super().__init__()
        self.cross_entropy_weight = cross_entropy_weight
        self.feature_weight = feature_weight
        self.regression_weight = regression_weight

    def allocate(self, networks: Networks) -> None:
        """Make the connector and copy the teacher's classifier. Raises `UserError` if a network has no last map."""
        student, teacher = last_map_shapes(networks, "srrl")
        self.connector = nn.Sequential(connector(student[0], teacher[0]), nn.ReLU())
        self.classifier = networks.teacher_classifier()
        self.pool = networks.required_teacher.network.pool

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        return {
            "cross_entropy": self.cross_entropy_weight,
            "feature": self.feature_weight,
            "regression": self.regression_weight,
        }

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy on the student's own logits, and both losses on its connected features."""
        connected = self.pool(self.connector(last_maps(batch)[0]))
        _, teacher = pooled_pair(batch)
        return {
            "cross_entropy": cross_entropy(batch),
            "feature": hint_loss(connected, teacher),
            "regression": hint_loss(self.classifier(connected), batch.teacher.logits),
        }
