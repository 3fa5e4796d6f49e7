"""Hostile requests over a real connection: files by name, other sites, huge bodies, broken connections."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tasks.register.packaging import drawn_photo
from tasks.serve.api import AppOptions, create_app
from tasks.serve.engine import Engine
from tasks.serve.gateway import Gateway
from tasks.serve.keys import Keys
from tasks.serve.limits import MAX_BODY_BYTES, read_json
from tasks.serve.messages import EngineSpec
from tasks.serve.server_limits import ServerLimits
from tasks.serve.videos import Videos
from tests.support.reports import write_record
from tests.support.service import running_service
from trip_model.images import load_image
from trip_model.request_limits import MAX_PHOTO_BYTES

PROMPT = "a red circle moving right"
SECRET = "confidential"
UNLIMITED = ServerLimits(requests_per_minute=10**6, burst=10**5)  # test_guard.py has the tests of the rate


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    from tasks.register.registry import RegisterSpec, register

    home = tmp_path_factory.mktemp("attacks")
    write_record(home)
    uri = f"sqlite:///{home}/mlflow.db"
    register(RegisterSpec(str(tiny_model), str(home), uri, check_steps=1), lambda _: None)
    engine = Engine(EngineSpec("trip", "champion", uri, str(home / "cache"), max_queue=4))
    engine.start()
    yield engine
    engine.stop()


@contextmanager
def served(engine: Engine, key: str | None = None) -> Iterator[tuple[str, Gateway]]:
    options = AppOptions(UNLIMITED, Keys(key=key) if key else None)
    with running_service(engine, options) as running:
        yield running.url, running.gateway


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[tuple[str, Gateway]]:
    with served(engine) as running:
        yield running


@pytest.fixture
def client(service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service[0], timeout=60) as client:
        yield client


def good(**changes: Any) -> dict[str, Any]:
    fields = {"image": base64.b64encode(drawn_photo(48)).decode(), "prompt": PROMPT, "num_frames": 2, "steps": 1}
    return {**fields, **changes}


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files that the process can read, among them a database and an image."""
    folder = tmp_path_factory.mktemp("private")
    (folder / "mlflow.db").write_text(SECRET)
    Image.new("RGB", (64, 64), "red").save(folder / "private.png")
    return ["/etc/hostname", "/proc/self/environ", str(folder / "mlflow.db"), str(folder / "private.png")]


