"""Random access to the samples of a data set, one by one or in batches. Nothing is unpickled."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from infra import storage
from tasks.records import UserError, to_json
from tasks.shards.fields import BY_FRAME, NPY_HEAD_BYTES, Layout, decode_field, npy_layout
from tasks.shards.layout import MANIFEST, clip_key_of
from tasks.shards.reading import read_manifest, read_shard_manifest
from tasks.shards.split import clip_hash
from tasks.shards.takedowns import read_takedowns, takedowns_sha256
from tasks.shards.tar_reader import Tars


class ShardDataset:
    """Random access to a published data set, by range reads at the recorded offsets.

    The index of a shard is read when one of its samples is first used, and kept as arrays of 16 bytes per field and
    sample.

    Raises:
        UserError: the manifest is missing or of another schema, or a removal of clips is not complete.
    """

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)
        self.published, self.manifest_sha256 = read_manifest(self.uri)
        if self.published.forgotten_sha256 != takedowns_sha256(read_takedowns(self.uri)):
            raise UserError(f"a removal of clips from {uri} is not complete; repeat the command forget")
        self._ends = np.cumsum([shard.samples for shard in self.published.shards], dtype=np.int64)
        self._tars = Tars([storage.join(self.uri, shard.shard) for shard in self.published.shards])
        self._indexed = np.zeros(len(self._ends), bool)
        # Pages that were never written take no memory: these arrays grow with the shards that are indexed.
        self._keys = np.empty(len(self), np.dtypes.StringDType())
        self._fields: tuple[str, ...] = ()
        self._places_NF2 = np.empty((len(self), 0, 2), np.int64)  # offset and size in the tar
        self._layouts: dict[str, Layout] = {}

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as a dict."""
        return to_json(self.published)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @functools.cached_property
    def keys(self) -> list[str]:
        """All sample keys in the order of the table, as a list; avoid it for millions of samples."""
        self._index(range(len(self._ends)))
        return self._keys.tolist()

    def keys_of(self, samples: np.ndarray) -> tuple[str, ...]:
        """Returns the keys of samples, int64 [B]. Raises IndexError if there is no such sample."""
        self._shards_of(samples)
        return tuple(self._keys[samples].tolist())

    def clip_of(self, i: int) -> str:
        """Returns the key of the clip that sample i was cut from."""
        return clip_key_of(self.keys_of(np.array([i]))[0])

    def clip_hashes(self) -> np.ndarray:
        """Returns the hash of each sample's clip for the split, uint64 [N]; reads every shard's index once."""
        self._index(range(len(self._ends)))
        return np.fromiter((clip_hash(clip_key_of(key)) for key in self._keys), np.uint64, len(self))

    def fields(self, i: int) -> tuple[str, ...]:
        """Returns the fields of sample i; all samples have the same. Raises IndexError if there is no sample i."""
        self._shards_of(np.array([i]))
        return self._fields

    def num_frames(self, i: int, field: str = "latents") -> int:
        """Returns the number of frames of sample i, from the size of a field that has frames. Raises as `read` does."""
        return int(self.frame_counts(np.array([i]), field)[0])

    def frame_counts(self, samples: np.ndarray, field: str = "latents") -> np.ndarray:
        """Returns the number of frames of each sample, int64 [B]. Raises as `read` does."""
        layout, sizes_B = self._layout(field), self._places(samples, field)[2]
        counts_B, rest_B = np.divmod(sizes_B - layout.begin, max(layout.row_bytes, 1))
        if rest_B.any() or not layout.row_bytes:
            raise UserError(f"{self.uri} has samples whose {field} have another shape; verify the data set")
        return counts_B

    def read(
        self, i: int, fields: Sequence[str] = ("latents", "caption"), frames: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """Returns the named fields of sample i, and always `key`: arrays, str for `caption`, dict for `meta`.

        Args:
            i: position of the sample in the data set.
            fields: names of the fields to read.
            frames: reads only frames start (inclusive) to stop of `latents`, `logvar` and `pixels`.
        Raises:
            IndexError: there is no sample i, or it lacks these frames. KeyError: the data set has no such field.
            UserError: the shard is damaged.
        """
        one = np.array([i])
        sample: dict[str, Any] = {"key": self.keys_of(one)[0]}
        for name in fields:
            if frames is not None and name in BY_FRAME:
                values, damage = self.stack(one, name, [frames[0]], frames[1] - frames[0])
                if damage:
                    raise UserError(f"{name} of {sample['key']} in {self.uri} is damaged ({damage[0]}); verify it")
                sample[name] = values[0]
                continue
            (shard,), (offset,), (size,) = (values.tolist() for values in self._places(one, name))
            sample[name] = decode_field(name, self._bytes(shard, offset, size))
        return sample

    def stack(
        self, samples: np.ndarray, field: str, starts: Sequence[int] | None = None, count: int | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Returns an array field of several samples as one array, read directly into its memory.

        Args:
            samples: positions of B samples in the data set.
            field: name of the field.
            starts: the first frame of each sample, for a field that has frames; None is frame 0.
            count: number of frames from there on; None is all.
        Returns:
            (values [B, count, ...] as stored, {position in the batch: damage}). A sample is damaged if its bytes end
            early, its header does not match its size, or a value is not finite; its values are set to zero.
        Raises:
            As `read`, except for damage.
        """
        layout, counts_B = self._layout(field), self.frame_counts(samples, field)
        count = layout.shape[0] if count is None else count
        starts_B = np.zeros_like(counts_B) if starts is None else np.asarray(starts)
        wrong = np.flatnonzero((starts_B < 0) | (count < 1) | (starts_B + count > counts_B))
        if len(wrong):
            start = starts_B[wrong[0]]
            raise IndexError(f"frames {start} to {start + count} of {counts_B[wrong[0]]}")
        shards_B, offsets_B, _ = self._places(samples, field)
        values = np.empty((len(samples), count, *layout.shape[1:]), layout.dtype)
        heads = np.zeros((len(samples), layout.begin), np.uint8)
        # A window at the start of a sample is read together with the header before it.
        rows = zip(heads, values, starts_B.tolist(), strict=True)
        buffers = [[head.data, value.data] if start == 0 else [value.data] for head, value, start in rows]
        offsets_B = offsets_B + np.where(starts_B > 0, layout.begin + starts_B * layout.row_bytes, 0)
        filled = self._fill(shards_B.tolist(), offsets_B.tolist(), buffers)
        damage = dict.fromkeys(_not_finite(values), "values that are not finite")
        for b, start in enumerate(starts_B.tolist()):
            if not filled[b]:
                damage[b] = "truncated"
            elif start == 0 and not _matches_layout(heads[b].tobytes(), int(counts_B[b]), layout):
                damage[b] = "another header"
        for b in damage:
            values[b] = 0
        return values, damage

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "sha256": self.manifest_sha256}  # a loader's worker process reads the index again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uri"])
        if self.manifest_sha256 != state["sha256"]:
            raise self._changed(MANIFEST)

    def _shards_of(self, samples: np.ndarray) -> np.ndarray:
        """Returns the shards of samples, int64 [B], and reads their indexes if needed."""
        outside = samples[(samples < 0) | (samples >= len(self))]
        if len(outside):
            raise IndexError(f"sample {outside[0]} of {len(self)}")
        shards_B = np.searchsorted(self._ends, samples, side="right")
        if not self._indexed[shards_B].all():
            self._index(np.unique(shards_B).tolist())
        return shards_B

    def _places(self, samples: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns shard, offset and size of a field of each sample, int64 [B] each."""
        shards_B = self._shards_of(samples)
        if name not in self._fields:
            raise KeyError(f"{name!r} is not among the fields of {self.uri}: {', '.join(self._fields)}")
        places_B2 = self._places_NF2[samples, self._fields.index(name)]
        return shards_B, places_B2[:, 0], places_B2[:, 1]

    def _layout(self, name: str) -> Layout:
        """Returns the layout of a field, from the first sample.

        Samples differ only in the number of frames, which follows from the size. So a window costs one range read.
        """
        if name not in self._layouts:
            (shard,), (offset,), (size,) = (values.tolist() for values in self._places(np.array([0]), name))
            try:
                self._layouts[name] = npy_layout(self._bytes(shard, offset, min(size, NPY_HEAD_BYTES)))
            except ValueError as error:
                raise UserError(f"the first sample of {self.uri} is damaged ({error}); verify the data set") from error
        return self._layouts[name]

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        data = bytearray(size)
        if not self._fill([shard], [offset], [[memoryview(data)]])[0]:
            raise UserError(
                f"{self.published.shards[shard].shard} of {self.uri} is truncated; delete it and prepare the data again"
            )
        return bytes(data)

    def _fill(self, shards: list[int], offsets: list[int], buffers: list[list[memoryview]]) -> list[bool]:
        """Calls `Tars.fill`; a tar that does not exist anymore raises UserError."""
        try:
            return self._tars.fill(shards, offsets, buffers)
        except FileNotFoundError as error:
            raise self._changed(str(error)) from error

    def _changed(self, name: str) -> UserError:
        return UserError(f"{name} of {self.uri} was deleted or changed after the data set was opened; open it again")

    def _index(self, shards: Iterable[int]) -> None:
        """Reads the indexes of shards that were not read before."""
        missing = [shard for shard in shards if not self._indexed[shard] and self.published.shards[shard].samples]
        for first in missing[:1]:  # the first index defines the fields
            self._index_shard(first)
        for _ in self._tars.map(self._index_shard, missing[1:]):
            pass

    def _index_shard(self, shard: int) -> None:
        published = self.published.shards[shard]
        manifest = read_shard_manifest(self.uri, published.shard)
        if manifest is None and not storage.exists(storage.join(self.uri, published.shard)):
            raise self._changed(published.shard)
        fields = self._fields or (tuple(manifest.samples[0].members) if manifest and manifest.samples else ())
        if (
            manifest is None
            or manifest.sha256 != published.sha256
            or len(manifest.samples) != published.samples
            or any(tuple(entry.members) != fields for entry in manifest.samples)
        ):
            raise UserError(f"the index of {published.shard} in {self.uri} is missing or stale; prepare it again")
        if not self._fields:
            self._fields = fields
            self._places_NF2 = np.empty((len(self), len(fields), 2), np.int64)
        here = slice(int(self._ends[shard]) - published.samples, int(self._ends[shard]))
        self._keys[here] = [entry.key for entry in manifest.samples]
        self._places_NF2[here] = [list(entry.members.values()) for entry in manifest.samples]
        self._indexed[shard] = True


_cached_layout = functools.lru_cache(1024)(npy_layout)  # most headers are equal


def _matches_layout(head: bytes, rows: int, layout: Layout) -> bool:
    """Returns whether a header describes `layout` with `rows` rows."""
    try:
        parsed = _cached_layout(head)
    except ValueError:
        return False
    return (parsed.begin, parsed.dtype, parsed.shape) == (layout.begin, layout.dtype, (rows, *layout.shape[1:]))


def _not_finite(values: np.ndarray) -> list[int]:
    """Returns the rows of values [B, ...] that contain a number that is not finite."""
    rows = values.reshape(len(values), -1)
    if values.dtype != np.float16:
        return np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist()
    # By their bits, which is many times as fast: of all halves, those that are not finite have the largest exponent.
    bits = rows.view(np.uint16)
    return np.flatnonzero((bits.max(axis=1) >= 0xFC00) | (bits.view(np.int16).max(axis=1) >= 0x7C00)).tolist()
