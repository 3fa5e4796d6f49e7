"""Reads the body of a request, JSON or a form, as an `Animation`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from anyio import to_thread
from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from tasks.serve.limits import Animation, Refusal, read_animation, read_json

JSON, MULTIPART = "application/json", "multipart/form-data"
READERS = 2  # threads that parse bodies
_FORM_BYTES = 2**16  # of a form that are parsed at once
MAX_BOUNDARIES = 64  # what looks like one, in a form of 8 fields; a photo of random bytes has none


async def read_request(request: Request, max_steps: int, seed: int | None = None) -> Animation:
    """Parses the request, JSON or a form, in a thread; `seed` stands for one that is not given. Raises `Refusal`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (JSON, MULTIPART):
        raise Refusal(415, f"the content type is {kind!r:.60}; send {JSON} or {MULTIPART}")
    body = await request.body()  # bounded by `Guard`

    def read() -> Animation:
        try:
            # In its own event loop: the form parser is a coroutine that computes and never waits.
            fields = read_json(body) if kind == JSON else asyncio.run(_form(request.headers, body))
        except (ValueError, MultiPartException) as error:
            raise Refusal(400, f"the body is not {kind} ({str(error)[:80]}); see /docs for an example") from error
        if not isinstance(fields, dict):
            raise Refusal(400, "the body is JSON but not an object; send {'image': ..., 'prompt': ...}")
        return read_animation(fields, max_steps, seed)

    return await to_thread.run_sync(read, limiter=request.app.state.readers)


async def _form(headers: Headers, body: bytes) -> dict[str, Any]:
    """The fields of a form. Raises ValueError for one that would take long to parse, or that ends too early."""
    if body.count(b"\r\n--") > MAX_BOUNDARIES:
        raise ValueError(f"more than {MAX_BOUNDARIES} boundaries")
    boundary = parse_options_header(headers.get("content-type", ""))[1].get(b"boundary", b"")
    if boundary and b"--" + boundary + b"--" not in body:  # the parser would take what there is
        raise ValueError("the closing boundary is missing")

    async def parts() -> AsyncGenerator[bytes, None]:
        # The parser keeps a tuple for each run of bytes; a million of them hold Python's lock while they are collected.
        for start in range(0, len(body), _FORM_BYTES):
            yield body[start : start + _FORM_BYTES]

    form = await MultiPartParser(headers, parts(), max_files=1, max_fields=16).parse()
    fields = {name: await value.read() if isinstance(value, UploadFile) else value for name, value in form.items()}
    await form.close()
    return fields
