"""Deep mutual learning (DML): Y. Zhang et al., "Deep Mutual Learning", CVPR 2018, arXiv 1706.00384.

    loss = CE_1 + mutual_weight * KL(p_2, p_1) + CE_2 + mutual_weight * KL(p_1, p_2)

Notation: p_1 and p_2 [B, C] are the predictions of the student and of its peer, without a temperature. The first two
terms train the student, the last two train the peer. In each KL, the other network's prediction is a constant.

The two networks have one architecture, and there is no teacher. Each learns from the labels and from the current
predictions of the other. The peer is trained beside the student and dropped with the method: only the student is scored
and kept.

The paper updates the two in turn, the second after the first has moved. Here both move at once, from the same
predictions.
"""

from pydantic import NonNegativeFloat
from torch import Tensor

from src.methods.kd import kd_loss
from src.methods.method import Batch, DistillationLogits, LogitMethod, Networks, at_least_float32, cross_entropy
from src.models.network import Network


class DML(LogitMethod):
    """CE + mutual_weight * KL for the student, and the same for its peer."""

    needs_teacher = False
    can_be_compiled = False  # the terms of the peer do not depend on the logits
    can_be_standardized = False
    peer: Network

    def __init__(self, *, mutual_weight: NonNegativeFloat) -> None:
        super().__init__()
        self.mutual_weight = mutual_weight

    def allocate(self, networks: Networks) -> None:
        """Make the peer: the student's architecture with fresh weights."""
        self.peer = networks.new_student()

    def weights(self, epoch: int) -> dict[str, float]:
        """Return constant weights."""
        both = {"cross_entropy": 1.0, "peer_cross_entropy": 1.0}
        return {**both, "mutual": self.mutual_weight, "peer_mutual": self.mutual_weight}

    def distillation(self, logits: DistillationLogits, batch: Batch) -> dict[str, Tensor]:
        """Return the student's mutual term, and both terms of its peer."""
        peer = at_least_float32(self.peer(batch.views[0].images))
        return {
            "mutual": kd_loss(logits.student, peer.detach(), 1.0),
            "peer_cross_entropy": cross_entropy(batch, peer),
            "peer_mutual": kd_loss(peer, logits.student.detach(), 1.0),
        }
