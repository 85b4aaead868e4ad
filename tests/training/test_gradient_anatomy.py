"""Gradients of the loss terms at the logits, as measured while a student trains (gradients.csv)."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn import functional as F

from src.analysis.gradient_figures import gradient_anatomy
from src.analysis.gradient_forms import explicit_transfer_gradient, kd_gradient, nckd_gradient, tckd_gradient
from src.methods.aekt import AEKT
from src.methods.at import AT
from src.methods.kd import kd_loss
from src.methods.method import DistillationLogits, LogitPair, Method, cross_entropy
from src.methods.vanilla import Vanilla
from src.training.gradient_anatomy import QUANTILES, RATIOS, GradientAnatomy, anatomy, read_gradients
from src.training.serialization import NoSerialization, Parallel, Serial, Serialization
from tests.helpers.losses import observed, three_logits
from tests.helpers.tiny import same, tiny_data, tiny_distiller, tiny_teacher, tiny_trainer, weights

OPTIONS = {"cross_entropy_weight": 1.0, "alpha": 1.0, "beta": 2.0, "temperature": 4.0, "warmup_epochs": 0}


def aekt() -> AEKT:
    return AEKT(**OPTIONS, gamma=0.4, weighting="ratio", max_weight=10.0, weight_temperature=4.0, confidence_term=True)


def test_the_anatomy_of_a_batch() -> None:
    own, distilled, teacher, target = three_logits()
    batch, logits = observed(distilled, teacher, target, own=own)
    method = aekt()
    terms = {name: method.weights(0)[name] * term for name, term in method.all_terms(batch, logits).items()}
    found = anatomy(terms, batch, logits, 4.0)

    each = {
        "tckd": tckd_gradient(distilled, teacher, target, 4.0),
        "nckd": 2.0 * nckd_gradient(distilled, teacher, target, 4.0),
        "explicit_transfer": 0.4 * explicit_transfer_gradient(distilled, teacher, target, 4.0),
        "cross_entropy": own.softmax(dim=1) - torch.eye(own.shape[1], dtype=own.dtype)[target],
    }
    rows = range(len(target))
    for name, gradient in each.items():
        at_target = gradient[rows, target]
        assert found[f"{name}/target"] == pytest.approx(at_target.mean().item(), abs=1e-6)
        others = gradient.abs().sum(dim=1) - at_target.abs()
        assert found[f"{name}/others"] == pytest.approx(others.mean().item(), rel=1e-5)
    cosine = F.cosine_similarity(each["tckd"], each["explicit_transfer"], dim=1)
    assert found["tckd|explicit_transfer/cosine"] == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert found["tckd|explicit_transfer/against"] == pytest.approx((cosine < 0).double().mean().item())
    assert "cross_entropy|tckd/cosine" not in found  # these logits are unrelated
    assert "tckd/own" not in found

    p_t, q_t = ((logits / 4).softmax(dim=1)[rows, target] for logits in (distilled.detach(), teacher))
    for name, ratio in zip(RATIOS, (q_t / p_t, (1 - q_t) / (1 - p_t)), strict=True):
        quantiles = [found[f"{name}/{level}"] for level in QUANTILES]
        assert quantiles == sorted(quantiles)
        between = ratio.log().quantile(torch.tensor(QUANTILES, dtype=ratio.dtype)).exp()
        assert quantiles == pytest.approx(between.tolist(), rel=1e-6)


def test_terms_meet_at_the_students_own_logits_behind_a_layer() -> None:
    own, _, teacher, target = three_logits()
    matrix = torch.randn(own.shape[1], own.shape[1], dtype=own.dtype, generator=torch.Generator().manual_seed(0))
    batch, _ = observed(own, teacher, target)
    distilled = batch.student.logits @ matrix.T
    logits = DistillationLogits((LogitPair(distilled, teacher),))
    terms = {"kd": kd_loss(distilled, teacher, 4.0), "cross_entropy": cross_entropy(batch)}
    found = anatomy(terms, batch, logits, 4.0)
    behind = kd_gradient(distilled, teacher, 4.0)
    arrived = behind @ matrix
    assert found["kd/target"] == pytest.approx(behind[range(len(target)), target].mean().item(), abs=1e-6)
    assert found["kd/own"] == pytest.approx(arrived.norm(dim=1).mean().item(), rel=1e-5)
    before = own.softmax(dim=1) - torch.eye(own.shape[1], dtype=own.dtype)[target]
    cosine = F.cosine_similarity(arrived, before, dim=1).mean()
    assert found["kd|cross_entropy/cosine"] == pytest.approx(cosine.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("method", "layer", "measured", "pairs"),
    [
        (aekt, partial(Serial, lr_scale=0.1), {"cross_entropy", "tckd", "nckd", "explicit_transfer"}, 6),
        (aekt, partial(Parallel, lr_scale=1.0), {"cross_entropy", "tckd", "nckd", "explicit_transfer"}, 3),
        (
            partial(AT, cross_entropy_weight=1.0, attention_weight=1000.0, power=2),
            NoSerialization,
            {"cross_entropy"},
            0,
        ),
        (Vanilla, NoSerialization, {"cross_entropy"}, 0),
    ],
    ids=["serial", "parallel", "features", "alone"],
)
def test_training_is_the_same_with_and_without_the_measurement(
    tmp_path: Path, method: Callable[[], Method], layer: Callable[[], Serialization], measured: set[str], pairs: int
) -> None:
    def trained(*callbacks: L.Callback) -> dict[str, Tensor]:
        made = method()
        teacher = tiny_teacher() if made.needs_teacher else None
        data = tiny_data(tmp_path)
        distiller = tiny_distiller(data, made, teacher=teacher, serialization=layer())
        trainer = tiny_trainer(2, callbacks=list(callbacks), limit_train_batches=3, limit_val_batches=0)
        trainer.fit(distiller, datamodule=data)
        assert distiller.last_batch is None
        return weights(distiller)

    measuring = GradientAnatomy(tmp_path, every=2, temperature=4.0)
    assert same(trained(), trained(measuring))
    rows = read_gradients(tmp_path)
    assert rows == measuring.rows
    assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (2, 2 / 3), (4, 1 + 1 / 3)]
    for row in rows:
        assert {name.removesuffix("/target") for name in row if name.endswith("/target")} == measured
        assert sum(name.endswith("/cosine") for name in row) == pairs
        assert all(math.isfinite(value) for value in row.values())
        assert ("target_ratio/0.5" in row) == (method is not Vanilla)
        assert ("tckd/own" in row) == (measured > {"tckd"} and pairs == 6)
    figure = gradient_anatomy(rows, "tiny")
    figure.canvas.draw()
    plt.close(figure)


def test_a_term_without_a_gradient_is_left_out() -> None:
    own, distilled, teacher, target = three_logits()
    batch, logits = observed(distilled, teacher, target, own=own)
    found = anatomy({"cross_entropy": cross_entropy(batch), "later": own.new_zeros(())}, batch, logits, 4.0)
    assert "cross_entropy/target" in found
    assert not any("later" in name for name in found)


def test_the_logger_gets_every_measurement(tmp_path: Path) -> None:
    data, heard = tiny_data(tmp_path), []

    class Logger(L.pytorch.loggers.CSVLogger):
        def log_metrics(self, metrics: dict, step: int | None = None) -> None:
            heard.append((step, set(metrics)))

    measuring = GradientAnatomy(tmp_path, every=3, temperature=1.0)
    logger = Logger(tmp_path)
    tiny_trainer(1, callbacks=[measuring], logger=logger).fit(tiny_distiller(data, Vanilla()), datamodule=data)
    assert [entry for entry in heard if "gradients/cross_entropy/target" in entry[1]] == [
        (step, {f"gradients/cross_entropy/{name}" for name in ("target", "others", "own")}) for step in (0, 3)
    ]


def test_an_accumulated_step_is_measured_once(tmp_path: Path) -> None:
    data, measuring = tiny_data(tmp_path), GradientAnatomy(tmp_path, every=1, temperature=1.0)
    trainer = tiny_trainer(1, callbacks=[measuring], accumulate_grad_batches=2, limit_val_batches=0)
    trainer.fit(tiny_distiller(data, Vanilla()), datamodule=data)
    assert [row["step"] for row in measuring.rows] == list(range(trainer.global_step))


def test_a_resumed_run_writes_the_same_rows(tmp_path: Path) -> None:
    def train(folder: Path, epochs: int, resumed: Path | None = None) -> bytes:
        data = tiny_data(tmp_path)
        distiller = tiny_distiller(data, aekt(), teacher=tiny_teacher(), serialization=Serial(0.1))
        saving = ModelCheckpoint(dirpath=folder, filename="last", save_on_train_epoch_end=True)
        callbacks = [GradientAnatomy(folder, every=2, temperature=4.0), saving]
        folder.mkdir(exist_ok=True)
        options = {"callbacks": callbacks, "enable_checkpointing": True, "limit_train_batches": 3}
        trainer = tiny_trainer(epochs, limit_val_batches=0, **options)
        trainer.fit(distiller, datamodule=data, ckpt_path=resumed)
        return (folder / "gradients.csv").read_bytes()

    through = train(tmp_path / "through", 3)
    train(tmp_path / "first", 1)
    train(tmp_path / "first", 2, tmp_path / "first" / "last.ckpt")  # killed before it saved its second epoch
    assert train(tmp_path / "first", 3, tmp_path / "first" / "last.ckpt") == through


def test_logits_without_gradients_are_not_measured() -> None:
    own, distilled, teacher, target = (value.detach() for value in three_logits())
    batch, logits = observed(distilled, teacher, target, own=own)
    assert anatomy({"kd": kd_loss(distilled, teacher, 4.0)}, batch, logits, 4.0) == {}


def test_a_run_without_measurements_has_no_rows(tmp_path: Path) -> None:
    assert read_gradients(tmp_path) == []
