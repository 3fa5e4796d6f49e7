"""64 raters vote at once over loopback while the server is killed: no confirmed vote is lost, none is stored twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tasks.study.store import Store
from tests.conftest import free_port, wait_for_port
from tests.support.studies import make_study

RATERS, KILLS = 64, 3
REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


class Server:
    """The command preference-serve in a process of its own."""

    def __init__(self, study: Path, database: str, log: Path) -> None:
        self.port, self._log = free_port(), log
        words = ["-m", "flows", "preference-serve", "--study", str(study), "--port", str(self.port)]
        self._command = [sys.executable, *words]
        self._environment = os.environ | {"TRIP_STUDY_DATABASE": database}

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=REPOSITORY, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_for_port(self.port, self.process)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Rater(threading.Thread):
    """Votes as the page does: repeats a request that got no answer, and takes "already stored" for stored."""

    def __init__(self, address: str, number: int) -> None:
        super().__init__()
        self.address, self.number = address, number
        self.confirmed: dict[str, dict[str, str]] = {}
        self.sent: dict[str, dict[str, str]] = {}
        self.headers: dict[str, str] = {}

    def run(self) -> None:
        with httpx.Client(base_url=self.address, timeout=20) as client:
            token = self.ask(client, "POST", "/api/raters", {"consent": True}).json()["token"]
            self.headers = {"Authorization": f"Bearer {token}"}
            while (pair := self.ask(client, "GET", "/api/next").json()["pair"]) is not None:
                side = ("left", "right", "unsure")[(self.number + len(self.sent)) % 3]
                answers = dict.fromkeys(("temporal_coherence", "motion_fidelity", "visual_quality"), side)
                body = {"pair": pair["name"], "answers": answers, "milliseconds": 900, "plays": 1, "device": "phone"}
                self.sent[pair["name"]] = answers
                answer = self.ask(client, "POST", "/api/votes", body)
                stored = answer.status_code == 201 or answer.json()["error"]["reason"] == "already_stored"
                assert stored, answer.text
                self.confirmed[pair["name"]] = answers

    def ask(self, client: httpx.Client, method: str, path: str, body: object = None) -> httpx.Response:
        while True:
            try:
                answer = client.request(method, path, json=body, headers=self.headers)
            except httpx.TransportError:
                time.sleep(0.3)
                continue
            if answer.status_code == 429 or answer.status_code >= 500 or "too_early" in answer.text:
                time.sleep(0.3)
                continue
            return answer


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_no_vote_is_lost_or_doubled_when_the_server_is_killed(kind, tmp_path, request):
    plan, _ = make_study(tmp_path, 8, raters=2 * RATERS, gold=2, repeats=1)
    # A rater that lost the answer to its enrolment takes a second place, so there are more places than raters.
    database = f"sqlite:///{tmp_path}/votes.db" if kind == "sqlite" else request.getfixturevalue("postgres")
    server = Server(tmp_path / "study", database, tmp_path / "server.log")
    server.start()
    raters = [Rater(f"http://127.0.0.1:{server.port}", number) for number in range(RATERS)]
    for rater in raters:
        rater.start()
    store = Store(database, plan)
    total = RATERS * len(plan.assignments[0])
    try:
        for kill in range(KILLS):
            end = time.monotonic() + 120
            while len(store.votes()) < total * (kill + 1) / (KILLS + 1) and time.monotonic() < end:
                time.sleep(0.05)
            server.kill()
            server.start()
        for rater in raters:
            rater.join(240)
        assert not any(rater.is_alive() for rater in raters)
    finally:
        server.kill()
    votes = store.votes()
    store.close()
    places = {}
    for vote in votes:
        places.setdefault(vote.rater, {})[vote.pair] = vote.answers
    assert len(votes) == total == sum(map(len, places.values()))
    key = lambda given: sorted((pair, answers["visual_quality"]) for pair, answers in given.items())  # noqa: E731
    assert sorted(map(key, places.values())) == sorted(key(rater.confirmed) for rater in raters)
