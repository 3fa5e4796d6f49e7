"""Videos in the background: the line, results, cancel, expiry, idempotency keys, owners, restarts and lost stores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from infra.settings import CHECKOUT
from tasks.register.packaging import drawn_photo
from tasks.serve.api import AppOptions
from tasks.serve.keys import Keys, key_line
from tasks.serve.limits import Refusal
from tasks.serve.openapi import ERROR, VIDEO, VIDEO_LIST
from tasks.serve.server_limits import VideoLimits
from tests.support.service import QuickBackend, running_service

PHOTO = drawn_photo(48)


def submit(url: str, prompt: str = "a cat", headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    data = {"prompt": prompt, **{name: str(value) for name, value in fields.items()}}
    return httpx.post(f"{url}/v1/videos", data=data, files={"image": PHOTO}, headers=headers, timeout=20)


def show(url: str, id: str) -> dict[str, Any]:
    video = httpx.get(f"{url}/v1/videos/{id}").json()
    jsonschema.validate(video, VIDEO)
    return video


def wait(what: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def ended(url: str, id: str) -> dict[str, Any]:
    return wait(lambda: (video := show(url, id))["completed_at"] and video)


def test_a_video_waits_in_line_runs_completes_and_is_read(tmp_path):
    backend = QuickBackend(4)
    with running_service(backend, videos=str(tmp_path)) as service:
        answers = [submit(service.url, f"number {n}", seed=n) for n in range(3)]
        assert {answer.status_code for answer in answers} == {202}
        ids = [answer.json()["id"] for answer in answers]
        assert answers[2].headers["location"] == f"/v1/videos/{ids[2]}"
        wait(lambda: show(service.url, ids[0])["status"] == "in_progress")
        assert [show(service.url, id)["place"] for id in ids[1:]] == [1, 2]
        early = httpx.get(f"{service.url}/v1/videos/{ids[2]}/content")
        assert early.status_code == 409 and "is queued" in early.json()["error"]["message"]
        progress = wait(lambda: (video := show(service.url, ids[0]))["step"] and video)
        assert progress["steps_total"] == 4 and 0 < progress["progress"] <= 100
        backend.seconds = 0.1
        for n, id in enumerate(ids):
            video = ended(service.url, id)
            assert (video["status"], video["progress"], video["seed"], video["version"]) == ("completed", 100, n, "1")
            content = httpx.get(f"{service.url}/v1/videos/{id}/content")
            assert content.content == f"number {n} {n} {len(PHOTO)}".encode()
            assert (
                content.headers["content-type"] == "video/mp4"
                and f"trip-{n}.mp4" in content.headers["content-disposition"]
            )
        listed = httpx.get(f"{service.url}/v1/videos", params={"limit": 2}).json()
        jsonschema.validate(listed, VIDEO_LIST)
        assert [video["id"] for video in listed["data"]] == ids[:0:-1] and listed["has_more"]
        rest = httpx.get(f"{service.url}/v1/videos", params={"after": ids[1]}).json()
        assert [video["id"] for video in rest["data"]] == ids[:1] and not rest["has_more"]
        assert not list(tmp_path.glob("*.photo")), "a photo is removed when its video has ended"


def test_cancel_and_delete_at_every_state(tmp_path):
    backend = QuickBackend(30)
    with running_service(backend, videos=str(tmp_path)) as service:
        running, waiting, deleted = (submit(service.url, name).json()["id"] for name in ("a", "b", "c"))
        wait(lambda: show(service.url, running)["status"] == "in_progress")
        for id in (waiting, running):
            answer = httpx.post(f"{service.url}/v1/videos/{id}/cancel").json()
            assert answer["status"] == "cancelled" and answer["place"] is None
            assert httpx.post(f"{service.url}/v1/videos/{id}/cancel").json()["status"] == "cancelled"
        wait(lambda: show(service.url, deleted)["status"] == "in_progress")  # the place of the running one is free
        assert httpx.delete(f"{service.url}/v1/videos/{deleted}").json()["deleted"]
        assert httpx.get(f"{service.url}/v1/videos/{deleted}").status_code == 404
        assert httpx.delete(f"{service.url}/v1/videos/{deleted}").status_code == 404
        wait(lambda: service.gateway.in_flight == 0)
        assert len(list(tmp_path.glob("*.json"))) == 2 and not list(tmp_path.glob(f"{deleted}*"))


def test_an_idempotency_key_returns_the_first_video_also_after_a_restart(tmp_path):
    key = {"Idempotency-Key": "order-1"}
    backend = QuickBackend()
    for _ in range(2):
        with running_service(backend, videos=str(tmp_path)) as service:
            first, again = (submit(service.url, headers=key) for _ in range(2))
            assert first.status_code == again.status_code == 202
            assert (first.json()["id"], first.json()["seed"]) == (again.json()["id"], again.json()["seed"])
            other = submit(service.url, "another prompt", headers=key)
            assert other.status_code == 409 and "another request" in other.text
            assert submit(service.url, headers={"Idempotency-Key": "a b"}).status_code == 400
            ended(service.url, first.json()["id"])
    assert len(backend.accepted) == 1


def test_keys_do_not_see_each_others_videos(tmp_path):
    (tmp_path / "keys").write_text(key_line("alice", "a") + key_line("bob", "b"))
    with running_service(QuickBackend(), AppOptions(keys=Keys(tmp_path / "keys"))) as service:
        alice, bob = ({"X-API-Key": key, "Idempotency-Key": "same"} for key in "ab")
        id = submit(service.url, headers=alice).json()["id"]
        assert submit(service.url, headers=bob).json()["id"] != id
        for method, route in (("GET", ""), ("GET", "/content"), ("POST", "/cancel"), ("DELETE", "")):
            answer = httpx.request(method, f"{service.url}/v1/videos/{id}{route}", headers=bob)
            assert answer.status_code == 404
            jsonschema.validate(answer.json(), ERROR)
            assert httpx.request(method, f"{service.url}/v1/videos/{id}{route}").status_code == 401
        listed = httpx.get(f"{service.url}/v1/videos", headers=alice).json()["data"]
        assert [video["id"] for video in listed] == [id]


class Refusing(QuickBackend):
    """Refuses the first requests of the model."""

    refusals: list[Refusal]

    async def stream(self, animation, seconds):
        if self.refusals:
            yield self.refusals.pop(0)
            return
        async for message in super().stream(animation, seconds):
            yield message


def test_a_full_model_is_waited_for_and_a_real_refusal_fails_the_video():
    backend = Refusing()
    backend.refusals = [Refusal(429, "full", 1), Refusal(503, "there is no model yet", 1), Refusal(422, "steps is bad")]
    with running_service(backend) as service:
        failed = ended(service.url, submit(service.url).json()["id"])
        assert failed["status"] == "failed" and failed["error"] == {"status": 422, "message": "steps is bad"}
        assert ended(service.url, submit(service.url).json()["id"])["status"] == "completed"


def test_the_line_and_the_store_are_bounded_and_old_videos_expire(tmp_path):
    limits = VideoLimits(waiting=2, kept=4, keep_seconds=1.5)
    backend = QuickBackend(8)
    with running_service(backend, videos=str(tmp_path), video_limits=limits) as service:
        first = submit(service.url).json()["id"]
        wait(lambda: show(service.url, first)["status"] != "queued")
        statuses = [submit(service.url).status_code for _ in range(4)]
        assert statuses == [202, 202, 429, 429]
        backend.seconds = 0.1
        wait(lambda: not httpx.get(f"{service.url}/v1/videos").json()["data"])
        assert httpx.get(f"{service.url}/v1/videos/{first}").status_code == 404 and not os.listdir(tmp_path)
        assert submit(service.url).status_code == 202


def test_a_store_that_fails_refuses_new_videos_with_a_sentence_and_without_its_path(tmp_path, monkeypatch):
    with running_service(QuickBackend(), videos=str(tmp_path)) as service:
        with monkeypatch.context() as patch:
            patch.setattr(
                "infra.storage.write_bytes", lambda *_: (_ for _ in ()).throw(OSError("disk full " + str(tmp_path)))
            )
            answer = submit(service.url)
        assert answer.status_code == 503 and "store of the videos" in answer.text and str(tmp_path) not in answer.text
        assert not httpx.get(f"{service.url}/v1/videos").json()["data"]
        assert ended(service.url, submit(service.url).json()["id"])["status"] == "completed"


def test_records_that_cannot_be_read_and_files_without_a_record_do_not_stop_the_start(tmp_path, caplog):
    (tmp_path / "video_a.json").write_text('{"id": 5}')
    (tmp_path / "video_b.photo").write_bytes(b"never accepted")
    (tmp_path / "notes.txt").write_text("mine")
    with running_service(QuickBackend(), videos=str(tmp_path)) as service:
        assert httpx.get(f"{service.url}/v1/videos/video_a").status_code == 404
    assert (
        sorted(os.listdir(tmp_path)) == ["notes.txt", "video_a.json"] and "video_a.json is not readable" in caplog.text
    )


# Prints its address, and serves until it is killed.
SERVICE = """
import sys, time
from tests.support.service import QuickBackend, running_service

with running_service(QuickBackend(float(sys.argv[2])), videos=sys.argv[1]) as service:
    print(service.url, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "S3"])
def test_accepted_videos_survive_a_kill(tmp_path: Path, remote: bool, request: pytest.FixtureRequest):
    address = str(tmp_path / "videos")
    if remote:
        address = f"{request.getfixturevalue('s3_folder')}/videos"

    def start(seconds: float) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, address, str(seconds)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        )  # fmt: skip
        assert process.stdout
        return process, process.stdout.readline().strip()

    process, url = start(0.5)
    done, *unfinished = (submit(url, f"number {n}", seed=n).json()["id"] for n in range(4))
    ended(url, done)
    wait(lambda: show(url, unfinished[0])["status"] == "in_progress")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process, url = start(0.1)
    try:
        assert show(url, done)["status"] == "completed"
        for n, id in enumerate((done, *unfinished)):
            assert ended(url, id)["status"] == "completed"
            assert httpx.get(f"{url}/v1/videos/{id}/content").content == f"number {n} {n} {len(PHOTO)}".encode()
    finally:
        process.kill()
        process.communicate()
