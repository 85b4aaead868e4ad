"""Every family of networks teaches and is taught."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from src.methods.aekt import AEKT
from src.models.deep_resnet import ResNet18
from src.models.mobilenet_v1 import mobilenet_v1
from src.models.mobilenet_v2 import MobileNetV2
from src.models.network import Network
from src.models.resnet import resnet8, resnet20_option_a
from src.models.shufflenet_v1 import ShuffleV1
from src.models.shufflenet_v2 import ShuffleV2
from src.models.slimnet import slimnet_300k
from src.models.sources import architecture
from src.models.torchvision_networks import resnet18
from src.models.vgg import vgg8
from src.models.wide_resnet import wrn_16_1
from src.serialization import Serial
from tests.tiny import same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


def timm_network(num_classes: int) -> Network:
    pytest.importorskip("timm")
    return architecture("timm/mobilenetv3_small_050", num_classes)


FAMILIES = [
    resnet8, wrn_16_1, vgg8, MobileNetV2, ShuffleV1, ShuffleV2, ResNet18, slimnet_300k, resnet20_option_a, mobilenet_v1,
    resnet18, timm_network,
]  # fmt: skip


@pytest.mark.parametrize(
    ("new_teacher", "new_student"), list(pairwise([*FAMILIES, FAMILIES[0]])), ids=lambda make: make.__name__
)
def test_two_steps(new_teacher, new_student, tmp_path: Path):
    data, teacher = tiny_data(tmp_path), tiny_teacher(new_teacher)
    method = AEKT(
        cross_entropy_weight=1.0, alpha=1.0, beta=2.0, temperature=4.0, warmup_epochs=1, gamma=0.4, weighting="ratio",
        max_weight=10.0, confidence_term=True,
    )  # fmt: skip
    distiller = tiny_distiller(data, method, teacher=teacher, serialization=Serial(0.1), new_student=new_student)
    before, taught_by = weights(distiller.student), weights(teacher.network)
    tiny_trainer(1, limit_train_batches=2, limit_val_batches=0).fit(distiller, datamodule=data)
    after = weights(distiller.student)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all(value.isfinite().all() for value in after.values())
    assert {name for name, _ in distiller.student.named_parameters()} <= changed
    assert same(taught_by, weights(teacher.network))
