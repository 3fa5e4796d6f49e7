"""Decodes clips in child processes ahead of the encoder: a video that crashes or hangs a decoder costs one row.

A child is `python -m tasks.video.decode_pool`: PyAV and numpy only, one thread, and it ends with its parent. Its pipes
carry lengths, JSON heads and raw bytes, never pickles: a child compromised by a video can send wrong pixels or a
malformed reply, but no code.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import queue
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

import numpy as np

from tasks.records import UserError
from tasks.video.decode import Clip, ClipError, read_spans, read_windows
from tasks.video.spec import DecodeSpec

Reader = Callable[..., list[Clip]]  # takes the bytes of a video and named arguments; a function of a module
SpanReader = Callable[..., list[list[Clip] | ClipError]]  # also takes spans: pairs of seconds
Span = tuple[float, float | None]

_READY = b"!"
_LENGTH = struct.Struct("<Q")
_MAX_HEAD_BYTES = 1 << 20
_PIPE_BYTES = 1 << 20  # most that Linux allows by default; a reply has megabytes, its default pipe 64 KiB
_START_SECONDS = 120.0  # limit of a child's imports, for a machine under heavy load


class DecoderPool:
    """A pool of decoder processes; they start with the first videos and end with `close`.

    Args:
        arguments: what the reader gets by name in addition to the bytes, e.g. `num_frames`, `fps`, `size`, `windows`.
        reader: returns the clips of a video's bytes; a module-level function, which the processes import by name.
        span_reader: likewise returns the clips of each of some spans.
    """

    def __init__(
        self,
        processes: int,
        spec: DecodeSpec,
        arguments: dict[str, Any],
        reader: Reader = read_windows,
        span_reader: SpanReader = read_spans,
    ) -> None:
        self.ahead = processes * spec.ahead
        names = [f"{function.__module__}:{function.__qualname__}" for function in (reader, span_reader)]
        self._children = [_Child(spec, arguments, names) for _ in range(processes)]
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for child in self._children:
            self._idle.put(child)
        self._threads = ThreadPoolExecutor(processes, "decoder")

    def submit(self, data: bytes) -> Future[list[Clip]]:
        """Returns a future of the clips of a video; it waits for an idle process.

        The result raises ClipError with the reader's reason, `decoder_crash` if the process died on this video,
        `decoder_timeout` if it was killed, or `out_of_memory` if the frames did not fit.
        """
        return self._threads.submit(self._decode, data)

    def submit_spans(self, data: bytes, spans: Sequence[Span]) -> Future[list[list[Clip] | ClipError]]:
        """Returns a future of the clips of each span of a video, which is decoded once, or why a span has none.

        The result raises what that of `submit` does. The limit of time is that of one video for each span.
        """
        return self._threads.submit(self._decode_spans, data, spans)

    def close(self) -> None:
        """Kills the processes and drops the videos that they decode."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.kill()
        self._threads.shutdown()
        for child in self._children:
            child.close_pipes()

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decode(self, data: bytes) -> list[Clip]:
        [clips] = self._decode_spans(data, None)
        if isinstance(clips, ClipError):
            raise clips
        return clips

    def _decode_spans(self, data: bytes, spans: Sequence[Span] | None) -> list[list[Clip] | ClipError]:
        child = self._idle.get()
        try:
            return child.decode(data, spans)
        finally:
            self._idle.put(child)


def check_decoding(spec: DecodeSpec) -> None:
    """Raises UserError for an invalid value."""
    for name, least in (("processes", 1), ("ahead", 1), ("seconds", 0.1), ("memory_bytes", 1 << 29)):
        value = getattr(spec, name)
        if value is not None and value < least:
            raise UserError(f"decode.{name} {value}, expected at least {least}")


