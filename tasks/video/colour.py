"""Colour of decoded frames: what the tags say, what is assumed without tags, and the conversion to BT.709.

Frames in BT.709, and SD with its similar primaries, are displayed as they are. Wide gamuts are converted to BT.709; HDR
(PQ, HLG) is also tone-mapped by the EETF of ITU-R BT.2390-10, section 5.4, from the mastering peak to the reference
white of ITU-R BT.2408 (203 nits). FFmpeg's `zscale` and libplacebo are not in PyAV's wheels, and swscale needs seconds
for each conversion table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Colorspace

# FFmpeg's names, by their numbers in ITU-T H.273.
MATRICES = {0: "gbr", 1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "ycgco"}
MATRICES |= {9: "bt2020nc", 10: "bt2020c", 11: "smpte2085", 12: "chroma-derived-nc", 13: "chroma-derived-c"}
MATRICES |= {14: "ictcp", 15: "ipt-c2", 16: "ycgco-re", 17: "ycgco-ro"}
PRIMARIES = {1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "film", 9: "bt2020"}
PRIMARIES |= {10: "smpte428", 11: "smpte431", 12: "smpte432", 22: "ebu3213"}
TRANSFERS = {1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 7: "smpte240m", 8: "linear", 9: "log100"}
TRANSFERS |= {10: "log316", 11: "iec61966-2-4", 12: "bt1361e", 13: "iec61966-2-1", 14: "bt2020-10", 15: "bt2020-12"}
TRANSFERS |= {16: "smpte2084", 17: "smpte428", 18: "arib-std-b67"}

WHITE_NITS = 203.0  # reference white of HDR, which becomes 255
PEAK_NITS = 1000.0  # of the mastering display, where the file has no metadata
HD_LINES, HD_COLUMNS = 720, 1280
_HDR = ("smpte2084", "arib-std-b67")
# x, y of red, green, blue and white.
_D65 = (0.3127, 0.3290)
_CHROMATICITIES = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), _D65),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    "smpte431": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),  # DCI's white is shown as the display's
    "smpte432": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
}
_SWSCALE = {"smpte170m": Colorspace.ITU601, "bt709": Colorspace.ITU709, "bt2020nc": Colorspace.BT2020}
_UNSUPPORTED = tuple(name for number, name in MATRICES.items() if number in (8, *range(10, 18)))


class UnsupportedColourError(ValueError):
    """A colour matrix that cannot be converted to RGB."""


@dataclass(frozen=True)
class Colour:
    """FFmpeg's names of a frame's colour, tagged or assumed; `unknown` is displayed as BT.709."""

    matrix: str
    primaries: str
    transfer: str
    range: str  # full (0 to 255) or limited (16 to 235)
    assumed: tuple[str, ...] = ()  # the fields without a tag for which a value was assumed
    peak_nits: float | None = None  # of the mastering display; HDR only

    @property
    def conversion(self) -> str:
        """`tone-mapped` or `gamut`, or "" for a frame that is displayed as it is."""
        if self.transfer in _HDR:
            return "tone-mapped"
        return "gamut" if self.primaries in _CHROMATICITIES and self.primaries != "bt709" else ""

    @property
    def source_matrix(self) -> Colorspace | None:
        """The matrix to give to the scaler; None for the frame's own."""
        return _SWSCALE.get(self.matrix) if "matrix" in self.assumed else None

    def record(self) -> dict[str, Any]:
        """Returns the entries of a sample's meta."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("range", "matrix", "primaries", "transfer")}
        optional = {"assumed": list(self.assumed), "colour_conversion": self.conversion, "peak_nits": self.peak_nits}
        return values | {name: value for name, value in optional.items() if value}


def colour_of(frame: av.VideoFrame) -> Colour:
    """Returns the colour of a frame by its tags.

    Without a matrix, frames from 720 lines or 1280 columns on are BT.709, as in players; smaller ones are BT.601.

    Raises:
        UnsupportedColourError: the matrix has no conversion to RGB here.
    """
    matrix = MATRICES.get(int(frame.colorspace), "unknown")
    primaries = PRIMARIES.get(int(frame.color_primaries), "unknown")
    transfer = TRANSFERS.get(int(frame.color_trc), "unknown")
    name, assumed = frame.format.name, []
    if frame.format.is_rgb or name.startswith(("gray", "mono", "pal")):
        matrix = "gbr" if frame.format.is_rgb else "gray"
    elif matrix in _UNSUPPORTED:
        raise UnsupportedColourError(f"the colour matrix {matrix} cannot be converted to RGB")
    if transfer in _HDR and primaries == "unknown":
        primaries = "bt2020"
        assumed.append("primaries")
    if matrix in ("unknown", "gbr") and not frame.format.is_rgb:
        wide = transfer in _HDR or primaries == "bt2020"
        large = frame.height >= HD_LINES or frame.width >= HD_COLUMNS
        matrix = "bt2020nc" if wide else "bt709" if large else "smpte170m"
        assumed.append("matrix")
    has_range = name.startswith("yuvj") or frame.color_range in (ColorRange.MPEG, ColorRange.JPEG)
    if not has_range and not frame.format.is_rgb:
        assumed.append("range")
    return Colour(
        matrix,
        primaries,
        transfer,
        "full" if has_full_range(frame) else "limited",
        tuple(assumed),
        _mastering_peak(frame) if transfer in _HDR else None,
    )


def has_full_range(frame: av.VideoFrame) -> bool:
    """Returns True for full range (0 to 255), False for limited range (16 to 235)."""
    name = frame.format.name
    if name.startswith("yuvj") or frame.format.is_rgb:
        return True
    if frame.color_range in (ColorRange.MPEG, ColorRange.JPEG):
        return frame.color_range == ColorRange.JPEG
    return name.startswith(("gray", "ya", "mono", "pal"))


def to_bt709(signal: np.ndarray, colour: Colour) -> np.ndarray:
    """Converts RGB in the primaries and the transfer of `colour` to BT.709.

    Args:
        signal: floats [H, W, 3], 0 to 1.
        colour: of the frame.
    Returns:
        uint8 [H, W, 3].
    """
    light = _linear(np.asarray(signal, np.float64), colour)  # 1 is white
    light = np.clip(light @ _to_bt709_primaries(colour.primaries).T, 0, 1)
    if colour.transfer == "iec61966-2-1":  # a curve of SDR stays as it is, as without a conversion
        return np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)).astype(
            np.uint8
        )
    return np.rint(255 * light ** (1 / 2.4)).astype(np.uint8)  # BT.1886, as displays show BT.709


def _linear(signal: np.ndarray, colour: Colour) -> np.ndarray:
    """Returns the linear light of the display, 1 for white; HDR is tone-mapped by its largest component."""
    if colour.transfer not in _HDR:
        if colour.transfer == "linear":
            return signal
        if colour.transfer == "iec61966-2-1":
            return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
        return signal**2.4
    peak = colour.peak_nits or PEAK_NITS
    nits = _pq_to_nits(signal) if colour.transfer == "smpte2084" else _hlg_to_nits(signal, peak)
    largest = np.maximum(nits.max(axis=-1, keepdims=True), 1e-6)
    return nits * (_eetf(largest, peak) / largest / WHITE_NITS)


def _eetf(nits: np.ndarray, peak: float) -> np.ndarray:
    """Maps 0..peak to 0..WHITE_NITS (BT.2390-10, section 5.4.1, black level 0); the identity below the knee."""
    source = _nits_to_pq(np.array(max(peak, WHITE_NITS)))
    e1 = np.minimum(_nits_to_pq(nits) / source, 1)
    target = float(_nits_to_pq(np.array(WHITE_NITS)) / source)
    knee = 1.5 * target - 0.5
    if knee >= 1:
        return np.minimum(nits, WHITE_NITS)
    t = (e1 - knee) / (1 - knee)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * target
    return _pq_to_nits(np.where(e1 < knee, e1, curve) * source)


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128  # SMPTE ST 2084


def _pq_to_nits(signal: np.ndarray) -> np.ndarray:
    power = np.clip(signal, 0, 1) ** (1 / _M2)
    return 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def _nits_to_pq(nits: np.ndarray) -> np.ndarray:
    power = (np.clip(nits, 0, 10_000) / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def _hlg_to_nits(signal: np.ndarray, peak: float) -> np.ndarray:
    """Inverse OETF and OOTF of ARIB STD-B67 (ITU-R BT.2100) on a display of `peak` nits."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = np.maximum(scene @ np.array([0.2627, 0.6780, 0.0593]), 1e-9)[..., None]
    return peak * luminance ** (0.2 + 0.42 * np.log10(peak / 1000)) * scene


def _to_bt709_primaries(primaries: str) -> np.ndarray:
    if primaries not in _CHROMATICITIES:
        return np.eye(3)
    return np.linalg.inv(_to_xyz("bt709")) @ _to_xyz(primaries)


def _to_xyz(primaries: str) -> np.ndarray:
    *corners, white = [np.array([x / y, 1, (1 - x - y) / y]) for x, y in _CHROMATICITIES[primaries]]
    columns = np.stack(corners, axis=1)
    return columns * np.linalg.solve(columns, white)


def _mastering_peak(frame: av.VideoFrame) -> float:
    """Returns the peak of the mastering display in nits, `PEAK_NITS` without valid metadata."""
    side_data: Any = frame.side_data  # its type stub allows only string keys
    try:
        values = np.frombuffer(side_data[Type.MASTERING_DISPLAY_METADATA], np.int32)  # AVMasteringDisplayMetadata
        peak = float(values[18] / values[19]) if values[21] and values[19] else PEAK_NITS
    except (KeyError, IndexError, ValueError):
        return PEAK_NITS
    return peak if WHITE_NITS <= peak <= 10_000 else PEAK_NITS
