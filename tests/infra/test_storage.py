"""What storage promises: the same behaviour at every address, and no half-written file where a reader looks."""

from __future__ import annotations

import base64
import importlib.util
import os
import subprocess
import sys
import threading
import uuid
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from flows.cli.app import user_error
from infra import storage
from tasks.ingest.rows import reading
from tests.conftest import REPOSITORY, free_port, wait_for_port


@pytest.fixture(params=["local", "file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("s3_folder")
    return {
        "local": str(tmp_path / "data"),
        "file": f"file://{tmp_path}/data",
        "memory": f"memory://{uuid.uuid4().hex}/data",
    }[request.param]


def test_a_folder_of_files_behaves_alike_at_every_address(folder: str) -> None:
    address = storage.join(folder, "a", "one.bin")
    assert not storage.exists(address) and storage.list_dir(folder) == []
    storage.write_bytes(address, b"0123456789")
    assert storage.exists(address)
    assert storage.read_bytes(address) == b"0123456789"
    assert storage.read_range(address, 2, 5) == b"234"
    assert storage.read_range(address, 8, 99) == b"89"
    storage.write_bytes(address, b"new")
    assert storage.read_bytes(address) == b"new"
    storage.write_json(storage.join(folder, "b.json"), {"z": 1, "a": [1.5, None]})
    assert storage.read_json(storage.join(folder, "b.json")) == {"a": [1.5, None], "z": 1}
    assert storage.list_dir(folder) == ["a", "b.json"]
    storage.delete(storage.join(folder, "b.json"))
    assert storage.list_dir(folder) == ["a"]
    storage.delete(folder)
    storage.delete(folder)
    assert storage.list_dir(folder) == []


def test_a_missing_file_is_file_not_found_at_every_address(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "none"))
    with pytest.raises(FileNotFoundError):
        storage.local_folder(storage.join(folder, "none"))


def test_an_uploaded_file_and_a_fetched_folder_are_the_same_bytes(folder: str, tmp_path: Path) -> None:
    source = tmp_path / "big.bin"
    source.write_bytes(os.urandom(3_000_000))
    storage.upload_file(source, storage.join(folder, "model", "unet", "w.bin"))
    copy = storage.local_folder(storage.join(folder, "model"), tmp_path / "cache")
    assert storage.sha256_file(copy / "unet" / "w.bin") == storage.sha256_file(source)
    storage.write_bytes(storage.join(folder, "model", "unet", "w.bin"), b"changed")
    again = storage.local_folder(storage.join(folder, "model"), tmp_path / "cache")
    assert (again / "unet" / "w.bin").read_bytes() == b"changed"


def test_a_failed_write_leaves_the_old_content_and_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "state.json")
    storage.write_json(address, {"step": 1})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        storage.write_json(address, {"step": 2})
    with pytest.raises(OSError, match="No space left"):
        storage.upload_file(address, str(tmp_path / "copy.json"))
    assert storage.read_json(address) == {"step": 1}
    assert os.listdir(tmp_path) == ["state.json"]


def test_an_unfinished_write_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".state.json.123.part").write_bytes(b"half")
    assert storage.list_dir(str(tmp_path)) == []


def test_a_stream_and_a_local_copy_hold_what_was_written(folder: str) -> None:
    address = storage.join(folder, "one.bin")
    content = os.urandom(3_000_000)
    storage.write_bytes(address, content)
    with storage.open_stream(address) as file:
        assert file.read(5) == content[:5] and file.read() == content[5:]
    with storage.local_copy(address) as path:
        assert path.read_bytes() == content
    assert storage.read_bytes(address) == content
    with pytest.raises(FileNotFoundError):
        storage.open_stream(storage.join(folder, "none"))


def test_what_a_killed_writer_left_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".state.json.123.part").write_bytes(b"half")
    (tmp_path / "notes.part").write_bytes(b"a user's")
    storage.drop_unfinished(str(tmp_path))
    assert os.listdir(tmp_path) == ["notes.part"]


def test_addresses_join_and_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.join("s3://bucket/a/", "b", "/c") == "s3://bucket/a/b/c"
    assert storage.join("/", "a") == "/a"
    assert storage.absolute("runs/x/") == str(tmp_path / "runs" / "x")
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert storage.parent("s3://bucket/a/t.csv") == "s3://bucket/a"
    assert storage.parent("/data/t.csv") == "/data"


def test_not_a_number_is_refused_for_it_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(str(tmp_path / "m.json"), {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_missing_credentials_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3fs = pytest.importorskip("s3fs")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(storage.StorageError, match=r"s3://bucket/a cannot be used .*set AWS_ACCESS_KEY_ID"):
        storage.write_bytes("s3://bucket/a", b"")
    with pytest.raises(storage.StorageError, match="set AWS_ACCESS_KEY_ID"), reading("s3://bucket/a.csv"):
        fsspec.core.url_to_fs("s3://bucket/a.csv")[0].cat_file("bucket/a.csv")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("address", ["foo://u:hunter2@host/a", "gs://bucket/a"])
def test_a_store_without_a_library_is_one_sentence(address: str) -> None:
    if address.startswith("gs:") and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(storage.StorageError, match="cannot be used") as raised:
        storage.read_bytes(address)
    assert "hunter2" not in str(raised.value)
    assert user_error(RuntimeError("of a framework")) is None and user_error(raised.value) is raised.value


class _WholeChecksum(BaseHTTPRequestHandler):
    """Answers any read of a part with bytes 3 to 5 of `0123456789`, and with the checksum of all ten."""

    def do_GET(self) -> None:
        self.send_response(206)
        self.send_header("Content-Length", "3")
        self.send_header("Content-Range", "bytes 3-5/10")
        self.send_header("x-amz-checksum-crc32", base64.b64encode(zlib.crc32(b"0123456789").to_bytes(4)).decode())
        self.end_headers()
        self.wfile.write(b"345")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_part_is_read_from_a_store_that_sends_the_checksum_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _WholeChecksum)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert storage.read_range("s3://bucket/ten", 3, 6) == b"345"
    finally:
        server.shutdown()
        server.server_close()
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_call_waits_for_a_store_that_is_down_for_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    port, down = free_port(), tmp_path / "down"
    values = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_MAX_ATTEMPTS": "1"}
    for name, value in (values | dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    command = [sys.executable, "-m", "tests.support.s3_server", str(port), str(down)]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, cwd=REPOSITORY, stderr=log) as server:
        try:
            wait_for_port(port, server)
            s3fs.S3FileSystem().mkdir("bucket")
            calls: list[Callable[[], object]] = [
                lambda: storage.write_bytes("s3://bucket/a", b"1"),
                lambda: storage.create_bytes("s3://bucket/b", b"2"),
                lambda: storage.exists("s3://bucket/a"),
                lambda: storage.list_dir("s3://bucket"),
                lambda: storage.read_bytes("s3://bucket/b"),
            ]
            found = []
            for call in calls:
                down.touch()
                timer = threading.Timer(1.5, down.unlink)
                timer.start()
                found.append(call())
                timer.join()
            assert found == [None, True, True, ["a", "b"], b"2"]
            s3fs.S3FileSystem(skip_instance_cache=True).pipe_file("bucket/c", b"3")  # as another process does
            assert storage.read_bytes("s3://bucket/c") == b"3", "a kept listing hides a new file"
            monkeypatch.setattr(storage, "BUSY_SECONDS", 0.0)
            down.touch()
            with pytest.raises(OSError, match="Errno 16"):
                storage.read_bytes("s3://bucket/a")
        finally:
            server.kill()
            s3fs.S3FileSystem.clear_instance_cache()
