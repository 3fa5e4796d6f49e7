"""The server of a study: the page with its media, a place for each rater, the next pair, votes."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.rate_limit import RateLimit
from tasks.json_records import parse_record
from tasks.study.plan import ANSWERS, Plan
from tasks.study.store import AlreadyStored, Full, NotNext, Store, Vote

MAX_BODY_BYTES = 4096
MAX_MILLISECONDS = 24 * 3600 * 1000
MAX_PLAYS = 10_000
DEVICES = ("desktop", "phone")
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
_PARTICIPANT = re.compile(r"[A-Za-z0-9_-]{4,128}")
MTURK = ("https://www.mturk.com", "https://workersandbox.mturk.com")
_log = logging.getLogger(__name__)
Body = TypeVar("Body")


@dataclass(frozen=True)
class ServerLimits:
    """How often one address and one rater may ask; a company or a university is often one address.

    Attributes:
        requests_per_second, requests_burst: of one address.
        raters_per_minute, raters_burst: new raters of one address.
        votes_per_second, votes_burst: of one rater.
    """

    requests_per_second: float = 100
    requests_burst: float = 1000
    raters_per_minute: float = 30
    raters_burst: float = 100
    votes_per_second: float = 1
    votes_burst: float = 10


@dataclass(frozen=True)
class Participant:
    """The participant and session of a platform; only their hash is stored."""

    id: str
    session: str


@dataclass(frozen=True)
class _Enrolment:
    consent: bool
    participant: Participant | None = None


@dataclass(frozen=True)
class _Ballot:
    """A vote as the page sends it."""

    pair: str
    answers: dict[str, str]
    milliseconds: int
    plays: int
    device: str


class Refusal(Exception):
    """A request that is not carried out: an HTTP status, a word for programs and a sentence."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.retry_after = status, reason, message, retry_after


def create_app(plan: Plan, store: Store, bundle: Path, limits: ServerLimits | None = None) -> FastAPI:
    """Returns the application of a study.

    Args:
        plan: the plan.
        store: where raters and votes are.
        bundle: the folder with the page and the media.
        limits: rate limits.
    """
    limits = limits or ServerLimits()
    app = FastAPI(title="Preference study", docs_url=None, redoc_url=None, openapi_url=None)
    page = (bundle / "index.html").read_bytes()
    app.add_middleware(_Headers, policy=_content_policy(page.decode(), plan))
    requests = RateLimit(limits.requests_per_second, limits.requests_burst)
    enrolments = RateLimit(limits.raters_per_minute / 60, limits.raters_burst)
    ballots = RateLimit(limits.votes_per_second, limits.votes_burst)
    media = {
        f"{name}.{suffix}": (bundle / "media" / f"{name}.{suffix}", kind)
        for pair in plan.pairs
        for name, suffix, kind in (
            (pair.first, "mp4", "video/mp4"),
            (pair.second, "mp4", "video/mp4"),
            (pair.photo, "png", "image/png"),
        )
    }
    files = {
        "/": (page, "text/html; charset=utf-8"),
        "/study.js": ((bundle / "study.js").read_bytes(), "text/javascript; charset=utf-8"),
        "/study.css": ((bundle / "study.css").read_bytes(), "text/css; charset=utf-8"),
    }

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        headers = {} if refusal.retry_after is None else {"Retry-After": str(math.ceil(refusal.retry_after))}
        error = {"reason": refusal.reason, "message": refusal.message}
        return JSONResponse({"error": error}, refusal.status, headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": {"reason": "route", "message": str(error.detail)}}, error.status_code)

    @app.exception_handler(SQLAlchemyError)
    async def no_store(request: Request, error: SQLAlchemyError) -> Response:
        _log.error("the database failed: %s", type(error).__name__)
        message = "the database does not answer; the page tries again"
        return JSONResponse({"error": {"reason": "database", "message": message}}, 503, {"Retry-After": "2"})

    def check_rate(limit: RateLimit, key: str, what: str) -> None:
        wait = limit.seconds_until_allowed(key)
        if wait:
            raise Refusal(429, "rate", f"too many {what}; wait {math.ceil(wait)} s", wait)

    def rater_of(request: Request) -> int:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        rater = store.rater(token) if scheme.lower() == "bearer" and 0 < len(token) <= 128 else None
        if rater is None:
            raise Refusal(401, "token", "this token is not one of this study; open the page again to start")
        return rater

    def next_pair(rater: int) -> dict[str, Any]:
        position, places = store.position(rater), plan.assignments[rater]
        if position >= len(places):
            code = plan.completion_code
            return {"done": len(places), "total": len(places), "pair": None, "code": code}
        store.show(rater, position)
        place = places[position]
        pair = plan.pairs[place.pair]
        left, right = (pair.second, pair.first) if place.swapped else (pair.first, pair.second)
        shown = {"name": pair.name, "photo": pair.photo, "prompt": pair.prompt, "left": left, "right": right}
        return {"done": position, "total": len(places), "pair": shown, "code": ""}

    def store_vote(rater: int, ballot: _Ballot) -> dict[str, Any]:
        _check(ballot, plan)
        places = plan.assignments[rater]
        names = [plan.pairs[place.pair].name for place in places]
        if ballot.pair not in names:
            raise Refusal(403, "pair", "this pair is not one of this rater's")
        position = names.index(ballot.pair)
        since = store.seconds_since_shown(rater, position)
        if since is None:
            raise Refusal(409, "not_shown", "this pair was not shown yet")
        if since < plan.seconds:
            raise Refusal(409, "too_early", "the clips cannot have played to their end yet")
        try:
            store.add(
                Vote(
                    rater,
                    position,
                    ballot.pair,
                    places[position].swapped,
                    ballot.answers,
                    ballot.milliseconds,
                    ballot.plays,
                    ballot.device,
                    int(time.time()),
                )
            )
        except AlreadyStored:
            raise Refusal(409, "already_stored", "there is a vote on this pair; the first one counts") from None
        except NotNext:
            raise Refusal(409, "not_next", "vote on the earlier pairs first") from None
        return {"stored": position + 1, "total": len(places)}

    @app.post("/api/raters", status_code=201)
    async def enrol(request: Request) -> dict[str, str]:
        address = _address(request)
        check_rate(enrolments, address, "new raters from this address")
        enrolment = await _read(_Enrolment, request)
        if not enrolment.consent:
            raise Refusal(422, "consent", "no place without consent")
        participant = _participant_hash(enrolment.participant, plan)
        token = secrets.token_urlsafe(32)
        try:
            await to_thread.run_sync(store.enrol, token, participant)
        except Full:
            raise Refusal(410, "full", "all places of this study are taken; thank you for your interest") from None
        return {"token": token}

    @app.get("/api/next")
    async def next_(request: Request) -> dict[str, Any]:
        check_rate(requests, _address(request), "requests from this address")
        return await to_thread.run_sync(lambda: next_pair(rater_of(request)))

    @app.post("/api/votes", status_code=201)
    async def vote(request: Request) -> dict[str, Any]:
        check_rate(requests, _address(request), "requests from this address")
        ballot = await _read(_Ballot, request)

        def cast() -> dict[str, Any]:
            rater = rater_of(request)
            check_rate(ballots, str(rater), "votes")
            return store_vote(rater, ballot)

        return await to_thread.run_sync(cast)

    @app.get("/media/{name}")
    async def medium(name: str, request: Request) -> Response:
        check_rate(requests, _address(request), "requests from this address")
        if name not in media:
            raise Refusal(404, "medium", "no such medium")
        path, kind = media[name]
        return Response(await to_thread.run_sync(path.read_bytes), media_type=kind)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "ok\n"

    def give(content: bytes, kind: str) -> Callable[[], Any]:
        async def file() -> Response:
            return Response(content, media_type=kind)

        return file

    for path, (content, kind) in files.items():
        app.get(path)(give(content, kind))
    return app


class _Headers:
    """Adds the headers that keep the page to itself: no other host, no cache, no referrer, no foreign frame."""

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self._app = app
        self._values = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._values.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, respond if scope["type"] == "http" else send)


