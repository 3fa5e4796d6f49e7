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
        return list(self.map(self._fill, tars, offsets, buffers))

    def map(self, work: Callable[..., Result], *arguments: Iterable[Any]) -> Iterable[Result]:
        """Applies `work` to the arguments in order; concurrently if the tars are in an object store."""
        return map(work, *arguments) if self._local else self._threads.map(work, *arguments)

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_REMOTE_READS, "range-reads")

    def _fill(self, tar: int, offset: int, buffers: list[memoryview]) -> bool:
        size = 0
        for buffer in buffers:
            size += buffer.nbytes
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
