"""Transformed teacher matching is KD plus a Renyi entropy."""

import torch

from src.methods.kd import kd_loss
from src.methods.ttm import transformed_divergence
from tests.helpers.logit_losses import EXPONENT
from tests.helpers.losses import observed, random_case, three_logits
from tests.helpers.methods import configured


def test_published_weights():
    assert configured("ttm").weights(0) == {"cross_entropy": 1.0, "ttm": 45.0}


def test_the_term_is_the_mean_of_the_divergence():
    own, distilled, teacher, target = three_logits()
    terms = configured("ttm").all_terms(*observed(distilled, teacher, target, own=own))
    assert terms["ttm"] == transformed_divergence(distilled, teacher, 0.1).mean()


def test_ttm_is_kd_and_a_renyi_entropy():
    student, teacher, _ = random_case(6, torch.float64)
    temperature = 1 / EXPONENT
    renyi = torch.logsumexp(EXPONENT * student.log_softmax(1), dim=1) / (1 - EXPONENT)
    q = (teacher / temperature).softmax(1)
    shannon = -(q * q.log()).sum(1)
    kd = torch.stack([kd_loss(u, v, temperature) for u, v in zip(student.split(1), teacher.split(1), strict=True)])
    wanted = kd / temperature - (temperature - 1) * (renyi - shannon)
    torch.testing.assert_close(transformed_divergence(student, teacher, EXPONENT), wanted)
