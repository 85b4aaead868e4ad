"""Two students learn from each other: the paper's losses, each of which teaches one of the two."""

from itertools import pairwise

import pytest
import torch

from src.methods.dml import DML
from src.methods.method import Batch, View
from src.models.mobilenet_v2 import MobileNetV2
from src.models.resnet import resnet8
from src.models.shufflenet_v2 import ShuffleV2
from tests.methods.test_losses import divergence, log_softmax, prediction
from tests.tiny import same, tiny_data, tiny_distiller, tiny_trainer, weights


def test_terms_are_those_of_the_paper_and_teach_one_network_each(tmp_path):
    method = DML(mutual_weight=1.0)
    distiller = tiny_distiller(tiny_data(tmp_path), method).double().eval()
    images, target = torch.randn(5, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    student = distiller.student(images)
    view = View(images, prediction(student, student), None)
    terms = method.terms(Batch((view,), target, torch.arange(5), epoch=0, step=0))

    log_p, log_q = ([log_softmax(row, 1.0) for row in said.tolist()] for said in (student, method.peer(images)))
    wanted = {
        "cross_entropy": -sum(row[t] for row, t in zip(log_p, target.tolist(), strict=True)) / 5,
        "mutual": sum(map(divergence, log_q, log_p)) / 5,
        "peer_cross_entropy": -sum(row[t] for row, t in zip(log_q, target.tolist(), strict=True)) / 5,
        "peer_mutual": sum(map(divergence, log_p, log_q)) / 5,
    }
    assert set(terms) == set(wanted) == set(method.weights(0))
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9)
        weight = next(iter(method.peer.parameters()))
        of_student, of_peer = torch.autograd.grad(terms[name], (student, weight), retain_graph=True, allow_unused=True)
        assert (of_student is None, of_peer is None) == (name.startswith("peer"), not name.startswith("peer"))


@pytest.mark.parametrize("new_student", [resnet8, ShuffleV2, MobileNetV2])
def test_both_train_and_survive_a_checkpoint(new_student, tmp_path):
    data = tiny_data(tmp_path)
    distiller, other = (
        tiny_distiller(data, DML(mutual_weight=1.0), seed=seed, new_student=new_student) for seed in (0, 1)
    )
    before = [weights(network) for network in (distiller.student, distiller.method.peer)]
    tiny_trainer(1, limit_train_batches=2, limit_val_batches=0).fit(distiller, datamodule=data)
    after = [weights(network) for network in (distiller.student, distiller.method.peer)]
    for one, another in pairwise([*before, *after]):
        assert not same(one, another)
    other.load_state_dict(distiller.state_dict())
    assert same(weights(other.method.peer), after[1])
