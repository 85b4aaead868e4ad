"""`python -m src.predict student.onnx image.png ...`: classify pictures with an exported student.

This file needs only onnxruntime, numpy and Pillow, and imports nothing of this project: copy it to the machine
that uses the student. Input size, normalisation and class names are read from the student's file.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
LARGEST_SIDE = 4096
"""Pixels. A file whose metadata asks for larger images is refused."""
LARGEST_RATIO = 50
"""Maximum ratio of a picture's longer to its shorter side. Resizing narrower pictures would need too much memory."""


class RefusedError(Exception):
    """A file that cannot be used. The message is one sentence that says what is wrong with it."""


class ExportedStudent(NamedTuple):
    """An exported student, ready to classify pictures."""

    session: onnxruntime.InferenceSession
    class_names: list[str]
    image_size: tuple[int, int]
    """Height and width of the network's input."""
    resize: tuple[int, int]
    """Height and width that a resized picture covers before its centre is cut out."""

    def probabilities(self, image: Image.Image) -> np.ndarray:
        """Compute the class probabilities [C] float64 of one RGB picture of any size.

        The network itself normalises the pixels. Raises `RefusedError` if the network fails.
        """
        pixels = np.asarray(central_crop(image, self.resize, self.image_size))
        try:
            (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})
        except Exception as error:  # onnxruntime has a class of its own for each kind of failure
            reason = printable(str(error))[:300]
            raise RefusedError(f"onnxruntime cannot run the network ({reason}): export it again.") from None
        if logits.shape != (1, len(self.class_names)) or not np.isfinite(logits).all():
            raise RefusedError("The network does not return one finite number for each class: export it again.")
        shifted = np.exp(logits[0].astype(np.float64) - logits.max())
        probabilities: np.ndarray = shifted / shifted.sum()
        return probabilities


def load(file: Path) -> ExportedStudent:
    """Load the student in an .onnx file. Only the file's graph is executed.

    Raises `RefusedError` if onnxruntime cannot load the file, or if its metadata is missing or invalid.
    """
    if not file.is_file():
        raise RefusedError(f"{file} is not a file: give an .onnx file that src.export wrote.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each kind of damage
        reason = printable(str(error))[:300]
        raise RefusedError(f"onnxruntime cannot load {file} ({reason}): export it again.") from None
    try:
        return _read_metadata(session)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {printable(str(error))[:200]}"
        raise RefusedError(
            f"{file} has no valid metadata ({reason}): export the student again with python -m src.export."
        ) from None


def _read_metadata(session: onnxruntime.InferenceSession) -> ExportedStudent:
    """Read how the student is used.

    Raises `KeyError`, `TypeError`, `ValueError` or `RecursionError` if the metadata is missing, is garbled, or does not
    fit the graph.
    """
    metadata = session.get_modelmeta().custom_metadata_map
    names = json.loads(metadata["class_names"])
    size, resize = (_parse_size(json.loads(metadata[key])) for key in ("image_size", "resize"))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is not a list of names")
    if metadata["normalisation"] != '"inside"':
        raise ValueError("the network does not normalise the pixels itself")
    if any(cut > whole for cut, whole in zip(size, resize, strict=True)):
        raise ValueError("image_size is larger than resize")
    found = [(node.type, node.shape[1:]) for node in (*session.get_inputs(), *session.get_outputs())]
    expected = [("tensor(uint8)", [3, *size]), ("tensor(float)", [len(names)])]
    if found != expected:
        raise ValueError(f"the network's inputs and outputs are {found}, but the metadata describes {expected}")
    return ExportedStudent(session, [printable(name) for name in names], size, resize)


def _parse_size(value: Any) -> tuple[int, int]:
    height, width = value
    if not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in (height, width)):
        raise ValueError(f"{value} is not a valid height and width")
    return height, width


def printable(text: str) -> str:
    r"""Replace characters that could control a terminal by spaces.

    >>> printable("red\x1b[31m")
    'red [31m'
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


def read_picture(file: Path) -> Image.Image:
    """Read a picture as RGB. Raises `RefusedError` if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = to_rgb(Image.open(file, formats=FORMATS))
        if max(image.size) > LARGEST_RATIO * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels are too narrow")
        return image
    except Exception as error:  # broken bytes make decoders raise almost anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RefusedError(
            f"{file} cannot be read as a picture ({printable(reason)}): give a file in one of the formats "
            f"{', '.join(FORMATS)}."
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB as training does.

    16 bits become 8. Transparency and the EXIF orientation are ignored.

    >>> to_rgb(Image.new("I;16", (1, 1), 40_000)).getpixel((0, 0))
    (156, 156, 156)
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def central_crop(image: Image.Image, resize: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """Resize a picture to just cover `resize` (height, width), and cut out its central `size`, as evaluation does.

    >>> central_crop(Image.new("RGB", (640, 480)), resize=(256, 256), size=(224, 224)).size
    (224, 224)
    """
    width, height = image.size
    if width * resize[0] < height * resize[1]:
        whole = (resize[1], max(resize[0], resize[1] * height // width))
    else:
        whole = (max(resize[1], resize[0] * width // height), resize[0])
    if whole != image.size:
        image = image.resize(whole, Image.Resampling.BILINEAR)
    left, top = round((whole[0] - size[1]) / 2), round((whole[1] - size[0]) / 2)
    return image.crop((left, top, left + size[1], top + size[0]))


def main(arguments: list[str] | None = None) -> int:
    """Print the most likely classes of each picture. Returns exit code 1 if a file could not be used, else 0."""
    parser = argparse.ArgumentParser(prog="python -m src.predict", description=__doc__, allow_abbrev=False)
    parser.add_argument("student", type=Path, help="an .onnx file that src.export wrote")
    parser.add_argument("images", type=Path, nargs="+", help="pictures: " + ", ".join(FORMATS))
    parser.add_argument("--top", type=int, default=5, help="how many classes to print (default: 5)")
    given = parser.parse_args(arguments)
    if given.top < 1:
        parser.error("--top must be positive")
    failed = False
    try:
        student = load(given.student)
        for file in given.images:
            try:
                probabilities = student.probabilities(read_picture(file))
            except RefusedError as error:
                failed = True
                _print_error(error)
                continue
            print(printable(str(file)))
            for k in np.argsort(-probabilities, kind="stable")[: given.top]:
                print(f"  {100 * probabilities[k]:6.2f} %  {student.class_names[k]}")
    except RefusedError as error:
        _print_error(error)
        return 1
    return int(failed)


def _print_error(error: RefusedError) -> None:
    print(f"error: {printable(str(error))}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
