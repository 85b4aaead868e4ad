"""The metadata of an exported file, and its model card."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from src.exporting.card import describe, model_card
from src.exporting.checking import Check, compare
from src.exporting.forms import Form
from src.methods.vanilla import Vanilla
from src.setup.reopen import Opened
from tests.helpers.exports import METADATA
from tests.helpers.tiny import CLASSES, MEAN, STD, tiny_data, tiny_distiller

pytest.importorskip("safetensors")


def perfect_check() -> Check:
    logits = torch.eye(CLASSES)
    return compare(logits, logits, torch.arange(CLASSES))


def test_a_card_escapes_markdown(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "student.onnx"
    file.write_bytes(b"content")
    text = model_card(file, Form("onnx", "float32"), METADATA, perfect_check())
    assert r"red, a\|b, &lt;i>, yellow" in text
    assert hashlib.sha256(b"content").hexdigest() in text
    assert "uint8, 0 to 255, normalised inside by mean [0.5, 0.5, 0.5]" in text
    assert "python -m src.predict student.onnx image.png" in text


def test_the_card_of_weights_alone_says_how_to_normalise(tmp_path: Path) -> None:
    file = tmp_path / "student.safetensors"
    file.write_bytes(b"content")
    text = model_card(file, Form("safetensors", "float32"), METADATA, perfect_check())
    assert "float, normalised by mean [0.5, 0.5, 0.5], std [0.25, 0.25, 0.25] of pixels between 0 and 1" in text
    assert "weights alone" in text
    assert "src.predict" not in text


def test_the_card_of_an_executorch_file_says_that_it_takes_one_image(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    (tmp_path / "student.pte").write_bytes(b"content")
    text = model_card(tmp_path / "student.pte", Form("executorch", "float32"), METADATA, perfect_check())
    assert "| input | `images` [1, 3, 16, 16], one image per call, RGB, uint8" in text
    assert "| output | `logits` [1, 4], before softmax |" in text
    assert "python -m src.predict student.pte image.png" in text


def test_a_checkpoint_is_described_without_a_run(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    run_cfg: Any = OmegaConf.create({"model": {"student": {"name": "resnet8"}}, "data": {"name": "tiny", "resize": 20}})
    cfg: Any = OmegaConf.create({"run": None, "checkpoint": "somewhere/student.pth"})
    metadata = describe(cfg, Opened(run_cfg, tiny_distiller(data, Vanilla()), data))
    assert (metadata["network"], metadata["source"]) == ("resnet8", "student.pth")
    assert (metadata["image_size"], metadata["resize"]) == ([16, 16], [20, 20])
    assert (metadata["mean"], metadata["std"]) == (list(MEAN), list(STD))
    assert metadata["class_names"] == ["red", "green", "blue", "yellow"]
    assert metadata["data"] == {"name": "tiny", "digest": data.source.digest[:16]}
    assert all(metadata[name] is None for name in ("method", "serialization", "teacher", "test", "seed", "epochs"))
