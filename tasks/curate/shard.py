"""Checks shards concurrently, every byte of them, and lists the problems of each."""

from __future__ import annotations

import hashlib
import itertools
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

from infra import storage
from tasks.curate.samples import SampleChecker, Shapes
from tasks.json_records import parse_record
from tasks.shards import (
    SUFFIXES,
    PackedSample,
    ShardManifest,
    index_name,
    shard_label,
)
from tasks.shards.layout import READABLE

_PIECE_BYTES = 1 << 16  # per read; tarfile copies the rest of a piece with every read from it


@dataclass
class CheckedShard:
    """The problems of one shard; `index` is None if it cannot be read."""

    index: ShardManifest | None
    index_problems: list[str]
    tar_problems: list[str] = field(default_factory=list)
    shapes: Shapes = field(default_factory=dict)  # of its samples


def check_shards(pool: str, shards: list[str], workers: int) -> Iterator[CheckedShard]:
    """Yields the checked shards in order; `workers` threads read at most twice their number of shards ahead.

    All samples of a frame size must have the shapes of the first of them. A shard whose first sample differs is checked
    again against those shapes, so that the problems do not depend on the timing of the threads.
    """
    names = iter(shards)
    shapes: Shapes = {}
    threads = ThreadPoolExecutor(workers, "verify")
    try:
        ahead = deque(
            (name, threads.submit(_check_shard, pool, name, {})) for name in itertools.islice(names, 2 * workers)
        )
        while ahead:
            shard, future = ahead.popleft()
            checked = future.result()
            if any(shapes.get(name, shape) != shape for name, shape in checked.shapes.items()):
                checked = _check_shard(pool, shard, shapes)
            shapes = checked.shapes | shapes
            yield checked
            ahead.extend((name, threads.submit(_check_shard, pool, name, {})) for name in itertools.islice(names, 1))
    finally:
        threads.shutdown(cancel_futures=True)


def _check_shard(pool: str, shard: str, shapes: Shapes) -> CheckedShard:
    name = index_name(shard)
    try:
        index = parse_record(ShardManifest, storage.read_bytes(storage.join(pool, name)))
    except FileNotFoundError:
        return CheckedShard(None, [f"{name}: is missing"])
    except ValueError as error:
        return CheckedShard(None, [f"{name}: cannot be read ({error})"])
    samples = SampleChecker(shapes)
    tar_problems = list(_tar_problems(pool, index, samples))
    return CheckedShard(index, list(_name_problems(index, shard)), tar_problems, samples.shapes)


def _name_problems(index: ShardManifest, shard: str) -> Iterator[str]:
    name = index_name(shard)
    label = shard_label(shard)
    if index.schema_version not in READABLE:
        yield f"{name}: has schema {index.schema_version}, expected {' or '.join(map(str, READABLE))}"
    elif label is None or index.named(label).shard != shard:
        yield f"{name}: was changed after it was written; its name does not match its content"


def _tar_problems(pool: str, index: ShardManifest, samples: SampleChecker) -> Iterator[str]:
    """Streams a tar and compares it with its index and checksum, and checks its samples."""
    try:
        with storage.open_stream(storage.join(pool, index.shard)) as file:
            stream = _Hashed(file)
            try:
                with tarfile.open(fileobj=stream, mode="r|", bufsize=_PIECE_BYTES) as tar:  # type: ignore[call-overload]
                    yield from _member_problems(tar, index, samples)
            except (tarfile.TarError, EOFError) as error:
                yield f"{index.shard}: cannot be read as a tar ({error})"
            while stream.read(_PIECE_BYTES):
                pass
    except FileNotFoundError:
        yield f"{index.shard}: is missing"
        return
    if stream.size_bytes != index.size_bytes:
        yield f"{index.shard}: {stream.size_bytes} bytes, expected {index.size_bytes}"
    if (sha256 := stream.hasher.hexdigest()) != index.sha256:
        yield f"{index.shard}: damaged, sha256 {sha256}, expected {index.sha256}"


def _member_problems(tar: tarfile.TarFile, index: ShardManifest, samples: SampleChecker) -> Iterator[str]:
    """Checks the members in the order of the index; stops at the first misplaced one, as all later ones would be."""
    end = 0
    sizes = index.size_of_samples() if len(index.frame_sizes) == len(index.samples) else {}
    for entry in index.samples:
        members = {}
        for name, (offset, size) in sorted(entry.members.items(), key=lambda item: item[1]):
            wanted = f"{entry.key}.{SUFFIXES.get(name, name)}"
            member = tar.next()
            if member is None:
                yield f"{index.shard}: ends before {wanted}"
                return
            if (member.name, member.offset_data, member.size) != (wanted, offset, size) or not member.isreg():
                actual = f"{member.name} of {member.size} bytes at {member.offset_data}"
                yield f"{index.shard}: contains {actual}, its index {wanted} of {size} bytes at {offset}"
                return
            if offset != end + tarfile.BLOCKSIZE:
                yield f"{index.shard}: {offset - end} bytes before {wanted}, expected a header of {tarfile.BLOCKSIZE}"
            file = tar.extractfile(member)
            assert file is not None
            members[name] = file.read()
            end = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        sample_problems = samples.problems(PackedSample(entry.key, members, sizes.get(entry.key)))
        yield from (f"{index.shard}: {problem}" for problem in sample_problems)
    if (member := tar.next()) is not None:
        yield f"{index.shard}: contains {member.name}, which its index does not list"


class _Hashed:
    """Hashes and counts the bytes of a stream as they are read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hasher = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self.hasher.update(piece)
        self.size_bytes += len(piece)
        return piece
