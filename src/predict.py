"""`python -m src.predict student.onnx image.png ...`: classify pictures with an exported student.

For an .onnx or a .pte file, this file needs only numpy, Pillow, and the runtime: onnxruntime or executorch. It imports
nothing of this project then: copy it to the machine that uses the student. A folder that src.export wrote with
format=hub needs this project and its extra `hub`. Input size, normalisation and class names are read from the file or
the folder.
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# Formats, tags and `turn` .. `value_range` are copies from `src/data/photos.py`: both must read a picture alike.
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
LARGEST_SIDE = 4096
"""Pixels. A file whose metadata asks for larger images is refused."""
LARGEST_RATIO = 50
"""Maximum ratio of a picture's longer to its shorter side. Resizing narrower pictures would need too much memory."""


class RefusedError(Exception):
    """A file that cannot be used. The message is one sentence that says what is wrong with it."""


class ExportedStudent(NamedTuple):
    """An exported student, ready to classify pictures."""

    logits: Callable[[np.ndarray], np.ndarray]
    """Maps pixels uint8 [1, 3, H, W] to logits [1, C] float32. The pixels are normalised inside."""
    class_names: list[str]
    image_size: tuple[int, int]
    """Height and width of the network's input."""
    resize: tuple[int, int]
    """Height and width that a resized picture covers before its centre is cut out."""

    def label(self, number: int) -> str:
        """Return the name of a class, with its number if another class has the same name."""
        name = self.class_names[number]
        return name if self.class_names.count(name) == 1 else f"{name} ({number})"

    def probabilities(self, image: Image.Image) -> np.ndarray:
        """Compute the class probabilities [C] float64 of one RGB picture of any size.

        Raises `RefusedError` if the network fails.
        """
        pixels = np.asarray(central_crop(image, self.resize, self.image_size))
        try:
            logits = self.logits(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))
        except Exception as error:  # onnxruntime has a class of its own for each kind of failure
            reason = printable(str(error))[:300]
            raise RefusedError(f"The network cannot be run ({reason}): export it again.") from None
        if logits.shape != (1, len(self.class_names)) or not np.isfinite(logits).all():
            raise RefusedError("The network does not return one finite number for each class: export it again.")
        shifted = np.exp(logits[0].astype(np.float64) - logits.max())
        probabilities: np.ndarray = shifted / shifted.sum()
        return probabilities


class OpenedFile(NamedTuple):
    """A student's file in its runtime."""

    logits: Callable[[np.ndarray], np.ndarray]
    """As in `ExportedStudent`."""
    metadata: Mapping[str, str]
    signature: list[tuple[str, list[int]]]
    """Type and shape of the inputs and outputs, without the batch size."""


def load(path: Path) -> ExportedStudent:
    """Load the student in an .onnx or .pte file, or in a folder for the Hugging Face Hub.

    Only the file's graph is executed. Raises `RefusedError` if a package is missing, or if the file or the folder is
    damaged or invalid.
    """
    if path.is_dir():
        return _load_folder(path)
    if path.is_file():
        return _load_file(path)
    raise RefusedError(
        f"{path} is not a file and not a folder: give an .onnx or .pte file, or a folder, that src.export wrote."
    )


