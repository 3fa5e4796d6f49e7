"""A photo by URL is downloaded with the checks of the clips."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from flows.cli.app import main
from tasks.ingest.download import download_photo
from tasks.ingest.spec import DownloadSpec
from tasks.records import UserError

_buffer = io.BytesIO()
Image.new("RGB", (16, 16), "red").save(_buffer, "PNG")
PNG = _buffer.getvalue()
HERE = DownloadSpec(allow_private=True, attempts=1)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server with a photo, a page, a large file and a redirect."""
    files = {"/photo.png": PNG, "/page.html": b"<html>no photo</html>", "/large.png": PNG + bytes(17 * 2**20)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/photo.png")
                self.end_headers()
                return
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/photo.png", "/moved"])
def test_a_photo_is_downloaded(server: str, path: str) -> None:
    assert download_photo(server + path, HERE) == PNG


@pytest.mark.parametrize(
    ("path", "reason"), [("/page.html", "not_accepted"), ("/large.png", "too_large"), ("/none.png", "http_404")]
)
def test_what_is_no_photo_is_one_sentence(server: str, path: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        download_photo(server + path, HERE)


def test_a_private_address_is_blocked(server: str) -> None:
    with pytest.raises(UserError, match="blocked_address"):
        download_photo(f"{server}/photo.png")


def test_the_command_animate_checks_the_address(server: str, tmp_path, capsys) -> None:
    assert main(["animate", f"{server}/photo.png", "it moves", "-o", str(tmp_path / "out.mp4")]) == 2
    assert "blocked_address" in capsys.readouterr().err
