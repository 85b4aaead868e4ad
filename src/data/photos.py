"""Decoding, cropping and resizing of photos."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image

from src.common.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")


def reduction(pixels: int, size: int) -> int:
    """Return the largest factor (8, 4, 2 or 1) by which a side of `pixels` can be reduced and still be at least `size`.

    >>> reduction(500, 224), reduction(447, 224)
    (2, 1)
    """
    return next((factor for factor in (8, 4, 2) if pixels >= factor * size), 1)


class Photo:
    """An encoded photo. Its `height` and `width` are known before it is decoded.

    Raises `UserError`, here or in `decode`, if the bytes are not a valid photo. `name` stands in the message.
    """

    def __init__(self, encoded: bytes, name: str) -> None:
        self.encoded, self.name = encoded, name
        self.opened: Image.Image | None = self._open()
        self.width, self.height = self.opened.size

    def decode(self, reduced: int) -> tuple[Image.Image, int]:
        """Return the photo in RGB and the factor by which it is reduced.

        The decoder of a JPEG reduces it by `reduced`, which saves work. The factor of other formats is 1. The EXIF
        orientation is ignored, as torchvision does.
        """
        image, self.opened = self.opened or self._open(), None
        with _report_damage(self.name):
            if reduced > 1 and image.draft("", (image.width // reduced, image.height // reduced)) is None:
                reduced = 1
            image.load()
            return _rgb(image), reduced

    def _open(self) -> Image.Image:
        with _report_damage(self.name):
            return Image.open(BytesIO(self.encoded), formats=FORMATS)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns otherwise
        image = image.convert("RGBA")
    return image.convert("RGB")


@contextmanager
def _report_damage(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged bytes make decoders raise almost any exception
        reason = str(error).partition(" <_io.")[0] or type(error).__name__
        raise UserError(f"{name} cannot be read as a photo ({reason}): repair or remove it.") from None


def crop_and_resize(image: Image.Image, reduced: int, box: Sequence[int], size: int, flip: bool) -> Image.Image:
    """Crop the `box` of left, top, width and height, and resize it to `size` x `size` pixels.

    The box is in pixels of the original photo, `reduced` times larger than `image`. Resizing is bilinear with
    antialiasing. For `reduced` 1 this equals torchvision's `resized_crop`. `flip` mirrors the result.
    """
    left, top, width, height = (edge / reduced for edge in box)
    x, y = math.floor(left), math.floor(top)
    part = image.crop((x, y, math.ceil(left + width), math.ceil(top + height)))
    inside = (left - x, top - y, left - x + width, top - y + height)
    resized = part.resize((size, size), Image.Resampling.BILINEAR, box=inside)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized


def centre(photo: Photo, resize: int, size: int) -> Image.Image:
    """Resize the short side of a photo to `resize`, then crop the central `size` x `size` pixels.

    This equals torchvision's Resize and CenterCrop, except that a large JPEG is decoded at a reduced size.
    """
    short = min(photo.height, photo.width)
    image, reduced = photo.decode(reduction(short, resize))
    new_width, new_height = resize * photo.width // short, resize * photo.height // short
    whole = (0, 0, photo.width / reduced, photo.height / reduced)
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR, box=whole)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    return resized.crop((left, top, left + size, top + size))
