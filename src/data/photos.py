"""Decoding, cropping and resizing of photos."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from src.common.errors import UserError

# `src/predict.py`, which imports nothing of this project, has copies of `FORMATS` and of all down to `value_range`.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TIFF": (".tif", ".tiff"),
}
"""The formats that are read, by their name in Pillow, and the suffixes of their files."""
ORIENTATION, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 274, 258, 262, 339
"""Numbers of EXIF and TIFF tags."""
UNSIGNED, WHITE_IS_ZERO = 1, 0
"""Values of the tags SAMPLE_FORMAT and PHOTOMETRIC."""
STATED_RANGES = ((340, 341), (280, 281))
"""Numbers of the TIFF tags for the smallest and the largest value."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, the operation that turns a picture upright."""
SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
"""Operations that swap width and height."""


def turn(image: Image.Image) -> Image.Transpose | None:
    """Return how an opened, undecoded picture has to be turned to stand upright, by its EXIF orientation.

    Pillow turns TIFF files itself. A broken tag is ignored.
    """
    if image.format == "TIFF":
        return None
    try:
        return TURNS.get(Image.Image.getexif(image).get(ORIENTATION, 1))  # PngImageFile.getexif would decode the pixels
    except Exception:  # a broken tag makes the parser raise almost any exception
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded picture to RGB. Transparency is ignored.

    A channel of more than 8 bits is scaled by the range of its values. Raises `ValueError` if the range is unknown.

    >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0)), to_rgb(Image.new("F", (1, 1), 0.5)).getpixel((0, 0))
    ((255, 255, 255), (128, 128, 128))
    """
    if image.mode.startswith(("I", "F")):
        image = scale_to_8_bits(image)
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns otherwise
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale the values of a picture with one channel of 16 or 32 bits to 0 .. 255."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "I" and np.max(tags.get(BITS, 16)) == 32 and np.max(tags.get(SAMPLE_FORMAT, 1)) == UNSIGNED:
        values = values.view(np.uint32)
    values = values.astype(np.float64)
    low, high = value_range(image.mode, values, tags)
    scaled = np.rint(((values - low) * (255 / (high - low))).clip(0, 255)).astype(np.uint8)
    return Image.fromarray(255 - scaled if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else scaled)


def value_range(mode: str, values: np.ndarray, tags: Mapping[int, Any]) -> tuple[float, float]:
    """Return the values that mean the darkest and the lightest grey.

    Unsigned integers of up to 16 bits use all of their bits. A file of other integers or of floats has to state its
    range in its TIFF `tags`. Otherwise floats have to be from 0 to 1. Raises `ValueError` if the range is unknown.
    """
    bits, sample_format = (int(np.max(tags.get(*tag))) for tag in ((BITS, 16), (SAMPLE_FORMAT, UNSIGNED)))
    if mode != "F" and bits <= 16 and sample_format == UNSIGNED:
        return 0, 2**bits - 1
    for lowest, highest in STATED_RANGES:
        low, high = float(np.max(tags.get(lowest, 0))), float(np.max(tags.get(highest, 0)))
        if high > low and np.isfinite(values).all():
            return low, high
    if mode == "F" and ((values >= 0) & (values <= 1)).all():
        return 0, 1
    raise ValueError("the range of its values is unknown, because they have more than 8 bits")


LARGEST_RATIO = 1000
"""Maximum ratio of a photo's longer to its shorter side in evaluation, which crops the centre in any case."""
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)


def reduction(pixels: int, size: int) -> int:
    """Return the largest factor (8, 4, 2 or 1) by which a side of `pixels` can be reduced and still be at least `size`.

    >>> reduction(500, 224), reduction(447, 224)
    (2, 1)
    """
    return next((factor for factor in (8, 4, 2) if pixels >= factor * size), 1)


class Photo:
    """An encoded photo. Its `height` and `width`, when it stands upright, are known before it is decoded.

    Raises `UserError`, here or in `decode`, if the bytes are not a valid photo. `name` stands in the message.
    """

    def __init__(self, encoded: bytes, name: str) -> None:
        self.encoded, self.name = encoded, name
        image = self._open()
        self.opened: Image.Image | None = image
        self.turn = turn(image)
        self.width, self.height = image.size[::-1] if self.turn in SIDEWAYS else image.size
        self.is_adjusted = self.turn is not None or image.mode.startswith(("I", "F"))
        """Whether decoding turns the photo or scales its values. Version 0.1 did neither."""
        self.is_compressed = image.format not in ("BMP", "PPM") and image.info.get("compression") != "raw"
        """Whether the size of the file depends on the values of the pixels."""

    def decode(self, reduced: int) -> tuple[Image.Image, int]:
        """Return the photo in RGB, upright, and the factor by which it is reduced.

        The decoder of a JPEG reduces it by `reduced`, which saves work. The factor of other formats is 1.
        """
        image, self.opened = self.opened or self._open(), None
        with _report_damage(self.name):
            size = max(1, image.width // reduced), max(1, image.height // reduced)
            if reduced > 1 and image.draft("", size) is None:
                reduced = 1
            image.load()
            rgb = to_rgb(image)
            return rgb if self.turn is None else rgb.transpose(self.turn), reduced

    def _open(self) -> Image.Image:
        with _report_damage(self.name):
            return Image.open(BytesIO(self.encoded), formats=tuple(FORMATS))


@contextmanager
def _report_damage(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged bytes make decoders raise almost any exception
        raise UserError(f"{name} cannot be read as a photo ({damage(error)}): repair or remove it.") from None


def damage(error: BaseException) -> str:
    """Describe in a few words why a decoder failed."""
    return str(error).partition(" <_io.")[0] or type(error).__name__


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

    This equals torchvision's Resize and CenterCrop, except that a large JPEG is decoded at a reduced size. The ends of
    a photo beyond `LARGEST_RATIO` are cut off first: resized, a single row of pixels could take gigabytes.
    """
    short = min(photo.height, photo.width)
    image, reduced = photo.decode(reduction(short, resize))
    width, height = (min(side, LARGEST_RATIO * short) for side in (photo.width, photo.height))
    new_width, new_height = resize * width // short, resize * height // short
    left, top = (photo.width - width) / 2, (photo.height - height) / 2
    whole = (left / reduced, top / reduced, (left + width) / reduced, (top + height) / reduced)
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR, box=whole)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    return resized.crop((left, top, left + size, top + size))
