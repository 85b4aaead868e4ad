"""Photos: from the bytes of a file to the pixels of a view, or of the picture that evaluation looks at."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image

from src.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")


def reduction(pixels: int, size: int) -> int:
    """By how much `pixels` a side may be reduced (8, 4, 2 or 1) and still be `size` or more."""
    return next((factor for factor in (8, 4, 2) if pixels >= factor * size), 1)


class Photo:
    """An encoded photo, of which `height` and `width` are known before it is decoded.

    Raises `UserError`, here or at `decode`, where the photo `name` cannot be read.
    """

    def __init__(self, encoded: bytes, name: str) -> None:
        self.encoded, self.name = encoded, name
        self.opened: Image.Image | None = self._open()
        self.width, self.height = self.opened.size

    def decode(self, reduced: int) -> tuple[Image.Image, int]:
        """The photo in RGB and the factor by which it is reduced: `reduced` for a JPEG, whose decoder then has less to
        do, else 1.

        The camera's note which side is up (EXIF) is ignored, as by torchvision.
        """
        image, self.opened = self.opened or self._open(), None
        with _readable(self.name):
            if reduced > 1 and image.draft("", (image.width // reduced, image.height // reduced)) is None:
                reduced = 1
            image.load()
            return _rgb(image), reduced

    def _open(self) -> Image.Image:
        with _readable(self.name):
            return Image.open(BytesIO(self.encoded), formats=FORMATS)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # else Pillow warns
        image = image.convert("RGBA")
    return image.convert("RGB")


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # broken bytes make decoders raise almost anything
        reason = str(error).partition(" <_io.")[0] or type(error).__name__
        raise UserError(f"{name} cannot be read as a photo ({reason}): mend or remove it.") from None


def crop_and_resize(image: Image.Image, reduced: int, box: Sequence[int], size: int, flip: bool) -> Image.Image:
    """What is in the `box` of left, top, width and height, at `size` x `size` pixels, bilinear with antialiasing.

    The box is in pixels of the photo before it was `reduced`. Where it was not, this is torchvision's `resized_crop`.
    """
    left, top, width, height = (edge / reduced for edge in box)
    x, y = math.floor(left), math.floor(top)
    part = image.crop((x, y, math.ceil(left + width), math.ceil(top + height)))
    inside = (left - x, top - y, left - x + width, top - y + height)
    resized = part.resize((size, size), Image.Resampling.BILINEAR, box=inside)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized


def centre(photo: Photo, resize: int, size: int) -> Image.Image:
    """The evaluation's picture: the short side resized to `resize`, then the central `size` x `size` pixels.

    This is torchvision's Resize and CenterCrop, but that a large JPEG is decoded at a reduced size.
    """
    short = min(photo.height, photo.width)
    image, reduced = photo.decode(reduction(short, resize))
    new_width, new_height = resize * photo.width // short, resize * photo.height // short
    whole = (0, 0, photo.width / reduced, photo.height / reduced)
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR, box=whole)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    return resized.crop((left, top, left + size, top + size))
