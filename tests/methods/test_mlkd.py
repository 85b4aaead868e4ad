"""Multi-level distillation: the sum over temperatures, and what its levels ignore."""

import torch

from src.methods.kd import kd_loss
from src.methods.mlkd import batch_loss, class_loss
from tests.helpers.logit_losses import TEMPERATURE
from tests.helpers.losses import observed, random_case, three_logits
from tests.helpers.methods import configured


def test_published_weights():
    made = configured("mlkd")
    assert made.weights(0) == {"cross_entropy": 0.1, "instance": 0.9, "batch": 0.9, "class": 0.9}
    assert made.temperatures == (2.0, 3.0, 4.0, 5.0, 6.0)


def test_each_level_sums_over_its_temperatures():
    own, distilled, teacher, target = three_logits()
    made = configured("mlkd", temperatures=[2.0, TEMPERATURE, 4.0])
    terms = made.all_terms(*observed(distilled, teacher, target, own=own))
    for name, loss in (("instance", kd_loss), ("batch", batch_loss), ("class", class_loss)):
        wanted = sum(loss(distilled, teacher, temperature) for temperature in (2.0, TEMPERATURE, 4.0))
        torch.testing.assert_close(terms[name], wanted)


def test_levels_do_not_see_the_order_of_samples_and_classes():
    student, teacher, _ = random_case(7, torch.float64)
    shuffled = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    for loss in (batch_loss, class_loss):
        wanted = loss(student, teacher, TEMPERATURE)
        torch.testing.assert_close(loss(student[:, shuffled], teacher[:, shuffled], TEMPERATURE), wanted)
        torch.testing.assert_close(loss(student.flip(0), teacher.flip(0), TEMPERATURE), wanted)
        assert loss(teacher, teacher, TEMPERATURE) == 0


def test_with_two_views_all_terms_are_summed_over_them():
    own, distilled, teacher, target = three_logits()
    made = configured("mlkd", views=2)
    assert (made.views_per_image, made.needs_unmixed, made.needs_labels) == (2, True, False)
    assert made.weights(0) == configured("mlkd").weights(0)
    terms = made.all_terms(*observed(distilled, teacher, target, own=own, views=2))
    first = configured("mlkd").all_terms(*observed(distilled, teacher, target, own=own))
    second = configured("mlkd").all_terms(*observed(-distilled, -teacher, target, own=-own))
    assert terms.keys() == first.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, first[name] + second[name])
