"""Decodes what a time grid shows and what that refers to, and leaves out the rest (Section 4.1).

The stamps of the packets say which frames will be on show before any is decoded. H.264 marks frames to which no other
refers; of these the decoder passes over those that no grid point shows. What it gives is bit for bit what it gives of a
file decoded whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction

import av
from av.container import InputContainer
from av.video.stream import VideoStream

_PROGRESSIVE = (0, 1)  # AVFieldOrder: not said, progressive


class OddFileError(ValueError):
    """What the packets say of this file is not what comes out of the decoder: every frame has to be decoded."""


def can_spare(stream: VideoStream) -> bool:
    """Whether the coding lets frames be passed over one by one. Of two fields the second may be one that can, alone."""
    codec = stream.codec_context
    return codec.name == "h264" and codec.field_order in _PROGRESSIVE


def needed_frames(
    container: InputContainer, stream: VideoStream, wanted: int, step: float, start: float
) -> Iterator[av.VideoFrame]:
    """Frames up to the one after the last grid point, all among them that are on show at `start + k * step` seconds.

    The first frame comes too, and the last one where the file ends within the grid, for it says how long the file is.

    Args:
        wanted: grid points. step: seconds from one to the next. start: seconds from the first frame to the first point.
    Raises:
        OddFileError: before the first frame or after some; what was chosen from those before is not to be used.
        av.FFmpegError: the file is damaged.
    """
    codec, base = stream.codec_context, stream.time_base
    assert base is not None
    packets: list[av.Packet] = []
    stamps: list[int] = []
    for packet in container.demux(stream):
        packets.append(packet)
        if packet.pts is None:
            break  # the empty packet at the end, or a file without stamps
        stamps.append(packet.pts)
        decoded = packet.pts if packet.dts is None else packet.dts  # Matroska does not know it of the first ones
        if packet.is_corrupt or packet.is_discard or packet.pts < decoded:
            raise OddFileError("a packet is broken, not to be shown, or to be shown before it is decoded")
        if packet.dts is not None and (decoded - stamps[0]) * float(base) > start + wanted * step:
            break
    known = set(stamps)
    if not stamps or len(known) < len(stamps) or (packets[-1].size and packets[-1].pts is None):
        raise OddFileError("not every packet has a presentation stamp of its own")
    if min(known) < stamps[0] or not packets[0].is_keyframe:
        raise OddFileError("the file begins amid pictures that refer to what is not there")
    needed = _on_show(sorted(known), base, wanted, step, start)
    due = sorted(needed, reverse=True)
    before = stamps[0] - 1
    for packet in itertools.chain(packets, container.demux(stream)):
        codec.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
        for frame in packet.decode():
            if frame.pts not in known or not before < frame.pts <= due[-1]:
                raise OddFileError(f"a frame came with the stamp {frame.pts}, expected was {due[-1]}")
            if frame.is_corrupt or frame.interlaced_frame:
                raise OddFileError(f"the frame stamped {frame.pts} is mended, or made of two fields")
            before = frame.pts
            yield frame
            if frame.pts == due[-1]:
                due.pop()
            if not due:
                return
    raise OddFileError(f"{len(due)} frames did not come")


def _on_show(stamps: list[int], base: Fraction, wanted: int, step: float, start: float) -> set[int]:
    """Of the stamps, which ascend: the first, those on show at grid points, and the next one or the last."""
    needed, point = {stamps[0]}, 0
    # The sums and comparisons by which the reader chooses, to the last bit.
    first, *later = (float(stamp) * base.numerator / base.denominator for stamp in stamps)
    for shown, following, time in zip(stamps, stamps[1:], later, strict=False):
        while point < wanted and point * step < time - first - start - 1e-6:
            needed.add(shown)
            point += 1
        if point == wanted:
            return needed | {following}
    return needed | {stamps[-1]}
