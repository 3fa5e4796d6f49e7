"""Decodes the frames of a time grid and their reference frames, and skips the others (Section 4.1).

The presentation stamps of the packets determine the displayed frames before any frame is decoded. H.264 marks frames
that no other frame references; the decoder skips those of them that no grid point displays. The result is bitwise equal
to a full decode.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
from av.container import InputContainer
from av.video.stream import VideoStream

_PROGRESSIVE = (0, 1)  # AVFieldOrder: unknown, progressive


class SelectiveDecodeError(ValueError):
    """The packets do not describe the decoder's output; the file needs a full decode."""


def can_skip_frames(stream: VideoStream) -> bool:
    """Returns True if unreferenced frames can be skipped. In interlaced streams only one of two fields can be one."""
    codec = stream.codec_context
    return codec.name == "h264" and codec.field_order in _PROGRESSIVE


def selected_frames(
    container: InputContainer, stream: VideoStream, wanted: int, step: float, start: float
) -> Iterator[av.VideoFrame]:
    """Yields the frames displayed at `start + k * step` seconds, up to the frame after the last grid point.

    Also yields the first frame, and the last one where the file ends within the grid: it gives the duration.

    Args:
        container: an open video file, at its start.
        stream: its video stream.
        wanted: number of grid points.
        step: seconds between them.
        start: seconds from the first frame to point 0.
    Raises:
        SelectiveDecodeError: at any frame; discard the frames yielded before it.
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
        decoded = packet.pts if packet.dts is None else packet.dts  # Matroska has none for the first packets
        if packet.is_corrupt or packet.is_discard or packet.pts < decoded:
            raise SelectiveDecodeError("a packet is corrupt, marked as discarded, or displayed before it is decoded")
        if packet.dts is not None and (decoded - stamps[0]) * float(base) > start + wanted * step:
            break
    known = set(stamps)
    if not stamps or len(known) < len(stamps) or (packets[-1].size and packets[-1].pts is None):
        raise SelectiveDecodeError("some packets have no presentation stamp or the same one")
    if min(known) < stamps[0] or not packets[0].is_keyframe:
        raise SelectiveDecodeError("the stream starts with frames that reference missing frames")
    needed = _displayed(sorted(known), base, wanted, step, start)
    due = sorted(needed, reverse=True)
    before = stamps[0] - 1
    for packet in itertools.chain(packets, container.demux(stream)):
        codec.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
        for frame in packet.decode():
            if frame.pts not in known or not before < frame.pts <= due[-1]:
                raise SelectiveDecodeError(f"the decoder returned the frame stamped {frame.pts}, expected {due[-1]}")
            if frame.is_corrupt or frame.interlaced_frame:
                raise SelectiveDecodeError(f"the frame stamped {frame.pts} is corrupt or interlaced")
            before = frame.pts
            yield frame
            if frame.pts == due[-1]:
                due.pop()
            if not due:
                return
    raise SelectiveDecodeError(f"the decoder returned {len(due)} fewer frames than expected")


def _displayed(stamps: list[int], base: Fraction, wanted: int, step: float, start: float) -> set[int]:
    """Returns, of ascending stamps, the first, those displayed at grid points, and the following one or the last."""
    needed, point = {stamps[0]}, 0
    # The same sums and comparisons as in the reader, so that both agree to the last bit.
    first, *later = (float(stamp) * base.numerator / base.denominator for stamp in stamps)
    for shown, following, time in zip(stamps, stamps[1:], later, strict=False):
        while point < wanted and point * step < time - first - start - 1e-6:
            needed.add(shown)
            point += 1
        if point == wanted:
            return needed | {following}
    return needed | {stamps[-1]}


def frames_of_spans(
    container: InputContainer, stream: VideoStream, starts: Sequence[float], ends: Sequence[float]
) -> tuple[Iterator[av.VideoFrame], float, float]:
    """Returns the frames stamped within spans, in order, the stamp of the first frame of the video, and its duration.

    Between the spans nothing is decoded: each stretch begins at the last key frame at or before its first frame.

    Args:
        container: the open video.
        stream: its video stream.
        starts: of the spans, in seconds since the first frame.
        ends: likewise, exclusive.
    Raises:
        SelectiveDecodeError: the packets have no stamps, or do not describe what the decoder returns; while the frames
            are read, it discards those before it.
        av.FFmpegError: the file is damaged.
    """
    base = stream.time_base
    packets = [packet for packet in container.demux(stream) if packet.size]
    stamps = [packet.pts for packet in packets if packet.pts is not None]
    if base is None or not packets or len(set(stamps)) < len(packets) or not packets[0].is_keyframe:
        raise SelectiveDecodeError("some packets have no presentation stamp or the same one")
    if (
        any(packet.dts is None or packet.is_corrupt or packet.is_discard for packet in packets)
        or min(stamps) < stamps[0]
    ):
        raise SelectiveDecodeError("a packet is corrupt, marked as discarded or has no decoding stamp")
    seconds = [float(stamp - min(stamps)) * base.numerator / base.denominator for stamp in stamps]
    decoded = [float((packet.dts or 0) - min(stamps)) * base.numerator / base.denominator for packet in packets]
    keys = [place for place, packet in enumerate(packets) if packet.is_keyframe]
    needed: set[int] = set()
    for start, end in zip(starts, ends, strict=True):
        first = min((time for time in seconds if time >= start), default=0.0)
        before = max((place for place in keys if seconds[place] <= first), default=0)
        after = next((place for place in range(before, len(packets)) if decoded[place] >= end), len(packets))
        needed |= set(range(before, after))

    def frames() -> Iterator[av.VideoFrame]:
        codec, wanted = stream.codec_context, iter(sorted(needed))
        for _, stretch in itertools.groupby(enumerate(wanted), lambda item: item[1] - item[0]):
            places = [place for _, place in stretch]
            due = sorted(stamps[place] for place in places if stamps[place] >= stamps[places[0]])
            codec.flush_buffers()
            flush = [None]  # an empty packet gives the frames that the decoder still holds
            for packet in itertools.chain((packets[place] for place in places), flush):
                for frame in codec.decode(packet):
                    if frame.pts is not None and frame.pts < stamps[places[0]]:
                        continue  # shown before the key frame, and made of frames before it
                    if not due or frame.pts != due[0] or frame.is_corrupt or frame.interlaced_frame:
                        raise SelectiveDecodeError(f"the decoder returned the frame stamped {frame.pts}")
                    due.pop(0)
                    frame.time_base = base  # PyAV gives none to the frames of a flush, and they would have no time
                    yield frame
            if due:
                raise SelectiveDecodeError(f"the decoder returned {len(due)} fewer frames than expected")

    step = max(seconds) / max(1, len(seconds) - 1)
    rate = float(stream.average_rate or 0)
    return frames(), min(stamps) * base.numerator / base.denominator, max(seconds) + (1.0 / rate if rate > 0 else step)
