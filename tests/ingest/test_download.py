"""The download: what a careless or hostile server, table or network can do, and the reason each is counted under."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from infra import url_guard as addresses
from infra.redaction import name_of
from infra.url_guard import is_public
from tasks.ingest.download import Fetched, download_clips
from tasks.ingest.http_checks import is_video, looks_like, opts_out, seconds_to_wait
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import RETRY_CLASSES, ClipRef, Failure, UserError
from trip_model import __version__

VIDEO = b"\x00\x00\x00\x18ftypmp42" + bytes(range(256)) * 40
FAST = DownloadSpec(read_seconds=0.4, total_seconds=2.0, backoff_seconds=0.01, allow_private=True)


class Server(ThreadingHTTPServer):
    """Answers `/clip?<how>`: what the query asks for; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.location: str | None = None  # where every request is sent on to, as UTF-8
        self.agents: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        how = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        with server.lock:
            server.asked.append(self.path)
            server.agents.add(self.headers["User-Agent"])
            times = server.asked.count(self.path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._answer(how, times)

    def _answer(self, how: dict[str, str], times: int) -> None:
        body = VIDEO
        if "wait" in how:
            server = self.server
            with server.lock:
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            time.sleep(float(how["wait"]))
            with server.lock:  # before the client can have the end of the answer
                server.at_once -= 1
        status = int(how.get("status", 200))
        if "heals" in how and times >= int(how["heals"]):
            status = 200
        if "page" in how:
            body = b"<html>not found, but we say 200</html>"
        if self.path == "/round":
            how, status = {"to": "/round"}, 302
        if self.server.location is not None:
            self.wfile.write(f"HTTP/1.0 302 Found\r\nLocation: {self.server.location}\r\n\r\n".encode())
            return
        self.send_response(status)
        if "to" in how:
            self.send_header("Location", how["to"])
        if "retry" in how:
            self.send_header("Retry-After", how["retry"])
        if "robots" in how:
            for tag in how["robots"].split("|"):
                self.send_header("X-Robots-Tag", tag)
        if "drip" in how:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for place in range(0, len(body), 40):
                self.wfile.write(body[place : place + 40])
                time.sleep(0.05)
            return
        if "endless" in how:
            self.end_headers()
            for _ in range(200):
                self.wfile.write(body)
            return
        self.send_header("Content-Length", str(int(how.get("length", len(body)))))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(url: str, spec: DownloadSpec = FAST, source: SourceSpec | None = None) -> Fetched | Failure:
    [(_, result)] = download_clips([ClipRef("k", url, "caption", 7)], source or SourceSpec("/nowhere/t.csv"), spec)
    return result


def reason(result: Fetched | Failure) -> str:
    return result.reason if isinstance(result, Failure) else "ok"


def test_a_clip_arrives_complete_with_its_hash(server: Server) -> None:
    result = fetch(f"{server.url}/clip", replace(FAST, contact="https://example.org/crawler"))
    assert result == Fetched(VIDEO, hashlib.sha256(VIDEO).hexdigest())
    assert server.agents == {f"trip-i2v/{__version__} (+https://example.org/crawler)"}


@pytest.mark.parametrize(
    ("query", "want", "asked"),
    [
        ("status=404", "http_404", 1),
        ("status=403", "http_403", 1),
        ("status=503", "http_503", 3),
        ("status=503&heals=3", "ok", 3),
        ("status=429&retry=0&heals=2", "ok", 2),
        ("page=1", "not_a_video", 1),
        ("length=999999", "truncated", 3),
        ("wait=1", "timeout", 3),
        ("endless=1", "too_large", 1),
        ("status=302&to=/clip%3Fstatus%3D404", "http_404", 2),
        ("status=302&to=/clip", "ok", 2),
        ("status=302&to=ftp://host/x", "blocked_address", 1),
        ("status=302&to=http://[x/", "bad_url", 1),
        ("status=501", "http_501", 1),
        ("status=503&heals=2&retry=Mon,+01+Jan+2024+00:00:00+%2B999999999999", "ok", 2),
        ("status=503&heals=2&retry=" + "9" * 400, "ok", 2),
        ("drip=1", "too_slow", 3),
        ("robots=noai", "robots_opt_out", 1),
        ("robots=otherbot: noindex|nofollow", "ok", 1),
    ],
)
def test_each_answer_has_its_reason_and_its_number_of_attempts(
    server: Server, query: str, want: str, asked: int
) -> None:
    spec = replace(FAST, max_bytes=1_000_000, max_backoff_seconds=0.1, rate_seconds=0.3)
    result = fetch(f"{server.url}/clip?{query}", spec)
    assert reason(result) == want and len(server.asked) == asked
    if isinstance(result, Failure):
        assert (result.key, result.row) == ("k", 7)


def test_a_page_instead_of_a_video_is_reported_as_one(server: Server) -> None:
    result = fetch(f"{server.url}/clip?page=1")
    assert isinstance(result, Failure) and "a web page, 38 bytes" in result.detail
    for data, name in {
        b"": "an empty file",
        b"\n<!-- x -->\n<!DOCTYPE HTML>": "a web page",
        b"<?xml version='1.0'?><Error/>": "XML",
        b'{"error": 1}': "JSON",
        b"RIFF\n...WEBPVP8 ": "a picture",
        b"\x1f\x8b\x08": "a compressed file",
    }.items():
        assert looks_like(data).startswith(name), data
    assert looks_like(b"\x00\x01") == "2 bytes that begin b'\\x00\\x01'"


def test_a_site_that_opts_out_is_respected_by_default(server: Server) -> None:
    url = f"{server.url}/clip?robots=nofollow|noindex"
    result = fetch(url)
    assert reason(result) == "robots_opt_out"
    assert reason(fetch(url, replace(FAST, respect_robots=False))) == "ok"


@pytest.mark.parametrize(
    ("tags", "out"),
    [
        (["noai"], True),
        (["nofollow, NoImageAI"], True),
        (["none"], True),
        (["trip-i2v: noindex"], True),
        (["*: noindex"], True),
        (["googlebot: noindex, noai"], False),
        (["googlebot: nofollow, trip-i2v: noai"], True),
        (["googlebot: noindex", "noai"], True),
        (["max-snippet: 20, noindex"], True),
        (["unavailable_after: Friday, 25-Jun-10 15:00:00 GMT, noindex"], True),
        (["all"], False),
        ([], False),
    ],
)
def test_the_robots_header_is_read_as_it_is_meant(tags: list[str], out: bool) -> None:
    assert opts_out(tags) is out


def test_a_pause_is_in_seconds_or_a_date_and_anything_else_is_none() -> None:
    assert seconds_to_wait("7") == 7.0 and seconds_to_wait("Mon, 01 Jan 2024 00:00:00 GMT") == 0.0
    assert seconds_to_wait("Fri, 01 Jan 2100 00:00:00 GMT") > 1e9  # type: ignore[operator]
    for nonsense in ("", "soon", "-1", "Mon, 01 Jan 2024 00:00:00 +999999999999", "99 99 9999"):
        assert seconds_to_wait(nonsense) is None


def test_attempts_are_reported(server: Server) -> None:
    healed = fetch(f"{server.url}/clip?status=503&heals=2")
    assert isinstance(healed, Fetched) and healed.attempts == 2
    failed = fetch(f"{server.url}/clip?status=503")
    assert isinstance(failed, Failure) and failed.detail.endswith(", 3 attempts")


def test_classes_of_reasons_for_a_later_run_do_not_overlap() -> None:
    words = [word for reasons in RETRY_CLASSES.values() for word in reasons]
    assert len(words) == len(set(words))
    assert "http_403" in RETRY_CLASSES["throttled"] and not {"http_404", "not_a_video", "robots_opt_out"} & set(words)


def test_one_host_gets_no_more_than_its_share_and_waiting_for_it_is_no_timeout(server: Server) -> None:
    refs = [ClipRef(f"k{i}", f"{server.url}/clip?wait=0.2&n={i}", "c", i) for i in range(12)]
    spec = replace(FAST, concurrency=12, per_host=2, total_seconds=0.5, attempts=1)
    assert [reason(result) for _, result in download_clips(refs, SourceSpec("/nowhere/t.csv"), spec)] == ["ok"] * 12
    assert server.most_at_once == 2


def test_a_header_that_announces_too_much_is_believed_without_reading(server: Server) -> None:
    result = fetch(f"{server.url}/clip?length=300000000")
    assert isinstance(result, Failure) and result.reason == "too_large" and "300000000" in result.detail


def test_redirects_without_end_are_left(server: Server) -> None:
    assert reason(fetch(f"{server.url}/round")) == "too_many_redirects" and len(server.asked) == 6
    nowhere = "/a?status=301&to=/a%3Fstatus%3D301"  # the second hop names no place to go
    assert reason(fetch(f"{server.url}{nowhere}")) == "http_301"


def test_a_closed_port_is_the_network() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert reason(fetch(f"http://127.0.0.1:{port}/x.mp4")) == "network"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_a_table_cannot_name_an_address_inside(server: Server, host: str) -> None:
    port = server.server_address[1]
    result = fetch(f"http://{host}:{port}/clip", replace(FAST, allow_private=False))
    assert reason(result) == "blocked_address" and not server.asked


def test_a_redirect_and_a_name_cannot_lead_inside_either(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = replace(FAST, allow_private=False)
    declared = SourceSpec("/nowhere/t.csv", base_url=server.url)
    assert reason(fetch("clip", guarded, declared)) == "ok"
    other = f"http://127.0.0.2:{server.server_address[1]}/clip"
    assert reason(fetch(f"clip?status=302&to={other}", guarded, declared)) == "blocked_address"

    async def rebound(self: object, host: str, port: int = 0, family: int = 0) -> list[dict]:
        return [{"hostname": host, "host": "192.168.0.9", "port": port, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr(addresses.aiohttp.ThreadedResolver, "resolve", rebound)
    assert reason(fetch("http://clips.example/a.mp4", guarded)) == "blocked_address"


# Hosts that some parser, resolver or kernel takes for this machine; `{port}` is that of a real server on loopback.
INSIDE = {
    "full-width digits": "１２７.0.0.1:{port}",
    "circled digits": "①②⑦.0.0.1:{port}",
    "superscripts": "¹²⁷.⁰.⁰.¹:{port}",
    "mathematical digits": "𝟏𝟐𝟕.𝟎.𝟎.𝟏:{port}",
    "Arabic-Indic digits": "١٢٧.٠.٠.١:{port}",
    "Devanagari digits": "१२७.०.०.१:{port}",
    "ideographic full stops": "127。0．0｡1:{port}",
    "a full-width name": "ｌｏｃａｌｈｏｓｔ:{port}",
    "circled letters": "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{port}",
    "one decimal number": "2130706433:{port}",
    "hexadecimal": "0x7f.1:{port}",
    "octal": "0177.0.0.1:{port}",
    "two parts": "127.1:{port}",
    "IPv4-compatible": "[::127.0.0.1]:{port}",
    "IPv4-mapped": "[::ffff:127.0.0.1]:{port}",
    "IPv4-translated": "[::ffff:0:127.0.0.1]:{port}",
    "NAT64": "[64:ff9b::127.0.0.1]:{port}",
    "6to4": "[2002:7f00:1::]:{port}",
    "a zone": "[::1%25lo]:{port}",
    "a zone of IPv4-mapped": "[::ffff:127.0.0.1%25lo]:{port}",
    "a trailing dot": "127.0.0.1.:{port}",
    "two trailing dots": "127.0.0.1..:{port}",
    "a name with a dot": "localhost.:{port}",
    "user information": "public.example@127.0.0.1:{port}",
    "user information of full-width digits": "public.example:80@１２７.0.0.1:{port}",
    "a backslash before": "public.example\\@127.0.0.1:{port}",
    "a backslash behind": "127.0.0.1:{port}\\@public.example",
    "a fragment": "127.0.0.1:{port}#@public.example",
    "an escaped dot": "127%2e0.0.1:{port}",
    "an escaped digit": "%31%32%37.0.0.1:{port}",
}


@pytest.mark.parametrize("host", INSIDE)
def test_no_spelling_of_an_address_inside_is_connected_to(server: Server, host: str) -> None:
    guarded = replace(FAST, allow_private=False, attempts=1)
    inside = f"http://{INSIDE[host].format(port=server.server_address[1])}/inside"
    refused = {"blocked_address", "bad_url", "network"}  # what no resolver takes for an address is a host not found
    assert reason(fetch(inside, guarded)) in refused and server.asked == []

    first = Server()  # the declared one, which sends its callers on
    first.location = inside
    threading.Thread(target=first.serve_forever, daemon=True).start()
    try:
        result = fetch("hop", guarded, SourceSpec("/nowhere/t.csv", base_url=first.url))
    finally:
        first.shutdown()
        first.server_close()
    assert first.asked == ["/hop"] and reason(result) in refused and server.asked == []


@pytest.mark.parametrize(
    "host", ["１２７.0.0.1:{port}", "127。0．0｡1:{port}", "[::127.0.0.1]:{port}", "①②⑦.0.0.1:{port}"]
)
def test_an_address_inside_is_blocked_where_it_is_connected_to(
    server: Server, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """What reads the URL may be mistaken: the address of the connection is checked too."""
    monkeypatch.setattr(addresses.AddressGuard, "check", lambda self, url: None)
    result = fetch(f"http://{host.format(port=server.server_address[1])}/x", replace(FAST, allow_private=False))
    assert reason(result) == "blocked_address" and server.asked == []


def test_a_declared_url_opens_its_own_scheme_and_port_and_no_other(server: Server) -> None:
    guarded, port = replace(FAST, allow_private=False, attempts=1), server.server_address[1]
    for declared in ("http://localhost/", "http://127.0.0.1/", f"https://127.0.0.1:{port}/", "http://127.0.0.1:9/"):
        for host in ("localhost", "127.0.0.1"):
            source = SourceSpec("/nowhere/t.csv", base_url=declared)
            assert reason(fetch(f"http://{host}:{port}/x", guarded, source)) == "blocked_address", (declared, host)
    assert server.asked == []
    for declared in (f"http://localhost:{port}/", f"http://LOCALHOST:{port}/", server.url):
        assert reason(fetch("clip", guarded, SourceSpec("/nowhere/t.csv", base_url=declared))) == "ok"
    with pytest.raises(UserError, match=r"is not a URL .*give one as http://host:port/"):
        fetch("clip", guarded, SourceSpec("/nowhere/t.csv", base_url="http://[bad"))


def test_public_means_global_and_undisguised() -> None:
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1::1")
    inside = ["127.0.0.1", "10.1.1.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
    disguised = ["224.0.0.1", "::1", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1"]
    disguised += ["::127.0.0.1", "::ffff:0:10.0.0.1", "fec0::1", "ff0e::1", "2001:0:7f00:1::", "64:ff9b:1::7f00:1"]
    assert not any(is_public(address) for address in inside + disguised)


def test_files_are_read_next_to_the_table_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "set" / "videos").mkdir(parents=True)
    (tmp_path / "set" / "videos" / "a.mp4").write_bytes(VIDEO)
    (tmp_path / "secret.mp4").write_bytes(VIDEO)
    beside = SourceSpec(str(tmp_path / "set" / "t.csv"))
    assert reason(fetch("videos/a.mp4", source=beside)) == "ok"
    assert reason(fetch("videos/./a.mp4", source=beside)) == "ok"
    assert reason(fetch("videos/none.mp4", source=beside)) == "missing_file"
    assert reason(fetch("videos", source=beside)) == "unreadable_file"
    for url in (
        "../secret.mp4",
        "videos/../../secret.mp4",
        str(tmp_path / "secret.mp4"),
        f"file://{tmp_path}/secret.mp4",
    ):
        assert reason(fetch(url, source=beside)) == "blocked_address"
    remote = SourceSpec("https://host/t.csv")
    assert reason(fetch(f"file://{tmp_path}/set/videos/a.mp4", source=remote)) == "blocked_address"


@pytest.mark.parametrize("url", ["http://", "http://[bad", "http://host:99999/x", "http://127.1/x", "//[bad"])
def test_a_url_that_is_none_is_one_failed_row(url: str) -> None:
    assert reason(fetch(url, source=SourceSpec("https://host/t.csv"))) == "bad_url"


def test_a_failure_keeps_no_secret_of_its_url(server: Server) -> None:
    url = server.url.replace("http://", "http://ops:hunter2@") + "/clip?status=404&token=hunter2"
    failed = fetch(url)
    assert isinstance(failed, Failure) and failed.reason == "http_404" and "hunter2" not in failed.detail
    assert failed.detail.startswith(f"{name_of(url)}: ")
    assert isinstance(fetch(url.replace("status=404&", "")), Fetched)


def test_results_come_in_order_and_never_more_at_once_than_asked(server: Server) -> None:
    refs = [ClipRef(f"k{i}", f"{server.url}/clip?wait={0.1 if i % 5 == 0 else 0}&n={i}", "c", i) for i in range(30)]
    results = list(download_clips(refs, SourceSpec("/nowhere/t.csv"), replace(FAST, concurrency=4)))
    assert [ref for ref, _ in results] == refs and all(isinstance(result, Fetched) for _, result in results)
    assert 1 < server.most_at_once <= 4


def test_a_caller_that_stops_early_leaves_no_thread_behind(server: Server) -> None:
    before = threading.active_count()
    refs = [ClipRef(f"k{i}", f"{server.url}/clip?wait=0.2&n={i}", "c", i) for i in range(8)]
    clips = download_clips(refs, SourceSpec("/nowhere/t.csv"), replace(FAST, concurrency=2))
    next(clips)
    clips.close()
    names = [thread.name for thread in threading.enumerate()]
    assert "download" not in names and threading.active_count() <= before + 4  # the server's own threads may linger


def test_containers_are_known_by_their_first_bytes() -> None:
    assert is_video(b"\x00\x00\x00\x18ftypisom") and is_video(b"\x1aE\xdf\xa3....") and is_video(b"RIFF....AVI LIST")
    for other in (b"", b"<html>", b"RIFF....WEBPVP8 ", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04"):
        assert not is_video(other)


def test_a_process_that_is_ended_in_a_download_ends(server: Server) -> None:
    """A Ray actor that is killed leaves the download to the end of its interpreter, when no thread runs any more."""
    program = f"""
from tasks.ingest.download import download_clips
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import ClipRef

refs = [ClipRef(key=str(n), row=n, url="{server.url}/clip?wait=" + str(30 * n), caption="") for n in range(3)]
spec = DownloadSpec(allow_private=True, concurrency=2)
downloads = download_clips(refs, SourceSpec(table="unused.csv"), spec)
print(type(next(downloads)[1]).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.returncode) == ("Fetched\n", 0), done.stderr
