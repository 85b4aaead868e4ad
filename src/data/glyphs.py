"""Glyphs: an embedded data set of 62 characters, rendered from the fonts inside matplotlib. Nothing is downloaded.

The classes are digits and Latin letters, in colour, 32 x 32 pixels. Some look alike (O and 0, l and I and 1, c and C):
only their size and details differ. Training and test images come from different font families.
"""

import string
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from src.common.files import one_process_at_a_time
from src.data.array_file import save_arrays

CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
FONTS = {
    "train": tuple(
        f"{family}{style}"
        for family, styles in {
            "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
            "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
            "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
            "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
        }.items()
        for style in styles
    ),
    "test": ("cmr10", "cmb10", "cmti10", "cmss10", "cmtt10"),
}
"""DejaVu and STIX against Computer Modern. matplotlib's other fonts have symbols instead of letters."""
CANVAS, SIZE, BASELINE = 64, 32, 48
"""In pixels: the side of the canvas for drawing, the side of an image, and the row of the baseline on the canvas."""
VERSION = 1
"""Part of the file name. Increase it when the images change."""


def glyphs(root: Path) -> Path:
    """Return the array file in `root`, with 200 training and 20 test images per class.

    Make it if it is missing, which takes some seconds.
    """
    file = root / f"glyphs-v{VERSION}.npz"
    if file.is_file():
        return file
    with one_process_at_a_time(file):
        if not file.is_file():
            save_arrays(file, class_names=np.array(list(CLASSES)), **draw_split("train", 200), **draw_split("test", 20))
    return file


def draw_split(split: str, count: int) -> dict[str, np.ndarray]:
    """Draw `count` images of each class in the fonts of a split, the same in each call.

    Returns the arrays `<split>_images` and `<split>_labels` of the array file.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", 52) for name in FONTS[split]]
    labels = np.tile(np.arange(len(CLASSES), dtype=np.uint8), count)
    images = np.stack(
        [draw(label, fonts, np.random.default_rng((split == "test", i))) for i, label in enumerate(labels)]
    )
    return {f"{split}_images": images, f"{split}_labels": labels}


def draw(label: int, fonts: list[ImageFont.FreeTypeFont], random: np.random.Generator) -> np.ndarray:
    """Draw one character, uint8 [32, 32, 3].

    Font, slant, size, position and colours are random. The background is uneven and may have a stray stroke.
    """
    shape = _character(CLASSES[label], fonts[random.integers(len(fonts))], random)
    ground, ink = _colours(random)
    slope = np.linspace(-1, 1, SIZE)
    light = 1 + random.uniform(-0.25, 0.25) * slope[:, None] + random.uniform(-0.25, 0.25) * slope[None, :]
    picture = ground + (ink - ground) * shape[:, :, None]
    picture = picture * light[:, :, None] + random.normal(0, random.uniform(2, 10), (SIZE, SIZE, 1))
    pixels: np.ndarray = picture.clip(0, 255).astype(np.uint8)
    return pixels


def _character(character: str, font: ImageFont.FreeTypeFont, random: np.random.Generator) -> np.ndarray:
    """Draw the share of ink in each pixel, [32, 32], from 0 to 1."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(canvas)
    pen.text((CANVAS / 2, BASELINE), character, fill=255, font=font, anchor="ms")
    for _ in range(random.integers(2)):
        stroke = [tuple(float(v) for v in point) for point in random.uniform(-10, CANVAS + 10, (2, 2))]
        pen.line(stroke, fill=int(random.integers(60, 160)), width=int(random.integers(1, 4)))
    canvas = canvas.transform((CANVAS, CANVAS), Image.Transform.AFFINE, _placement(random), Image.Resampling.BILINEAR)
    canvas = canvas.filter(ImageFilter.GaussianBlur(random.uniform(0.2, 1.7)))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64) / 255


def _placement(random: np.random.Generator) -> tuple[float, ...]:
    """Draw an affine map from the image to the canvas: a rotation, slant, scale and shift about the middle."""
    angle, slant = np.radians(random.uniform(-9, 9)), random.uniform(-0.15, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, slant], [0, 1]]) / random.uniform(0.9, 1.12, 2)
    middle = CANVAS / 2
    shift = middle - matrix @ (np.array([middle, middle]) + random.uniform(-3, 3, 2))
    return (*matrix[0], shift[0], *matrix[1], shift[1])


def _colours(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a light background colour and a dark ink colour, RGB from 0 to 255."""
    return random.uniform(140, 255, 3), random.uniform(0, 115, 3)
