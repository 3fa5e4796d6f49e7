"""The files of the rig's server: drawn clips in every supported form, and every kind of broken file, by seed."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np

from benchmarks.rig.crashing import MARK
from tasks.ingest.drawing import CLIP_SECONDS, SOURCE_FPS, draw_clip
from trip_model.images import video_bytes

_MILLISECOND = Fraction(1, 1000)
_PLAIN_MATRIX = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
_TURNED_MATRIX = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # upright phones write it


def make_file(kind: str, seed: int, size: int) -> bytes:
    """Returns a file of a kind below, a pure function of its arguments; `size` is the side of a frame in pixels."""
    match kind:
        case "clip":
            return video_bytes(draw_clip(seed, size)[0], SOURCE_FPS)
        case "gif":
            return video_bytes(draw_clip(seed, size, fps=5.0)[0], 5.0, "gif")
        case "long":
            return video_bytes(draw_clip(seed, size, fps=6.0, seconds=20.0)[0], 6.0)
        case "odd-fps":
            return video_bytes(draw_clip(seed, size, fps=24000 / 1001)[0], 24000 / 1001)
        case "vfr":
            steps = np.random.default_rng(seed).integers(20, 160, round(CLIP_SECONDS * SOURCE_FPS))
            return _muxed(draw_clip(seed, size)[0], 700 + np.cumsum(steps), "matroska")  # starts late as well
        case "rotated":
            head, track, rest = make_file("clip", seed, size).partition(b"tkhd")  # the matrix of the movie stays
            return head + track + rest.replace(_PLAIN_MATRIX, _TURNED_MATRIX, 1)
        case "one-frame":
            return video_bytes(draw_clip(seed, size, seconds=1 / SOURCE_FPS)[0], SOURCE_FPS)
        case "short":
            return video_bytes(draw_clip(seed, size, seconds=1.5)[0], SOURCE_FPS)
        case "no-index":  # the index of such an mp4 lies at its end
            whole = _muxed(draw_clip(seed, size)[0], np.arange(54) * 83, "mp4")
            return whole[: whole.rindex(b"moov") * 3 // 4]
        case "cut-data":  # the index is complete, the frames are not
            whole = make_file("clip", seed, size)
            return whole[: len(whole) * 4 // 5]
        case "noise":
            head = struct.pack(">I4s", 24, b"ftyp") + b"isom\0\0\2\0isomiso2"
            return head + np.random.default_rng(seed).bytes(20_000)
        case "audio":
            return _tone(seed)
        case "crash":  # a video like any other, but for a box that `benchmarks.rig.crashing` looks for
            return make_file("clip", seed, size) + struct.pack(">I4s", 8 + len(MARK), b"free") + MARK
        case "slow":
            return _slow()
        case "bomb":
            return _bomb()
        case "zip":
            return b"PK\x03\x04" + np.random.default_rng(seed).bytes(5_000)
        case "picture":
            return b"\xff\xd8\xff\xe0\0\x10JFIF\0" + np.random.default_rng(seed).bytes(5_000)
        case "playlist":
            return b"#EXTM3U\n#EXTINF:4.0,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
        case "empty":
            return b""
    raise ValueError(f"no file of kind {kind!r}")


def _muxed(pixels: np.ndarray, stamps: np.ndarray, container: str) -> bytes:
    """Frames uint8 [F, S, S, 3], each shown from its stamp in milliseconds on."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = pixels.shape[2], pixels.shape[1], "yuv420p"
        stream.options = {"crf": "16", "preset": "veryfast", "bf": "0"}
        stream.time_base = stream.codec_context.time_base = _MILLISECOND
        for picture, stamp in zip(pixels, stamps.tolist(), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, _MILLISECOND
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def _tone(seed: int) -> bytes:
    """Returns an mp4 with only audio."""
    buffer = io.BytesIO()
    rate, pitch = 44_100, 220 + seed % 440
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=rate)
        for begin in range(0, 4 * rate, 1024):
            wave = np.sin(2 * np.pi * pitch * np.arange(begin, begin + 1024) / rate).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def _slow(side: int = 4096, frames: int = 2000, seconds: float = 4.5) -> bytes:
    """A valid mp4 of few megabytes that keeps a decoder busy for half a minute: one large key frame, 2,000 times."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=round(frames / seconds))
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "40", "bf": "0", "rc-lookahead": "0", "threads": "1"}
        black = av.VideoFrame.from_ndarray(np.zeros((side * 3 // 2, side), np.uint8), format="yuv420p")
        [packet] = [*stream.encode(black), *stream.encode()]
        for number in range(frames):
            packet.time_base = Fraction(1, round(frames / seconds))
            packet.pts = packet.dts = number
            file.mux(packet)
    return buffer.getvalue()


def _bomb(side: int = 16_000, frames: int = 20) -> bytes:
    """A GIF of a few hundred bytes whose frames take a gigabyte each; FFmpeg takes none that is much larger."""
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    control = b"\x21\xf9\x04\x04" + struct.pack("<H", 25) + b"\0\0"
    dot = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return head + (control + dot) * frames + b";"
