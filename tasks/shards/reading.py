"""Reads a data set: samples at random by range reads, whole shards row by row. Nothing is ever unpickled."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from infra import storage
from tasks.records import Failure, UserError, to_json
from tasks.shards.fields import BY_FRAME, NPY_HEAD_BYTES, Layout, decode_field, npy_layout
from tasks.shards.forgotten import forgotten_sha256, read_forgotten
from tasks.shards.layout import (
    MANIFEST,
    SCHEMA_VERSION,
    DatasetManifest,
    Entry,
    PackedSample,
    ShardManifest,
    clip_key_of,
    index_name,
    parse_record,
    shard_number,
)


def read_manifest(dataset: str) -> tuple[DatasetManifest, str]:
    """The manifest of a finished data set and its sha256.

    Raises:
        UserError: no manifest at the address, one that is damaged, or one of another schema.
    """
    address = storage.join(dataset, MANIFEST)
    try:
        content = storage.read_bytes(address)
        found = json.loads(content).get("schema_version")
    except FileNotFoundError as error:
        raise UserError(f"no finished data set at {dataset}: {MANIFEST} is missing; run the prepare stage") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{address} is not JSON; delete the file and run the prepare stage again") from error
    if found != SCHEMA_VERSION:
        raise UserError(f"{address} has schema {found!r}, expected {SCHEMA_VERSION}; prepare the data set anew")
    try:
        return parse_record(DatasetManifest, content), hashlib.sha256(content).hexdigest()
    except ValueError as error:
        raise UserError(f"{address} is damaged ({error}); delete the file and run the prepare stage again") from error


def read_shard_manifest(dataset: str, shard: str) -> ShardManifest | None:
    """The index of a shard (by the name of its tar), or None when there is none that can be trusted."""
    try:
        manifest = parse_record(ShardManifest, storage.read_bytes(storage.join(dataset, index_name(shard))))
        manifest.clips()
    except (FileNotFoundError, ValueError):
        return None
    return manifest if manifest.schema_version == SCHEMA_VERSION and manifest.shard == shard else None


def shards_held(dataset: str) -> dict[int, list[str]]:
    """Names of the tars that lie in a folder with their index, by number of the shard."""
    names = set(storage.list_dir(dataset))
    held: dict[int, list[str]] = {}
    for name in sorted(names):
        number = shard_number(name)
        if number is not None and index_name(name) in names:
            held.setdefault(number, []).append(name)
    return held


def stored_outcomes(dataset: str, manifest: ShardManifest) -> Iterator[list[PackedSample] | Failure]:
    """What each row of a shard came to, in order, samples as the bytes of their members.

    Raises:
        UserError: the tar is not the one that the index is of.
    """
    failures = {failure.row: failure for failure in manifest.failures}
    clips = manifest.clips()
    with storage.local_copy(storage.join(dataset, manifest.shard)) as path:
        # Bytes that are taken over get a new checksum, so the old one is looked at for the last time.
        if storage.sha256_file(path) != manifest.sha256:
            raise UserError(f"{manifest.shard} of {dataset} is damaged; delete it and prepare the data again")
        with path.open("rb") as file:
            for row in range(manifest.start, manifest.stop):
                if row in failures:
                    yield failures[row]
                    continue
                samples = []
                for entry in clips[row]:
                    members = {}
                    for name, (offset, size) in entry.members.items():
                        file.seek(offset)
                        members[name] = file.read(size)
                    samples.append(PackedSample(entry.key, members))
                yield samples


class ShardDataset:
    """Random access to a published data set, by range reads at the recorded offsets.

    Raises:
        UserError: no manifest at the address, or one of another schema; a removal of clips that is not complete.
    """

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)
        self.published, self.manifest_sha256 = read_manifest(self.uri)
        if self.published.forgotten_sha256 != forgotten_sha256(read_forgotten(self.uri)):
            raise UserError(f"clips of {uri} were asked to be forgotten and are still there; repeat that command")
        self._ends = np.cumsum([shard.samples for shard in self.published.shards], dtype=np.int64)
        self._loaded: dict[int, ShardManifest] = {}
        self._layouts: dict[str, Layout] = {}

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as a dict."""
        return to_json(self.published)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @functools.cached_property
    def keys(self) -> list[str]:
        """All sample keys in the order of the table; reads every shard's index once."""
        shards = range(len(self.published.shards))
        return [entry.key for shard in shards for entry in self._shard_manifest(shard).samples]

    def clip_of(self, i: int) -> str:
        """Key of the clip that sample i was cut from."""
        return clip_key_of(self.keys[i])

    def fields(self, i: int) -> tuple[str, ...]:
        """The fields that sample i has; all samples of a data set have the same. Raises IndexError: no sample i."""
        return tuple(self._find(i)[1].members)

    def num_frames(self, i: int, field: str = "latents") -> int:
        """How many frames sample i has, told by the size of a field that goes by frames. Raises as `read` does."""
        manifest, entry = self._find(i)
        return self._frames_of(manifest.shard, field, *self._place(entry, field))[1]

    def read(
        self, i: int, fields: Sequence[str] = ("latents", "caption"), frames: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """The named fields of sample i: arrays, str for `caption`, dict for `meta`; `key` comes along always.

        Args:
            frames: of `latents`, `logvar` and `pixels`, only frames start (inclusive) to stop are fetched.
        Raises:
            IndexError: no sample i, or not these frames. KeyError: the data set does not hold a field.
            UserError: the shard is damaged.
        """
        manifest, entry = self._find(i)
        shard = manifest.shard
        sample: dict[str, Any] = {"key": entry.key}
        for name in fields:
            offset, size = self._place(entry, name)
            if frames is None or name not in BY_FRAME:
                sample[name] = decode_field(name, self._bytes(shard, offset, size))
                continue
            (start, stop), (layout, count) = frames, self._frames_of(shard, name, offset, size)
            if not 0 <= start < stop <= count:
                raise IndexError(f"frames {start} to {stop} of {count}")
            begin, frame_bytes = offset + layout.begin, layout.row_bytes
            data = self._bytes(shard, begin + start * frame_bytes, (stop - start) * frame_bytes)
            sample[name] = np.frombuffer(data, layout.dtype).reshape(stop - start, *layout.shape[1:]).copy()
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "sha256": self.manifest_sha256}  # a loader's worker process reads the index itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uri"])
        if self.manifest_sha256 != state["sha256"]:
            raise self._changed(MANIFEST)

    def _find(self, i: int) -> tuple[ShardManifest, Entry]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        manifest = self._shard_manifest(shard)
        return manifest, manifest.samples[i - (int(self._ends[shard - 1]) if shard else 0)]

    def _place(self, entry: Entry, name: str) -> tuple[int, int]:
        """Offset and size of a field of a sample."""
        if name not in entry.members:
            raise KeyError(f"{name!r} is not among the fields of {self.uri}: {', '.join(entry.members)}")
        return entry.members[name]

    def _frames_of(self, shard: str, name: str, offset: int, size: int) -> tuple[Layout, int]:
        """How the frames of a field lie in its member, and how many there are.

        The first header that is read tells the layout of all: they are alike but for the number of frames, and that
        follows from the size. So a window costs one range read, not two.
        """
        if name not in self._layouts:
            try:
                self._layouts[name] = npy_layout(self._bytes(shard, offset, min(size, NPY_HEAD_BYTES)))
            except ValueError as error:
                raise UserError(f"{shard} of {self.uri} is damaged ({error}); verify the data set") from error
        layout = self._layouts[name]
        if layout.row_bytes == 0 or (size - layout.begin) % layout.row_bytes:
            raise UserError(f"{shard} of {self.uri} is damaged ({size} bytes of {name}); verify the data set")
        return layout, (size - layout.begin) // layout.row_bytes

    def _bytes(self, shard: str, offset: int, size: int) -> bytes:
        try:
            data = storage.read_range(storage.join(self.uri, shard), offset, offset + size)
        except FileNotFoundError as error:
            raise self._changed(shard) from error
        if len(data) != size:
            raise UserError(f"{shard} of {self.uri} is cut short; delete it and prepare the data again")
        return data

    def _changed(self, name: str) -> UserError:
        return UserError(f"{name} of {self.uri} is gone or changed since the data set was opened; open it again")

    def _shard_manifest(self, shard: int) -> ShardManifest:
        if shard not in self._loaded:
            published = self.published.shards[shard]
            manifest = read_shard_manifest(self.uri, published.shard)
            if manifest is None and not storage.exists(storage.join(self.uri, published.shard)):
                raise self._changed(published.shard)
            if manifest is None or manifest.sha256 != published.sha256:
                raise UserError(f"the index of {published.shard} in {self.uri} is missing or stale; prepare it again")
            self._loaded[shard] = manifest
        return self._loaded[shard]


def split_keys(clip_keys: Iterable[str], held_out_fraction: float) -> tuple[list[str], list[str]]:
    """Splits clips into (train, held out) by a hash of the key, so a clip keeps its side when others come or go.

    At least one clip lies on each side: where the threshold leaves a side empty, the clip with the smallest hash is
    held out, or the one with the largest is trained on.

    Raises:
        UserError: fewer than two clips, or a fraction outside 0 to 1.
    """
    if not 0 <= held_out_fraction <= 1:
        raise UserError(f"held_out_fraction {held_out_fraction}, expected a number from 0 to 1")
    keys = list(dict.fromkeys(clip_keys))
    if len(keys) < 2:
        raise UserError(f"{len(keys)} clips cannot be split into training and held-out ones; at least 2 are needed")
    place = {key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in keys}
    held_out = {key for key in keys if place[key] < held_out_fraction} or {min(keys, key=place.__getitem__)}
    if len(held_out) == len(keys):
        held_out.remove(max(keys, key=place.__getitem__))
    return [key for key in keys if key not in held_out], [key for key in keys if key in held_out]
