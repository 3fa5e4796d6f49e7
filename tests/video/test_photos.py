"""Photos become sRGB by their ICC profile, and large metadata or a modern format is no obstacle."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, features

from trip_model.images import load_image
from trip_model.request_limits import RequestError, read_photo


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def display_p3() -> bytes:
    """An ICC profile of Display P3: sRGB's built-in profile with P3's primaries (adapted to D50) in its tags."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189)}
    primaries[b"bXYZ"] = (0.15710, 0.06657, 0.78407)
    (count,) = struct.unpack_from(">I", profile, 128)
    for entry in range(132, 132 + 12 * count, 12):
        name, offset, _ = struct.unpack_from(">4sII", profile, entry)
        if name in primaries:
            struct.pack_into(">3i", profile, offset + 8, *(round(65536 * value) for value in primaries[name]))
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "P3 d".encode("utf-16-be"))


GREEN, SHOWN = (90, 200, 90), (0, 204, 71)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_photo_in_display_p3_becomes_srgb(format: str) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    photo = saved(Image.new("RGB", (64, 64), GREEN), format, icc_profile=display_p3())
    assert np.abs(load_image(photo, 32).astype(int) - SHOWN).max() <= 6
    assert np.abs(load_image(Image.open(io.BytesIO(photo)), 32).astype(int) - SHOWN).max() <= 6


def test_a_profile_leaves_transparency_and_palettes_intact() -> None:
    half = Image.new("RGBA", (64, 64), (*GREEN, 255))
    half.paste((*GREEN, 0), (0, 0, 32, 64))
    square = load_image(saved(half, icc_profile=display_p3()), 32).astype(int)
    assert (square[16, 4] == 255).all() and np.abs(square[16, 28] - SHOWN).max() <= 2
    palette = Image.new("RGB", (64, 64), GREEN).quantize(2)
    square = load_image(saved(palette, icc_profile=display_p3()), 32).astype(int)
    assert np.abs(square[16, 16] - SHOWN).max() <= 3
    keyed = saved(Image.new("RGB", (64, 64), GREEN), icc_profile=display_p3(), transparency=GREEN)
    assert (load_image(keyed, 32) == 255).all()


@pytest.mark.parametrize("profile", [b"no profile", b"", display_p3()[:200]])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "LA"])
def test_a_profile_that_cannot_be_applied_is_ignored(mode: str, profile: bytes) -> None:
    image = Image.new("RGB", (64, 64), GREEN).convert(mode)
    image.info["icc_profile"] = profile
    plain = Image.new("RGB", (64, 64), GREEN).convert(mode)
    assert np.array_equal(load_image(image, 32), load_image(plain, 32))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_profile_of_another_colour_space_is_ignored(mode: str) -> None:
    image = Image.new("RGB", (64, 64), GREEN).convert(mode)
    plain = load_image(image, 32)
    image.info["icc_profile"] = display_p3()
    assert np.array_equal(load_image(image, 32), plain)


def test_an_srgb_profile_changes_no_bit() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = saved(Image.fromarray(picture), icc_profile=srgb)
    assert np.array_equal(load_image(photo, 64), picture)


def test_a_lab_image_becomes_srgb() -> None:
    lab = Image.fromarray(np.full((64, 64, 3), (128, 0, 0), np.uint8), "LAB")
    assert np.ptp(load_image(lab, 32)[16, 16]) <= 4


@pytest.mark.parametrize("zip", [True, False])
def test_a_png_is_read_without_its_large_text(zip: bool) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "steps " * 700_000, zip=zip)
    text.add_itxt("workflow", "nodes " * 700_000, zip=zip)
    photo = saved(Image.new("RGB", (64, 64), GREEN), pnginfo=text)
    if zip:
        with pytest.raises(ValueError, match="too large"):
            Image.open(io.BytesIO(photo)).load()
    assert (load_image(read_photo(photo), 32) == GREEN).all()


def test_requests_take_avif_and_name_the_formats() -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    photo = saved(Image.new("RGB", (64, 64), GREEN), "AVIF")
    assert np.abs(load_image(read_photo(photo), 32).astype(int) - GREEN).max() <= 4
    with pytest.raises(RequestError, match="GIF, BMP or AVIF photo"):
        read_photo(saved(Image.new("RGB", (64, 64)), "TIFF"))


def test_heic_photos_are_read_where_pillow_heif_is_installed() -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    photo = saved(Image.new("RGB", (64, 64), GREEN), "HEIF")
    assert np.abs(load_image(read_photo(photo), 32).astype(int) - GREEN).max() <= 4
