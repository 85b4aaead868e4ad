"""compile=true trains the same student, in compiled kernels."""

import copy
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from src.methods.fitnet import FitNet
from src.methods.method import Method
from tests.helpers.tiny import kd, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


@pytest.mark.slow
@pytest.mark.parametrize("method", [kd(), FitNet(cross_entropy_weight=1.0, hint_weight=1.0, hint_layer=1)])
def test_a_compiled_student_learns_the_same_and_is_saved_under_the_same_names(tmp_path: Path, method: Method) -> None:
    data, teacher = tiny_data(tmp_path, batch_size=40), tiny_teacher()  # more steps would multiply the rounding
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (
        tiny_distiller(data, copy.deepcopy(method), teacher=teacher, compiled=compiled) for compiled in (False, True)
    )
    for distiller in (plain, compiled):
        assert not counters["stats"]["unique_graphs"]
        tiny_trainer(1).fit(distiller, datamodule=data)
    assert counters["stats"]["unique_graphs"] == 2  # the batch of 40, and the last one of 4
    expected, found = weights(plain), weights(compiled)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