def _load_folder(folder: Path) -> ExportedStudent:
    try:
        import torch

        from src.common.errors import UserError
        from src.exporting.hub import load_hub_folder
    except ImportError as error:
        raise RefusedError(
            f"{folder} is a folder, which needs the whole project ({error}): install it, or export an .onnx file."
        ) from None
    try:
        student = load_hub_folder(folder)
    except UserError as error:
        raise RefusedError(str(error)) from None
    names = [printable(name) for name in student.class_names]

    def logits(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            computed: np.ndarray = student.classifier(torch.from_numpy(pixels)).numpy()
        return computed

    return ExportedStudent(logits, names, student.image_size, student.resize)


def _load_file(file: Path) -> ExportedStudent:
    runtime, open_file = ("executorch", _open_pte) if file.suffix == ".pte" else ("onnxruntime", _open_onnx)
    try:
        importlib.import_module(runtime)
    except ImportError:
        raise RefusedError(f"{runtime} is not installed: pip install {runtime}.") from None
    try:
        opened = open_file(file)
    except Exception as error:  # onnxruntime has a class of its own for each kind of damage
        reason = printable(str(error))[:300]
        raise RefusedError(f"{runtime} cannot load {file} ({reason}): export it again.") from None
    try:
        return _read_metadata(opened)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {printable(str(error))[:200]}"
        raise RefusedError(
            f"{file} has no valid metadata ({reason}): export the student again with python -m src.export."
        ) from None


def _open_onnx(file: Path) -> OpenedFile:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    signature = [(node.type.removeprefix("tensor"), node.shape[1:]) for node in (*inputs, *outputs)]
    metadata = session.get_modelmeta().custom_metadata_map
    return OpenedFile(lambda pixels: session.run(None, {inputs[0].name: pixels})[0], metadata, signature)


def _open_pte(file: Path) -> OpenedFile:
    with contextlib.redirect_stderr(io.StringIO()):  # the runtime writes about the processor
        import torch
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(file)
        forward = program.load_method("forward")
        metadata = {name: program.load_method(name).execute([])[0] for name in program.method_names - {"forward"}}
    shapes = forward.metadata
    types = {0: "(uint8)", 6: "(float)"}  # torch's numbers of its types
    nodes = [shapes.input_tensor_meta(0), shapes.output_tensor_meta(0)]
    signature = [(types.get(node.dtype(), ""), list(node.sizes()[1:])) for node in nodes]
    return OpenedFile(lambda pixels: forward.execute([torch.from_numpy(pixels)])[0].numpy(), metadata, signature)


def _read_metadata(opened: OpenedFile) -> ExportedStudent:
    """Read how the student is used.

    Raises `KeyError`, `TypeError`, `ValueError` or `RecursionError` if the metadata is missing, is garbled, or does not
    fit the graph.
    """
    metadata = opened.metadata
    names = json.loads(metadata["class_names"])
    size, resize = (_parse_size(json.loads(metadata[key])) for key in ("image_size", "resize"))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is not a list of names")
    if metadata["normalisation"] != '"inside"':
        raise ValueError("the network does not normalise the pixels itself")
    if any(cut > whole for cut, whole in zip(size, resize, strict=True)):
        raise ValueError("image_size is larger than resize")
    expected = [("(uint8)", [3, *size]), ("(float)", [len(names)])]
    if opened.signature != expected:
        raise ValueError(
            f"the network's inputs and outputs are {opened.signature}, but the metadata describes {expected}"
        )
    return ExportedStudent(opened.logits, [printable(name) for name in names], size, resize)


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
    """Read a picture as RGB, upright. Raises `RefusedError` if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # about broken EXIF data
            opened = Image.open(file, formats=tuple(FORMATS))
            turned = turn(opened)
            opened.load()
            image = to_rgb(opened) if turned is None else to_rgb(opened).transpose(turned)
        if max(image.size) > LARGEST_RATIO * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels are too narrow")
        return image
    except Exception as error:  # broken bytes make decoders raise almost anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RefusedError(
            f"{file} cannot be read as a picture ({printable(reason)}): give a file in one of the formats "
            f"{', '.join(FORMATS)}."
        ) from None


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
    parser.add_argument("student", type=Path, help="an .onnx or .pte file, or a folder (format=hub), from src.export")
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
                print(f"  {100 * probabilities[k]:6.2f} %  {student.label(k)}")
    except RefusedError as error:
        _print_error(error)
        return 1
    return int(failed)


def _print_error(error: RefusedError) -> None:
    print(f"error: {printable(str(error))}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
