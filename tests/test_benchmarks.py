"""The benchmarks run as documented, and their sides compute the same. How fast they are is not asserted."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, open_dict

from benchmarks import methods, speed
from benchmarks.customary import masked_dkd
from benchmarks.images import write_images
from benchmarks.part_rows import method_loss
from benchmarks.process_memory import peak_growth
from benchmarks.timing import measure_in_turn
from benchmarks.trial import compose_training
from src.data.array_file import load_arrays, save_arrays
from src.methods.dkd import DKD

ROOT = Path(__file__).parents[1]


def test_sides_are_measured_in_alternating_order_after_a_warm_up() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = measure_in_turn({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert found == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_the_customary_loss_is_the_same_as_the_method() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 10, dtype=torch.float64)
    target = torch.randint(10, (8,))
    dkd = DKD(cross_entropy_weight=1.0, alpha=1.0, beta=8.0, temperature=4.0, warmup_epochs=20)
    gradients = []
    for loss in (lambda *logits: method_loss(dkd, *logits), masked_dkd):
        logits = student.clone().requires_grad_()
        loss(logits, teacher, target).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_growth_sees_memory_that_is_freed_again() -> None:
    size = 2**28
    assert 0.9 * size < peak_growth(lambda: np.ones(size, dtype=np.uint8).sum()) < 2 * size


def test_random_images_stand_in_for_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEKT_DATA", str(tmp_path))
    write_images(tmp_path / "images.npz", 100)
    arrays = load_arrays(tmp_path / "images.npz")
    assert len(arrays.train_labels) == len(arrays.test_labels) == 500
    assert len(arrays.class_names) == 100


def test_images_of_cifar100_are_chosen_evenly_over_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat(np.arange(100), 10)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 4, 4, 3), dtype=np.uint8)
    whole = {
        f"{split}_{kind}": x for split in ("train", "test") for kind, x in (("images", images), ("labels", labels))
    }
    save_arrays(tmp_path / "cifar100.npz", **whole)
    monkeypatch.setenv("AEKT_DATA", str(tmp_path))
    write_images(tmp_path / "images.npz", 200)
    arrays = load_arrays(tmp_path / "images.npz")
    assert arrays.train_labels.bincount().tolist() == [2] * 100
    assert arrays.test_labels.bincount().tolist() == [5] * 100
    assert np.array_equal(arrays.train_images[2].permute(1, 2, 0).numpy(), images[10])


def test_winograd_excludes_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.parse(["--winograd", "--bfloat16"])
    assert "leave one of them out" in capsys.readouterr().err


def test_the_table_of_methods_is_made_without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A yaml may lack the entries that the table shows."""

    def compose(method: str, *rest: Any) -> DictConfig:
        cfg = compose_training(method, *rest)
        if method == "kd":
            with open_dict(cfg.method):
                for key in ("year", "uses", "settings"):
                    del cfg.method[key]
        return cfg

    monkeypatch.setattr(methods, "TRAIN_SIZE", 100)
    monkeypatch.setattr(methods, "compose_training", compose)
    monkeypatch.setattr(methods, "make_timer", None)
    head, line, aekt, kd = methods.table(["aekt", "kd"])
    assert head == "| method | year | uses | extra parameters | settings |"
    assert line == "|---|---|---|---|---|"
    assert aekt.startswith("| aekt | 2024 | logits | 10,100 | ")
    assert kd == "| kd | - | - | - | - |"


def test_the_table_gives_the_reason_of_a_method_that_refuses_the_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "TRAIN_SIZE", 100)
    head, _, row = methods.table(["fsp"], model="slimnet600k_to_resnet8", rounds=1)
    assert [cell.strip() for cell in head.split("|")][5] == "step / KD's"
    assert [cell.strip() for cell in row.split("|")][4] == "refused"
    assert "method=fsp" in row.split("|")[5]


@pytest.mark.slow
@pytest.mark.parametrize("row", speed.ROWS)
def test_every_row_is_measured_and_kept(row: str, tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    smallest = ["--rounds", "1", "--steps", "1", "--batches", "2", "--batch-sizes", "8"]
    shortest = ["--sweep-images", "100", "--sweep-epochs", "1", "--sweep-seeds", "1"]
    pair = ["--pairs", "wrn40_2_to_wrn16_2", "--out", str(table)]
    command = [sys.executable, "-m", "benchmarks.speed", row, *smallest, *shortest, *pair]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    heading, _, _, _, *rows = table.read_text().splitlines()
    assert heading.startswith(f"`python -m benchmarks.speed {row}")
    assert rows
    assert all(float(line.split("|")[4].split()[0]) > 0 for line in rows)


@pytest.mark.slow
def test_a_method_is_timed_against_kd(tmp_path: Path) -> None:
    out = tmp_path / "methods.md"
    options = ["--rounds", "1", "--batch-size", "8", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.methods", "vanilla", *options]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *_, row = out.read_text().splitlines()
    assert row.startswith("| vanilla | - | labels alone | - |")
    assert float(row.split("|")[5].split()[0]) > 0
