"""The index of a data set: one array file next to the manifest that finds every sample and every row.

`index-<digest>.npz` is an uncompressed zip of `.npy` arrays, named after its sha256. Arrays begin at multiples of 64
bytes, so that a reader maps them into memory and reads only the pages it uses; `numpy.load` reads the file as well. For
N samples of F fields and R rows, in the order of the manifest's shards:

    fields       text [F]       names of the fields
    offsets      uint32 [N, F]  of each field in its tar, in blocks of 512 bytes
    sizes        uint32 [N, F]  in bytes
    clip_hashes  uint64 [N]     of each sample's clip, for the split
    key_ends     uint64 [N]     where each sample's key ends in `keys`
    keys         uint8 [K]      the keys of all samples, without separators
    rows         uint64 [R, 3]  the identity of each row, two words, and the hash of its caption
    outcomes     uint16 [R]     0 for an encoded row, else 1 + the position of its reason in `reasons`
    reasons      text           all reasons of failures, sorted
    frame_sizes  uint16 [N, 2]  width and height of each sample's frames; only of a recipe with frame sizes
"""

from __future__ import annotations

import io
import itertools
import re
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from infra import storage
from tasks.records import UserError
from tasks.shards.identity import as_array
from tasks.shards.layout import DatasetManifest, PublishedShard, ShardManifest, clip_key_of, count_frame_sizes
from tasks.shards.places import version_of
from tasks.shards.split import clip_hash

_ALIGNED = 64  # bytes, as `.npy` headers
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20
_SHAPES = {"offsets": "F", "sizes": "F", "clip_hashes": "", "key_ends": "", "keys": "", "rows": "3", "outcomes": ""}
_SHAPES |= {"frame_sizes": "2"}
_DTYPES = {"offsets": "<u4", "sizes": "<u4", "keys": "|u1", "outcomes": "<u2", "frame_sizes": "<u2"}  # others are <u8


def index_file(index_sha256: str) -> str:
    """Returns the name of an index file."""
    return f"index-{index_sha256[:16]}.npz"


def is_index_file(name: str) -> bool:
    return re.fullmatch(r"index-[0-9a-f]{16}\.npz", name) is not None


@dataclass(frozen=True)
class SampleIndex:
    """The arrays of a data set's index or of a part of it; the docstring of this module gives their shapes."""

    fields: tuple[str, ...]
    offsets_NF: np.ndarray
    sizes_NF: np.ndarray
    clip_hashes_N: np.ndarray
    key_ends_N: np.ndarray
    keys_K: np.ndarray
    rows_R3: np.ndarray
    outcomes_R: np.ndarray
    reasons: tuple[str, ...]
    frame_sizes_N2: np.ndarray | None = None

    def count_frame_sizes(self) -> dict[str, int]:
        """Returns the number of samples of each frame size; empty if the recipe has none."""
        return {} if self.frame_sizes_N2 is None else count_frame_sizes(self.frame_sizes_N2.tolist())

    def keys(self, samples: Iterable[int]) -> list[str]:
        """Returns the keys of samples by their positions."""
        ends, text = self.key_ends_N, self.keys_K
        return [text[int(ends[i - 1]) if i else 0 : int(ends[i])].tobytes().decode() for i in samples]

    def part(self, samples: slice, rows: slice) -> SampleIndex:
        """Returns the index of consecutive samples and rows."""
        begin = int(self.key_ends_N[samples.start - 1]) if samples.start else 0
        ends = self.key_ends_N[samples]
        return SampleIndex(
            self.fields,
            self.offsets_NF[samples],
            self.sizes_NF[samples],
            self.clip_hashes_N[samples],
            ends - np.uint64(begin),
            self.keys_K[begin : int(ends[-1]) if len(ends) else begin],
            self.rows_R3[rows],
            self.outcomes_R[rows],
            self.reasons,
            None if self.frame_sizes_N2 is None else self.frame_sizes_N2[samples],
        )


