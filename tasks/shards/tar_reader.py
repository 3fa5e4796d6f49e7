"""Range reads of the tars of a data set: from open files on a local disk, several at a time from another store."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from infra import storage

Result = TypeVar("Result")

_MOST_OPEN = 256  # files; a process may have 1024 on most machines
_REMOTE_READS = 16  # at a time


class Tars:
    """The tars at some addresses, all local or all in one other store, by their number."""

    def __init__(self, uris: Sequence[str]) -> None:
        self._uris = uris
        self._local = not uris or storage.local_path(uris[0]) is not None
        self._open: dict[int, int] = {}  # descriptors, the one used last at the end

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def fill(self, tars: Sequence[int], offsets: Sequence[int], buffers: Sequence[list[memoryview]]) -> list[bool]:
        """Reads from each of the tars, from its offset on until its buffers are full, one after another.

        Returns:
            which buffers were filled: False where a tar ends before.
        Raises:
            FileNotFoundError: with the name of a tar that is gone.
        """
        for tar in self._open.keys() & set(tars):
            # An open file outlives its name; the tars of forgotten clips are to be gone at once.
            if os.fstat(self._open[tar]).st_nlink == 0:
                raise self._gone(tar)
        return list(self.map(self._fill, tars, offsets, buffers))

    def map(self, work: Callable[..., Result], *arguments: Iterable[Any]) -> Iterable[Result]:
        """`work` on each of the arguments, in their order; where that waits for a network, several at a time."""
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
