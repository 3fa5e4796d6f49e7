"""Calls to an address of the caller: signed, repeated a bounded number of times, and never into the private network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import jsonschema
import pytest

from flows.cli.app import main
from tasks.serve.api import AppOptions
from tasks.serve.callbacks import SECRET_VARIABLE, CallbackOptions, Callbacks, signature
from tasks.serve.keys import Keys, key_line
from tasks.serve.limits import Refusal
from tasks.serve.openapi import VIDEO
from tests.serve.test_videos import PHOTO, ended, submit, wait
from tests.support.service import QuickBackend, running_service

SECRET = "a secret of the operator, long enough"


@dataclass
class Receiver:
    """A server that records what it receives, and answers with the next of its statuses."""

    statuses: list[int] = field(default_factory=list)
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    port: int = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def events(self) -> list[str]:
        return [json.loads(body)["type"] for _, body in self.received]


@contextmanager
def receiving(*statuses: int) -> Iterator[Receiver]:
    receiver = Receiver(list(statuses))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
            self.send_header("Location", f"http://{receiver.host}/redirected")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.port = server.server_port
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


def options(*hosts: str, delays: tuple[float, ...] = (0, 0.1, 0.1)) -> CallbackOptions:
    return CallbackOptions(SECRET, hosts, delays, seconds=5)


def callback(receiver: Receiver, path: str = "/trip?order=5") -> dict[str, str]:
    return {"Callback-Url": f"http://{receiver.host}{path}"}


def test_a_signature_is_that_of_standard_webhooks() -> None:
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="  # of its specification
    assert signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == expected


def test_the_end_of_a_video_is_called_once_and_signed(tmp_path: Path) -> None:
    with receiving() as receiver, running_service(QuickBackend(), callbacks=options(receiver.host)) as service:
        answer = submit(service.url, headers=callback(receiver))
        video = answer.json()
        assert answer.status_code == 202 and video["callback_url"] == f"http://{receiver.host}/trip?order=5"
        jsonschema.validate(video, VIDEO)
        wait(lambda: receiver.received)
        headers, body = receiver.received[0]
        event = json.loads(body)
        assert event["type"] == "video.completed"
        assert event["data"] == {"id": video["id"], "status": "completed", "error": None}
        assert headers["webhook-id"] == f"{video['id']}.completed" and headers["content-type"] == "application/json"
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
        stamp = int(headers["webhook-timestamp"])
        assert headers["webhook-signature"] == signature(video["callback_secret"], headers["webhook-id"], stamp, body)
        assert "callback_secret" not in ended(service.url, video["id"])
        assert httpx.get(f"{service.url}/v1/videos/{video['id']}/content").status_code == 200
        time.sleep(0.3)
        assert len(receiver.received) == 1


def test_a_call_is_repeated_until_it_is_answered_and_given_up_in_the_end(tmp_path: Path, caplog) -> None:
    with (
        receiving(500, 302, 200) as receiver,
        running_service(QuickBackend(), videos=str(tmp_path), callbacks=options(receiver.host)) as service,
    ):
        submit(service.url, headers=callback(receiver))
        wait(lambda: len(receiver.received) == 3)
        assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1  # a receiver drops repeats by it
        wait(lambda: '"called":true' in next(tmp_path.glob("*.json")).read_text().replace(" ", ""))
        receiver.statuses[:] = [500] * 9
        submit(service.url, headers=callback(receiver))
        wait(lambda: len(receiver.received) == 6)
        time.sleep(0.4)
        assert len(receiver.received) == 6, "as many attempts as delays; a redirect is not followed"
    assert "attempt 3 to call its address failed: status 500" in caplog.text and receiver.host not in caplog.text


def test_a_killed_service_calls_at_its_next_start(tmp_path: Path) -> None:
    with receiving() as receiver:
        late = options(receiver.host, delays=(600,))
        with running_service(QuickBackend(), videos=str(tmp_path), callbacks=late) as service:
            id = submit(service.url, headers=callback(receiver)).json()["id"]
            ended(service.url, id)
            deleted = submit(service.url, headers=callback(receiver)).json()["id"]
            ended(service.url, deleted)
            assert httpx.delete(f"{service.url}/v1/videos/{deleted}").status_code == 200
        for _ in range(2):
            soon = options(receiver.host)
            with running_service(QuickBackend(), videos=str(tmp_path), callbacks=soon):
                wait(lambda: receiver.received)
                time.sleep(0.3)
        assert [json.loads(body)["data"]["id"] for _, body in receiver.received] == [id]


def test_a_failed_and_a_cancelled_video_are_called_too() -> None:
    class Refusing(QuickBackend):
        async def stream(self, animation, seconds):
            if animation.prompt == "bad":
                yield Refusal(422, "steps is bad")
                return
            async for message in super().stream(animation, seconds):
                yield message

    with receiving() as receiver, running_service(Refusing(30), callbacks=options(receiver.host)) as service:
        submit(service.url, "bad", headers=callback(receiver))
        wait(lambda: receiver.events == ["video.failed"])
        assert json.loads(receiver.received[0][1])["data"]["error"] == {"status": 422, "message": "steps is bad"}
        id = submit(service.url, headers=callback(receiver)).json()["id"]
        httpx.post(f"{service.url}/v1/videos/{id}/cancel")
        wait(lambda: receiver.events == ["video.failed", "video.cancelled"])


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{port}/", "http://2130706433:{port}/", "http://[::1]:{port}/", "http://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/", "http://[fd00::1]/", "http://0.0.0.0:{port}/",
        "file:///etc/passwd", "ftp://example.com/", "gopher://example.com/", "/relative", "", "http://",
        "http://user:password@example.com/", "http://example.com/" + "a" * 2000, "http://example.com:99999/",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_refused_at_once_or_never_connected_to(address: str) -> None:
    with receiving() as receiver, running_service(QuickBackend(), callbacks=options()) as service:
        answer = submit(service.url, headers={"Callback-Url": address.format(port=receiver.port)})
        if answer.status_code == 202:  # a name: it is resolved when it is called
            assert "2130706433" in address
            ended(service.url, answer.json()["id"])
            time.sleep(0.5)
        else:
            assert answer.status_code == 422 and "the Callback-Url" in answer.json()["error"]["message"]
        assert not receiver.received


def test_a_name_of_the_private_network_is_not_connected_to(caplog) -> None:
    """The name passes the check of the address, as one whose owner points it at 127.0.0.1 later does."""
    with receiving() as receiver:
        headers = {"Callback-Url": f"http://localhost:{receiver.port}/"}
        with running_service(QuickBackend(), callbacks=options()) as service:
            assert submit(service.url, headers=headers).status_code == 202
            wait(lambda: caplog.text.count("localhost is not a public address") == 3)
        assert not receiver.received
        with running_service(QuickBackend(), callbacks=options(f"localhost:{receiver.port}")) as service:
            assert submit(service.url, headers=headers).status_code == 202
            wait(lambda: receiver.received)


def test_a_proxy_of_the_environment_is_not_used(monkeypatch) -> None:
    with receiving() as receiver, receiving() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.host}")
        with running_service(QuickBackend(), callbacks=options(receiver.host)) as service:
            answer = httpx.post(
                f"{service.url}/v1/videos", data={"prompt": "a cat"}, files={"image": PHOTO},
                headers=callback(receiver), trust_env=False,
            )  # fmt: skip
            assert answer.status_code == 202
            wait(lambda: receiver.received)
        assert not proxy.received


def test_callers_have_secrets_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(key_line("alice", "a") + key_line("bob", "b"))
    app = AppOptions(keys=Keys(tmp_path / "keys"))
    with receiving() as receiver, running_service(QuickBackend(), app, callbacks=options(receiver.host)) as service:
        secrets = {
            submit(service.url, headers={"X-API-Key": key} | callback(receiver)).json()["callback_secret"]
            for key in "aabb"
        }
        assert len(secrets) == 2 and all(secret.startswith("whsec_") for secret in secrets)
        assert SECRET not in str(secrets) + repr(Callbacks(options()).options)
        wait(lambda: len(receiver.received) == 4)


def test_one_idempotency_key_has_one_address() -> None:
    with receiving() as receiver, running_service(QuickBackend(), callbacks=options(receiver.host)) as service:
        key = {"Idempotency-Key": "order-1"}
        first, again = (submit(service.url, headers=key | callback(receiver)) for _ in range(2))
        assert first.json()["id"] == again.json()["id"]
        assert first.json()["callback_secret"] == again.json()["callback_secret"]
        other = submit(service.url, headers=key | callback(receiver, "/other"))
        assert other.status_code == 409
        wait(lambda: receiver.received)
        time.sleep(0.2)
        assert len(receiver.received) == 1


def test_addresses_are_refused_unless_the_operator_allows_them(monkeypatch, capsys) -> None:
    with receiving() as receiver, running_service(QuickBackend()) as service:
        answer = submit(service.url, headers=callback(receiver))
        assert answer.status_code == 422 and "calls no addresses" in answer.json()["error"]["message"]
        parameters = httpx.get(f"{service.url}/openapi.json").json()["paths"]["/v1/videos"]["post"]["parameters"]
        assert [parameter["name"] for parameter in parameters] == ["Idempotency-Key"]
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    assert main(["serve", "--callbacks", "--tracking-uri", "sqlite:///none.db"]) == 2
    assert "none.db" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"{SECRET_VARIABLE} has 5 characters, expected at least 24"):
        CallbackOptions("short")
    with pytest.raises(ValueError, match="no HOST or HOST:PORT"):
        options("http://internal/")
