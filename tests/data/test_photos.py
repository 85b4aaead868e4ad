"""Decoding, cropping and resizing, compared with torchvision."""

import warnings
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from src.common.errors import UserError
from src.data.photos import FORMATS, SUFFIXES, Photo, centre, crop_and_resize, reduction
from tests.helpers.photo_folders import encoded, files, picture, sixteen_bits


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", files(0))
def test_every_mode_becomes_rgb(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, reduced = Photo(files(0)[name], name).decode(1)
    number = sorted(files(0), key=lambda name: name.rpartition("/")[2]).index(name)
    expected = picture(number, *image.size)
    if name in ("b.JPEG", "h.png", "j.PNG"):
        expected = expected.convert("L").convert("RGB")
    if name == "f.png":
        expected = expected.quantize(16).convert("RGB")
    if name == "i.png":
        expected = expected.convert("1").convert("RGB")
    assert (image.mode, reduced) == ("RGB", 1)
    lossy = name not in ("e.png", "f.png", "g.png", "h.png", "i.png", "j.PNG", "l.bmp", "m.ppm", "nested/deep/n.tif")
    assert np.abs(pixels(image) - pixels(expected)).mean() <= (12 if lossy else 0)


def test_16_bit_images_are_scaled_and_not_clipped() -> None:
    image = picture(3, 20, 20)
    decoded, _ = Photo(encoded(sixteen_bits(image), "TIFF"), "x.tif").decode(1)
    assert np.array_equal(pixels(decoded), pixels(image.convert("L").convert("RGB")))


def stated(**tags: int) -> dict[str, TiffImagePlugin.ImageFileDirectory_v2]:
    """Make the option of Pillow that writes these tags into a TIFF file, by their names."""
    numbers = {"Photometric": 262, "Min": 280, "Max": 281, "SampleMax": 341}
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        directory[numbers[name]] = value
    return {"tiffinfo": directory}


GREY = np.array([[0, 1, 64], [127, 200, 255]], dtype=np.uint8)


@pytest.mark.parametrize(
    ("values", "kind", "options"),
    [
        ((GREY / 255).astype(np.float32), "TIFF", {}),
        ((GREY / 255).astype(np.float32), "PPM", {}),
        (GREY.astype(np.uint16) * 257, "TIFF", {}),
        (GREY.astype(np.uint16) * 257, "PNG", {}),
        (GREY.astype(np.uint16) * 257, "PPM", {}),
        (GREY.astype(np.int32) * 4, "TIFF", stated(Max=1020)),
        (GREY.astype(np.int32) * 4 + 100, "TIFF", stated(Min=100, Max=1120)),
        (GREY.astype(np.float32), "TIFF", stated(SampleMax=255)),
        (255 - GREY.astype(np.float32), "TIFF", stated(SampleMax=255, Photometric=0)),
    ],
    ids=["float TIFF", "PFM", "16-bit TIFF", "16-bit PNG", "16-bit PGM", "int32", "from 100", "stated", "inverted"],
)
def test_pictures_with_more_than_8_bits_are_scaled_by_the_range_of_their_values(
    values: np.ndarray, kind: str, options: dict[str, Any]
) -> None:
    photo = Photo(encoded(Image.fromarray(values), kind, **options), "x")
    assert photo.is_adjusted
    decoded, _ = photo.decode(1)
    assert np.array_equal(pixels(decoded), np.stack([GREY] * 3, axis=2))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_a_picture_whose_range_is_unknown_is_refused_by_name(kind: type) -> None:
    file = encoded(Image.fromarray(GREY.astype(kind) * 3), "TIFF")
    with pytest.raises(
        UserError, match=r"^some/x\.tif cannot be read as a photo \(the range of its values is unknown, .* 8 bits\): "
    ):
        Photo(file, "some/x.tif").decode(1)


def test_the_formats_are_those_of_pillow() -> None:
    registered = Image.registered_extensions()
    assert {s: name for name, suffixes in FORMATS.items() for s in suffixes} == {
        suffix: name for suffix, name in registered.items() if name in FORMATS
    }
    assert ".pgm" in SUFFIXES


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {} if kind in ("PNG", "TIFF") else {"quality": 100}
    file = encoded(picture(0, 40, 30), kind, exif=exif, **lossless)
    photo = Photo(file, "x")
    expected = ImageOps.exif_transpose(Image.open(BytesIO(file))).convert("RGB")
    assert (photo.width, photo.height) == expected.size == ((40, 30) if orientation < 5 else (30, 40))
    assert np.array_equal(pixels(photo.decode(1)[0]), pixels(expected))
    assert photo.is_adjusted == (orientation > 1 and kind != "TIFF")  # Pillow has always turned TIFF files


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_of_a_reduced_photo_is_turned_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Photo(encoded(picture(0, 160, 120), "JPEG", quality=95, exif=exif), "x")
    box = (24, 8, 81, 97)
    whole, reduced = (crop_and_resize(*photo.decode(factor), box, 12, flip=False) for factor in (1, 4))
    assert np.abs(pixels(whole) - pixels(reduced)).mean() < 4
    upright = ImageOps.exif_transpose(Image.open(BytesIO(photo.encoded))).convert("RGB")
    evaluated = v2.Compose([v2.Resize(20), v2.CenterCrop(16)])(upright)
    assert np.abs(pixels(centre(photo, 20, 16)) - pixels(evaluated)).mean() < 4


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning", "ignore:Truncated:UserWarning", "ignore:Tag:UserWarning")
@pytest.mark.parametrize(
    "tag", [b"", b"garbage", b"II*\0\x08\0\0\0\xff\xff", b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x05"]
)
def test_a_broken_orientation_is_ignored(tag: bytes) -> None:
    photo = Photo(encoded(picture(0, 40, 30), "JPEG", exif=b"Exif\0\0" + tag), "x.jpg")
    assert photo.decode(1)[0].size == (40, 30)


@given(pixels=st.integers(1, 5000), size=st.integers(1, 300))
def test_a_reduction_leaves_enough_pixels_and_not_twice_as_many(pixels: int, size: int) -> None:
    factor = reduction(pixels, size)
    assert factor == 1 or pixels >= factor * size
    assert factor == 8 or pixels < 2 * factor * size


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_decoder_reduces_a_jpeg(factor: int) -> None:
    image = picture(0, 161, 120)
    photo = Photo(encoded(image, "JPEG", quality=95), "x.jpg")
    for _ in range(2):  # the second time, the photo has to be opened again
        decoded, reduced = photo.decode(factor)
        assert reduced == factor
        assert decoded.size == (-(-161 // factor), -(-120 // factor))
    png, reduced_png = Photo(encoded(image, "PNG"), "x.png").decode(factor)
    assert reduced_png == 1
    assert np.array_equal(pixels(png), pixels(image))

    box = (24, 8, 101, 97)
    whole, _ = photo.decode(1)
    exact = crop_and_resize(whole, 1, box, 12, flip=True)
    assert np.abs(pixels(crop_and_resize(decoded, reduced, box, 12, flip=True)) - pixels(exact)).mean() < 4
    elsewhere = crop_and_resize(whole, 1, (24 + factor, 8, 101, 97), 12, flip=True)
    assert np.abs(pixels(elsewhere) - pixels(exact)).mean() > 4


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 40, 30), (3, 5, 20, 13), (39, 29, 1, 1), (10, 0, 7, 30)])
def test_a_view_equals_torchvisions(box: tuple[int, int, int, int], flip: bool) -> None:
    image = picture(0, 40, 30)
    left, top, width, height = box
    expected = tv.resized_crop(image, top, left, height, width, [16, 16])
    expected = tv.horizontal_flip(expected) if flip else expected
    assert np.array_equal(pixels(crop_and_resize(image, 1, box, 16, flip)), pixels(expected))


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 41), (20, 20), (39, 39), (17, 90), (200, 21), (5, 7)])
@pytest.mark.parametrize(("resize", "size"), [(20, 16), (20, 15), (16, 16)])
def test_evaluation_equals_torchvisions(width: int, height: int, resize: int, size: int) -> None:
    image = picture(1, width, height)
    expected = v2.Compose([v2.Resize(resize), v2.CenterCrop(size)])(image)
    assert np.array_equal(pixels(centre(Photo(encoded(image, "PNG"), "x.png"), resize, size)), pixels(expected))


