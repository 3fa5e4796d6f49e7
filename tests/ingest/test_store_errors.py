"""An S3 store that answers 503 or 403: at the table one sentence, at a video a counted reason."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli.app import main
from infra import storage
from tasks.encode.resume import retry_reasons
from tasks.ingest.download import Fetched, download_clips
from tasks.ingest.sources import read_rows
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import ClipRef, Failure, Inside, UserError

_ERROR = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{code}</Code><Message>{message}</Message><RequestId>1</RequestId></Error>"""
ANSWERS = {503: ("SlowDown", "Please reduce your request rate."), 403: ("AccessDenied", "Access Denied")}


class _Store(http.server.BaseHTTPRequestHandler):
    status = 503

    def do_GET(self) -> None:
        body = _ERROR.format(code=ANSWERS[self.status][0], message=ANSWERS[self.status][1]).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(params=[503, 403])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """An endpoint of S3 that answers every request with one status."""
    s3fs = pytest.importorskip("s3fs")
    handler = type("Handler", (_Store,), {"status": request.param})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(storage, "BUSY_SECONDS", 0.0)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # it waits 2 s in all between its own attempts
    s3fs.S3FileSystem.clear_instance_cache()
    yield request.param
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


REASONS = {503: "Please reduce your request rate.", 403: "Access Denied"}
REMEDIES = {503: "the store did not serve it; try again later", 403: "give credentials that may read it"}


def test_a_table_in_such_a_store_is_one_sentence(store: int, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = f"table s3://clips/table.csv cannot be read ({REASONS[store]}); {REMEDIES[store]}"
    with pytest.raises(UserError) as caught:
        list(read_rows(SourceSpec("s3://clips/table.csv")))
    assert str(caught.value) == sentence
    assert main(["check-source", "s3://clips/table.csv"]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def one(source: SourceSpec, ref: ClipRef) -> Fetched | Failure:
    [(_, result)] = download_clips([ref], source, DownloadSpec(attempts=2, backoff_seconds=0))
    return result


REASONS_OF_ROWS = {503: "store_busy", 403: "store_forbidden"}
INSIDES = {"a file": None, "a member of a tar": (0, 9, None), "a cell of Parquet": (0, 0, "video")}


@pytest.mark.parametrize("inside", INSIDES)
def test_a_video_in_such_a_store_has_a_reason_that_a_later_run_may_retry(
    store: int, tmp_path: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceSpec(str(tmp_path / "table.csv"), allow=("s3://clips/",))
    part = INSIDES[inside] and Inside("s3://clips/a.mp4", *INSIDES[inside])
    monkeypatch.setattr(storage, "BUSY_SECONDS", 60.0)  # other calls wait so long; a row does not
    began = time.monotonic()
    result = one(source, ClipRef("a", "s3://clips/a.mp4", "a dog", 0, inside=part))
    assert time.monotonic() - began < 40
    assert isinstance(result, Failure) and result.reason == REASONS_OF_ROWS[store], result
    assert result.detail.endswith(", 2 attempts") == (store == 503), result
    assert result.reason in retry_reasons(["server" if store == 503 else "throttled"])


def test_a_store_that_does_not_respond_costs_the_rows_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(storage, "BUSY_SECONDS", 0.0)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    source = SourceSpec(str(tmp_path / "table.csv"), allow=("s3://clips/",))
    result = one(source, ClipRef("a", "s3://clips/a.mp4", "a dog", 0))
    s3fs.S3FileSystem.clear_instance_cache()
    assert isinstance(result, Failure) and result.reason == "store_busy" and "\n" not in result.detail


def test_a_damaged_file_that_contains_the_video_has_its_reason(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 cut")
    source = SourceSpec(str(tmp_path / "t.parquet"))
    result = one(source, ClipRef("a", "t.parquet#0", "a dog", 0, inside=Inside(str(tmp_path / "t.parquet"), 0, 0, "v")))
    assert isinstance(result, Failure) and result.reason == "unreadable_file"
