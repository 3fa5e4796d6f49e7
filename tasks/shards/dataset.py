"""Random access to the samples of a data set, one by one or in batches. Nothing is unpickled."""

from __future__ import annotations

import functools
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra import storage
from tasks.records import UserError, to_json
from tasks.shards.fields import BY_FRAME, NPY_HEAD_BYTES, Layout, decode_field, npy_layout
from tasks.shards.layout import MANIFEST, clip_key_of
from tasks.shards.places import named
from tasks.shards.reading import read_manifest, read_parts, shards_folder
from tasks.shards.sample_index import SampleIndex, mapped, open_index, written_index
from tasks.shards.takedowns import read_takedowns, takedowns_sha256
from tasks.shards.tar_reader import Tars
from tasks.video.frame_sizes import FrameSize


@dataclass(frozen=True)
class _Reads:
    """The reads of one field of several samples: from where, and into which memory."""

    layout: Layout
    counts: list[int]  # frames of each sample
    starts: list[int]
    shards: list[int]
    offsets: list[int]
    heads: np.ndarray  # uint8 [B, header]
    values: np.ndarray
    buffers: list[list[memoryview]]  # views of heads and values

    def damage(self, filled: Sequence[bool]) -> dict[int, str]:
        """Returns the damage by position in the batch, after the buffers were filled, or could not be."""
        damage = dict.fromkeys(_not_finite(self.values), "values that are not finite")
        for b, start in enumerate(self.starts):
            if not filled[b]:
                damage[b] = "truncated"
            elif start == 0 and not _matches_layout(self.heads[b].tobytes(), self.counts[b], self.layout):
                damage[b] = "another header"
        return damage