def raw(address: str, request: bytes) -> bytes:
    """The response to a request that is sent as it is."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def test_no_path_of_a_request_reads_a_file_of_the_server(service, client, private):
    # The routes of the API, and those that pages made with Gradio have.
    routes = [path.replace("{id}", "ID") for path in client.get("/openapi.json").json()["paths"]]
    routes += ["/", "/page.js", "/static-offline-docs", "/docs", "/static", "/assets", "/file", "/gradio_api"]
    routes += [f"/gradio_api/{name}" for name in ("file=", "stream", "proxy=", "upload", "queue/join", "queue/data")]
    for path in private:
        content = Path(path).read_bytes()[:16].strip()
        for route in routes:
            for climb in ("", "/../../../../../../..", "/..%2f..%2f..%2f..%2f..%2f..", "/%2e%2e/%2e%2e/%2e%2e/%2e%2e"):
                target = route.replace("/ID", climb) if "/ID" in route else route + climb
                for name in (path, path.replace("/", "%2f")):
                    head = f"GET {target}{name} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
                    answer = raw(service[0], head.encode())
                    assert content not in answer, (target, name)
                    assert answer.split(b" ")[1] in (b"404", b"405"), (target, name, answer[:80])


def test_no_field_of_a_request_reads_a_file_of_the_server(client, private):
    for path in private:
        forged = {"path": path, "meta": {"_type": "gradio.FileData"}, "url": f"file://{path}"}
        for route in ("/v1/animate", "/v1/videos"):
            for image in (path, f"file://{path}", f"data:image/png;base64,{path}", forged, [forged], [path]):
                answer = client.post(route, json=good(image=image))
                assert answer.status_code in (400, 422), answer.text
                assert SECRET not in answer.text and "Traceback" not in answer.text
            for fields in ({"image": path}, {"image": f"file://{path}"}, {"image": json.dumps(forged)}):
                assert client.post(route, data={"prompt": PROMPT, **fields}).status_code in (400, 415)
            named = client.post(route, data={"prompt": PROMPT}, files={"image": (path, b"")})
            assert named.status_code == 400 and "image is empty" in named.text
        for route in ("run/animate", "api/predict", "call/animate", "component_server", "queue/join", "upload"):
            body = {"data": [forged, PROMPT, "7", 1, 1, 2, 4, None], "fn_index": 0, "session_hash": "r"}
            assert client.post(f"/gradio_api/{route}", json=body).status_code == 404, route


def test_an_address_is_not_fetched(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"):
            answer = client.post("/v1/animate", json=good(image=f"http://{host}:{port}/a.png"))
            assert answer.status_code == 400 and "not base64" in answer.text
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    "data",
    [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0\0\0\x18ftypheic\0\0\0\0", b"hello", b"<svg/>"],
    ids=["PostScript", "HEIC", "text", "SVG"],
)
def test_a_file_that_is_not_a_photo_is_refused_at_its_field(client, data):
    for route in ("/v1/animate", "/v1/videos"):
        answer = client.post(route, data={"prompt": PROMPT}, files={"image": ("a.png", data)})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "image") and "cannot be read" in error["message"]


def test_an_upload_has_a_maximum_size_and_needs_its_length(client):
    part = b"0" * (MAX_PHOTO_BYTES // 2)
    for route in ("/v1/animate", "/v1/videos"):
        many = client.post(route, files=[("image", (f"{n}.png", part)) for n in range(3)])
        assert many.status_code == 413 and "bytes" in many.json()["error"]["message"]
        several = client.post(route, files=[("image", (f"{n}.png", b"a")) for n in range(3)])
        assert several.status_code == 400 and "Too many files" in several.text
        endless = client.post(route, content=iter([b"{}"]), headers={"Content-Type": "application/json"})
        assert endless.status_code == 411
        packed = client.post(
            route, content=b"{}", headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}
        )
        assert packed.status_code == 415 and "'gzip'" in packed.text


PAGES = ("/", "/v1/model", "/v1/animate", "/v1/videos", "/v1/videos/video_1/cancel")


@pytest.mark.parametrize("host", ["127.0.0.1", "trip.example.org"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
def test_a_page_of_another_site_reads_nothing_and_starts_nothing(client, host, origin):
    headers = {"Host": host, "Origin": origin, "Cookie": "access-token-x=y"}
    for path in PAGES:
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        for method, more in (("GET", {}), ("OPTIONS", ask), ("POST", {})):
            answer = client.request(method, path, headers=headers | more)
            allowed = {name for name in answer.headers if name.startswith("access-control-allow-")}
            assert not allowed & {"access-control-allow-origin", "access-control-allow-credentials"}, (method, path)
            if method == "POST":
                assert answer.status_code == 403 and "another site" in answer.json()["error"]["message"]
    form = client.post("/v1/animate", data={"prompt": PROMPT}, files={"image": drawn_photo(48)}, headers=headers)
    assert form.status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "trip.example.org", "Origin": "https://trip.example.org"}, 200),
        ({"Host": "inside:8000", "Origin": "https://trip.example.org", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "trip.example.org", "Origin": "https://trip.example.org", "Sec-Fetch-Site": "cross-site"}, 403),
        ({}, 200),
    ],
    ids=["own page", "behind a proxy that changes Host", "the browser says cross-site", "a program"],
)
def test_our_page_and_programs_are_accepted(client, headers, status):
    assert client.post("/v1/animate", json=good(), headers=headers).status_code == status


def test_no_header_makes_the_service_name_another_host(client):
    for header in ("X-Forwarded-Host", "X-Gradio-Server", "Host"):
        for path in ("/", "/v1/model", "/docs", "/openapi.json"):
            assert "evil.example" not in client.get(path, headers={header: "evil.example"}).text, (header, path)
        form = {"data": {"prompt": PROMPT, "num_frames": "2", "steps": "1"}, "files": {"image": drawn_photo(48)}}
        answer = client.post("/v1/videos", headers={header: "evil.example"}, **form)
        assert answer.status_code == 202 and answer.headers["location"].startswith("/v1/videos/video_")


def test_the_service_sets_no_cookie_and_its_pages_name_no_other_host(client):
    for path in ("/", "/page.js", "/page.css", "/docs", "/v1/model"):
        answer = client.get(path)
        assert "set-cookie" not in answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        if path != "/docs":
            assert "unsafe-inline" not in answer.headers["content-security-policy"]
            assert not re.search(r"(?<!xmlns=\")https?://", answer.text), path


def test_wrong_methods_and_head_are_answered_by_the_api_and_not_by_the_page(client):
    for method, path, allowed in (("GET", "/v1/animate", "POST"), ("DELETE", "/healthz", "GET")):
        answer = client.request(method, path)
        assert answer.status_code == 405 and allowed in answer.headers["allow"], (method, path)
        assert answer.json()["error"]["status"] == 405
    for path in ("/", "/healthz", "/livez", "/readyz", "/metrics", "/v1/model", "/openapi.json"):
        head, whole = client.head(path), client.get(path)
        assert head.status_code == whole.status_code == 200 and not head.content, path
    assert client.head("/v1/animate").status_code == 405
    assert client.get("/nothing").status_code == 404 and client.get("/nothing").json()["error"]["request_id"]


def huge(shape: str) -> dict[str, Any]:
    """A body of about 20 MB."""
    size = MAX_BODY_BYTES - 2**12
    part = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
    as_json = {"Content-Type": "application/json"}
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    body, headers = {
        "a million keys": lambda: (b"{" + b",".join(b'"%d":1' % key for key in range(1_500_000)) + b"}", as_json),
        "many keys of one object inside": lambda: (b'{"image":{"a":1' + b',"a":1' * (size // 6) + b"}}", as_json),
        "deep lists": lambda: (b'{"image":' + b"[" * size, as_json),
        "deep objects": lambda: (b'{"a":' * (size // 5), as_json),
        "a long list": lambda: (b'{"image":[' + b"1," * (size // 2) + b"1]}", as_json),
        "a giant string": lambda: (b'{"prompt":"' + b"a " * (size // 2) + b'"}', as_json),
        "a string of escapes": lambda: (b'{"image":"' + b"\\u0041" * (size // 6) + b'"}', as_json),
        "a string of quotes": lambda: (b'{"image":"' + b'\\"' * (size // 2) + b'"}', as_json),
        "a string for a number": lambda: (b'{"image":"","prompt":"a","steps":"' + b"9" * size + b'"}', as_json),
        "a giant name": lambda: (b'{"' + b"a" * size + b'":1}', as_json),
        "giant base64": lambda: (b'{"prompt":"a","image":"' + b"AAAA" * (size // 4) + b'"}', as_json),
        "bytes that are no text": lambda: (b'{"image":"' + b"\xff\xc3" * (size // 2) + b'"}', as_json),
        "a giant int": lambda: (b'{"steps":' + b"9" * size + b"}", as_json),
        "a giant float": lambda: (b'{"steps":1.' + b"9" * size + b"}", as_json),
        "spaces": lambda: (b'{"steps":' + b" " * size + b"1}", as_json),
        "many fields": lambda: (b"1\r\n".join(part % b"a" for _ in range(size // 52)), form),
        "a field of boundaries that are none": lambda: (part % b"image" + b"\r\n--" * (size // 4), form),
        "a file of returns": lambda: (part % b'image"; filename="a' + b"\r" * size + b"\r\n--x--", form),
        "headers of a part": lambda: (b"--x\r\n" + b"a: b\r\n" * (size // 6), form),
    }[shape]()
    assert size * 0.7 < len(body) < MAX_BODY_BYTES
    return {"content": body, "headers": headers}


SHAPES = (
    "a million keys", "many keys of one object inside", "deep lists", "deep objects", "a long list", "a giant string",
    "a string of escapes", "a string of quotes", "a string for a number", "a giant name", "giant base64",
    "bytes that are no text", "a giant int", "a giant float", "spaces", "many fields",
    "a field of boundaries that are none", "a file of returns", "headers of a part",
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_huge_body_of_any_shape_is_refused_and_does_not_block_the_event_loop(engine, shape):
    gateway = Gateway(engine, 60)
    request, app = huge(shape), create_app(gateway, Videos(gateway, "memory://huge"))

    async def go() -> tuple[httpx.Response, float]:
        """Returns the response and the longest time that another task of the event loop waited."""
        longest, over = 0.0, False

        async def watch() -> None:
            nonlocal longest
            while not over:
                start = time.perf_counter()
                await asyncio.sleep(0.005)
                longest = max(longest, time.perf_counter() - start)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://trip") as client:
            watching = asyncio.ensure_future(watch())
            answer = await client.post("/v1/animate", **request)
            over = True
            await watching
        return answer, longest

    waits = []
    for _ in range(4):  # a busy machine may delay the process
        answer, longest = asyncio.run(go())
        assert answer.status_code in (400, 413, 422), answer.text
        assert len(answer.json()["error"]["message"]) < 300
        waits.append(longest)
        if longest < 0.2:
            break
    assert min(waits) < 0.2, waits


def test_the_photo_is_cut_out_of_json_and_restored():
    photo = base64.b64encode(np.random.default_rng(1).bytes(200_000)).decode()
    for fields in ({"image": photo, "prompt": 'say "hi", [now]'}, {"prompt": photo, "image": "a"}, {"a": [photo]}):
        body = json.dumps(fields).encode()
        if "a" in fields:
            assert read_json(body)["a"] != [photo]  # no value of a request is a list
        else:
            assert read_json(body) == read_json(body.replace(b"/", b"\\/")) == fields
    with pytest.raises(ValueError, match="besides the photo"):
        read_json(json.dumps({"image": photo, "prompt": photo}).encode())
    assert read_json(json.dumps([photo]).encode()) != {}


def test_padding_inside_of_base64_is_refused_also_at_the_end_of_a_part(client):
    text = ("A" * (2**20 - 4) + "AA==") * 2
    answer = client.post("/v1/animate", json=good(image=text))
    assert answer.status_code == 400 and "not base64" in answer.json()["error"]["message"]


def bad_exif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80), (20, 120, 220)).save(buffer, "PNG", exif=b"Exif\0\0garbage!data")
    return buffer.getvalue()


def test_malformed_exif_is_ignored(client):
    pixels = load_image(bad_exif(), 32)
    assert pixels.shape == (32, 32, 3) and (pixels == (20, 120, 220)).all()
    answer = client.post("/v1/animate", json=good(image=base64.b64encode(bad_exif()).decode()))
    assert answer.status_code == 200


@pytest.mark.parametrize("place", ["load_image", "generate", "_clip"])
def test_a_request_that_raises_gets_a_response_and_the_engine_continues(client, engine, monkeypatch, place):
    def fail(*_: Any, **__: Any) -> None:
        raise RecursionError("a decoder went wrong")

    with monkeypatch.context() as patch:
        if place == "load_image":
            patch.setattr("tasks.serve.engine.load_image", fail)
        elif place == "generate":
            patch.setattr(type(engine._live.pipe), "generate", fail)
        else:
            patch.setattr(engine, "_clip", fail)
        answer = client.post("/v1/animate", json=good())
    assert answer.status_code == (400 if place == "load_image" else 500)
    assert "RecursionError" in answer.json()["error"]["message"] and "went wrong" not in answer.text
    assert engine.alive() and client.post("/v1/animate", json=good()).status_code == 200


def hang_up(address: str, accept: str, **changes: Any) -> None:
    """Sends a request and closes the connection without waiting for the response."""
    body = json.dumps(good(**changes)).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/animate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.3)


def until(what: Any, seconds: float = 20) -> float:
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds
        time.sleep(0.01)
    return time.monotonic() - start


@pytest.mark.parametrize("accept", ["video/mp4", "application/json", "application/x-ndjson"])
def test_a_client_that_disconnects_leaves_the_queue_at_once(service, engine, client, accept):
    address, gateway = service
    long = {"num_frames": 16, "steps": 1000}
    with socket.create_connection(tuple(address.removeprefix("http://").split(":"))) as first:  # type: ignore[arg-type]
        body = json.dumps(good(**long)).encode()
        first.sendall(
            b"POST /v1/animate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        until(lambda: gateway.in_flight == 1 and not engine._waiting)
        before = ended(client, 499)
        threads = [threading.Thread(target=hang_up, args=(address, accept), kwargs=long) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: len(engine._waiting) == 4)
        for thread in threads:
            thread.join()
        assert until(lambda: not engine._waiting) < 1
        assert gateway.in_flight == 1  # the first is still computed
    assert until(lambda: not gateway.in_flight) < 1  # and not any more
    until(lambda: ended(client, 499) == before + 5)
    assert client.post("/v1/animate", json=good()).status_code == 200


def ended(client: httpx.Client, status: int) -> float:
    """The number of requests that ended with a status, from /metrics."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(f'trip_requests_total{{status="{status}"}}'))


def test_an_interrupted_upload_is_counted_and_logs_no_error(service, client, caplog):
    host, port = service[0].removeprefix("http://").split(":")
    before = ended(client, 499)
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/animate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        time.sleep(0.2)
    until(lambda: ended(client, 499) == before + 1)
    assert "failed" not in caplog.text
