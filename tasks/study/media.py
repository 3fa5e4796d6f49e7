"""Clips of a study as mp4 files that differ only in their pictures: one size in bytes, one size of every frame.

Every coded frame is padded, by an SEI message that players ignore, to the largest frame at its place in the study. So
the tables of an mp4, its bit rate and its length are the same for all clips.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import av

# An unregistered SEI message needs an identity; this one is random and of no other use.
_SEI_UUID = bytes.fromhex("9f8b21d70c5e4a36b1d24e7f6a93c558")
_SEI, _UNREGISTERED, _END = 6, 5, 0x80
_LEAST = 4 + 1 + 1 + 1 + len(_SEI_UUID) + 1  # length, kind of unit, kind and size of the message, identity, last bit


def frame_sizes(video: bytes) -> list[int]:
    """The coded size of every frame of an mp4, in bytes."""
    with av.open(io.BytesIO(video), "r") as container:
        return [packet.size for packet in container.demux(video=0) if packet.size]


def common_sizes(sizes: Sequence[Sequence[int]]) -> list[int]:
    """The size to which frame i of every clip is padded. Raises ValueError for clips of different length."""
    return [max(column) + 3 * _LEAST for column in zip(*sizes, strict=True)]


def padded(video: bytes, sizes: Sequence[int]) -> bytes:
    """Returns an H.264 mp4 with frame i padded to `sizes[i]` bytes.

    Raises:
        ValueError: a frame that is too large for its size, or another number of frames.
    """
    sink = io.BytesIO()
    with (
        av.open(io.BytesIO(video), "r") as source,
        av.open(sink, "w", format="mp4", options={"fflags": "+bitexact"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for packet, size in zip(packets, sizes, strict=True):
            content = bytes(packet)
            longer = av.Packet(_padding(size - len(content)) + content)
            longer.pts, longer.dts, longer.duration = packet.pts, packet.dts, packet.duration
            longer.time_base, longer.is_keyframe, longer.stream = packet.time_base, packet.is_keyframe, stream
            target.mux(longer)
    return sink.getvalue()


def _padding(size: int) -> bytes:
    """SEI units of `size` bytes in all, lengths included, as an mp4 stores them."""
    if size < 2 * _LEAST:
        raise ValueError(f"padding of {size} bytes, expected at least {2 * _LEAST}")
    for payload in range(size - 8, size - 10 - size // 255, -1):
        unit = _unit(payload)
        if len(unit) == size:
            return unit
    # One size in about 256 is that of no unit: there the field of the size itself grows.
    return _unit(len(_SEI_UUID)) + _padding(size - _LEAST)


def _unit(payload: int) -> bytes:
    filler = b"\xff" * (payload - len(_SEI_UUID))
    message = bytes([_UNREGISTERED]) + b"\xff" * (payload // 255) + bytes([payload % 255]) + _SEI_UUID + filler
    body = bytes([_SEI]) + message + bytes([_END])
    return len(body).to_bytes(4, "big") + body
