"""Two processes on the CPU: the same views, the same global batch, every image scored once."""

import copy

import pytest
import torch
from torch import nn

from src.methods.dkd import DKD
from src.serialization import Serial
from tests.tiny import tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


def dkd():
    return DKD(cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=4.0, warmup_epochs=1)


def without_batch_norm(module: nn.Module) -> None:
    """Batch norm sees its device's share of a batch alone: without it, two devices compute what one does."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(4, child.num_features))
        else:
            without_batch_norm(child)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    try:
        data = tiny_data(tmp_path)
        one = tiny_distiller(data, dkd(), teacher=tiny_teacher(), serialization=Serial(0.1))
        without_batch_norm(one.student)
        two = copy.deepcopy(one)
        alone = tiny_trainer(2)
        alone.fit(one, datamodule=data)
        both = tiny_trainer(2, devices=2, strategy="ddp_fork")
        both.fit(two, datamodule=tiny_data(tmp_path))
    finally:
        torch.set_num_threads(threads)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, atol=1e-5, rtol=1e-4, msg=name)
    for name in ("test/accuracy", "test/agreement"):  # of 17 images: an odd number over two devices
        assert float(both.callback_metrics[name]) == pytest.approx(float(alone.callback_metrics[name]))
    for name in ("test/nll", "train/loss_epoch"):
        assert float(both.callback_metrics[name]) == pytest.approx(float(alone.callback_metrics[name]), rel=1e-3)