def index_of_shard(index: ShardManifest) -> SampleIndex:
    """Returns the arrays of one shard from its own index. Raises ValueError if they do not fit the format."""
    fields = tuple(sorted(index.samples[0].members)) if index.samples else ()
    if any(tuple(sorted(entry.members)) != fields for entry in index.samples):
        raise ValueError("samples of different fields")
    places = [[entry.members[name] for name in fields] for entry in index.samples]
    places_NF2 = np.array(places, np.int64).reshape(len(places), len(fields), 2)
    blocks_NF, rest_NF = np.divmod(places_NF2[..., 0], tarfile.BLOCKSIZE)
    if rest_NF.any() or (places_NF2 < 0).any() or (blocks_NF >= 1 << 32).any() or (places_NF2[..., 1] >= 1 << 32).any():
        raise ValueError("an offset or a size that no tar has")
    keys = [entry.key.encode() for entry in index.samples]
    reasons = tuple(sorted({failure.reason for failure in index.failures}))
    outcomes = np.zeros(index.stop - index.start, np.uint16)
    for failure in index.failures:
        outcomes[failure.row - index.start] = 1 + reasons.index(failure.reason)
    return SampleIndex(
        fields,
        blocks_NF.astype(np.uint32),
        places_NF2[..., 1].astype(np.uint32),
        np.fromiter((clip_hash(clip_key_of(entry.key)) for entry in index.samples), np.uint64, len(keys)),
        np.cumsum([len(key) for key in keys], dtype=np.uint64),
        np.frombuffer(b"".join(keys), np.uint8),
        as_array(index.identities()),
        outcomes,
        reasons,
        np.array(index.frame_sizes, np.uint16) if index.frame_sizes else None,
    )


@contextmanager
def written_index(parts: Iterable[SampleIndex]) -> Iterator[tuple[Path, str]]:
    """Yields the index of shards in order as a local file with its sha256; equal shards give equal bytes.

    Parts are consumed one by one and kept in temporary files, so memory does not grow with the samples.

    Raises:
        UserError: shards with samples of different fields.
    """
    with ExitStack() as stack:
        spools = {name: stack.enter_context(tempfile.TemporaryFile()) for name in _SHAPES}
        counts, keys_end, fields = dict.fromkeys(_SHAPES, 0), 0, ()
        reasons: dict[str, int] = {}
        for part in parts:
            if len(part.clip_hashes_N):
                if fields and part.fields != fields:
                    raise UserError(
                        f"shards with the fields {', '.join(fields)} and {', '.join(part.fields)} cannot be one data"
                        " set; prepare the data again"
                    )
                fields = part.fields
            counted = np.bincount(part.outcomes_R, minlength=len(part.reasons) + 1)
            numbers = [0] * len(counted)
            for number, reason in enumerate(part.reasons, 1):
                if counted[number]:  # a part of an index has reasons of other parts as well
                    numbers[number] = reasons.setdefault(reason, len(reasons) + 1)
            values = {
                "offsets": part.offsets_NF,
                "sizes": part.sizes_NF,
                "clip_hashes": part.clip_hashes_N,
                "key_ends": part.key_ends_N + np.uint64(keys_end),
                "keys": part.keys_K,
                "rows": part.rows_R3,
                "outcomes": np.array(numbers, np.uint16)[part.outcomes_R],
            }
            if part.frame_sizes_N2 is not None:
                values["frame_sizes"] = part.frame_sizes_N2
            keys_end += len(part.keys_K)
            for name, array in values.items():
                counts[name] += len(array)
                spools[name].write(np.ascontiguousarray(array, _DTYPES.get(name, "<u8")).data)
        if counts["frame_sizes"] not in (0, counts["clip_hashes"]):
            raise UserError("shards with and without frame sizes cannot be one data set; prepare the data again")
        # Reasons in the order of their names, whichever shard has them first.
        ordered = sorted(reasons)
        renumber = np.zeros(len(reasons) + 1, np.uint16)
        renumber[[reasons[reason] for reason in ordered]] = np.arange(1, len(ordered) + 1)
        renumbered = stack.enter_context(tempfile.TemporaryFile())
        spools["outcomes"].seek(0)
        while piece := spools["outcomes"].read(1 << 20):
            renumbered.write(renumber[np.frombuffer(piece, "<u2")].astype("<u2").data)
        spools["outcomes"] = renumbered

        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trip-index-"))) / "index.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, spool in spools.items():
                if name == "frame_sizes" and not counts[name]:
                    continue
                row = {"F": (len(fields),), "3": (3,), "2": (2,), "": ()}[_SHAPES[name]]
                head = io.BytesIO()
                header = {"descr": _DTYPES.get(name, "<u8"), "fortran_order": False, "shape": (counts[name], *row)}
                np.lib.format.write_array_header_1_0(head, header)
                spool.seek(0)
                _add_array(archive, name, [head.getvalue()], spool)
            for name, words in (("fields", fields), ("reasons", ordered)):
                text = io.BytesIO()
                np.lib.format.write_array(text, np.array(words, "<U64"), allow_pickle=False)
                _add_array(archive, name, [text.getvalue()])
        yield path, storage.sha256_file(path)


