"""Small folders of photos in all formats and colour modes, and data modules that read them."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from src.data.folder_data import FolderData

SIZES = ((40, 30), (30, 41), (25, 25), (90, 20))
LARGE = (160, 120)
"""Width and height of a photo that is large enough for its decoder to reduce."""


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Make an RGB image with smooth colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode an image as the bytes of a file."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sixteen_bits(image: Image.Image) -> Image.Image:
    """Convert an image to 16-bit grey."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def files(seed: int) -> dict[str, bytes]:
    """Make 14 photos, one of each format and colour mode: bytes by file name."""
    rgb = [picture(seed * 100 + i, *(LARGE if i == 3 else SIZES[i % len(SIZES)])) for i in range(14)]
    return {
        "a.jpg": encoded(rgb[0], "JPEG"),
        "b.JPEG": encoded(rgb[1].convert("L"), "JPEG"),
        "c.jpeg": encoded(rgb[2].convert("CMYK"), "JPEG"),
        "d.Jpg": encoded(rgb[3], "JPEG", quality=90),
        "e.png": encoded(rgb[4], "PNG"),
        "f.png": encoded(rgb[5].quantize(16), "PNG", transparency=b"\x00\x80\xff"),
        "g.png": encoded(rgb[6].convert("RGBA"), "PNG"),
        "h.png": encoded(sixteen_bits(rgb[7]), "PNG"),
        "i.png": encoded(rgb[8].convert("1"), "PNG"),
        "j.PNG": encoded(rgb[9].convert("LA"), "PNG"),
        "k.webp": encoded(rgb[10], "WEBP"),
        "l.bmp": encoded(rgb[11], "BMP"),
        "m.ppm": encoded(rgb[12], "PPM"),
        "nested/deep/n.tif": encoded(rgb[13], "TIFF"),
    }


def write_folder(root: Path, classes: tuple[str, ...] = ("ant", "bee", "cat"), test: str = "val") -> Path:
    """Write a folder with 14 training photos and 5 test photos per class. Return `root`."""
    for split in ("train", test):
        for number, name in enumerate(classes):
            contents = list(files(number + 10 * (split == test)).items())
            for path, content in contents[:5] if split == test else contents:
                file = root / split / name / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    return root


OPTIONS: dict[str, Any] = {
    "name": "photos",
    "image_size": 16,
    "resize": 20,
    "scale": (0.08, 1.0),
    "flip": True,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "train_size": None,
    "val_size": 0,
    "split_seed": 0,
    "workers": 0,
    "batch_size": 8,
    "seed": 0,
    "cache": os.environ.get("AEKT_CACHE", "~/.cache/aekt"),
}


def load(root: Path | str, kind: type[FolderData] = FolderData, **options: Any) -> Any:
    """Load a data module that makes images of 16 x 16 pixels."""
    data = kind(root=str(root), **{**OPTIONS, **options})
    data.load()
    return data
