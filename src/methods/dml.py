"""Deep mutual learning (DML): Y. Zhang et al., "Deep Mutual Learning", CVPR 2018, arXiv 1706.00384.

Two students of one architecture and no teacher: each learns from the labels and from what the other says now. With
predictions p_1 and p_2 [B, C] the student minimises CE_1 + KL(p_2, p_1) and its peer CE_2 + KL(p_1, p_2), without a
temperature; what one says is a constant to the other.

The paper updates the two in turn, the second after the first has moved; here, as in its released successors, both move
at once, from the same predictions. The peer is trained beside the student and dropped with the method: what is scored
and kept is the student.
"""

from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn import functional as F

from src.methods.kd import kd_loss
from src.methods.method import Batch, Method, Networks, at_least_float32, cross_entropy
from src.models.network import Network


class DML(Method):
    """CE + mutual_weight * KL for the student, and the same for its peer."""

    needs_teacher = False
    distils_logits = True
    peer: Network

    def __init__(self, *, mutual_weight: NonNegativeFloat) -> None:
        super().__init__()
        self.mutual_weight = mutual_weight

    def build(self, networks: Networks) -> None:
        """The peer: the student's architecture with first weights of its own."""
        self.peer = networks.new_student()

    def weights(self, epoch: int) -> dict[str, float]:
        """Constant weights."""
        both = {"cross_entropy": 1.0, "peer_cross_entropy": 1.0}
        return {**both, "mutual": self.mutual_weight, "peer_mutual": self.mutual_weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """CE on both networks' own logits; the student's logits for distillation against its peer's logits."""
        student = batch.student.distillation_logits
        peer = at_least_float32(self.peer(batch.views[0].images))
        return {
            "cross_entropy": cross_entropy(batch),
            "mutual": kd_loss(student, peer.detach(), 1.0),
            "peer_cross_entropy": F.cross_entropy(peer, batch.target),
            "peer_mutual": kd_loss(peer, student.detach(), 1.0),
        }
