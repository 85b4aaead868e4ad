"""The benchmarks run as documented, and their sides compute the same. How fast they are is not asserted."""

import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, open_dict

from benchmarks import gpu, methods, paired, speed
from benchmarks.customary import masked_dkd
from benchmarks.gpu_bench import Bench, Failure, Finding, Sizes
from benchmarks.images import write_images
from benchmarks.part_rows import method_loss
from benchmarks.process_memory import peak_growth
from benchmarks.timing import Row, measure_in_turn
from benchmarks.trial import compose_training
from src.data.array_file import load_arrays, save_arrays
from src.methods.dkd import DKD
from tests.helpers.run_folders import make_result

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


@pytest.fixture
def not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the levels of loggers as they are, because later tests read messages."""
    monkeypatch.setattr(gpu, "silence", lambda: None)


@pytest.mark.usefixtures("not_silent")
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    rows = [name for name in gpu.ROWS if name != "compiled"]  # compiling takes a minute
    gpu.main([*rows, "--tiny", "--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    measured = [row for row in report["rows"] if "ratios" in row]
    assert [row["name"] for row in report["rows"] if row not in measured] == ["waits"]
    assert {row["name"] for row in measured} == set(rows) - {"waits"}
    assert all(row["median"] > 0 and np.isfinite(row["ratios"]).all() for row in measured)
    assert any(row["what"].endswith("(fastest)") and row["target"] == "speed >= 4" for row in measured)
    assert all(rate > 0 for rate in report["peaks"].values())
    assert report["card"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert all(f"| {row['what']} | {row['against']} |" in printed for row in measured)
    assert "| waits |  |  | skipped: torch counts the host's waits on a GPU only |" in printed


@pytest.mark.usefixtures("not_silent")
def test_a_row_of_the_gpu_benchmark_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(bench: Bench) -> Iterator[Finding]:
        yield Finding(Row("a run", "another", "64", [2.0, 4.0, 3.0], "speed >= 4"), {"detail": 1})

    def bad(bench: Bench) -> Iterator[Finding]:
        yield from good(bench)
        raise ValueError("no such card")

    def of_pair(model: str, deadline: float) -> Iterator[Finding | Failure]:
        return bad(cast(Bench, None)) if model == "one" else good(cast(Bench, None))

    def partly(bench: Bench) -> Iterator[Finding | Failure]:
        return bench.each(("one", "other"), of_pair)

    monkeypatch.setattr(gpu, "ROWS", {"bad": (bad, 1, 0), "partly": (partly, 1, 0), "good": (good, 1, 0)})
    gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["bad", "bad", "partly", "partly", "partly", "good"]
    failed = [row for row in rows if "error" in row]
    assert failed == [rows[1], rows[3]]
    assert [row["what"] for row in failed] == ["", "one"]
    assert all(row["error"].splitlines()[-1] == "ValueError: no such card" for row in failed)
    for row in (rows[0], rows[2], rows[4], rows[5]):
        assert (row["median"], row["met"], row["detail"]) == (3.0, False, 1)
    printed = capsys.readouterr().out
    assert "| partly |  | one | failed: ValueError: no such card |  |  |" in printed


def test_the_gpu_benchmark_keeps_to_its_time(tmp_path: Path) -> None:
    """A row whose time is over measures one round. A row that cannot be finished in time is left out."""
    bench = SimpleNamespace(sizes=Sizes(rounds=5, window=1.0, unit=10), device=torch.device("cpu"))
    bench.steps_of_window = lambda seconds: Bench.steps_of_window(cast(Bench, bench), seconds)
    calls: list[int] = []

    def side(steps: int) -> float:
        calls.append(steps)
        return 0.02

    found = Bench.measure(cast(Bench, bench), {"a": side}, deadline=0.0)
    assert (calls, found) == ([20, 50], {"a": [0.02]})
    report = gpu.Report(tmp_path / "speed.json", bench.device, {}, "command")
    gpu.measure(cast(Bench, bench), report, ["compiled"], end=time.perf_counter() + 30)
    (row,) = report.content["rows"]
    assert row["skipped"].endswith(" seconds are left, it needs 40")


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


@pytest.mark.slow
def test_ways_to_quantise_are_compared(finished_run: Path, array_file: Path, tmp_path: Path) -> None:
    from benchmarks import onnx_int8

    out = tmp_path / "new" / "int8.csv"
    given = [f"run={finished_run}", f"data.path={array_file}", "calibration_images=32"]
    command = [sys.executable, "-m", "benchmarks.onnx_int8", *given, "--rounds", "2", "--out", str(out)]
    for _ in range(2):
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["form"] for row in rows] == ["float32", *onnx_int8.WAYS] * 2
    assert float(rows[0]["same top-1 %"]) == 100
    assert all(float(row["kB"]) < float(rows[0]["kB"]) for row in rows[1:8])


def test_two_settings_are_compared_by_seed(tmp_path: Path) -> None:
    for name, accuracies in {"kd": (0.5, 0.6, 0.7), "vanilla": (0.4, 0.51, 0.59)}.items():
        for seed, accuracy in enumerate(accuracies):
            make_result(seed=seed, accuracy=accuracy).write(tmp_path / f"{name}-seed{seed}.json")
    found = paired.compare(tmp_path, "kd", "vanilla")
    assert found.seeds == (0, 1, 2)
    assert found.difference == pytest.approx(10)
    with pytest.raises(SystemExit, match=r"kd and aekt have no seed in common"):
        paired.compare(tmp_path, "kd", "aekt")
