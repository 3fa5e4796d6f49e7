"""Decoder processes: a video that kills, hangs or takes over its decoder costs only its own row."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from tasks.encode.encoder import Decoded, decode_ahead
from tasks.ingest.download import Fetched
from tasks.records import ClipRef, Failure, UserError
from tasks.video.decode import Clip, ClipError, read_windows
from tasks.video.decode_pool import DecoderPool, check_decoding
from tasks.video.spec import DecodeSpec
from tests.support.odd_readers import read_or_misbehave
from trip_model.images import video_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
SUPPORT = REPOSITORY / "tests" / "support"
ARGUMENTS = {"num_frames": 4, "fps": 4.0, "size": 32, "windows": 2}
SPEC = DecodeSpec(seconds=60.0, memory_bytes=1 << 30)


def drawn(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (1, 32, 48, 3), dtype=np.uint8)
    return video_bytes(np.concatenate([np.roll(pixels, k, axis=2) for k in range(10)]), 4.0)


VIDEO = drawn(0)


@pytest.fixture(scope="module", autouse=True)
def importable_readers() -> Iterator[None]:
    """Lets the processes import the readers from their folder: another package `tests` may be installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SUPPORT))
        patch.setattr(read_or_misbehave, "__module__", "odd_readers")
        yield


@pytest.fixture(scope="module")
def odd() -> Iterator[DecoderPool]:
    with DecoderPool(1, SPEC, ARGUMENTS, read_or_misbehave) as pool:
        yield pool


def failure(pool: DecoderPool, data: bytes) -> ClipError:
    with pytest.raises(ClipError) as caught:
        pool.submit(data).result()
    return caught.value


def assert_equal(clips: list[Clip], want: list[Clip]) -> None:
    assert len(clips) == len(want) and [clip.info for clip in clips] == [clip.info for clip in want]
    for clip, wanted in zip(clips, want, strict=True):
        np.testing.assert_array_equal(clip.pixels, wanted.pixels)
        np.testing.assert_array_equal(clip.times, wanted.times)
        assert (clip.pixels.dtype, clip.times.dtype) == (wanted.pixels.dtype, wanted.times.dtype)


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "tasks.video.decode_pool" in " ".join(p.cmdline())]


def test_a_process_returns_the_clips_of_the_reader() -> None:
    with DecoderPool(2, SPEC, ARGUMENTS) as pool:
        videos = [drawn(seed) for seed in range(6)]
        for video, future in zip(videos, [pool.submit(video) for video in videos], strict=True):
            assert_equal(future.result(), read_windows(video, **ARGUMENTS))
        assert failure(pool, b"\x00\x00\x00\x18ftypmp42" + b"noise" * 99).reason == "undecodable"
        assert failure(pool, video_bytes(np.zeros((3, 32, 32, 3), np.uint8), 4.0)).reason == "too_short"
        assert len(children()) == 2
    assert children() == []


@pytest.mark.parametrize(
    ("word", "reason", "detail"),
    [
        (b"crash", "decoder_crash", "SIGSEGV"),
        (b"abort", "decoder_crash", "SIGABRT"),
        (b"leave", "decoder_crash", "exit status 3"),
        (b"fault", "decoder_crash", "exit status 1"),
        (b"hoard", "out_of_memory", "1073741824 bytes"),
    ],
)
def test_a_crash_is_the_reason_of_its_video_and_the_next_video_decodes(
    odd: DecoderPool, word: bytes, reason: str, detail: str
) -> None:
    error = failure(odd, word)
    assert error.reason == reason and detail in error.detail
    assert_equal(odd.submit(VIDEO).result(), read_windows(VIDEO, **ARGUMENTS))


@pytest.mark.parametrize("word", [b"sleep", b"stuck"])
def test_a_video_that_hangs_is_killed_over_and_its_neighbours_go_on(word: bytes) -> None:
    with DecoderPool(2, replace(SPEC, seconds=3.0), ARGUMENTS, read_or_misbehave) as pool:
        futures = [pool.submit(data) for data in (VIDEO, word, VIDEO, VIDEO, VIDEO)]
        for place in (0, 2, 3, 4):
            assert len(futures[place].result()) == 2
        started_at = time.monotonic()
        with pytest.raises(ClipError, match="decoder_timeout: killed after 3 s"):
            futures[1].result()
        assert time.monotonic() - started_at < 10
        assert len(pool.submit(VIDEO).result()) == 2


def reply(head: object, rest: bytes = b"") -> bytes:
    line = head if isinstance(head, bytes) else json.dumps(head).encode()
    return b"forge" + len(line).to_bytes(8, "little") + line + rest


