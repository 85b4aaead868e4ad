"""The embedded data set: fonts, characters and determinism."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from src.data import glyphs as module
from src.data.array_file import load_arrays
from src.data.glyphs import CLASSES, FONTS, draw_split, glyphs

FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def family(name: str) -> str:
    """Return the family that the font file states. The files of Computer Modern state different names."""
    stated = ImageFont.truetype(FOLDER / f"{name}.ttf", 10).getname()[0]
    assert stated is not None
    return "Computer Modern" if stated.startswith("cm") else stated


def test_training_and_test_fonts_are_of_different_families() -> None:
    train, test = ({family(name) for name in FONTS[split]} for split in ("train", "test"))
    assert not train & test
    assert train == {"DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif", "STIXGeneral"}
    assert test == {"Computer Modern"}


@pytest.mark.parametrize("name", FONTS["train"] + FONTS["test"])
def test_every_font_has_62_different_characters(name: str) -> None:
    font = ImageFont.truetype(FOLDER / f"{name}.ttf", 52)
    seen = set()
    for character in CLASSES:
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).text((32, 48), character, fill=255, font=font, anchor="ms")
        assert np.asarray(image).max() == 255, f"{character} is blank"
        seen.add(image.tobytes())
    assert len(seen) == len(CLASSES) == 62


@pytest.mark.parametrize("split", ["train", "test"])
def test_drawing_is_deterministic_and_balanced(split: str) -> None:
    once, again = draw_split(split, 2), draw_split(split, 2)
    images, labels = once[f"{split}_images"], once[f"{split}_labels"]
    np.testing.assert_array_equal(images, again[f"{split}_images"])
    assert images.shape == (124, 32, 32, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(labels), np.full(62, 2))
    assert len({image.tobytes() for image in images}) == 124
    assert images.std(axis=(1, 2)).max(axis=1).min() > 5


def test_more_images_do_not_change_the_first_ones() -> None:
    few, more = draw_split("test", 1), draw_split("test", 2)
    np.testing.assert_array_equal(more["test_images"][:62], few["test_images"])


def test_ink_is_darker_than_the_background() -> None:
    colours = [module._colours(np.random.default_rng(i)) for i in range(200)]
    brightness = np.array([[colour @ (0.299, 0.587, 0.114) for colour in pair] for pair in colours])
    assert (brightness[:, 0] - brightness[:, 1]).min() > 25


def test_the_file_is_made_once_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[tuple[str, int]] = []

    def draw_few(split: str, count: int) -> dict[str, Any]:
        counts.append((split, count))
        return draw_split(split, 1)

    monkeypatch.setattr(module, "draw_split", draw_few)
    file = glyphs(tmp_path)
    assert glyphs(tmp_path) == file == tmp_path / "glyphs-v1.npz"
    assert counts == [("train", 200), ("test", 20)]
    loaded = load_arrays(file)
    assert loaded.class_names == tuple(CLASSES)
    assert loaded.train_images.shape == (62, 3, 32, 32)
