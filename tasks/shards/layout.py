"""The format of a data set: its file names, and the records in its JSON files."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tasks.records import Failure, count_by_reason, digest
from tasks.shards.fields import SUFFIXES, encode_field
from tasks.shards.identity import is_row_id, key_id
from tasks.shards.split import row_key
from tasks.video.frame_sizes import FrameSize

SCHEMA_VERSION = 3  # of a manifest and of an index
FRAME_SIZES_VERSION = 4  # of those of a recipe with frame sizes, which versions before would read as squares
# 2: shards next to the manifest, known by ranges of rows; the command upgrade adds the rest.
READABLE = (2, SCHEMA_VERSION, FRAME_SIZES_VERSION)
SAMPLE_VERSION = 2  # of a sample's fields, which are part of a recipe
MANIFEST = "manifest.json"
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Sample:
    """One window or the track of one clip, as stored; the docstring of `tasks.shards` gives the shapes."""

    key: str
    caption: str
    latents: np.ndarray
    first: np.ndarray
    tokens: np.ndarray
    meta: dict[str, Any]
    pixels: np.ndarray | None = None
    logvar: np.ndarray | None = None
    text: np.ndarray | None = None
    frame_size: FrameSize | None = None  # of a recipe with frame sizes

    def pack(self) -> PackedSample:
        values = {name: getattr(self, name) for name in SUFFIXES}
        members = {name: encode_field(name, value) for name, value in values.items() if value is not None}
        return PackedSample(self.key, members, self.frame_size)


@dataclass(frozen=True)
class PackedSample:
    """A sample as the bytes of its members, by field: what a rebuilt shard copies from the old one."""

    key: str
    members: dict[str, bytes]
    frame_size: FrameSize | None = None


@dataclass(frozen=True)
class Entry:
    """The place of one sample in its tar: {field: [offset, size]} in bytes."""

    key: str
    members: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class ShardManifest:
    """The index of one shard. Every row is accounted for: `stop - start == encoded + len(failures)`."""

    shard: str  # name of the tar
    start: int  # number of its first row; prepare numbers the rows of each shard from 0
    stop: int  # exclusive
    recipe_hash: str
    encoded: int  # rows that gave at least one sample
    samples: list[Entry]
    failures: list[Failure]
    sha256: str
    size_bytes: int
    schema_version: int = SCHEMA_VERSION
    made_with: dict[str, str] = field(default_factory=dict)  # library versions, for the record
    row_ids: list[str] = field(default_factory=list)  # `tasks.shards.identity`, one per row; empty in schema 2
    frame_sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height), one per sample, or none

    def summary(self) -> ShardSummary:
        return ShardSummary(
            shard=self.shard,
            start=self.start,
            stop=self.stop,
            recipe_hash=self.recipe_hash,
            encoded=self.encoded,
            samples=len(self.samples),
            failed=count_by_reason(self.failures),
            size_bytes=self.size_bytes,
            sha256=self.sha256,
            frame_sizes=count_frame_sizes(self.frame_sizes),
        )

    def named(self, label: int | str) -> ShardManifest:
        """Returns a copy with the name that its label and its content determine."""
        content = self.content() | {"shard": ""}
        if not self.row_ids:
            del content["row_ids"]  # as before they existed
        return dataclasses.replace(self, shard=f"{shard_name(label)}-{digest(content)}.tar")

    def content(self) -> dict[str, Any]:
        """Returns the record as JSON; without frame sizes it is what it was before they existed."""
        content = dataclasses.asdict(self)
        if not self.frame_sizes:
            del content["frame_sizes"]
        return content

    def size_of_samples(self) -> dict[str, FrameSize]:
        """Returns the frame size of each sample by its key; empty if the recipe has none."""
        if not self.frame_sizes:
            return {}
        return {entry.key: FrameSize(*sides) for entry, sides in zip(self.samples, self.frame_sizes, strict=True)}

    def identities(self) -> list[str]:
        """Returns the identity of each row in order; of a shard without them what the keys tell."""
        if self.row_ids:
            return self.row_ids
        keys = {row: row_key_of(entries[0].key) for row, entries in self.clips().items()}
        keys |= {failure.row: failure.key for failure in self.failures}
        return [key_id(keys[row]) for row in range(self.start, self.stop)]

    def clips(self) -> dict[int, list[Entry]]:
        """Returns the samples of each encoded row, by row. Raises ValueError if the counts do not add up."""
        failed = {failure.row for failure in self.failures}
        rows = [row for row in range(self.start, self.stop) if row not in failed]
        groups = [list(group) for _, group in itertools.groupby(self.samples, lambda entry: row_key_of(entry.key))]
        within = all(self.start <= row < self.stop for row in failed)
        within &= len(self.frame_sizes) in (0, len(self.samples))
        within &= len(self.row_ids) in (0, self.stop - self.start) and all(map(is_row_id, self.row_ids))
        if not (within and len(failed) == len(self.failures) and len(rows) == len(groups) == self.encoded):
            raise ValueError(
                f"rows {self.start} to {self.stop - 1} are not {self.encoded} encoded (samples of {len(groups)} clips)"
                f" and {len(self.failures)} failures of one row each"
            )
        return dict(zip(rows, groups, strict=True))


@dataclass(frozen=True)
class ShardSummary:
    """What the driver keeps of one shard: only counts, so that its memory does not grow with the clips."""

    shard: str
    start: int
    stop: int
    recipe_hash: str
    encoded: int
    samples: int
    failed: dict[str, int]
    size_bytes: int
    sha256: str
    frame_sizes: dict[str, int] = field(default_factory=dict)  # samples of each


@dataclass(frozen=True)
class PublishedShard:
    """The entry of one shard in the data set's manifest."""

    shard: str
    rows: tuple[int, int]
    samples: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetManifest:
    """The mark of completion. Every row of all shards is accounted for: `rows == encoded + sum(failed.values())`."""

    recipe: dict[str, Any]
    recipe_hash: str
    source: dict[str, Any]
    rows: int
    encoded: int
    samples: int
    failed: dict[str, int]
    shards: list[PublishedShard]
    schema_version: int = SCHEMA_VERSION
    forgotten_sha256: str | None = None  # of the takedowns that these shards follow
    index_sha256: str | None = None  # of the array file of all samples and rows; None in schema 2