def _content_policy(page: str, plan: Plan) -> str:
    """Scripts and data of this server only; on MTurk also its frame and its form."""
    hashes = [base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() for style in _STYLE.findall(page)]
    styles = " ".join(["'self'", *(f"'sha256-{value}'" for value in hashes)])
    mturk = " ".join(MTURK) if plan.platform == "mturk" else ""
    frames = f"https://*.mturk.com {mturk}" if mturk else "'none'"
    return (
        f"default-src 'none'; script-src 'self'; style-src {styles}; img-src 'self' blob:; media-src blob:; "
        f"connect-src 'self'; base-uri 'none'; form-action 'self' {mturk}; frame-ancestors {frames}"
    )


def _address(request: Request) -> str:
    """The address of the caller: kept in memory for the rate limits, never stored."""
    return request.client.host if request.client is not None else ""


def _participant_hash(participant: Participant | None, plan: Plan) -> str | None:
    if plan.platform == "none":
        return None
    if participant is None or not all(_PARTICIPANT.fullmatch(text) for text in (participant.id, participant.session)):
        raise Refusal(422, "participant", f"open this study from {plan.platform}, which adds your participation")
    content = f"{participant.id}\0{participant.session}".encode()
    return hmac.digest(plan.sha256.encode(), content, "sha256").hex()


async def _read(kind: type[Body], request: Request) -> Body:
    """Parses a JSON body of bounded size. Raises `Refusal`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise Refusal(413, "body", f"the body has more than {MAX_BODY_BYTES} bytes")
    try:
        return parse_record(kind, bytes(body))
    except ValueError as error:
        raise Refusal(422, "body", f"the body cannot be used ({str(error)[:100]})") from None


def _check(ballot: _Ballot, plan: Plan) -> None:
    """Raises `Refusal` for a vote that no page sends."""
    if set(ballot.answers) != {question.name for question in plan.questions}:
        raise Refusal(422, "answers", "answer every question once")
    if not set(ballot.answers.values()) <= set(ANSWERS):
        raise Refusal(422, "answers", f"an answer is one of {', '.join(ANSWERS)}")
    if not 1 <= ballot.plays <= MAX_PLAYS:
        raise Refusal(422, "plays", "both clips must have played to their end")
    if not 0 <= ballot.milliseconds <= MAX_MILLISECONDS or ballot.device not in DEVICES:
        raise Refusal(422, "body", "the time or the device cannot be used")