@pytest.mark.parametrize(("width", "height"), [(161, 120), (83, 399)])
def test_evaluation_of_a_large_jpeg_is_close_to_torchvisions(width: int, height: int) -> None:
    file = encoded(picture(1, width, height), "JPEG", quality=95)
    whole, _ = Photo(file, "x.jpg").decode(1)
    expected = v2.Compose([v2.Resize(20), v2.CenterCrop(16)])(whole)
    assert np.abs(pixels(centre(Photo(file, "x.jpg"), 20, 16)) - pixels(expected)).mean() < 4


@pytest.mark.parametrize("kind", ["empty", "text", "cut short", "another kind"])
def test_a_file_that_is_not_a_photo_is_named(kind: str) -> None:
    whole = encoded(picture(0, 40, 30), "PNG")
    content = {
        "empty": b"",
        "text": b"not a photo",
        "cut short": whole[: len(whole) // 2],
        "another kind": encoded(picture(0, 40, 30), "GIF"),
    }[kind]
    with pytest.raises(UserError, match=r"^some/x\.png cannot be read as a photo \([^<]+\): repair or remove it\.$"):
        Photo(content, "some/x.png").decode(1)


def test_torch_and_numpy_read_the_same_pixels() -> None:
    image = picture(0, 16, 16)
    assert torch.equal(tv.pil_to_tensor(image).permute(1, 2, 0), torch.from_numpy(np.array(image)))


@pytest.mark.parametrize("is_wide", [True, False])
def test_evaluation_of_a_single_row_of_pixels_cuts_off_its_ends(is_wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.zeros((1, 20_001, 3), np.uint8)
    row[:, 9_999:10_002] = 255
    resized: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(image: Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        resized.append(size)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    photo = Photo(encoded(Image.fromarray(row if is_wide else row.transpose(1, 0, 2)), "PNG"), "x.png")
    centred = pixels(centre(photo, 20, 16))
    assert sorted(resized[0]) == [20, 20_000]
    assert centred.shape == (16, 16, 3)
    assert (centred == 255).all()
