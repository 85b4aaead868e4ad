"""FitNets: the regressor leads from size to size, and refuses the sizes that it cannot."""

import pytest
import torch

from src.common.errors import UserError
from src.models.network import Shapes
from tests.helpers.methods import assert_published_weights, configured, on_shapes


def test_published_weights():
    """Those of RepDistiller's run_cifar_distill.sh."""
    assert_published_weights(configured("fitnet"), cross_entropy=1.0, hint=100.0)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (4, 4), (9, 11), (16, 9)])
def test_a_regressor_leads_from_size_to_size(size: tuple[int, int]):
    student, teacher = Shapes(5, ((2, *size),), 6), Shapes(5, ((3, 8, 8),), 6)
    made = on_shapes("fitnet", student, teacher, hint_layer=0)
    assert made.regressor(torch.randn(2, 2, *size)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("size", "layer", "message"),
    [
        ((3, 3), 0, r"^method=fitnet cannot map the student's features of 3x3 pixels to the teacher's 8x8: .*"),
        ((4, 8), 0, r"^method=fitnet cannot map the student's features of 4x8 pixels to the teacher's 8x8: .*"),
        ((8, 8), 1, r"^method\.hint_layer=1 is too deep: the student has 1 and the teacher 1 feature maps, .*"),
    ],
)
def test_sizes_and_layers_without_a_regressor_are_refused(size: tuple[int, int], layer: int, message: str):
    with pytest.raises(UserError, match=message):
        on_shapes("fitnet", Shapes(5, ((2, *size),), 6), Shapes(5, ((3, 8, 8),), 6), hint_layer=layer)
