"""Checks shards side by side, every byte of them, and says what is wrong with each one alone."""

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
from tasks.curate.samples import Looks, SampleChecker
from tasks.shards import (
    SCHEMA_VERSION,
    SUFFIXES,
    PackedSample,
    ShardManifest,
    index_name,
    parse_record,
    shard_number,
)

_PIECE_BYTES = 1 << 16  # hashed at once; tarfile copies the rest of a piece with every read from it


@dataclass
class CheckedShard:
    """What one shard says when it is read alone; its index is None where none can be read."""

    index: ShardManifest | None
    index_problems: list[str]
    tar_problems: list[str] = field(default_factory=list)
    looks: Looks = field(default_factory=dict)  # of its samples


def check_shards(dataset: str, shards: list[str], workers: int) -> Iterator[CheckedShard]:
    """The shards in order, each read by one of `workers` threads, which are at most twice their number ahead.

    All samples must look like the data set's first. A shard whose own first looks otherwise is read once more against
    that, so what is said does not depend on who was faster.
    """
    names = iter(shards)
    looks: Looks = {}
    pool = ThreadPoolExecutor(workers, "verify")
    try:
        ahead = deque(
            (name, pool.submit(_check_shard, dataset, name, {})) for name in itertools.islice(names, 2 * workers)
        )
        while ahead:
            shard, future = ahead.popleft()
            found = future.result()
            if any(looks.get(name, look) != look for name, look in found.looks.items()):
                found = _check_shard(dataset, shard, looks)
            looks = found.looks | looks
            yield found
            ahead.extend((name, pool.submit(_check_shard, dataset, name, {})) for name in itertools.islice(names, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _check_shard(dataset: str, shard: str, looks: Looks) -> CheckedShard:
    name = index_name(shard)
    try:
        index = parse_record(ShardManifest, storage.read_bytes(storage.join(dataset, name)))
    except FileNotFoundError:
        return CheckedShard(None, [f"{name}: is missing"])
    except ValueError as error:
        return CheckedShard(None, [f"{name}: cannot be read ({error})"])
    samples = SampleChecker(looks)
    tar_problems = list(_tar_problems(dataset, index, samples))
    return CheckedShard(index, list(_name_problems(index, shard)), tar_problems, samples.looks)


def _name_problems(index: ShardManifest, shard: str) -> Iterator[str]:
    name = index_name(shard)
    number = shard_number(shard)
    if index.schema_version != SCHEMA_VERSION:
        yield f"{name}: has schema {index.schema_version}, expected {SCHEMA_VERSION}"
    elif number is None or index.named(number).shard != shard:
        yield f"{name}: was changed after it was written, for its name is that of another content"


def _tar_problems(dataset: str, index: ShardManifest, samples: SampleChecker) -> Iterator[str]:
    """Streams a tar past its index, its checksum and the checks of its samples."""
    try:
        with storage.open_stream(storage.join(dataset, index.shard)) as file:
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
    if (found := stream.hasher.hexdigest()) != index.sha256:
        yield f"{index.shard}: damaged, sha256 {found}, expected {index.sha256}"


def _member_problems(tar: tarfile.TarFile, index: ShardManifest, samples: SampleChecker) -> Iterator[str]:
    """Member by member in the index's order; after the first that is elsewhere, all others would be."""
    end = 0
    for entry in index.samples:
        members = {}
        for name, (offset, size) in sorted(entry.members.items(), key=lambda item: item[1]):
            wanted = f"{entry.key}.{SUFFIXES.get(name, name)}"
            member = tar.next()
            if member is None:
                yield f"{index.shard}: ends before {wanted}"
                return
            if (member.name, member.offset_data, member.size) != (wanted, offset, size) or not member.isreg():
                found = f"{member.name} of {member.size} bytes at {member.offset_data}"
                yield f"{index.shard}: holds {found}, its index {wanted} of {size} bytes at {offset}"
                return
            if offset != end + tarfile.BLOCKSIZE:
                yield f"{index.shard}: {offset - end} bytes before {wanted}, expected a header of {tarfile.BLOCKSIZE}"
            file = tar.extractfile(member)
            assert file is not None
            members[name] = file.read()
            end = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        found = samples.problems(PackedSample(entry.key, members), (index.start, index.stop))
        yield from (f"{index.shard}: {problem}" for problem in found)
    if (member := tar.next()) is not None:
        yield f"{index.shard}: holds {member.name}, which its index does not name"


class _Hashed:
    """A stream that is hashed and counted as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hasher = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self.hasher.update(piece)
        self.size_bytes += len(piece)
        return piece
