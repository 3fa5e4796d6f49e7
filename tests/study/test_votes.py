"""Votes are stored once and before they are confirmed; forged, foreign, early and repeated ones are refused."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from infra.rate_limit import RateLimit
from tasks.records import UserError
from tasks.study.plan import BUNDLE
from tasks.study.server import MAX_BODY_BYTES, ServerLimits, create_app
from tasks.study.store import AlreadyStored, Full, NotNext, Store, Vote
from tests.support.studies import make_study

LIMITS = ServerLimits(votes_per_second=1000, votes_burst=1000)
ANSWERS = {"temporal_coherence": "left", "motion_fidelity": "unsure", "visual_quality": "right"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    plan, key = make_study(folder, 3, raters=3, gold=2, repeats=1)
    return folder, replace(plan, seconds=0.0), key


@pytest.fixture
def store(study, tmp_path):
    store = Store(f"sqlite:///{tmp_path}/votes.db", study[1])
    yield store
    store.close()


def client_of(study, store, **values):
    folder, plan, _ = study
    app = create_app(replace(plan, **values), store, Path(folder) / "study" / BUNDLE, LIMITS)
    return TestClient(app, raise_server_exceptions=False)


def enrol(client, **body):
    answer = client.post("/api/raters", json={"consent": True, **body})
    assert answer.status_code == 201, answer.text
    return {"Authorization": f"Bearer {answer.json()['token']}"}


def ballot(name, **values):
    return {"pair": name, "answers": ANSWERS, "milliseconds": 4000, "plays": 1, "device": "desktop"} | values


def test_a_rater_goes_through_and_ends(study, store):
    client = client_of(study, store, completion_code="C0DE")
    token = enrol(client)
    seen = []
    while (shown := client.get("/api/next", headers=token).json())["pair"] is not None:
        assert shown["done"] == len(seen) and not shown["code"]
        seen.append(shown["pair"]["name"])
        assert client.post("/api/votes", json=ballot(seen[-1]), headers=token).status_code == 201
    assert shown["code"] == "C0DE" and shown["done"] == shown["total"] == len(seen) == len(set(seen))
    votes = store.votes()
    assert [vote.pair for vote in votes] == seen and votes[0].answers == ANSWERS
    assert [vote.swapped for vote in votes] == [place.swapped for place in study[1].assignments[0]]


def test_what_no_page_sends_is_refused_and_changes_nothing(study, store):
    client = client_of(study, store)
    plan, token = study[1], enrol(client)
    other = enrol(client)
    name = client.get("/api/next", headers=token).json()["pair"]["name"]
    client.get("/api/next", headers=other)
    mine = [plan.pairs[place.pair].name for place in plan.assignments[0]]
    cases = {
        (401, "token"): ({}, {"Authorization": "Bearer forged"}),
        (403, "pair"): ({"pair": "0" * 32}, token),
        (409, "not_shown"): ({"pair": mine[1]}, token),
        (422, "answers"): ({"answers": ANSWERS | {"other": "left"}}, token),
        (422, "plays"): ({"plays": 0}, token),
        (422, "body"): ({"milliseconds": "4000"}, token),
    }
    for (status, reason), (values, headers) in cases.items():
        answer = client.post("/api/votes", json=ballot(name, **values), headers=headers)
        assert (answer.status_code, answer.json()["error"]["reason"]) == (status, reason)
    wrong = client.post("/api/votes", json=ballot(name, answers=dict.fromkeys(ANSWERS, "both")), headers=token)
    assert wrong.status_code == 422
    long = client.post("/api/votes", content=b" " * (MAX_BODY_BYTES + 1), headers=token)
    assert long.status_code == 413
    for path in ("/media/nothing.mp4", "/media/..%2Fplan.json", "/plan.json", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 404
    assert client.post("/api/raters", json={"consent": False}).status_code == 422
    assert not store.votes()


def test_a_second_vote_on_a_pair_and_a_replay_are_refused(study, store):
    client = client_of(study, store)
    token = enrol(client)
    name = client.get("/api/next", headers=token).json()["pair"]["name"]
    sent = ballot(name)
    assert client.post("/api/votes", json=sent, headers=token).status_code == 201
    for again in (sent, ballot(name, answers=dict.fromkeys(ANSWERS, "right"))):
        answer = client.post("/api/votes", json=again, headers=token)
        assert (answer.status_code, answer.json()["error"]["reason"]) == (409, "already_stored")
    assert [vote.answers for vote in store.votes()] == [ANSWERS]


def test_a_vote_before_the_clips_can_have_ended_is_refused(study, store):
    client = client_of(study, store, seconds=5.0)
    token = enrol(client)
    name = client.get("/api/next", headers=token).json()["pair"]["name"]
    answer = client.post("/api/votes", json=ballot(name), headers=token)
    assert (answer.status_code, answer.json()["error"]["reason"]) == (409, "too_early")


def test_a_token_of_another_study_is_refused(study, store, tmp_path):
    client = client_of(study, store)
    elsewhere = replace(study[1], study="ffff")
    foreign = Store(f"sqlite:///{tmp_path}/votes.db", elsewhere)  # the same database
    foreign.enrol("their token", None)
    assert client.get("/api/next", headers={"Authorization": "Bearer their token"}).status_code == 401
    foreign.close()


def test_places_end_and_a_participant_has_one(study, store):
    client = client_of(study, store, platform="mturk")
    person = {"participant": {"id": "A1B2C3", "session": "3XYZ"}}
    first, second = enrol(client, **person), enrol(client, **person)
    assert client.get("/api/next", headers=first).status_code == 401  # the newer token replaces it
    assert client.get("/api/next", headers=second).status_code == 200
    assert client.post("/api/raters", json={"consent": True}).status_code == 422  # not from the platform
    for number in range(len(study[1].assignments) - 1):
        store.enrol(f"token {number}", None)
    with pytest.raises(Full):
        store.enrol("one more", None)
    policy = client.get("/").headers["content-security-policy"]
    assert "form-action 'self' https://www.mturk.com" in policy and "script-src 'self';" in policy


def test_no_personal_data_is_stored(study, store, tmp_path):
    client = client_of(study, store, platform="prolific")
    token = enrol(client, participant={"id": "participant0815", "session": "session4711"})
    client.get("/api/next", headers=token | {"User-Agent": "agent99"})
    content = "\n".join(sqlite3.connect(tmp_path / "votes.db").iterdump())
    for private in ("participant0815", "session4711", "agent99", "testclient", token["Authorization"][7:]):
        assert private not in content


def test_a_changed_plan_finds_no_database(study, store, tmp_path):
    rule = replace(study[1].rule, least_gold=0.0)
    with pytest.raises(UserError, match="fixed before the first vote"):
        Store(f"sqlite:///{tmp_path}/votes.db", replace(study[1], rule=rule))
    with pytest.raises(UserError, match="cannot be used"):
        Store("nonsense://x", study[1])


def check_two_at_once(store: Store, plan) -> None:
    """Eight threads enrol and send the same votes at once: one place each, one vote each."""
    raters, refused = [], []

    def vote(number: int) -> None:
        raters.append(store.enrol(f"token {number}", None) if number < 2 else 0)
        try:
            store.add(Vote(0, 0, "pair", False, ANSWERS, 1, 1, "phone", number))
        except (AlreadyStored, NotNext) as error:
            refused.append(error)

    threads = [threading.Thread(target=vote, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.votes()) == 1 and len(refused) == 7
    assert sorted(raters) == [0] * 7 + [1]
    with pytest.raises(NotNext):
        store.add(Vote(0, 5, "pair", False, ANSWERS, 1, 1, "phone", 0))


def test_two_at_once_on_sqlite(study, store):
    check_two_at_once(store, study[1])


@pytest.mark.slow
def test_two_at_once_on_postgresql(study, postgres):
    store = Store(postgres, study[1])
    check_two_at_once(store, study[1])
    store.close()


def test_a_rate_limit_refills_and_forgets_the_oldest_key():
    now = [0.0]
    limit = RateLimit(per_second=2, burst=2, keys=2, clock=lambda: now[0])
    assert [limit.seconds_until_allowed("a") for _ in range(3)] == [0, 0, 0.5]
    now[0] = 0.5
    assert limit.seconds_until_allowed("a") == 0
    for key in "bc":
        limit.seconds_until_allowed(key)
    assert limit.seconds_until_allowed("a") == 0  # dropped, so its bucket is full


def test_too_many_votes_of_one_rater_wait(study, store):
    folder, plan, _ = study
    app = create_app(plan, store, Path(folder) / "study" / BUNDLE, ServerLimits(votes_per_second=0.01, votes_burst=1))
    client = TestClient(app)
    token = enrol(client)
    answers = []
    for _ in range(2):
        name = client.get("/api/next", headers=token).json()["pair"]["name"]
        answers.append(client.post("/api/votes", json=ballot(name), headers=token))
    assert [answer.status_code for answer in answers] == [201, 429] and int(answers[1].headers["retry-after"]) > 90
