"""The specs of a source and of the download, without the code that uses them."""

from __future__ import annotations

from dataclasses import dataclass, field

# The 2M and the 10M tables of WebVid order their columns differently, so columns are found by name.
WEBVID_COLUMNS = {"key": "videoid", "url": "contentUrl", "caption": "name"}


@dataclass(frozen=True)
class SourceSpec:
    """A table, an annotation or a folder of captioned videos.

    Relative URLs resolve against `base_url` if given, else against the table's folder. `base_url` is where the files
    are now (a mirror, a loopback port, a folder); it is not part of the identity of a data set.
    """

    table: str  # address of a file, of a folder of files or of videos, a glob, or several addresses with commas
    columns: dict[str, str] = field(default_factory=lambda: dict(WEBVID_COLUMNS))  # of a table; also `start` and `end`
    limit: int | None = None  # only the first rows
    base_url: str | None = None
    format: str = "auto"  # one of FORMATS; "auto" decides by the name, and by the content of a folder
    split: str | None = None  # MSR-VTT's own; for other formats "train", "validation" or "test", by a hash of the key
    held_out: float = 0.01  # share of the keys in "validation", and again in "test"
    captions: str | int = "first"  # of several per clip: "first", "all" (a row each), or a seed that draws one
    encoding: str | None = None  # of a text table; None is UTF-8, or UTF-16 with its byte order mark
    allow: tuple[
        str, ...
    ] = ()  # hosts (HOST or HOST:PORT) that may be private, and folders or buckets outside the root
    proxy: str | None = None  # address of an HTTP proxy that all requests go through
    sha256: str | None = None  # of its content, set by `opened`
    files: tuple[str, ...] | None = None  # the addresses of its files in order, set by `opened`
    entities: bool | None = None  # whether captions contain HTML entities, which are unescaped; set by `opened`


@dataclass(frozen=True)
class DownloadSpec:
    """Limits of the download. Bytes and seconds are per clip; the defaults suit one CDN and clips of 2 MB."""

    concurrency: int = 16  # concurrent requests of one worker
    per_host: int = 8  # concurrent requests to one host and port
    max_bytes: int = 200_000_000
    connect_seconds: float = 10.0
    read_seconds: float = 30.0  # longest wait for data
    total_seconds: float = 300.0  # one attempt
    min_bytes_per_second: float = 2_000.0
    rate_seconds: float = 15.0  # interval over which the rate is averaged
    attempts: int = 3
    backoff_seconds: float = 0.5  # doubled after each attempt, with full jitter
    max_backoff_seconds: float = 10.0  # also the upper bound for Retry-After
    respect_robots: bool = True  # skip files with X-Robots-Tag noai, noimageai, noindex, noimageindex or none
    allow_private: bool = False  # allow private, loopback and link-local addresses in the table
    contact: str = ""  # a page or mail address for server operators, part of the user agent
