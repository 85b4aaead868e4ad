"""Compare ways to quantise a trained student to int8 in ONNX: accuracy on all test images, and time on this processor.

The arguments are those of `python -m src.export`, for example `run=FOLDER`. Each way is calibrated on the same training
images. All ways are timed in turn on one thread, and the smallest time of all rounds counts.
"""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from onnxruntime.quantization import CalibrationMethod, QuantType

from benchmarks.trial import CONF
from src.exporting.checking import compare, predict_in_batches, sample_test_images, sample_training_images
from src.exporting.forms import BATCH, Form, Predictor, load_form, make_classifier, quantise_onnx, write_form
from src.exporting.measuring import time_interleaved
from src.setup.reopen import open_run_or_checkpoint

S8, U8 = QuantType.QInt8, QuantType.QUInt8
WAYS: dict[str, dict[str, Any]] = {
    "s8s8, 7 bits": {"activation_type": S8, "weight_type": S8, "reduce_range": True},
    "s8s8": {"activation_type": S8, "weight_type": S8, "reduce_range": False},
    "u8s8, 7 bits": {"activation_type": U8, "weight_type": S8, "reduce_range": True},
    "u8s8": {"activation_type": U8, "weight_type": S8, "reduce_range": False},
    "u8u8": {"activation_type": U8, "weight_type": U8, "reduce_range": False},
    "u8u8, per tensor": {"activation_type": U8, "weight_type": U8, "reduce_range": False, "per_channel": False},
    "u8s8, 7 bits, percentile": {
        "activation_type": U8,
        "weight_type": S8,
        "reduce_range": True,
        "calibrate_method": CalibrationMethod.Percentile,
    },
}
"""By name (the types of activations and weights), the options of onnxruntime's `quantize_static`."""
COLUMNS = ("network", "form", "images", "top-1 %", "same top-1 %", "largest difference", "kB", "1 image ms",
           f"{BATCH} images ms")  # fmt: skip


def measure(overrides: list[str], rounds: int, folder: Path) -> list[list[Any]]:
    """Return a row for the student in torch, for the float32 file, and for each way."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("export", overrides)
    opened = open_run_or_checkpoint(cfg)
    network = make_classifier(opened.distiller)
    images, target = sample_test_images(opened.data, opened.data.split_size("test"))
    calibration = sample_training_images(opened.data, cfg.calibration_images)
    float_file, form = folder / "float.onnx", Form("onnx", "float32")
    write_form(network, float_file, form, calibration, {})
    files = {"float32": float_file, **{way: folder / f"{number}.onnx" for number, way in enumerate(WAYS)}}
    for way, given in WAYS.items():
        quantise_onnx(float_file, files[way], calibration, **given)
    predictors: dict[str, Predictor] = {way: load_form(file, form, network) for way, file in files.items()}
    student = predict_in_batches(network, images)
    calls = list(predictors.values())
    seconds = [time_interleaved(calls, images, batch, rounds).min(axis=0) for batch in (1, BATCH)]
    rows: list[list[Any]] = []
    for column, (way, predictor) in enumerate(predictors.items()):
        check = compare(student, predict_in_batches(predictor, images), target)
        rows.append([
            opened.cfg.model.student.name, way, check.images, f"{100 * check.accuracy:.2f}",
            f"{100 * check.same / check.images:.2f}", f"{check.difference:.3g}", files[way].stat().st_size // 1000,
            *(f"{1e3 * times[column]:.3g}" for times in seconds),
        ])  # fmt: skip
    return rows


def main() -> None:
    """Append the rows to a csv file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="arguments of src.export")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True, help="a csv file, to which the rows are appended")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.overrides, options.rounds, Path(folder))
    is_new = not options.out.exists()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows] if is_new else rows)


if __name__ == "__main__":
    main()
