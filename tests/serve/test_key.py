"""API keys: the table of routes in docs/decisions/serving.md, rotation of the key file, and limits on wrong keys."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route

from flows.cli.serve import serve_key
from tasks.records import UserError
from tasks.serve.api import AppOptions, create_app
from tasks.serve.gateway import Gateway
from tasks.serve.keys import Keys, key_line
from tasks.serve.request_log import ACCESS_LOG
from tasks.serve.server_limits import ServerLimits
from tasks.serve.videos import Videos
from tests.support.service import QuickBackend

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "decisions" / "serving.md"
ROW = re.compile(r"^\| (GET|POST|DELETE) \| `(\S+)` \| (open|required) \|$", re.MULTILINE)
TABLE = ROW.findall(DOCUMENT.read_text())
KEY = "a key with spaces and \N{LATIN SMALL LETTER E WITH ACUTE}"


def app_of(keys: Keys | None, limits: ServerLimits | None = None):
    gateway = Gateway(QuickBackend(), 60)
    return create_app(gateway, Videos(gateway, "memory://keys"), AppOptions(limits or ServerLimits(), keys))


def ask(app, method: str, path: str, key: str | None = None, client: str = "10.0.0.1", **more) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://trip") as http:
            headers = {} if key is None else {"Authorization": b"Bearer " + key.encode()}
            return await http.request(method, path, headers=headers, **more)

    return asyncio.run(go())


@pytest.fixture(scope="module")
def app():
    return app_of(Keys(key=KEY))


@pytest.mark.parametrize(("method", "route", "key"), TABLE, ids=lambda value: value)
def test_a_route_requires_the_key_as_the_table_states(app, method, route, key):
    path = route.replace("{id}", "video_1").replace("{path}", "swagger-ui.css")
    status = ask(app, method, path).status_code
    assert status == 401 if key == "required" else status in (200, 404)


def test_the_table_contains_every_route_and_a_new_one_requires_the_key(app):
    def routes(of) -> set[tuple[str, str]]:
        own = set()
        for route in of:
            if isinstance(route, Mount):
                own.add(("GET", route.path + "/{path}"))
            elif isinstance(route, APIRoute | Route):
                own |= {(method, route.path) for method in route.methods or () if method != "HEAD"}
        return own

    assert {(method, route) for method, route, _ in TABLE} == routes(app.routes)
    assert ask(app, "GET", "/v1/new").status_code == ask(app, "POST", "/nothing").status_code == 401


def test_the_key_opens_the_api(app):
    right = ask(app, "POST", "/v1/animate", KEY, json={})
    assert right.status_code == 422  # the key is right, the request is empty
    wrong = ask(app, "POST", "/v1/animate", "another", json={})
    assert wrong.status_code == 401 and wrong.headers["www-authenticate"] == "Bearer"
    for sent in (KEY, KEY.encode().decode("latin-1")):
        assert sent not in wrong.text


@pytest.fixture
def key_file(tmp_path, capsys) -> tuple[Path, dict[str, str]]:
    """A file with two keys as the command writes it, and the keys by name."""
    keys = {}
    for name in ("alice", "bob"):
        serve_key(name, tmp_path / "keys")
        (keys[name],) = (word for word in re.findall(r"[\w-]{43}", capsys.readouterr().out))
    return tmp_path / "keys", keys


def test_the_file_has_hashes_only_and_its_keys_open_the_api_by_name(key_file):
    file, keys = key_file
    text = file.read_text()
    assert not any(key in text for key in keys.values()) and file.stat().st_mode & 0o077 == 0
    accepted = Keys(file, "environment's own")
    assert {accepted.name_of(key) for key in keys.values()} == {"alice", "bob"}
    assert accepted.name_of("environment's own") == "environment" and accepted.name_of("other") is None
    assert accepted.name_of(hashlib.sha256(keys["bob"].encode()).hexdigest()) is None


def test_keys_are_rotated_without_a_restart_and_a_broken_file_changes_nothing(key_file, caplog):
    file, keys = key_file
    app = app_of(Keys(file))
    assert ask(app, "GET", "/v1/videos", keys["alice"]).status_code == 200
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[1] + key_line("carol", "new"))
    assert ask(app, "GET", "/v1/videos", keys["alice"]).status_code == 401
    assert ask(app, "GET", "/v1/videos", keys["bob"]).status_code == 200
    assert ask(app, "GET", "/v1/videos", "new").status_code == 200
    for broken in ("carol my-secret-key\n", "# no key\n", None):
        file.unlink() if broken is None else file.write_text(broken)
        assert ask(app, "GET", "/v1/videos", "new").status_code == 200
    assert "stay as they were" in caplog.text and "my-secret-key" not in caplog.text


@pytest.mark.parametrize("text", ["", "# comment\n", "alice\n", "alice my-secret\n", "a b c\n"])
def test_a_file_without_keys_is_a_user_error_without_the_line(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match="serve-key") as error:
        Keys(tmp_path / "keys")
    assert "my-secret" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        Keys(tmp_path / "missing")


def test_a_bad_name_of_a_key_is_a_user_error(tmp_path):
    for name in ("", "a b", "x" * 65, "a\nb"):
        with pytest.raises(UserError, match="letters, digits"):
            serve_key(name, tmp_path / "keys")
    assert not os.listdir(tmp_path)


def test_the_log_has_the_name_of_the_key_and_never_a_key(key_file, caplog):
    file, keys = key_file
    caplog.set_level(logging.INFO, ACCESS_LOG)
    app = app_of(Keys(file))
    ask(app, "POST", f"/v1/videos?key={keys['bob']}", keys["alice"], json={"image": "a", "prompt": "p"})
    ask(app, "GET", "/v1/videos", "a wrong one")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == ACCESS_LOG]
    assert [(line["caller"], line["status"], line["path"]) for line in lines] == [
        ("alice", 400, "/v1/videos"),
        ("", 401, "/v1/videos"),
    ]
    assert not any(key in caplog.text for key in (*keys.values(), "a wrong one"))


def test_wrong_keys_of_an_address_are_limited_and_known_callers_stay(key_file):
    file, keys = key_file
    app = app_of(Keys(file), ServerLimits(wrong_keys_per_minute=5))
    assert ask(app, "GET", "/v1/videos", keys["alice"]).status_code == 200
    statuses = [ask(app, "GET", "/v1/videos", f"guess {n}").status_code for n in range(30)]
    assert statuses[:5] == [401] * 5 and set(statuses[5:]) == {429}
    # A right guess is not told from a wrong one; a caller that was there before goes on.
    guess = ask(app, "GET", "/v1/videos", keys["bob"])
    assert guess.status_code == 429 and int(guess.headers["retry-after"]) >= 1
    assert ask(app, "GET", "/v1/videos", keys["alice"]).status_code == 200
    assert ask(app, "GET", "/v1/videos", keys["bob"], client="10.0.0.2").status_code == 200
    assert ask(app, "GET", "/readyz").status_code == 200
