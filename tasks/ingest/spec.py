"""How a source is named and read, and how its videos are downloaded: the specs, without the code that runs them."""

from __future__ import annotations

from dataclasses import dataclass, field

# The 2M and the 10M tables of WebVid order their columns differently, so columns go by name.
WEBVID_COLUMNS = {"key": "videoid", "url": "contentUrl", "caption": "name"}


@dataclass(frozen=True)
class SourceSpec:
    """A table, an annotation or a folder of captioned videos.

    Relative URLs resolve against `base_url` where given, else against the table's own folder. `base_url` says where the
    same files are found today (a mirror, a loopback port, a folder); it is no part of what the data set is.
    """

    table: str  # address of a file, or of a folder of videos
    columns: dict[str, str] = field(default_factory=lambda: dict(WEBVID_COLUMNS))  # of a CSV, Parquet or JSON lines
    limit: int | None = None  # the first rows only
    base_url: str | None = None
    format: str = "auto"  # one of FORMATS; "auto" goes by the name, and by what a folder holds
    split: str | None = None  # MSR-VTT's own; of any other format "train", "validation" or "test", by hash of the key
    held_out: float = 0.01  # share of the keys in "validation", and again in "test"
    captions: str | int = "first"  # of MSR-VTT's 20 a clip: "first", "all" (a row each), or one drawn by this seed
    sha256: str | None = None  # of its content, once `opened` has read it


@dataclass(frozen=True)
class DownloadSpec:
    """How politely and how long to try. Bytes and seconds are per clip; the defaults suit one CDN and 2 MB clips."""

    concurrency: int = 16  # requests at once, of one worker
    per_host: int = 8  # of these, to one host and port
    max_bytes: int = 200_000_000
    connect_seconds: float = 10.0
    read_seconds: float = 30.0  # longest silence while reading
    total_seconds: float = 300.0  # one attempt
    min_bytes_per_second: float = 2_000.0
    rate_seconds: float = 15.0  # what the least rate is an average of
    attempts: int = 3
    backoff_seconds: float = 0.5  # doubled each time, with full jitter
    max_backoff_seconds: float = 10.0  # also caps what Retry-After may ask for
    heed_robots: bool = True  # leave what X-Robots-Tag keeps out: noai, noimageai, noindex, noimageindex, none
    allow_private: bool = False  # let the table name private, loopback and link-local addresses
    contact: str = ""  # a page or an address for the operators of the servers, told in the user agent