class _Child:
    """One decoder process, restarted after it died. Only `kill` is safe to call from another thread."""

    def __init__(self, spec: DecodeSpec, arguments: dict[str, Any], readers: list[str]) -> None:
        self._spec = spec
        self._command = [sys.executable, "-m", __name__, *readers, json.dumps(arguments)]
        self._command += [str(spec.seconds), str(spec.memory_bytes)]
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._closed = threading.Lock(), False

    def decode(self, data: bytes, spans: Sequence[Span] | None) -> list[list[Clip] | ClipError]:
        """Returns the clips of each span, or with None those of the video, or why there are none."""
        process, requests, replies = self._running()
        count = 1 if spans is None else len(spans)
        started_at, seconds = time.monotonic(), self._spec.seconds * count
        timeout = threading.Timer(seconds, process.kill)
        timeout.start()
        try:
            head = json.dumps(spans).encode()
            requests.write(_LENGTH.pack(len(head)) + head + _LENGTH.pack(len(data)))
            requests.write(data)
            requests.flush()
            results: list[list[Clip] | ClipError] = []
            remaining_bytes = self._spec.memory_bytes
            for _ in range(count):
                try:
                    clips = _receive(replies, remaining_bytes)
                except ClipError as error:
                    results.append(error)
                else:
                    results.append(clips)
                    remaining_bytes -= sum(clip.pixels.nbytes for clip in clips)
            return results
        except (OSError, EOFError):
            status = _end(process)
            if status == -signal.SIGKILL and time.monotonic() - started_at >= seconds:
                raise ClipError("decoder_timeout", f"killed after {seconds:g} s") from None
            raise ClipError("decoder_crash", f"the decoder ended with {_name(status)}") from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            process.kill()
            _end(process)
            raise ClipError("decoder_crash", f"malformed reply from the decoder ({type(error).__name__})") from None
        finally:
            timeout.cancel()

    def kill(self) -> None:
        """Kills the process; it does not start again."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def close_pipes(self) -> None:
        """Closes the pipes of a killed process; no thread may decode any more."""
        if self._process is not None:
            _end(self._process)

    def _running(self) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
        """Returns the process and its pipes; starts a new process if there is none or it died."""
        with self._lock:
            process = self._process
            if self._closed:
                raise RuntimeError("the decoders are closed")
            is_new = process is None or process.poll() is not None
            if is_new:
                self.close_pipes()  # of the one that died
                # The child gets the import path of this process, which Ray may have unpacked anywhere.
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
                environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                process = subprocess.Popen(
                    self._command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                self._process = process
        assert process is not None and process.stdin is not None and process.stdout is not None
        if is_new:
            with contextlib.suppress(OSError, AttributeError):  # of one user all pipes are limited; only Linux has it
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            slow = threading.Timer(_START_SECONDS, process.kill)
            slow.start()
            started = process.stdout.read(1)
            slow.cancel()
            if started != _READY:
                raise RuntimeError(f"a decoder process did not start; it ended with {_name(_end(process))}")
        return process, process.stdin, process.stdout


def _receive(pipe: IO[bytes], max_bytes: int) -> list[Clip]:
    """Reads a child's reply. Raises ClipError for its reason, EOFError at its end, ValueError for a malformed reply."""
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
    if length > _MAX_HEAD_BYTES:
        raise ValueError(f"a head of {length} bytes, expected at most {_MAX_HEAD_BYTES}")
    head = json.loads(_exactly(pipe, length))
    json.dumps(head, allow_nan=False, ensure_ascii=False).encode()  # a manifest could not store it
    if "reason" in head:
        if not re.fullmatch(r"[a-z_]{1,40}", head["reason"]):
            raise ValueError(f"reason {head['reason']!r:.50}, expected lower-case letters and underscores")
        raise ClipError(head["reason"], str(head["detail"])[:500])
    clips, remaining_bytes = [], max_bytes
    for shape, info in head["clips"]:
        frames, height, width = (int(side) for side in shape)
        size = frames * (height * width * 3 + 4)
        remaining_bytes -= size
        if min(frames, height, width) < 1 or remaining_bytes < 0:
            raise ValueError(f"frames of shape {shape}")
        times = np.frombuffer(_exactly(pipe, 4 * frames), np.float32)
        pixels = np.empty((frames, height, width, 3), np.uint8)
        _fill(pixels.data, pipe)
        clips.append(Clip(pixels, times, dict(info)))
    return clips


def _exactly(pipe: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    _fill(memoryview(data), pipe)
    return data


def _fill(buffer: memoryview, pipe: IO[bytes]) -> None:
    if pipe.readinto(buffer) != buffer.nbytes:  # type: ignore[attr-defined]
        raise EOFError


def _end(process: subprocess.Popen[bytes]) -> int:
    """Returns the exit status of a process whose pipe has closed; kills it if it still runs after 5 s."""
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # the rest of a request cannot be flushed
            pipe.close()  # type: ignore[union-attr]
    return process.wait()


def _name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _serve(reader: str, span_reader: str, arguments: str, seconds: str, memory_bytes: str) -> None:
    """Main loop of a child: reads videos and writes clips until the parent closes the pipe."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps the output of libraries out of the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends the child when the parent has died
    read, read_parts = (_load(name) for name in (reader, span_reader))
    keywords = json.loads(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies.write(_READY)
    replies.flush()
    while head := requests.read(_LENGTH.size):
        spans = json.loads(requests.read(*_LENGTH.unpack(head)))
        data = requests.read(*_LENGTH.unpack(requests.read(_LENGTH.size)))
        count = 1 if spans is None else len(spans)
        # If the parent has died and the decoder hangs, the kernel ends this process: no Python thread would run.
        signal.setitimer(signal.ITIMER_REAL, float(seconds) * count + 5)
        results: list[list[Clip] | ClipError]
        try:
            results = [read(data, **keywords)] if spans is None else read_parts(data, spans=spans, **keywords)
        except ClipError as error:
            results = [error] * count
        except MemoryError:
            results = [ClipError("out_of_memory", f"decoding needs more than {memory_bytes} bytes")] * count
        signal.setitimer(signal.ITIMER_REAL, 0)
        for result in results:
            _send(replies, result)
        replies.flush()


def _load(name: str) -> Callable[..., Any]:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def _send(pipe: IO[bytes], result: list[Clip] | ClipError) -> None:
    clips = [] if isinstance(result, ClipError) else result
    head: dict[str, Any] = {"clips": [(clip.pixels.shape[:3], clip.info) for clip in clips]}
    if isinstance(result, ClipError):
        head = {"reason": result.reason, "detail": result.detail}
    line = json.dumps(head).encode()
    pipe.write(_LENGTH.pack(len(line)) + line)
    for clip in clips:
        pipe.write(clip.times.data)
        pipe.write(clip.pixels.data)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
