"""`python -m src.predict student.onnx image.png ...`: the likeliest classes of pictures, by an exported student.

Needs onnxruntime, numpy and Pillow alone, and nothing else of this project: the file can be copied to where it serves.
Input size, normalisation and class names are the student's own: they come out of its file.
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
LARGEST_SIDE, LARGEST_RATIO = 4096, 50


class RefusedError(Exception):
    """One sentence that says what is wrong with which file."""


class Student(NamedTuple):
    """An exported student, ready to be asked."""

    session: onnxruntime.InferenceSession
    class_names: list[str]
    image_size: tuple[int, int]
    """Height and width of what the network sees."""
    resize: tuple[int, int]
    """What a picture is made to cover before its centre is cut out."""

    def probabilities(self, image: Image.Image) -> np.ndarray:
        """[C] float64 of one RGB picture of any size; normalisation is part of the network.

        Raises `RefusedError` where the network fails on it.
        """
        pixels = np.asarray(centre(image, self.resize, self.image_size))
        try:
            (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})
        except Exception as error:  # onnxruntime has a class of its own for every kind of failure
            raise RefusedError(f"The network fails ({printable(str(error))[:300]}): export it again.") from None
        if logits.shape != (1, len(self.class_names)) or not np.isfinite(logits).all():
            raise RefusedError("The network does not answer by a finite number for each class: export it again.")
        shifted = np.exp(logits[0].astype(np.float64) - logits.max())
        return shifted / shifted.sum()


def load(file: Path) -> Student:
    """The student in an .onnx file; nothing in it is executed but its graph.

    Raises `RefusedError` where onnxruntime cannot load it, or it does not say how it is to be used.
    """
    if not file.is_file():
        raise RefusedError(f"{file} is no file: give an .onnx file that src.export wrote.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for every kind of damage
        raise RefusedError(f"{file} cannot be loaded by onnxruntime ({printable(str(error))[:300]}).") from None
    try:
        return _described(session)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RefusedError(
            f"{file} does not say how pictures are fed to it ({type(error).__name__}: {printable(str(error))[:200]}): "
            "export it by python -m src.export."
        ) from None


def _described(session: onnxruntime.InferenceSession) -> Student:
    """Raises `KeyError`, `TypeError` or `ValueError` where the metadata is missing, garbled, or not the graph's."""
    metadata = session.get_modelmeta().custom_metadata_map
    names = json.loads(metadata["class_names"])
    size, resize = (_size(json.loads(metadata[key])) for key in ("image_size", "resize"))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is no list of names")
    if metadata["normalisation"] != '"inside"':
        raise ValueError("normalisation is not inside the network")
    if any(cut > whole for cut, whole in zip(size, resize, strict=True)):
        raise ValueError("image_size is larger than resize")
    taken, given = [(node.type, node.shape[1:]) for node in (*session.get_inputs(), *session.get_outputs())]
    if taken != ("tensor(uint8)", [3, *size]) or given != ("tensor(float)", [len(names)]):
        raise ValueError(f"the network takes {taken} and gives {given}, which the metadata does not fit")
    return Student(session, [printable(name) for name in names], size, resize)


def _size(value: Any) -> tuple[int, int]:
    height, width = value
    if not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in (height, width)):
        raise ValueError(f"{value} is no height and width")
    return height, width


def printable(text: str) -> str:
    """Text out of a file, without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def read(file: Path) -> Image.Image:
    """A picture in RGB. Raises `RefusedError` where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = rgb(Image.open(file, formats=FORMATS))
        if max(image.size) > LARGEST_RATIO * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels are too narrow")
        return image
    except Exception as error:  # broken bytes make decoders raise almost anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RefusedError(f"{file} cannot be read as a picture ({printable(reason)}).") from None


def rgb(image: Image.Image) -> Image.Image:
    """As training reads photos: 16 bits become 8, transparency and the camera's note which side is up are ignored."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def centre(image: Image.Image, resize: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """As evaluation sees photos: made as small as still covers `resize` (height, width), then the central `size`."""
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
    """Print the likeliest classes of each picture; exit code 1 where one could not be read."""
    parser = argparse.ArgumentParser(prog="python -m src.predict", description=__doc__, allow_abbrev=False)
    parser.add_argument("student", type=Path, help="an .onnx file that src.export wrote")
    parser.add_argument("images", type=Path, nargs="+", help="pictures: " + ", ".join(FORMATS))
    parser.add_argument("--top", type=int, default=5, help="how many classes to print (5)")
    given = parser.parse_args(arguments)
    if given.top < 1:
        parser.error("--top must be positive")
    failed = False
    try:
        student = load(given.student)
        for file in given.images:
            try:
                probabilities = student.probabilities(read(file))
            except RefusedError as error:
                failed = True
                print(f"error: {error}", file=sys.stderr)
                continue
            print(printable(str(file)))
            for k in np.argsort(-probabilities, kind="stable")[: given.top]:
                print(f"  {100 * probabilities[k]:6.2f} %  {student.class_names[k]}")
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
