"""Random access to the samples of a data set, one by one or a batch at a time. Nothing is ever unpickled."""

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
from tasks.shards.takedowns import forgotten_sha256, read_forgotten
from tasks.shards.tar_reader import Tars


class ShardDataset:
    """Random access to a published data set, by range reads at the recorded offsets.

    The index of a shard is read when one of its samples is asked for and kept as arrays, 16 bytes a field and sample.

    Raises:
        UserError: no manifest at the address, or one of another schema; a removal of clips that is not complete.
    """

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)
        self.published, self.manifest_sha256 = read_manifest(self.uri)
        if self.published.forgotten_sha256 != forgotten_sha256(read_forgotten(self.uri)):
            raise UserError(f"clips of {uri} were asked to be forgotten and are still there; repeat that command")
        self._ends = np.cumsum([shard.samples for shard in self.published.shards], dtype=np.int64)
        self._tars = Tars([storage.join(self.uri, shard.shard) for shard in self.published.shards])
        self._indexed = np.zeros(len(self._ends), bool)
        # Memory that nothing was written to yet costs nothing: these take their size with the shards that are indexed.
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
        """All sample keys in the order of the table, as a list: not for what goes with millions of samples."""
        self._index(range(len(self._ends)))
        return self._keys.tolist()

    def keys_of(self, samples: np.ndarray) -> tuple[str, ...]:
        """The keys of some samples. Raises IndexError: no such sample."""
        self._shards_of(samples)
        return tuple(self._keys[samples].tolist())

    def clip_of(self, i: int) -> str:
        """Key of the clip that sample i was cut from."""
        return clip_key_of(self.keys_of(np.array([i]))[0])

    def clip_hashes(self) -> np.ndarray:
        """The hash of each sample's clip, uint64 [N], which the split goes by; reads every shard's index once."""
        self._index(range(len(self._ends)))
        return np.fromiter((clip_hash(clip_key_of(key)) for key in self._keys), np.uint64, len(self))

    def fields(self, i: int) -> tuple[str, ...]:
        """The fields that sample i has; all samples of a data set have the same. Raises IndexError: no sample i."""
        self._shards_of(np.array([i]))
        return self._fields

    def num_frames(self, i: int, field: str = "latents") -> int:
        """How many frames sample i has, told by the size of a field that goes by frames. Raises as `read` does."""
        return int(self.frame_counts(np.array([i]), field)[0])

    def frame_counts(self, samples: np.ndarray, field: str = "latents") -> np.ndarray:
        """How many frames each of some samples has, int64 [B]. Raises as `read` does."""
        layout, sizes_B = self._layout(field), self._places(samples, field)[2]
        counts_B, rest_B = np.divmod(sizes_B - layout.begin, max(layout.row_bytes, 1))
        if rest_B.any() or not layout.row_bytes:
            raise UserError(f"{self.uri} holds samples whose {field} are of another shape; verify the data set")
        return counts_B

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
        """One array field of several samples as one array, each read from its tar right into its place.

        Args:
            starts, count: of a field that goes by frames, `count` frames from its start on of each sample.
        Returns:
            (values [B, count, ...] as stored, what is wrong with those that are damaged, by their place in the batch).
            A sample is damaged when its bytes end early, its header is not that of its size, or a value is not finite;
            its values are zeros.
        Raises:
            As `read`, but for damage.
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
        # A window that begins with the sample comes with the header before it, in the same read.
        rows = zip(heads, values, starts_B.tolist(), strict=True)
        buffers = [[head.data, value.data] if start == 0 else [value.data] for head, value, start in rows]
        offsets_B = offsets_B + np.where(starts_B > 0, layout.begin + starts_B * layout.row_bytes, 0)
        filled = self._fill(shards_B.tolist(), offsets_B.tolist(), buffers)
        damage = dict.fromkeys(_not_finite(values), "values that are not finite")
        for b, start in enumerate(starts_B.tolist()):
            if not filled[b]:
                damage[b] = "cut short"
            elif start == 0 and not _says(heads[b].tobytes(), int(counts_B[b]), layout):
                damage[b] = "another header"
        for b in damage:
            values[b] = 0
        return values, damage

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "sha256": self.manifest_sha256}  # a loader's worker process reads the index itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uri"])
        if self.manifest_sha256 != state["sha256"]:
            raise self._changed(MANIFEST)

    def _shards_of(self, samples: np.ndarray) -> np.ndarray:
        """The shards that samples lie in, int64 [B], their indexes being read."""
        outside = samples[(samples < 0) | (samples >= len(self))]
        if len(outside):
            raise IndexError(f"sample {outside[0]} of {len(self)}")
        shards_B = np.searchsorted(self._ends, samples, side="right")
        if not self._indexed[shards_B].all():
            self._index(np.unique(shards_B).tolist())
        return shards_B

    def _places(self, samples: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, offset and size of a field of each of some samples, int64 [B] each."""
        shards_B = self._shards_of(samples)
        if name not in self._fields:
            raise KeyError(f"{name!r} is not among the fields of {self.uri}: {', '.join(self._fields)}")
        places_B2 = self._places_NF2[samples, self._fields.index(name)]
        return shards_B, places_B2[:, 0], places_B2[:, 1]

    def _layout(self, name: str) -> Layout:
        """How a field lies in its member, told by the first sample.

        All are alike but for the number of frames, and that follows from the size. So a window costs one range read.
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
                f"{self.published.shards[shard].shard} of {self.uri} is cut short; delete it and prepare the data again"
            )
        return bytes(data)

    def _fill(self, shards: list[int], offsets: list[int], buffers: list[list[memoryview]]) -> list[bool]:
        """`Tars.fill`, with the sentence on a tar that is gone."""
        try:
            return self._tars.fill(shards, offsets, buffers)
        except FileNotFoundError as error:
            raise self._changed(str(error)) from error

    def _changed(self, name: str) -> UserError:
        return UserError(f"{name} of {self.uri} is gone or changed since the data set was opened; open it again")

    def _index(self, shards: Iterable[int]) -> None:
        """Reads the indexes of those of the shards whose index was not read before."""
        missing = [shard for shard in shards if not self._indexed[shard] and self.published.shards[shard].samples]
        for first in missing[:1]:  # the first of all tells the fields
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


_known_layout = functools.lru_cache(1024)(npy_layout)  # headers are alike


def _says(head: bytes, rows: int, layout: Layout) -> bool:
    """Whether a header says what `layout` does but for the number of rows, which is `rows`."""
    try:
        found = _known_layout(head)
    except ValueError:
        return False
    return (found.begin, found.dtype, found.shape) == (layout.begin, layout.dtype, (rows, *layout.shape[1:]))


def _not_finite(values: np.ndarray) -> list[int]:
    """Which of the rows [B, ...] hold a number that is not finite."""
    rows = values.reshape(len(values), -1)
    if values.dtype != np.float16:
        return np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist()
    # By their bits, many times as fast: the largest halves are those that are not finite, with sign and without.
    bits = rows.view(np.uint16)
    return np.flatnonzero((bits.max(axis=1) >= 0xFC00) | (bits.view(np.int16).max(axis=1) >= 0x7C00)).tolist()
