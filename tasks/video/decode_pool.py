"""Decodes clips in processes of their own, ahead of the encoder: a video that crashes or hangs a decoder costs one row.

A child is `python -m tasks.video.decode_pool`: PyAV and numpy only, one thread, ended with its parent. Its pipes carry
a length, a JSON head and raw bytes, nothing pickled: a child that a video has taken over can send wrong pixels or
nonsense, never code.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

import numpy as np

from tasks.records import UserError
from tasks.video.decode import Clip, ClipError, read_windows
from tasks.video.spec import DecodeSpec

Reader = Callable[..., list[Clip]]  # takes the bytes of a video and named arguments; a function of a module

_READY = b"!"
_LENGTH = struct.Struct("<Q")
_MAX_HEAD_BYTES = 1 << 20
_START_SECONDS = 120.0  # for imports, on a machine that is short of everything


class DecoderPool:
    """Processes that decode one video each at a time; they start with the first videos and end with `close`.

    Args:
        arguments: what the reader gets by name beside the bytes, e.g. `num_frames`, `fps`, `size`, `windows`.
        reader: returns the clips of a video's bytes; a module-level function, which the processes import by name.
    """

    def __init__(
        self, processes: int, spec: DecodeSpec, arguments: dict[str, Any], reader: Reader = read_windows
    ) -> None:
        self.ahead = processes * spec.ahead
        name = f"{reader.__module__}:{reader.__qualname__}"
        self._children = [_Child(spec, arguments, name) for _ in range(processes)]
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for child in self._children:
            self._idle.put(child)
        self._threads = ThreadPoolExecutor(processes, "decoder")

    def submit(self, data: bytes) -> Future[list[Clip]]:
        """The clips of a video, as soon as a process is free for it.

        The result raises ClipError: the reader's reasons; `decoder_crash` where the process died over this video,
        `decoder_timeout` where it had to be killed, `out_of_memory` where the frames did not fit.
        """
        return self._threads.submit(self._decode, data)

    def close(self) -> None:
        """Ends the processes at once; videos that are being decoded are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.kill()
        self._threads.shutdown()

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decode(self, data: bytes) -> list[Clip]:
        child = self._idle.get()
        try:
            return child.decode(data)
        finally:
            self._idle.put(child)


def check_decoding(spec: DecodeSpec) -> None:
    """Raises UserError for a number that no video can be decoded with."""
    for name, least in (("processes", 1), ("ahead", 1), ("seconds", 0.1), ("memory_bytes", 1 << 29)):
        value = getattr(spec, name)
        if value is not None and value < least:
            raise UserError(f"decode.{name} {value}, expected at least {least}")


