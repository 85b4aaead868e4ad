"""Two methods at once: whose terms, weights, stages, gradients and predictor count."""

from pathlib import Path

import pytest
from torch import nn

from src.common.errors import UserError
from src.methods.combined import Combined
from src.methods.kd import KD
from src.methods.method import Method
from src.methods.vanilla import Vanilla
from src.models.network import Network
from tests.helpers.methods import configured, taught_by
from tests.helpers.throwaway import MemoryBank, OwnGradients, TeachersHead, Through
from tests.helpers.tiny import kd, same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights


def weighted_kd(weight: float) -> KD:
    return KD(cross_entropy_weight=weight, kd_weight=0.9, temperature=4.0)


def test_distillation_terms_are_added_and_cross_entropy_counts_once(tmp_path: Path):
    also = MemoryBank()
    method = Combined(weighted_kd(0.1), also)
    distiller = tiny_distiller(tiny_data(tmp_path), method, teacher=tiny_teacher())
    assert (method.needs_teacher, method.needs_features, method.distils_logits) == (True, True, True)
    assert method.weights(2) == {"cross_entropy": 0.1, "kd": 0.9, "stay": 0.2, "hint": 0.1}
    trainer = tiny_trainer(1)
    trainer.fit(distiller, datamodule=tiny_data(tmp_path))
    assert also.seen.tolist() == [1] * 44
    assert {"train/kd_epoch", "train/hint_epoch", "train/cross_entropy_epoch"} <= trainer.callback_metrics.keys()


def test_terms_of_one_name_are_kept_apart(tmp_path: Path):
    method = Combined(weighted_kd(0.1), weighted_kd(0.7))
    assert method.weights(0) == {"cross_entropy": 0.1, "kd": 0.9, "also_kd": 0.9}
    trainer = tiny_trainer(1, max_steps=1, limit_val_batches=0)
    trainer.fit(tiny_distiller(tiny_data(tmp_path), method, teacher=tiny_teacher()), datamodule=tiny_data(tmp_path))
    logged = trainer.callback_metrics
    assert logged["train/also_kd_epoch"] == logged["train/kd_epoch"]


def test_it_asks_for_what_either_method_asks_for():
    assert Combined(configured("ofd"), configured("ab")).needs_preactivations
    assert Combined(configured("at"), configured("ofd")).needs_preactivations
    assert not Combined(configured("at"), configured("sp")).distils_logits
    assert not Combined(Vanilla(), Vanilla()).needs_teacher
    assert Combined(Vanilla(), kd()).needs_teacher


def test_the_first_of_two_methods_predicts(tmp_path: Path):
    method = Combined(TeachersHead(), kd())
    distiller = tiny_distiller(tiny_data(tmp_path), method, teacher=tiny_teacher())
    assert isinstance(method.predictor(distiller.student), Through)


def test_logits_with_which_the_student_does_not_predict_are_not_distilled():
    with pytest.raises(UserError, match=r"^method@also=kd distils the student's own logits, but a student of method=t"):
        Combined(TeachersHead(), kd()).check()
    Combined(TeachersHead(), configured("at")).check()


class OwnPredictor(Vanilla):
    """Predicts by the student, but defines its predictor itself."""

    def predictor(self, student: Network) -> nn.Module:
        return student


@pytest.mark.parametrize("also", [TeachersHead, OwnPredictor, OwnGradients])
def test_a_second_method_that_changes_gradients_or_prediction_is_refused(also: type[Method]):
    name = also.__name__.lower()
    with pytest.raises(UserError, match=rf"^method@also={name} changes gradients or prediction: choose it with"):
        Combined(Vanilla(), also())


def test_the_first_of_two_methods_combines_the_gradients(tmp_path: Path):
    data, states = tiny_data(tmp_path), []
    for method in (OwnGradients(), Combined(OwnGradients(), weighted_kd(0.7))):
        distiller = tiny_distiller(data, method, teacher=tiny_teacher())
        tiny_trainer(1, max_steps=2, limit_val_batches=0).fit(distiller, datamodule=data)
        states.append(weights(distiller.student))
    assert same(*states)


def test_the_stage_of_the_first_stays_and_the_main_stage_has_the_terms_of_both(tmp_path: Path):
    made = Combined(configured("ab"), kd())
    data = tiny_data(tmp_path)
    distiller = tiny_distiller(data, made, teacher=taught_by())
    assert [stage.name for stage in made.stages()] == ["boundaries"]
    assert made.weights(0) == {"cross_entropy": 1.0, "kd": 0.9}
    trainer = tiny_trainer(1, max_steps=1, limit_val_batches=0)
    trainer.fit(distiller, datamodule=data)
    assert "train/kd_epoch" in trainer.callback_metrics


def test_the_stages_of_both_are_listed_in_order(tmp_path: Path):
    made = Combined(configured("ft"), configured("ab"))
    tiny_distiller(tiny_data(tmp_path), made, teacher=taught_by())
    assert [stage.name for stage in made.stages()] == ["paraphraser", "boundaries"]
