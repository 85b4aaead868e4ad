"""Two students learn from each other by the paper's losses, each of which teaches one of the two."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from src.methods.dml import DML
from src.methods.method import Batch, DistillationLogits, LogitPair, View, logits_only
from src.models.mobilenet_v2 import MobileNetV2
from src.models.resnet import resnet8
from src.models.shufflenet_v2 import ShuffleV2
from tests.helpers.losses import divergence, log_softmax
from tests.helpers.methods import NewNetwork, configured
from tests.helpers.tiny import same, tiny_data, tiny_distiller, tiny_trainer, weights


def test_the_sum_has_no_weights_in_the_paper():
    wanted = {"cross_entropy": 1.0, "mutual": 1.0, "peer_cross_entropy": 1.0, "peer_mutual": 1.0}
    assert configured("dml").weights(0) == configured("dml").weights(239) == wanted


def test_both_students_learn_from_the_smoothed_labels(tmp_path: Path):
    method = DML(mutual_weight=1.0)
    distiller = tiny_distiller(tiny_data(tmp_path), method).double().eval()
    images, labels = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2])
    view = View(images, logits_only(distiller.student(images)), None)
    batch = Batch((view,), labels, torch.arange(3), epoch=0, step=0, label_smoothing=0.2)
    terms = method.all_terms(batch, DistillationLogits((LogitPair(view.student.logits, None),)))
    for name, logits in (("cross_entropy", view.student.logits), ("peer_cross_entropy", method.peer(images))):
        expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
        torch.testing.assert_close(terms[name], expected)


def test_terms_match_the_paper_and_teach_one_network_each(tmp_path: Path):
    method = DML(mutual_weight=1.0)
    distiller = tiny_distiller(tiny_data(tmp_path), method).double().eval()
    images, labels = torch.randn(5, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    student = distiller.student(images)
    batch = Batch((View(images, logits_only(student), None),), labels, torch.arange(5), epoch=0, step=0)
    terms, target = method.all_terms(batch, DistillationLogits((LogitPair(student, None),))), labels.tolist()

    log_p, log_q = ([log_softmax(row, 1.0) for row in x.tolist()] for x in (student, method.peer(images)))
    wanted = {
        "cross_entropy": -sum(row[t] for row, t in zip(log_p, target, strict=True)) / 5,
        "mutual": sum(map(divergence, log_q, log_p)) / 5,
        "peer_cross_entropy": -sum(row[t] for row, t in zip(log_q, target, strict=True)) / 5,
        "peer_mutual": sum(map(divergence, log_p, log_q)) / 5,
    }
    assert set(terms) == set(wanted) == set(method.weights(0))
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9)
        weight = next(iter(method.peer.parameters()))
        of_student, of_peer = torch.autograd.grad(terms[name], (student, weight), retain_graph=True, allow_unused=True)
        assert (of_student is None, of_peer is None) == (name.startswith("peer"), not name.startswith("peer"))


@pytest.mark.parametrize("new_student", [resnet8, ShuffleV2, MobileNetV2])
def test_both_train_and_survive_a_checkpoint(new_student: NewNetwork, tmp_path: Path):
    data = tiny_data(tmp_path)
    methods = [DML(mutual_weight=1.0) for _ in range(2)]
    distiller, other = (
        tiny_distiller(data, method, seed=seed, new_student=new_student) for seed, method in enumerate(methods)
    )
    before = [weights(network) for network in (distiller.student, methods[0].peer)]
    tiny_trainer(1, limit_train_batches=2, limit_val_batches=0).fit(distiller, datamodule=data)
    after = [weights(network) for network in (distiller.student, methods[0].peer)]
    for one, another in pairwise([*before, *after]):
        assert not same(one, another)
    other.load_state_dict(distiller.state_dict())
    assert same(weights(methods[1].peer), after[1])
