"""Selects the main video stream of a container and decodes it to frames in display order.

Each frame has the stamp at which it is displayed. Interlaced frames are deinterlaced, and the alpha layer of VP8 and
VP9, which Matroska stores next to the frames, is decoded with them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import av
from av.container import InputContainer
from av.filter import Graph
from av.stream import Disposition
from av.video.stream import VideoStream

_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of VP8 and VP9 ignore the alpha layer


def main_stream(container: InputContainer, reopen: Callable[[], InputContainer]) -> VideoStream | None:
    """Returns the best video stream that is not an attached picture or of one frame; else the best of all, or None.

    Args:
        container: no packet of it is read.
        reopen: opens the same file again, to count packets where a container does not say how many frames it has.
    """
    streams = list(container.streams.video)
    main = [stream for stream in streams if not stream.disposition & Disposition.attached_pic and stream.frames != 1]
    if len(main) > 1 and any(stream.frames < 3 for stream in main):  # 0 is unknown; AVI counts the delay of B-frames
        with reopen() as same:
            several = _streams_with_several_packets(same)
        main = [stream for stream in main if stream.index in several] or main
    if len(main) > 1:  # the default stream, then the largest picture, then the first
        return max(main, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height, -s.index))
    return main[0] if main else streams[0] if streams else None


def _streams_with_several_packets(container: InputContainer) -> set[int]:
    """Returns the indices of the video streams with at least two packets before the end, or before a break."""
    counts = {stream.index: 0 for stream in container.streams.video}
    with suppress(av.FFmpegError):
        for packet in container.demux(*container.streams.video):
            counts[packet.stream.index] += bool(packet.size)
            if min(counts.values()) > 1:
                break
    return {index for index, count in counts.items() if count > 1}


def alpha_decoder(stream: VideoStream) -> str | None:
    """Returns the name of the decoder for a stream whose container says that it has an alpha layer, or None."""
    has_alpha = any(name.lower() == "alpha_mode" and value == "1" for name, value in stream.metadata.items())
    return _WITH_ALPHA.get(stream.codec_context.name) if has_alpha else None


def has_display_stamps(container: InputContainer) -> bool:
    """Returns False for AVI, which stores the order of decoding only; FFmpeg guesses the stamps of its B-frames."""
    return container.format.name != "avi"


def decoded_frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Yields all frames of a stream in display order."""
    decoder = alpha_decoder(stream)
    if decoder is not None:
        return _decoded_by(decoder, container, stream)
    return container.decode(stream) if has_display_stamps(container) else _stamped_in_order(container, stream)


def _decoded_by(decoder: str, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    codec = av.CodecContext.create(decoder, "r")
    codec.thread_count = 1
    for packet in container.demux(stream):
        yield from codec.decode(packet if packet.size else None)  # type: ignore[attr-defined]


def _stamped_in_order(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Stamps the i-th displayed frame with the i-th decoding stamp: a container without B-frames would store it."""
    stamps: deque[int] = deque()
    for packet in container.demux(stream):
        if packet.size and packet.dts is not None:
            stamps.append(packet.dts)
        for frame in packet.decode():
            if stamps:
                frame.pts, frame.time_base = stamps.popleft(), stream.time_base
            yield frame


def deinterlaced(frames: Iterable[av.VideoFrame]) -> Iterator[tuple[av.VideoFrame, bool]]:
    """Yields frames, each with whether it was deinterlaced: `bwdif`, from the first interlaced frame on."""
    deinterlacer: _Deinterlacer | None = None
    for frame in frames:
        if deinterlacer is not None and not deinterlacer.fits(frame):
            yield from deinterlacer.push(None)
            deinterlacer = None
        if deinterlacer is None and frame.interlaced_frame:
            deinterlacer = _Deinterlacer(frame)
        if deinterlacer is None:
            yield frame, False
        else:
            yield from deinterlacer.push(frame)
    if deinterlacer is not None:
        yield from deinterlacer.push(None)


class _Deinterlacer:
    """A filter graph for frames of one size and format; it needs the following frame and is one frame late."""

    def __init__(self, frame: av.VideoFrame) -> None:
        self._shape = (frame.width, frame.height, frame.format.name)
        self._waiting: deque[bool] = deque()
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        bwdif = self._graph.add("bwdif", "mode=send_frame:deint=interlaced")
        self._graph.link_nodes(source, bwdif, self._graph.add("buffersink")).configure()

    def fits(self, frame: av.VideoFrame) -> bool:
        return self._shape == (frame.width, frame.height, frame.format.name)

    def push(self, frame: av.VideoFrame | None) -> Iterator[tuple[av.VideoFrame, bool]]:
        if frame is not None:
            self._waiting.append(bool(frame.interlaced_frame))
        self._graph.vpush(frame)
        try:
            while True:
                yield self._graph.vpull(), self._waiting.popleft() if self._waiting else False
        except (av.BlockingIOError, av.EOFError):
            return
