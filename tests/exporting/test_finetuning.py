"""Quantisation-aware fine-tuning trains with the run's method and teacher, or is refused before anything starts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from src.common.errors import UserError
from src.exporting.checking import predict_in_batches
from src.exporting.finetuning import check_finetuning, finetune
from src.exporting.forms import Form
from src.methods.fitnet import FitNet
from src.methods.kd import KD
from src.models.resnet import resnet14, resnet20
from src.setup.reopen import Opened
from src.training.distiller import Distiller
from src.training.serialization import NoSerialization, Parallel
from tests.helpers.commands import assert_refused, run
from tests.helpers.configure import configure
from tests.helpers.exports import random_images
from tests.helpers.tiny import same, tiny_data, tiny_distiller, tiny_teacher, weights

INT8 = Form("executorch", "int8")


def opened(method: Any, serialization: Any) -> Any:
    target = f"{type(serialization).__module__}.{type(serialization).__qualname__}"
    cfg = OmegaConf.create({"method": {"name": "any"}, "serialization": {"_target_": target}})
    return SimpleNamespace(cfg=cfg, distiller=SimpleNamespace(method=method, serialization=serialization))


def test_only_methods_on_logits_are_fine_tuned() -> None:
    kd = SimpleNamespace(needs_features=KD.needs_features, stages=lambda: ())
    check_finetuning(INT8, opened(kd, NoSerialization()))
    fitnet = SimpleNamespace(needs_features=FitNet.needs_features, stages=lambda: ())
    staged = SimpleNamespace(needs_features=False, stages=lambda: ("a stage",))
    for method, layer in ((fitnet, NoSerialization()), (staged, NoSerialization()), (kd, Parallel(lr_scale=1.0))):
        with pytest.raises(UserError, match=r"finetune_epochs does not fit method=any.*: set finetune_epochs=0"):
            check_finetuning(INT8, opened(method, layer))
    with pytest.raises(UserError, match=r"add format=executorch precision=int8"):
        check_finetuning(Form("onnx", "int8"), opened(kd, NoSerialization()))


@pytest.mark.slow
def test_the_teachers_terms_act_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another teacher gives another student, and the first epoch is the one after the run's last."""
    pytest.importorskip("executorch")
    epochs, logits = [], []
    observe = Distiller.observe

    def noting(self: Any, samples: Any) -> Any:
        epochs.append(self.current_epoch)
        return observe(self, samples)

    monkeypatch.setattr(Distiller, "observe", noting)
    cfg = configure("data=cifar10", "trainer=cpu", "schedule=quick", "schedule.epochs=3", "schedule.batch_size=8")
    images = random_images(8)
    for network in (resnet14, resnet20):
        data, teacher = tiny_data(tmp_path), tiny_teacher(network)
        method = KD(cross_entropy_weight=0.1, kd_weight=0.9, temperature=4.0)
        trained = tiny_distiller(data, method, teacher=teacher)
        before = weights(trained.student)
        tuned = finetune(Opened(cfg, trained, data), teacher, 2, images)
        logits.append(predict_in_batches(tuned, images))
        assert same(weights(trained.student), before)
    assert set(epochs) == {3, 4}
    assert not torch.equal(*logits)


@pytest.mark.slow
def test_a_run_is_fine_tuned_with_its_teacher(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    given = [f"run={finished_run}", f"data.path={array_file}", "images=50", "finetune_epochs=2", f"out={tmp_path}"]
    ran = run("export", *given, "format=executorch", "precision=int8")
    assert (ran.code, ran.err) == (0, "")
    assert "int8 after 2 epochs of fine-tuning" in ran.out
    assert "same top-1 on" in ran.out
    card = (tmp_path / "student-int8.pte.md").read_text()
    assert "| fine-tuned | 2 epochs of quantisation-aware training by the same method |" in card

    from executorch.runtime import Runtime

    stored = Runtime.get().load_program(tmp_path / "student-int8.pte").load_method("finetune_epochs").execute([])
    assert json.loads(stored[0]) == 2


def test_fine_tuning_another_form_is_refused(finished_run: Path, array_file: Path) -> None:
    ran = run("export", f"run={finished_run}", f"data.path={array_file}", "finetune_epochs=1")
    assert_refused(ran, "finetune_epochs is for int8 files of ExecuTorch")
