"""The limits of the server: connections, heads, slow bodies, rates, hosts; the access log; TLS, paths, draining."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry

from tasks.register.packaging import drawn_photo
from tasks.serve.api import AppOptions, create_app
from tasks.serve.connections import Connections
from tasks.serve.gateway import Gateway, Server
from tasks.serve.request_log import ACCESS_LOG
from tasks.serve.server_limits import ServerLimits
from tasks.serve.videos import Videos
from tests.support.service import QuickBackend, running_service

FORM = {"data": {"prompt": "a cat"}, "files": {"image": drawn_photo(48)}}


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def until(what: Callable[[], object], seconds: float = 20) -> float:
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds
        time.sleep(0.02)
    return time.monotonic() - start


def closes(connection: socket.socket, seconds: float = 10) -> bytes:
    """What the server sends until it closes the connection."""
    connection.settimeout(seconds)
    data = b""
    try:
        while part := connection.recv(2**16):
            data += part
    except ConnectionResetError:
        pass
    connection.close()
    return data


def test_slow_heads_and_slow_bodies_are_cut_off_and_others_are_answered():
    limits = ServerLimits(head_seconds=0.6, body_seconds=0.6, body_rate=2**20)
    with running_service(QuickBackend(), AppOptions(limits)) as service:
        slow = [socket.create_connection(service.address) for _ in range(20)]
        head = b"POST /v1/animate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        for connection in slow[:10]:
            connection.sendall(head)
        for connection in slow[10:]:
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        assert httpx.post(f"{service.url}/v1/animate", **FORM).status_code == 200
        ends = [closes(connection) for connection in slow]
        assert set(ends[:10]) == {b""}
        assert all(end.startswith(b"HTTP/1.1 408 ") and b"was not received within" in end for end in ends[10:])
        assert metric(service.url, 'trip_connections_closed_total{reason="head"}') == 10
        timeouts = 'trip_http_requests_total{method="POST",route="/v1/animate",status="408"}'
        assert metric(service.url, timeouts) == 10


def test_a_slow_sender_of_few_bytes_each_second_is_cut_off_too():
    limits = ServerLimits(body_seconds=0.5, body_rate=1000)
    with running_service(QuickBackend(), AppOptions(limits)) as service:
        connection = socket.create_connection(service.address)
        connection.sendall(
            b"POST /v1/animate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
        )
        start = time.monotonic()

        def drip() -> None:
            while time.monotonic() < start + 15:
                connection.sendall(b"x")
                time.sleep(0.05)

        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            drip()
        connection.close()
        assert time.monotonic() - start < 10


def test_one_connection_too_many_closes_the_oldest_without_a_request():
    with running_service(QuickBackend(), AppOptions(ServerLimits(connections=8))) as service:
        idle = [socket.create_connection(service.address) for _ in range(8)]
        until(lambda: len(service.server.server_state.connections) == 8)
        assert httpx.post(f"{service.url}/v1/animate", **FORM).status_code == 200
        assert closes(idle.pop(0)) == b""
        assert metric(service.url, 'trip_connections_closed_total{reason="number"}') >= 1
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("parts", [1, 50])
def test_a_head_of_300_kb_is_refused(parts):
    with running_service(QuickBackend()) as service, socket.create_connection(service.address) as connection:
        head = b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"a" * 6000) for n in range(50))
        try:
            for part in range(parts):
                connection.sendall(head[part * len(head) // parts : (part + 1) * len(head) // parts])
            connection.sendall(b"\r\n")
        except OSError:
            pass
        assert closes(connection)[:12] in (b"HTTP/1.1 431", b"")  # the reset may be faster
        assert metric(service.url, 'trip_connections_closed_total{reason="head_bytes"}') == 1


def test_a_refused_body_is_discarded_for_a_short_time_only():
    with running_service(QuickBackend()) as service, socket.create_connection(service.address) as connection:
        connection.sendall(b"POST /v1/animate HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n")
        start = time.monotonic()
        assert b"413" in closes(connection)[:20] and time.monotonic() - start < 5


def test_bodies_in_memory_are_bounded():
    limits = ServerLimits(body_memory=200_000)
    with running_service(QuickBackend(0.7), AppOptions(limits)) as service:
        big = {"data": {"prompt": "a"}, "files": {"image": drawn_photo(48) + bytes(80_000)}}
        statuses: list[int] = []

        def send() -> None:
            statuses.append(httpx.post(f"{service.url}/v1/animate", timeout=20, **big).status_code)

        threads = [threading.Thread(target=send) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses.count(200) == 2 and statuses.count(503) == 3
        assert httpx.post(f"{service.url}/v1/animate", **big).status_code == 200  # the memory is free again


def test_the_rate_of_a_caller_is_limited_and_reading_is_not():
    options = AppOptions(ServerLimits(requests_per_minute=60, burst=5))
    with running_service(QuickBackend(), options) as service, httpx.Client(base_url=service.url) as client:
        statuses = [client.post("/v1/animate", **FORM).status_code for _ in range(8)]
        assert statuses[:5] == [200] * 5 and 429 in statuses[5:]
        refused = next(r for r in iter(lambda: client.post("/v1/videos", **FORM), None) if r.status_code == 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 3 and "60 requests per minute" in refused.text
        assert {client.get("/v1/videos").status_code for _ in range(20)} == {200}
        time.sleep(1.1)
        assert client.post("/v1/animate", **FORM).status_code == 200


def test_only_trusted_hosts_are_served():
    options = AppOptions(hosts=("127.0.0.1", "trip.example.org", "::1"))
    with running_service(QuickBackend(), options) as service:
        for host, status in (
            ("127.0.0.1:8000", 200),
            ("Trip.Example.org", 200),
            ("[::1]:8000", 200),
            ("evil.example", 400),
        ):
            answer = httpx.get(f"{service.url}/v1/model", headers={"Host": host})
            assert answer.status_code == status, host


def test_other_origins_are_allowed_by_option_only():
    asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    options = AppOptions(origins=("https://app.example",))
    with running_service(QuickBackend(), options) as service, httpx.Client(base_url=service.url) as client:
        assert client.options("/v1/videos", headers=asks).headers["access-control-allow-origin"] == asks["Origin"]
        answer = client.post("/v1/animate", headers={"Origin": asks["Origin"], "Sec-Fetch-Site": "cross-site"}, **FORM)
        assert answer.status_code == 200 and "X-Seed" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        other = client.post("/v1/animate", headers={"Origin": "https://evil.example"}, **FORM)
        assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


def test_every_request_is_one_line_of_the_log_and_one_count(caplog):
    caplog.set_level(logging.INFO, ACCESS_LOG)
    with running_service(QuickBackend(0.5)) as service:
        with httpx.Client(base_url=service.url) as client:
            trace = {"traceparent": f"00-{'a1' * 16}-{'b2' * 8}-01"}
            client.post("/v1/animate", headers={"X-Request-Id": "abc", **trace}, **FORM)
            client.get("/nothing")
            client.head("/livez")
        connection = socket.create_connection(service.address)
        connection.sendall(
            b"POST /v1/animate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        time.sleep(0.2)
        connection.close()  # breaks off its upload
        aborted = 'trip_http_requests_total{method="POST",route="/v1/animate",status="499"}'
        until(lambda: metric(service.url, aborted) == 1)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == ACCESS_LOG]
    lines = [line for line in lines if line["path"] != "/metrics"]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/v1/animate", 200), ("GET", "/nothing", 404), ("HEAD", "/livez", 200), ("POST", "/v1/animate", 499),
    ]  # fmt: skip
    assert [line["trace_id"] for line in lines] == ["a1" * 16, "", "", ""]
    assert lines[0]["request_id"] == "abc" and lines[0]["bytes_received"] > 300 and lines[0]["client"] == "127.0.0.1"


def test_an_error_of_the_application_is_logged_with_the_request_id_and_tells_nothing(caplog):
    backend = QuickBackend()
    backend.stream = lambda *_: (_ for _ in ()).throw(RuntimeError("/a/path/of/the/server"))  # type: ignore[method-assign]
    with running_service(backend) as service:
        answer = httpx.post(f"{service.url}/v1/animate", **FORM)
    assert answer.status_code == 500 and "/a/path" not in answer.text and "Traceback" not in answer.text
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
    assert f"request {answer.headers['x-request-id']} failed" in caplog.text


def test_below_a_root_path_everything_works():
    service_below = running_service(QuickBackend(), root_path="/trip")  # a proxy removes the prefix
    with service_below as service, httpx.Client(base_url=service.url) as client:
        assert {client.get(path).status_code for path in ("/", "/page.js", "/healthz", "/docs")} == {200}
        assert "/trip/openapi.json" in client.get("/docs").text
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/trip"}]
        video = client.post("/v1/videos", **FORM)
        assert video.status_code == 202 and video.headers["location"] == f"/trip/v1/videos/{video.json()['id']}"


def test_tls(tmp_path: Path):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(private)
    files = {"ssl_certfile": str(tmp_path / "cert.pem"), "ssl_keyfile": str(tmp_path / "key.pem")}
    with running_service(QuickBackend(), **files) as service:
        trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        address = service.url.replace("http://", "https://")
        assert httpx.get(f"{address}/healthz", verify=trusting).text == "ok\n"


def test_draining_is_unready_first_then_refuses_then_completes_what_was_accepted(tmp_path):
    gateway = Gateway(QuickBackend(1.5), 60)
    limits = ServerLimits()

    async def go() -> list[int]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            connections = Connections(limits, CollectorRegistry())
            app = create_app(gateway, Videos(gateway, str(tmp_path)))
            config = uvicorn.Config(app, http=connections, ws="none", lifespan="on", log_level="warning",
                                    timeout_graceful_shutdown=1)  # type: ignore[arg-type]  # fmt: skip
            server = Server(config, gateway, pause_seconds=0.6)
            running = asyncio.create_task(server.serve([listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                first = asyncio.create_task(client.post("/v1/animate", **FORM))
                await asyncio.sleep(0.3)
                server.handle_exit(signal.SIGTERM, None)
                statuses = [(await client.get("/readyz")).status_code, (await client.get("/livez")).status_code]
                second = asyncio.create_task(client.post("/v1/animate", **FORM))  # in the pause
                await asyncio.sleep(0.8)
                statuses += [(await client.post("/v1/animate", **FORM)).status_code]
                statuses += [(await client.post("/v1/videos", **FORM)).status_code]
                statuses += [(await first).status_code, (await second).status_code]
            await running
            return statuses

    assert asyncio.run(go()) == [503, 200, 503, 503, 200, 200]