def count_frame_sizes(sizes: Iterable[Sequence[int]]) -> dict[str, int]:
    """Returns the number of samples of each frame size."""
    return {str(FrameSize(*sides)): count for sides, count in sorted(Counter(map(tuple, sizes)).items())}


def shard_name(label: int | str) -> str:
    """Returns the name of a shard without the digest of its content: by number, or by the digest of its rows."""
    return f"shard-{label:05d}" if isinstance(label, int) else f"shard-{label}"


def shard_label(name: str) -> int | str | None:
    """Returns the label of a shard, as of `shard_name`, from the name of its tar; None for any other name."""
    match = re.fullmatch(r"shard-(?:(\d{5,15})|([0-9a-f]{16}))(-[0-9a-f]{16})?\.tar", name)
    return None if match is None else int(match[1]) if match[1] else match[2]


def rows_label(identities: Sequence[str]) -> str:
    """Returns the label of a shard of these rows: 16 hex digits."""
    return digest(list(identities))


def index_name(shard: str) -> str:
    """Returns the name of the index of a shard's tar."""
    return f"{shard.removesuffix('.tar')}.json"


def sample_key(clip_key: str, window: int) -> str:
    """Returns the key of a clip's window; a track is window 0.

    The key of a row must consist of 1 to 80 characters of `[A-Za-z0-9_-]`: webdataset ends a key at a dot, and a name
    in a tar has 100 characters at most, of which a shot takes four.
    """
    return f"{clip_key}_{window:03d}"


def clip_key_of(key: str) -> str:
    """Returns the key of the clip that a sample was cut from."""
    return key.rsplit("_", 1)[0]


def row_key_of(key: str) -> str:
    """Returns the key of the row that a sample was made from; several shots of a video have one row."""
    return row_key(clip_key_of(key))