@pytest.mark.parametrize(
    "forged",
    [
        b"forge" + b"\xff" * 8,
        reply(b"no json"),
        reply(b"[" * 100_000),
        reply([]),
        reply({"reason": "../x", "detail": ""}),
        reply({"reason": "fine", "detail": "\ud800"}),
        reply({"clips": [[[1, 2], {}]]}),
        reply({"clips": [[[1 << 20, 1 << 20, 1 << 20], {}]]}),
        reply({"clips": [[[-1, -32, 32], {}]]}),
        reply({"clips": [[[1, 1, 1], {"average_fps": float("nan")}]]}, b"\0" * 7),
        reply(b'{"clips": [[[1, 1, 1], {"average_fps": 1e999}]]}', b"\0" * 7),
    ],
)
def test_a_malformed_reply_is_a_crash_of_that_video(odd: DecoderPool, forged: bytes) -> None:
    error = failure(odd, forged)
    assert error.reason == "decoder_crash" and "malformed" in error.detail
    assert len(odd.submit(VIDEO).result()) == 2


def test_output_of_libraries_stays_out_of_the_reply(odd: DecoderPool) -> None:
    assert_equal(odd.submit(b"print" + VIDEO).result(), read_windows(VIDEO, **ARGUMENTS))


def test_a_process_that_died_while_idle_fails_no_video(odd: DecoderPool) -> None:
    odd.submit(VIDEO).result()
    [child] = children()
    child.kill()
    child.wait()
    assert len(odd.submit(VIDEO).result()) == 2


def test_rows_keep_their_order_and_the_queue_its_limit() -> None:
    taken: list[int] = []

    def rows() -> Iterator[tuple[ClipRef, Fetched] | Failure]:
        for row in range(12):
            taken.append(row)
            ref = ClipRef(f"k{row}", "u", "c", row)
            data = b"abort" if row == 6 else VIDEO
            yield Failure(ref.key, row, "http_404") if row % 5 == 4 else (ref, Fetched(data, ""))

    with DecoderPool(1, replace(SPEC, ahead=3), ARGUMENTS, read_or_misbehave) as pool:
        results = []
        for result in decode_ahead(rows(), pool):
            results.append(result)
            assert len(taken) - len(results) < 3
    reasons = [result.reason if isinstance(result, Failure) else "" for result in results]
    assert reasons == ["", "", "", "", "http_404", "", "decoder_crash", "", "", "http_404", "", ""]
    assert [result.row if isinstance(result, Failure) else result.ref.row for result in results] == list(range(12))
    assert isinstance(results[0], Decoded) and results[0].size_bytes == len(VIDEO)


def test_closing_does_not_wait_for_a_video() -> None:
    others = children()
    pool = DecoderPool(1, SPEC, ARGUMENTS, read_or_misbehave)
    pool.submit(VIDEO).result()
    pool.submit(b"sleep")
    pool.submit(VIDEO)
    started_at = time.monotonic()
    pool.close()
    assert time.monotonic() - started_at < 5 and children() == others


@pytest.mark.parametrize("busy_with", ["", "stuck"])
def test_a_process_ends_with_its_parent(busy_with: str) -> None:
    code = (
        f"import sys, time; sys.path.append({str(SUPPORT)!r})\n"
        "from tasks.video.decode_pool import DecoderPool, DecodeSpec\n"
        "from odd_readers import read_or_misbehave\n"
        f"pool = DecoderPool(1, DecodeSpec(seconds=3.0), {ARGUMENTS}, read_or_misbehave)\n"
        "pool.submit(b'').exception()\n"
        f"pool.submit({busy_with.encode()!r})\n"
        "print('decoded', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"decoded\n"
        [child] = psutil.Process(parent.pid).children()
        time.sleep(0.5)
        parent.kill()
    until = time.monotonic() + (20 if busy_with else 5)
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_an_invalid_value_is_rejected() -> None:
    for spec in (DecodeSpec(processes=0), DecodeSpec(ahead=0), DecodeSpec(seconds=0), DecodeSpec(memory_bytes=1)):
        with pytest.raises(UserError, match=r"decode\.\w+ [0-9]+, expected at least"):
            check_decoding(spec)


def test_a_process_that_cannot_start_is_an_error_and_no_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_or_misbehave, "__module__", "no_such_module")
    with (
        DecoderPool(1, SPEC, ARGUMENTS, read_or_misbehave) as pool,
        pytest.raises(RuntimeError, match="did not start; it ended with exit status 1"),
    ):
        pool.submit(VIDEO).result()


def test_a_process_imports_neither_torch_nor_a_network() -> None:
    heavy = {"torch", "diffusers", "ray", "aiohttp", "fsspec"}
    code = f"import sys, tasks.video.decode_pool; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
