"""Range reads of the tars of a data set: from open files on a local disk, concurrent from an object store."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from infra import storage

Result = TypeVar("Result")

_MOST_OPEN = 256  # files; most systems allow a process 1024
_REMOTE_READS = 16  # at a time
# A request costs more than these bytes: what lies between two fields of a sample is read with them, up to a limit.
_GAP_BYTES, _REQUEST_BYTES = 1 << 16, 1 << 23


def _size(buffers: Iterable[memoryview]) -> int:
    size = 0
    for buffer in buffers:
        size += buffer.nbytes
    return size


def _neighbours(
    tars: Sequence[int], offsets: Sequence[int], buffers: Sequence[list[memoryview]]
) -> Iterable[list[int]]:
    """Groups reads by number: those of a group lie in one tar, in order, with small gaps between them."""
    group: list[int] = []
    end = 0
    for read in sorted(range(len(tars)), key=lambda number: (tars[number], offsets[number])):
        near = bool(group) and tars[read] == tars[group[0]] and 0 <= offsets[read] - end <= _GAP_BYTES
        if near and offsets[read] + _size(buffers[read]) - offsets[group[0]] <= _REQUEST_BYTES:
            group.append(read)
        else:
            if group:
                yield group
            group = [read]
        end = offsets[read] + _size(buffers[read])
    if group:
        yield group


class Tars:
    """Reads the tars at some addresses, all local or all in one object store, by their number."""

    def __init__(self, uris: Sequence[str]) -> None:
        self._uris = uris
        self._local = not uris or storage.local_path(uris[0]) is not None
        self._open: dict[int, int] = {}  # descriptors, least recently used first

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def fill(self, tars: Sequence[int], offsets: Sequence[int], buffers: Sequence[list[memoryview]]) -> list[bool]:
        """Fills the buffers of each read, one after another, from its tar at its offset on.

        Returns:
            for each read whether its buffers were filled; False if the tar ends before.
        Raises:
            FileNotFoundError: a tar does not exist anymore; the error contains its name.
        """
        for tar in self._open.keys() & set(tars):
            # An open file outlives its name, but the tars of removed clips must not be read anymore.
            if os.fstat(self._open[tar]).st_nlink == 0:
                raise self._gone(tar)
        if self._local:
            return list(map(self._fill, tars, offsets, buffers))
        groups = list(_neighbours(tars, offsets, buffers))
        read_all = self._threads.map(lambda group: self._fill_group(group, tars, offsets, buffers), groups)
        filled = {
            read: done
            for group, results in zip(groups, read_all, strict=True)
            for read, done in zip(group, results, strict=True)
        }
        return [filled[read] for read in range(len(tars))]

    def map(self, work: Callable[..., Result], *arguments: Iterable[Any]) -> Iterable[Result]:
        """Applies `work` to the arguments in order; concurrently if the tars are in an object store."""
        return map(work, *arguments) if self._local else self._threads.map(work, *arguments)

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_REMOTE_READS, "range-reads")

    def _fill(self, tar: int, offset: int, buffers: list[memoryview]) -> bool:
        size = _size(buffers)
        if size == 0:  # an empty caption
            return True
        try:
            if self._local and os.preadv(self._descriptor(tar), list(buffers), offset) == size:  # pyright: ignore[reportArgumentType]
                return True
            data = storage.read_range(self._uris[tar], offset, offset + size)
        except FileNotFoundError as error:
            raise self._gone(tar) from error
        if len(data) != size:
            return False
        begin = 0
        for buffer in buffers:
            buffer.cast("B")[:] = data[begin : begin + buffer.nbytes]
            begin += buffer.nbytes
        return True

    def _fill_group(
        self, group: list[int], tars: Sequence[int], offsets: Sequence[int], buffers: Sequence[list[memoryview]]
    ) -> list[bool]:
        """Fills reads that lie next to each other in one tar with one request; one by one if the tar ends too early."""
        end, joined = offsets[group[0]], list[memoryview]()
        for read in group:
            gap = [memoryview(bytearray(offsets[read] - end))] if offsets[read] > end else []
            joined += [*gap, *buffers[read]]
            end = offsets[read] + _size(buffers[read])
        if len(group) > 1 and self._fill(tars[group[0]], offsets[group[0]], joined):
            return [True] * len(group)
        return [self._fill(tars[read], offsets[read], buffers[read]) for read in group]

    def _descriptor(self, tar: int) -> int:
        descriptor = self._open.pop(tar, None)
        if descriptor is None:
            if len(self._open) == _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            path = storage.local_path(self._uris[tar])
            assert path is not None
            descriptor = os.open(path, os.O_RDONLY)
        self._open[tar] = descriptor
        return descriptor

    def _gone(self, tar: int) -> FileNotFoundError:
        return FileNotFoundError(self._uris[tar].rsplit("/", 1)[-1])
