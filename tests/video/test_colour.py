"""HDR and wide gamuts become BT.709, HD without tags is read as BT.709, and the record says what was assumed."""

from __future__ import annotations

import hashlib
import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from tasks.video.colour import WHITE_NITS, Colour, UnsupportedColourError, _nits_to_pq, _pq_to_nits, colour_of, to_bt709
from tasks.video.decode import ClipError, read_clip
from tasks.video.frame import to_square
from trip_model.images import load_image, video_bytes

PATCHES = np.array([[220, 30, 30], [30, 200, 60], [40, 60, 210], [128, 128, 128]], np.uint8)
WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # red and blue of a matrix, by its number
HDR = Colour("bt2020nc", "bt2020", "smpte2084", "limited", peak_nits=1000.0)


def frame(signal: np.ndarray, matrix: int, primaries: int, transfer: int, tagged: bool = True) -> av.VideoFrame:
    """A frame yuv444p10 of RGB signals 0..1 [H, W, 3], limited range, with its colour as tags."""
    red, blue = WEIGHTS[matrix]
    luma = signal @ np.array([red, 1 - red - blue, blue])
    planes = [64 + 876 * luma]
    planes += [512 + 896 * (signal[..., c] - luma) / (2 * (1 - w)) for c, w in ((2, blue), (0, red))]
    made = av.VideoFrame(signal.shape[1], signal.shape[0], "yuv444p10le")
    for plane, values in zip(made.planes, planes, strict=True):
        padded = np.zeros((plane.height, plane.line_size // 2), "<u2")
        padded[:, : plane.width] = np.rint(values)
        plane.update(padded)
    if tagged:
        made.colorspace, made.color_primaries, made.color_trc = matrix, primaries, transfer
        made.color_range = ColorRange.MPEG
    return made


def flat(colour: np.ndarray, height: int = 32, width: int = 32) -> np.ndarray:
    return np.broadcast_to(colour, (height, width, 3)).astype(float)


def shown(made: av.VideoFrame) -> np.ndarray:
    return to_square(made, 32, 1.0, VideoReformatter())[16, 16]


def coded(frames: list[av.VideoFrame], container: str = "mp4", codec: str = "libx265") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        stream.options = {"crf": "4", "preset": "ultrafast", "x265-params": "log-level=none"}
        codec_context = stream.codec_context
        codec_context.colorspace, codec_context.color_trc = frames[0].colorspace, frames[0].color_trc
        codec_context.color_primaries, codec_context.color_range = frames[0].color_primaries, frames[0].color_range
        for k, made in enumerate(frames):
            made.pts, made.time_base = k, Fraction(1, 4)
            file.mux(stream.encode(made))
        file.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize(("matrix", "height", "width"), [(1, 720, 96), (1, 544, 1280), (6, 576, 96), (6, 480, 848)])
def test_frames_without_tags_are_bt709_in_hd_and_bt601_below(
    matrix: int, height: int, width: int, patch: np.ndarray
) -> None:
    made = frame(flat(patch / 255, height, width), matrix, 2, 2, tagged=False)
    assert np.abs(shown(made).astype(int) - patch).max() <= 2
    colour = colour_of(made)
    assert colour.matrix == {1: "bt709", 6: "smpte170m"}[matrix]
    assert colour.assumed == ("matrix", "range") and not colour.conversion


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize(("matrix", "height"), [(1, 64), (6, 720)])
def test_a_tag_is_stronger_than_the_size(matrix: int, height: int, patch: np.ndarray) -> None:
    made = frame(flat(patch / 255, height, 96), matrix, matrix, matrix)
    assert np.abs(shown(made).astype(int) - patch).max() <= 2 and colour_of(made).assumed == ()


@pytest.mark.parametrize(
    ("pixel_format", "matrix", "digest"),
    [("yuv420p", 2, "untagged"), ("yuv420p", 1, "bt709"), ("yuv420p10le", 1, "bt709"), ("yuv420p", 6, "bt601")],
)
def test_sd_without_tags_and_tagged_bt709_keep_their_bits(pixel_format: str, matrix: int, digest: str) -> None:
    picture = np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    made = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
    made.colorspace = made.color_primaries = made.color_trc = matrix
    plain = made.reformat(
        85, 64, "gbrp", None, None, Interpolation.BICUBIC, ColorRange.MPEG, ColorRange.JPEG, threads=1
    ).to_ndarray()[:, 10:74]
    square = to_square(made, 64, 1.0, VideoReformatter())
    assert hashlib.sha256(square).digest() == hashlib.sha256(np.ascontiguousarray(plain)).digest(), digest


LEVELS = [0.5, 5, 20, 60, 90, 150, 203, 400, 700, 1000, 4000]


def test_pq_is_tone_mapped_in_order_and_gray_stays_gray() -> None:
    values = [shown(frame(flat(_nits_to_pq(np.array([level] * 3))), 9, 9, 16)).astype(int) for level in LEVELS]
    luma = [int(value.mean()) for value in values]
    assert max(int(np.ptp(value)) for value in values) <= 1
    assert luma == sorted(luma) and len(set(luma[:9])) == 9 and luma[-2:] == [255, 255]
    # Below the knee levels are kept, relative to the reference white.
    for level, value in zip(LEVELS[:4], luma, strict=False):
        assert value == pytest.approx(255 * (level / WHITE_NITS) ** (1 / 2.4), abs=1.5)
    assert 200 < luma[LEVELS.index(203)] < 245
    assert _pq_to_nits(np.array(0.508078)) == pytest.approx(100, rel=1e-4)  # SMPTE ST 2084


def test_hlg_is_tone_mapped_in_order_and_its_reference_white_is_that_of_pq() -> None:
    signals = [0.1, 0.2, 0.35, 0.5, 0.6, 0.75, 0.85, 0.95, 1.0]
    luma = [int(shown(frame(flat(np.array([signal] * 3)), 9, 9, 18))[0]) for signal in signals]
    assert luma == sorted(luma) and len(set(luma)) >= 8 and luma[-1] == 255
    white = int(shown(frame(flat(_nits_to_pq(np.array([WHITE_NITS] * 3))), 9, 9, 16))[0])
    assert luma[signals.index(0.75)] == pytest.approx(white, abs=2)  # BT.2408: 75 % HLG is 203 nits


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_keeps_hues(transfer: str) -> None:
    for channel in range(3):
        signal = np.full((1, 1, 3), 0.3)
        signal[..., channel] = 0.6
        pixel = to_bt709(signal, Colour("bt2020nc", "bt2020", transfer, "limited"))[0, 0]
        assert pixel.argmax() == channel and int(pixel[channel]) - int(np.delete(pixel, channel).max()) > 60


def test_wide_gamut_video_is_the_photo_of_the_same_colours() -> None:
    # Display P3 (90, 200, 90) is sRGB (0, 204, 71): by the transfer of sRGB here as there.
    assert np.abs(shown(frame(flat(np.array([90, 200, 90]) / 255), 1, 12, 13)).astype(int) - [0, 204, 71]).max() <= 3
    gray = shown(frame(flat(np.array([0.5] * 3)), 9, 9, 14)).astype(int)
    assert np.abs(gray - 128).max() <= 1


def test_hdr_of_a_file_is_recorded_and_untagged_primaries_are_assumed() -> None:
    level = _nits_to_pq(np.array([60.0] * 3))
    clip = read_clip(coded([frame(flat(level, 64, 64), 9, 9, 16) for _ in range(4)]), 4, 4.0, 32)
    kept = {name: clip.info[name] for name in ("range", "matrix", "primaries", "transfer", "colour_conversion")}
    assert list(kept.values()) == ["limited", "bt2020nc", "bt2020", "smpte2084", "tone-mapped"]
    assert clip.info["peak_nits"] == 1000.0 and "assumed" not in clip.info
    assert np.abs(clip.pixels[0, 16, 16].astype(int) - 255 * (60 / 203) ** (1 / 2.4)).max() <= 3
    partly = frame(flat(level), 9, 2, 16)
    partly.colorspace = 2
    colour = colour_of(partly)
    assert (colour.matrix, colour.primaries, colour.assumed) == ("bt2020nc", "bt2020", ("primaries", "matrix"))


@pytest.mark.parametrize("matrix", [8, 11, 14])
def test_a_matrix_without_a_conversion_has_its_own_reason(matrix: int) -> None:
    made = frame(flat(np.array([0.5] * 3)), 1, 1, 1)
    made.colorspace = matrix
    with pytest.raises(UnsupportedColourError, match="cannot be converted to RGB"):
        colour_of(made)
    frames = [frame(flat(np.array([0.5] * 3), 64, 64), 1, 1, 1) for _ in range(4)]
    for one in frames:
        one.colorspace = matrix
    with pytest.raises(ClipError, match="unsupported_colour: the colour matrix"):
        read_clip(coded(frames, "matroska", "ffv1"), 4, 4.0, 32)


@pytest.mark.parametrize("number", [3, 200])
def test_a_reserved_number_is_no_tag(number: int) -> None:
    made = frame(flat(PATCHES[0] / 255, 64, 64), 6, 2, 2)
    made.colorspace = made.color_primaries = made.color_trc = number if number == 3 else 2
    assert np.abs(shown(made).astype(int) - PATCHES[0]).max() <= 2


@pytest.mark.parametrize("side", [64, 720])
def test_a_written_mp4_is_tagged_and_has_its_colours_in_every_size(side: int) -> None:
    picture = np.broadcast_to(PATCHES[:2].repeat(side // 2, axis=0)[None, :, None], (4, side, side, 3))
    data = video_bytes(np.ascontiguousarray(picture), 4.0)
    with av.open(io.BytesIO(data)) as container:
        first = next(container.decode(video=0))
    assert (first.colorspace, first.color_primaries, first.color_trc, first.color_range) == (1, 1, 1, 1)
    pixels = read_clip(data, 4, 4.0, 64).pixels[0]
    assert np.abs(pixels[[16, 48], 32].astype(int) - PATCHES[:2]).max() <= 4
    assert np.abs(load_image(pixels, 64).astype(int) - pixels).max() == 0