class ShardDataset:
    """Random access to a published data set, by range reads at the recorded offsets.

    The index is mapped into memory, so opening a data set reads none of its samples and none of its shards. For a data
    set of schema 2 the index of every shard is read instead; the command `upgrade` writes it once.

    Raises:
        UserError: the manifest or the index is missing, damaged or of another schema, or clips are being removed.
    """

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)
        self.published, self.manifest_sha256 = read_manifest(self.uri)
        if self.published.forgotten_sha256 != takedowns_sha256(read_takedowns(self.uri)):
            if named(self.uri) != self.uri:
                raise UserError(f"clips were removed from {uri} on request; take the newest version, {named(self.uri)}")
            raise UserError(f"a removal of clips from {uri} is not complete; repeat the command forget")
        self._ends = np.cumsum([shard.samples for shard in self.published.shards], dtype=np.int64)
        pool = shards_folder(self.uri, self.published)
        self._tars = Tars([storage.join(pool, shard.shard) for shard in self.published.shards])
        self._layouts: dict[tuple[str, FrameSize | None], Layout] = {}

    @functools.cached_property
    def index(self) -> SampleIndex:
        """The arrays of all samples and rows."""
        index = open_index(self.uri, self.published, self.manifest_sha256)
        if index is None:
            with written_index(read_parts(self.uri, self.published, self.manifest_sha256).values()) as (path, _):
                index = mapped(path)  # pages of a deleted file stay until the last reader is gone
        return index

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as a dict."""
        return to_json(self.published)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @functools.cached_property
    def keys(self) -> list[str]:
        """All sample keys in the order of the manifest, as a list; avoid it for millions of samples."""
        return self.index.keys(range(len(self)))

    def keys_of(self, samples: np.ndarray) -> tuple[str, ...]:
        """Returns the keys of samples, int64 [B]. Raises IndexError if there is no such sample."""
        self._check(samples)
        return tuple(self.index.keys(samples.tolist()))

    def clip_of(self, i: int) -> str:
        """Returns the key of the clip that sample i was cut from."""
        return clip_key_of(self.keys_of(np.array([i]))[0])

    def clip_hashes(self) -> np.ndarray:
        """Returns the hash of each sample's clip for the split, uint64 [N]."""
        return self.index.clip_hashes_N

    @functools.cached_property
    def frame_sizes(self) -> tuple[FrameSize | None, ...]:
        """The frame sizes of the samples, sorted; one None if all have the recipe's only size."""
        sizes_N2 = self.index.frame_sizes_N2
        if sizes_N2 is None:
            return (None,)
        return tuple(FrameSize(*divmod(code, 1 << 16)) for code in np.unique(_codes(sizes_N2)).tolist())

    def frame_size_places(self, samples: np.ndarray) -> np.ndarray:
        """Returns for each sample, int64 [B], the place of its frame size in `frame_sizes`, int64 [B]."""
        self._check(samples)
        sizes_N2 = self.index.frame_sizes_N2
        if sizes_N2 is None:
            return np.zeros(len(samples), np.int64)
        codes_B, places_B = _codes(sizes_N2[samples]), np.zeros(len(samples), np.int64)
        for place, size in enumerate(self.frame_sizes):
            places_B[codes_B == _codes(np.array([size]))] = place
        return places_B

    def frame_size_of(self, i: int) -> FrameSize | None:
        """Returns the frame size of sample i; None if all samples have the recipe's only size."""
        return self.frame_sizes[int(self.frame_size_places(np.array([i]))[0])]

    def fields(self, i: int) -> tuple[str, ...]:
        """Returns the fields of sample i; all samples have the same. Raises IndexError if there is no sample i."""
        self._check(np.array([i]))
        return self.index.fields

    def num_frames(self, i: int, field: str = "latents") -> int:
        """Returns the number of frames of sample i, from the size of a field that has frames. Raises as `read` does."""
        return int(self.frame_counts(np.array([i]), field)[0])

    def frame_counts(self, samples: np.ndarray, field: str = "latents") -> np.ndarray:
        """Returns the number of frames of each sample, int64 [B]. Raises as `read` does."""
        sizes_B, places_B = self._places(samples, field)[2], self.frame_size_places(samples)
        counts_B = np.zeros_like(sizes_B)
        for place in np.unique(places_B).tolist():
            layout, here_B = self._layout(field, self.frame_sizes[place]), places_B == place
            counts_B[here_B], rest = np.divmod(sizes_B[here_B] - layout.begin, max(layout.row_bytes, 1))
            if rest.any() or not layout.row_bytes:
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
            samples: positions of B samples in the data set, for a field that has frames of one frame size.
            field: name of the field.
            starts: the first frame of each sample, for a field that has frames; None is frame 0.
            count: number of frames from there on; None is all.
        Returns:
            (values [B, count, ...] as stored, {position in the batch: damage}). A sample is damaged if its bytes end
            early, its header does not match its size, or a value is not finite; its values are set to zero.
        Raises:
            As `read`, except for damage.
        """
        return self.stacks(samples, {field: (starts, count)})[field]

    def stacks(
        self, samples: np.ndarray, windows: Mapping[str, tuple[Sequence[int] | None, int | None]]
    ) -> dict[str, tuple[np.ndarray, dict[int, str]]]:
        """Returns `stack` of several fields, by name, given (starts, count) of each.

        All fields are read at once; from an object store what lies close together is one request.
        """
        reads = {name: self._planned(samples, name, *window) for name, window in windows.items()}
        filled = self._fill(
            [shard for read in reads.values() for shard in read.shards],
            [offset for read in reads.values() for offset in read.offsets],
            [buffers for read in reads.values() for buffers in read.buffers],
        )
        results = {}
        for place, (name, read) in enumerate(reads.items()):
            results[name] = read.values, read.damage(filled[place * len(samples) : (place + 1) * len(samples)])
            for b in results[name][1]:
                read.values[b] = 0
        return results

    def _planned(self, samples: np.ndarray, field: str, starts: Sequence[int] | None, count: int | None) -> _Reads:
        size, *others = {self.frame_sizes[place] for place in np.unique(self.frame_size_places(samples)).tolist()}
        assert not others or field not in BY_FRAME, f"{field} of the frame sizes {size}, {others} in one array"
        layout, counts_B = self._layout(field, size), self.frame_counts(samples, field)
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
        return _Reads(
            layout, counts_B.tolist(), starts_B.tolist(), shards_B.tolist(), offsets_B.tolist(), heads, values, buffers
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "sha256": self.manifest_sha256}  # a loader's worker process reads the index again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uri"])
        if self.manifest_sha256 != state["sha256"]:
            raise self._changed(MANIFEST)

    def _check(self, samples: np.ndarray) -> None:
        outside = samples[(samples < 0) | (samples >= len(self))]
        if len(outside):
            raise IndexError(f"sample {outside[0]} of {len(self)}")

    def _places(self, samples: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns shard, offset and size of a field of each sample, int64 [B] each."""
        self._check(samples)
        index = self.index
        if name not in index.fields:
            raise KeyError(f"{name!r} is not among the fields of {self.uri}: {', '.join(index.fields)}")
        field = index.fields.index(name)
        shards_B = np.searchsorted(self._ends, samples, side="right")
        offsets_B = index.offsets_NF[samples, field].astype(np.int64) * tarfile.BLOCKSIZE
        return shards_B, offsets_B, index.sizes_NF[samples, field].astype(np.int64)

    def _layout(self, name: str, frame_size: FrameSize | None) -> Layout:
        """Returns the layout of a field, from the first sample of a frame size.

        These samples differ only in the number of frames, which follows from the size. So a window costs one range
        read.
        """
        if (name, frame_size) not in self._layouts:
            first = self._firsts[self.frame_sizes.index(frame_size)]
            (shard,), (offset,), (size,) = (values.tolist() for values in self._places(np.array([first]), name))
            try:
                self._layouts[name, frame_size] = npy_layout(self._bytes(shard, offset, min(size, NPY_HEAD_BYTES)))
            except ValueError as error:
                key = self.index.keys([first])[0]
                raise UserError(f"sample {key} of {self.uri} is damaged ({error}); verify the data set") from error
        return self._layouts[name, frame_size]

    @functools.cached_property
    def _firsts(self) -> list[int]:
        """The first sample of each frame size."""
        sizes_N2 = self.index.frame_sizes_N2
        if sizes_N2 is None:
            return [0]
        codes_N = _codes(sizes_N2)
        return [int(np.argmax(codes_N == _codes(np.array([size])))) for size in self.frame_sizes if size]

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


def _codes(sizes_N2: np.ndarray) -> np.ndarray:
    """Returns width x 65536 + height of each frame size: uint32 [N]."""
    return (sizes_N2[:, 0].astype(np.uint32) << 16) + sizes_N2[:, 1]


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