def _add_array(archive: zipfile.ZipFile, name: str, begin: Sequence[bytes], rest: BinaryIO | None = None) -> None:
    assert archive.fp is not None
    info = zipfile.ZipInfo(f"{name}.npy")
    fixed = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + 4
    padding = -fixed % _ALIGNED
    info.extra = struct.pack("<HH", 0x4E50, padding) + bytes(padding)  # an extra field that readers skip
    with archive.open(info, "w", force_zip64=True) as member:
        for piece in begin:
            member.write(piece)
        while rest is not None and (piece := rest.read(1 << 20)):
            member.write(piece)


def open_index(dataset: str, manifest: DatasetManifest, manifest_sha256: str) -> SampleIndex | None:
    """Maps the index of a data set into memory; None if it has none (schema 2).

    Raises:
        UserError: the file is missing or does not fit the manifest.
    """
    if manifest.index_sha256 is None:
        return None
    address = storage.join(version_of(dataset, manifest_sha256), index_file(manifest.index_sha256))
    try:
        index = mapped(storage.cached_file(address))
    except FileNotFoundError as error:
        raise UserError(f"{address} is missing; prepare the data again") from error
    except (ValueError, KeyError, zipfile.BadZipFile, struct.error) as error:
        raise UserError(f"{address} is damaged ({error}); delete it and prepare the data again") from error
    if (len(index.clip_hashes_N), len(index.rows_R3)) != (manifest.samples, manifest.rows):
        raise UserError(f"{address} is not the index of its manifest; delete it and prepare the data again")
    return index


def mapped(path: Path) -> SampleIndex:
    """Maps an index file. Raises ValueError, KeyError, struct.error or zipfile.BadZipFile if it is none."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            file.seek(info.header_offset)
            name_length, extra_length = struct.unpack("<26xHH", file.read(_LOCAL_HEADER))
            file.seek(info.header_offset + _LOCAL_HEADER + name_length + extra_length)
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{info.filename} has another version")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject:
                raise ValueError(f"{info.filename} contains objects")
            mapped = np.memmap(path, dtype, "r", file.tell(), shape) if 0 not in shape else np.empty(shape, dtype)
            arrays[info.filename.removesuffix(".npy")] = np.asarray(mapped)
    texts = {name: tuple(arrays[name].tolist()) for name in ("fields", "reasons")}
    return SampleIndex(
        texts["fields"],
        arrays["offsets"],
        arrays["sizes"],
        arrays["clip_hashes"],
        arrays["key_ends"],
        arrays["keys"],
        arrays["rows"],
        arrays["outcomes"],
        texts["reasons"],
        arrays.get("frame_sizes"),
    )


def parts_of(index: SampleIndex, shards: Sequence[PublishedShard]) -> dict[str, SampleIndex]:
    """Returns the part of an index that belongs to each shard, by the shard's name."""
    ends = [0, *itertools.accumulate(shard.samples for shard in shards)]
    return {
        shard.shard: index.part(slice(begin, end), slice(*shard.rows))
        for shard, (begin, end) in zip(shards, itertools.pairwise(ends), strict=True)
    }
