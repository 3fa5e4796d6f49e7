"""What the service grants to connections, callers and videos; the command `serve` takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """What the service grants to connections, requests and callers.

    Args:
        connections: open at once. One more closes the oldest that has no request, or is closed itself.
        head_bytes: of the request line and headers of a request.
        head_seconds: from the connection, or the first byte of a later request, to the end of its headers.
        body_seconds: for the body of a request, in addition to the time that `body_rate` gives.
        body_rate: bytes per second that a sender must reach.
        body_memory: bytes of all bodies in memory, received and waiting for the model.
        requests_per_minute: of a caller that change something (POST, DELETE). A caller is a key, or without keys an
            address (IPv6: a network of 64 bits).
        burst: such requests that a caller may send at once.
        wrong_keys_per_minute: of an address; further ones are refused without a look at the key.
        step_frames: steps times frames of a clip.
    """

    connections: int = 1024
    head_bytes: int = 2**14
    head_seconds: float = 10
    body_seconds: float = 20
    body_rate: int = 2**14
    body_memory: int = 2**29
    requests_per_minute: int = 300
    burst: int = 100
    wrong_keys_per_minute: int = 10
    step_frames: int = 16_000


@dataclass(frozen=True)
class VideoLimits:
    """What the service grants to videos.

    Args:
        waiting: videos in the queue; further ones are refused with 429.
        kept: videos with a record, finished ones included; further ones are refused with 429.
        keep_seconds: from the end of a video until its record and its file are removed.
        parallel: videos in the model at once.
    """

    waiting: int = 100
    kept: int = 1000
    keep_seconds: float = 86_400
    parallel: int = 1


SERVER, VIDEOS = ServerLimits(), VideoLimits()  # the defaults