class _Child:
    """One decoder process, replaced after it died. Of use to one thread at a time, but for `kill`."""

    def __init__(self, spec: DecodeSpec, arguments: dict[str, Any], reader: str) -> None:
        self._spec = spec
        self._command = [sys.executable, "-m", __name__, reader, json.dumps(arguments)]
        self._command += [str(spec.seconds), str(spec.memory_bytes)]
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._over = threading.Lock(), False

    def decode(self, data: bytes) -> list[Clip]:
        process, requests, replies = self._running()
        began = time.monotonic()
        late = threading.Timer(self._spec.seconds, process.kill)
        late.start()
        try:
            requests.write(_LENGTH.pack(len(data)))
            requests.write(data)
            requests.flush()
            return _receive(replies, self._spec.memory_bytes)
        except ClipError:
            raise
        except (OSError, EOFError):
            status = _end(process)
            if status == -signal.SIGKILL and time.monotonic() - began >= self._spec.seconds:
                raise ClipError("decoder_timeout", f"killed after {self._spec.seconds:g} s") from None
            raise ClipError("decoder_crash", f"the decoder ended with {_name(status)}") from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            process.kill()
            _end(process)
            raise ClipError("decoder_crash", f"the decoder sent nonsense ({type(error).__name__})") from None
        finally:
            late.cancel()

    def kill(self) -> None:
        """Ends the process for good."""
        with self._lock:
            self._over = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _running(self) -> tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]:
        """The process and its pipes; a fresh one where there is none, or where it died."""
        with self._lock:
            process = self._process
            if self._over:
                raise RuntimeError("the decoders are closed")
            fresh = process is None or process.poll() is not None
            if fresh:
                # A child can import what this process can, wherever Ray has unpacked the checkout.
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
                environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                process = subprocess.Popen(
                    self._command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                self._process = process
        assert process is not None and process.stdin is not None and process.stdout is not None
        if fresh:
            slow = threading.Timer(_START_SECONDS, process.kill)
            slow.start()
            started = process.stdout.read(1)
            slow.cancel()
            if started != _READY:
                raise RuntimeError(f"a decoder process did not start, it ended with {_name(_end(process))}")
        return process, process.stdin, process.stdout


def _receive(pipe: IO[bytes], most_bytes: int) -> list[Clip]:
    """What a child answers. Raises ClipError for its reason, EOFError at its end, ValueError or kin for nonsense."""
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size))
    if length > _MAX_HEAD_BYTES:
        raise ValueError(f"a head of {length} bytes")
    head = json.loads(_exactly(pipe, length))
    json.dumps(head, allow_nan=False, ensure_ascii=False).encode()  # what a shard's manifest could not say is nonsense
    if "reason" in head:
        if not re.fullmatch(r"[a-z_]{1,40}", head["reason"]):
            raise ValueError("a reason that is no word")
        raise ClipError(head["reason"], str(head["detail"])[:500])
    clips, left = [], most_bytes
    for shape, info in head["clips"]:
        frames, height, width = (int(side) for side in shape)
        size = frames * (height * width * 3 + 4)
        left -= size
        if min(frames, height, width) < 1 or left < 0:
            raise ValueError(f"frames of shape {shape}")
        times = np.frombuffer(_exactly(pipe, 4 * frames), np.float32)
        pixels = np.frombuffer(_exactly(pipe, size - 4 * frames), np.uint8).reshape(frames, height, width, 3)
        clips.append(Clip(pixels, times, dict(info)))
    return clips


def _exactly(pipe: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    if pipe.readinto(data) != size:  # type: ignore[attr-defined]
        raise EOFError
    return data


def _end(process: subprocess.Popen[bytes]) -> int:
    """Exit status of a process whose pipe has closed; one that lives on regardless is killed."""
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what is left of a request has nowhere to go
            pipe.close()  # type: ignore[union-attr]
    return process.wait()


def _name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _serve(reader: str, arguments: str, seconds: str, memory_bytes: str) -> None:
    """The life of a child: videos in, clips out, until the parent closes the pipe."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody is left to answer
    module, function = reader.split(":")
    read = getattr(importlib.import_module(module), function)
    named = json.loads(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies.write(_READY)
    replies.flush()
    while head := requests.read(_LENGTH.size):
        data = requests.read(*_LENGTH.unpack(head))
        # Should the parent be gone and the decoder hang, the kernel ends it: no thread of ours would get a turn.
        signal.setitimer(signal.ITIMER_REAL, float(seconds) + 5)
        answer: dict[str, Any] = {}
        clips: list[Clip] = []
        try:
            clips = read(data, **named)
            answer["clips"] = [(clip.pixels.shape[:3], clip.info) for clip in clips]
        except ClipError as error:
            answer = {"reason": error.reason, "detail": error.detail}
        except MemoryError:
            answer = {"reason": "out_of_memory", "detail": f"more than {memory_bytes} bytes to decode it"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = json.dumps(answer).encode()
        replies.write(_LENGTH.pack(len(line)) + line)
        for clip in clips:
            replies.write(clip.times.data)
            replies.write(clip.pixels.data)
        replies.flush()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
