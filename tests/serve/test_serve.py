"""The service in one process: a registry, an engine that follows its alias, and the HTTP application."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import socket
import struct
import time
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from flows.cli.app import main
from infra.tracking import connect
from tasks.register.registry import RegisterSpec, register
from tasks.serve.api import ABOUT_MODEL, AppOptions, create_app
from tasks.serve.engine import Engine
from tasks.serve.gateway import Gateway
from tasks.serve.keys import Keys
from tasks.serve.limits import Refusal, read_animation
from tasks.serve.messages import Clip, EngineSpec, Progress
from tasks.serve.videos import Videos
from tasks.video.decode import read_clip
from tests.support.reports import write_record
from trip_model.pipeline import TripPipeline
from trip_model.request_limits import MAX_PHOTO_BYTES

PROMPT = "a red circle moving right"


def photo(mode: str = "RGB", size: tuple[int, int] = (48, 40), format: str = "PNG", **options) -> bytes:
    """Returns a photo of noise, so that no two frames of a clip are equal by chance."""
    rng = np.random.default_rng(5)
    bands = Image.new(mode, (1, 1)).getbands()
    pixels = rng.integers(0, 255, (size[1], size[0], len(bands)), dtype=np.uint8)
    image = Image.merge(mode, [Image.fromarray(pixels[..., band]) for band in range(len(bands))])
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """Returns a PNG whose header states 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def animated() -> bytes:
    """Returns a gif whose second frame is black."""
    buffer = io.BytesIO()
    first = Image.open(io.BytesIO(photo()))
    first.save(buffer, "GIF", save_all=True, append_images=[Image.new("RGB", first.size)], duration=100)
    return buffer.getvalue()


def turned() -> bytes:
    """Returns a photo that is rotated by 90 degrees, according to its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return photo(format="JPEG", exif=exif)


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@dataclass(frozen=True)
class Store:
    uri: str
    folders: dict[str, Path]  # version -> model folder

    def expected(self, version: str, data: bytes, seed: int, **numbers) -> np.ndarray:
        return TripPipeline.from_pretrained(self.folders[version]).generate([data], [PROMPT], [seed], **numbers)[0]

    def point(self, alias: str, version: str) -> None:
        connect(self.uri).set_registered_model_alias("trip", alias, version)


@pytest.fixture(scope="module")
def store(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A registry with two versions that give different clips; `champion` is the second."""
    home = tmp_path_factory.mktemp("serve")
    report = write_record(home / "report")
    other = home / "other"
    shutil.copytree(tiny_model, other)
    about = json.loads((other / "trip.json").read_text())
    about["config"]["guidance"] = 3.0
    (other / "trip.json").write_text(json.dumps(about))
    uri = f"sqlite:///{home}/mlflow.db"
    folders = {}
    for folder in (tiny_model, other):
        made = register(RegisterSpec(str(folder), report, uri, check_steps=1), lambda _: None)
        folders[made.version] = folder
    return Store(uri, folders)


@contextmanager
def engine_of(store: Store, cache: Path, **options):
    engine = Engine(EngineSpec("trip", options.pop("alias", "champion"), store.uri, str(cache), **options))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def engine(store: Store, tmp_path_factory: pytest.TempPathFactory):
    with engine_of(store, tmp_path_factory.mktemp("cache"), max_queue=4) as engine:
        yield engine


def ask(
    engine_or_gateway,
    method: str = "POST",
    path: str = "/v1/animate",
    key: str | None = None,
    options: AppOptions | None = None,
    **request,
):
    """One request to the application over an in-process connection."""
    gateway = engine_or_gateway if isinstance(engine_or_gateway, Gateway) else Gateway(engine_or_gateway, 60)

    async def go() -> httpx.Response:
        chosen = options or AppOptions(keys=Keys(key=key) if key else None)
        app = create_app(gateway, Videos(gateway, "memory://videos"), chosen)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://trip", timeout=60) as client:
            return await client.request(method, path, **request)

    return asyncio.run(go())


def frames_of(answer: httpx.Response) -> np.ndarray:
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    return np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in sorted(archive.namelist())])


def test_a_photo_as_json_gives_an_mp4_of_the_pipelines_frames(engine, store):
    answer = ask(engine, json={"image": url(photo()), "prompt": PROMPT, "seed": 7}, headers={"X-Request-Id": "abc-1"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert (answer.headers["x-seed"], answer.headers["x-model-version"]) == ("7", "2")
    assert answer.headers["x-request-id"] == "abc-1"
    clip = read_clip(answer.content, 16, 4, 32)
    assert np.abs(clip.pixels[0].astype(int) - store.expected("2", photo(), 7)[0]).mean() < 30


def test_the_clip_is_the_one_of_the_logged_model(engine, store):
    numbers = {"seed": 4, "num_frames": 3, "steps": 2, "fps": 6.0}
    rows = pd.DataFrame({"image": [photo()], "prompt": [PROMPT]})
    theirs = mlflow.pyfunc.load_model("models:/trip@champion").predict(rows, params=numbers)["video"][0]
    ours = ask(engine, json={"image": url(photo()), "prompt": PROMPT, **numbers})
    np.testing.assert_array_equal(read_clip(ours.content, 3, 6, 32).pixels, read_clip(theirs, 3, 6, 32).pixels)


def test_a_form_gives_the_same_frames_as_json_and_as_the_pipeline(engine, store):
    numbers = {"seed": 9, "steps": 3, "num_frames": 4, "guidance": 2.5}
    form = ask(
        engine,
        data={"prompt": PROMPT, "format": "frames", **{name: str(n) for name, n in numbers.items()}},
        files={"image": ("a.png", photo())},
    )
    as_json = ask(
        engine,
        json={"image": url(photo()), "prompt": PROMPT, "format": "frames", **numbers},
        headers={"Accept": "application/json"},
    ).json()
    expected = store.expected("2", photo(), **numbers)
    np.testing.assert_array_equal(frames_of(form), expected)
    pngs = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in as_json["frames"]]
    np.testing.assert_array_equal(np.stack(pngs), expected)
    assert (as_json["seed"], as_json["steps"], as_json["version"], as_json["batch"]) == (9, 3, "2", 1)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/json", "application/json"),
        ("video/mp4;q=0.5, application/json", "application/json"),
        ("Application/JSON; q=0.1", "application/json"),
        ("video/mp4, application/json;q=0", "video/mp4"),
        ("video/mp4, application/x-ndjson; q=0.000, application/json; q = 0.0", "video/mp4"),
        ("application/jsonp", "video/mp4"),
        ("*/*", "video/mp4"),
    ],
)
def test_accept_chooses_the_form_of_the_answer_and_q_0_excludes_one(accept, kind, engine):
    answer = ask(engine, json=GOOD | {"num_frames": 2, "steps": 1}, headers={"Accept": accept})
    assert answer.status_code == 200 and answer.headers["content-type"].partition(";")[0] == kind


def test_the_model_says_what_it_can_do_and_the_operator_may_say_it(engine):
    own = "This model moves clouds and water."
    for about, options in ((ABOUT_MODEL, AppOptions()), (own, AppOptions(about=own))):
        assert ask(engine, "GET", "/v1/model", options=options).json()["about"] == about
    assert "dissolve into blur" in ABOUT_MODEL, "a first photo that turns to mush is no surprise"


@pytest.mark.parametrize("port", ["in use", "99999"])
def test_a_port_that_cannot_be_listened_on_is_said_before_the_model_is_loaded(port, tmp_path, capsys):
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = str(listener.getsockname()[1]) if port == "in use" else port
        start = time.monotonic()
        assert main(["serve", "--port", number, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 2
    output = capsys.readouterr()
    assert f"cannot listen on 127.0.0.1:{number}" in output.err and "give another --host or --port" in output.err
    assert "starting" not in output.out and time.monotonic() - start < 60


def test_the_returned_seed_gives_the_same_clip(engine):
    request = {"image": url(photo()), "prompt": PROMPT, "format": "frames", "num_frames": 2}
    first = ask(engine, json=request)
    again = ask(engine, json=request | {"seed": int(first.headers["x-seed"])})
    assert first.content == again.content
    assert ask(engine, json=request).headers["x-seed"] != first.headers["x-seed"]


def test_lines_contain_each_step_and_then_the_clip(engine):
    request = {"image": url(photo()), "prompt": PROMPT, "steps": 3, "format": "gif"}
    answer = ask(engine, json=request, headers={"Accept": "application/x-ndjson"})
    *steps, last = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["step"] for line in steps] == [0, 1, 2, 3] and {line["steps"] for line in steps} == {3}
    assert base64.b64decode(last["video"]).startswith(b"GIF8") and last["request_id"]


USUAL = {
    "a gif, of which the first frame": animated(),
    "CMYK": photo("CMYK", format="JPEG"),
    "transparent": photo("RGBA"),
    "gray": photo("L"),
    "turned by EXIF": turned(),
    "one of 8 pixels": photo(size=(8, 8)),
}


@pytest.mark.parametrize("data", USUAL.values(), ids=USUAL.keys())
def test_an_unusual_photo_is_animated_as_the_pipeline_does(data, engine, store):
    answer = ask(
        engine, data={"prompt": PROMPT, "seed": "1", "num_frames": "2", "format": "frames"}, files={"image": data}
    )
    np.testing.assert_array_equal(frames_of(answer), store.expected("2", data, 1, num_frames=2))


GOOD = {"image": url(photo()), "prompt": PROMPT}
BAD = {
    "not an image": ({"image": url(b"%PDF-1.7 no photo")}, 400, "image cannot be read"),
    "PostScript": (
        {"image": url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")},
        400,
        "image cannot be read",
    ),
    "cut off": ({"image": url(photo()[:200])}, 400, "damaged"),
    "not base64": ({"image": "a photo of mine"}, 400, "not base64"),
    "another URL": ({"image": "http://127.0.0.1/secret"}, 400, "not base64"),
    "nothing": ({"image": ""}, 400, "empty"),
    "a number for an image": ({"image": 5}, 422, "image is 5; use a JPEG"),
    "40,000 x 40,000": ({"image": url(bomb())}, 413, "at most 64000000 pixels"),
    "1x1": ({"image": url(photo(size=(1, 1)))}, 422, "1x1 pixels; use at least 8"),
    "a strip": ({"image": url(photo(size=(4000, 8)))}, 422, "at most 20 times"),
    "too many bytes": ({"image": url(b"\0" * (MAX_PHOTO_BYTES + 1))}, 413, f"at most {MAX_PHOTO_BYTES} bytes"),
    "far too many bytes": ({"image": url(b"\0" * (MAX_PHOTO_BYTES * 2))}, 413, f"at most {MAX_PHOTO_BYTES} bytes"),
    "10,000 words": ({"prompt": "word " * 10_000}, 422, "prompt has 49999 characters; use a sentence of 1 to 2000"),
    "an empty prompt": ({"prompt": "  "}, 422, "use a sentence"),
    "no prompt": ({"prompt": None}, 422, "prompt is None"),
    "steps": ({"steps": -1}, 422, "steps is -1; use an integer from 1 to 1000"),
    "frames": ({"num_frames": 1e9}, 422, "num_frames is 1000000000.0; use an integer from 2 to 64"),
    "guidance": ({"guidance": "NaN"}, 422, "guidance is 'NaN'; use a number"),
    "seed": ({"seed": -5}, 422, "seed is -5"),
    "format": ({"format": "exe"}, 422, "format is 'exe'; use mp4, gif or frames"),
    "an unknown parameter": ({"strength": 1}, 422, "parameter 'strength' is unknown; use image, prompt"),
}


@pytest.mark.parametrize(("change", "status", "words"), BAD.values(), ids=BAD.keys())
def test_an_invalid_value_gets_a_status_and_a_message(change, status, words, engine):
    answer = ask(engine, json={**GOOD, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["status"]) == (status, status), error
    assert words in error["message"] and len(error["message"]) < 400
    assert error["request_id"] == answer.headers["x-request-id"]


BODIES = {
    "text": ({"content": b"hello", "headers": {"Content-Type": "text/plain"}}, 415, "send application/json"),
    "no type": ({"content": b"hello"}, 415, "content type is ''"),
    "broken JSON": (
        {"content": b'{"a":', "headers": {"Content-Type": "application/json"}},
        400,
        "not application/json",
    ),
    "deep JSON": (
        {"content": b"[" * 10**6, "headers": {"Content-Type": "application/json"}},
        400,
        "not application/json",
    ),
    "a list": ({"json": [1]}, 400, "not an object"),
    "no boundary": ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "not multipart"),
    "no closing boundary": (
        {
            "content": b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cat\r\n--x\r\n'
            b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + photo(),
            "headers": {"Content-Type": "multipart/form-data; boundary=x"},
        },
        400,
        "the closing boundary is missing",
    ),
    "two photos": ({"files": [("image", photo()), ("image", photo())]}, 400, "Too many files"),
    "no image": ({"json": {"prompt": PROMPT}}, 422, "image is missing; send a JPEG"),
}


@pytest.mark.parametrize(("request_", "status", "words"), BODIES.values(), ids=BODIES.keys())
def test_an_invalid_body_gets_a_status_and_a_message(request_, status, words, engine):
    answer = ask(engine, **request_)
    assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"X-API-Key": "ключ"}, 200),
        ({"Authorization": "bearer ключ"}, 200),
    ],
)
def test_with_a_key_a_request_for_a_clip_requires_it(headers, status, engine):
    raw = {name: value.encode() for name, value in headers.items()}
    request = GOOD | {"num_frames": 2, "steps": 1}
    assert ask(engine, key="ключ", json=request, headers=raw).status_code == status
    assert ask(engine, "GET", "/readyz", key="a").status_code == 200


async def messages_of(engine: Engine, count: int, **changes) -> list[list]:
    """The messages of `count` requests that are sent at once, seeds 0 to count - 1."""

    async def one(seed: int) -> list:
        fields = {**GOOD, "seed": seed, **changes}
        return [message async for message in engine.stream(read_animation(fields), 60)]

    return list(await asyncio.gather(*map(one, range(count))))


@pytest.mark.parametrize("format", ["mp4", "gif", "frames"])
def test_a_clip_says_in_its_file_that_it_is_generated_and_from_what(engine, format):
    request = {**GOOD, "num_frames": 2, "steps": 1, "seed": 5, "format": format}
    data = ask(engine, json=request).content
    if format == "mp4":
        with av.open(io.BytesIO(data)) as container:
            text = container.metadata["comment"]
    else:
        file = zipfile.ZipFile(io.BytesIO(data)).read("001.png") if format == "frames" else data
        comment = Image.open(io.BytesIO(file)).info["Comment" if format == "frames" else "comment"]
        text = comment if isinstance(comment, str) else comment.decode()
    about = json.loads(text)
    assert about.pop("version").startswith("trip-i2v ")
    assert about == {"generated": True, "model": "trip version 2", "seed": 5, "prompt": PROMPT}


def test_a_clip_says_whether_the_end_of_its_prompt_was_not_read(engine):
    request = {**GOOD, "num_frames": 2, "steps": 1}
    for prompt, truncated in ((PROMPT, "false"), ("a red circle " * 100, "true")):
        answer = ask(engine, json={**request, "prompt": prompt})
        assert answer.headers["x-prompt-truncated"] == truncated


def test_steps_times_frames_are_bounded_but_the_models_own_values_always_pass(store, tmp_path):
    with engine_of(store, tmp_path, step_frames=40) as engine:
        answer = ask(engine, json={**GOOD, "num_frames": 64, "steps": 1000})
        assert answer.status_code == 422 and "steps is 1000 for 64 frames; use at most" in answer.text
        assert answer.json()["error"]["param"] == "steps"
        assert ask(engine, json={**GOOD, "num_frames": 4, "steps": 10}).status_code == 200


def test_a_full_queue_refuses_requests_with_a_retry_time(engine):
    ends = [messages[-1] for messages in asyncio.run(messages_of(engine, 12))]
    refused = [end for end in ends if isinstance(end, Refusal)]
    assert 6 <= len(refused) <= 8 and len([end for end in ends if isinstance(end, Clip)]) == 12 - len(refused)
    assert {end.status for end in refused} == {429} and all((end.retry_after or 0) >= 1 for end in refused)


def test_requests_of_equal_shape_share_a_batch_and_others_do_not(store, tmp_path):
    with engine_of(store, tmp_path, max_batch=3) as engine:
        clips = [messages[-1] for messages in asyncio.run(messages_of(engine, 5, num_frames=4, format="frames"))]
    assert sorted(clip.batch for clip in clips) in ([1, 1, 3, 3, 3], [2, 2, 3, 3, 3])
    for seed, clip in enumerate(clips):
        frames = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in clip.files])
        expected = store.expected("2", photo(), seed, num_frames=4)
        assert np.abs(frames.astype(int) - expected).max() <= 1, f"the clip of seed {seed} has other frames"


def test_a_request_over_its_time_limit_gets_504_and_leaves_the_queue(engine):
    answer = ask(Gateway(engine, 0.05), json={**GOOD, "steps": 1000, "num_frames": 64})
    assert answer.status_code == 504 and "no clip within 0.05 s" in answer.json()["error"]["message"]
    assert ask(engine, json={**GOOD, "num_frames": 2}).status_code == 200


def test_an_alias_that_moves_is_followed_and_no_request_is_lost(store, tmp_path):
    store.point("moving", "1")
    with engine_of(store, tmp_path, alias="moving", poll_seconds=0.05, max_queue=64) as engine:

        async def go() -> list[Clip]:
            clips = []
            for seed in range(2000):
                if seed == 3:
                    store.point("moving", "2")
                animation = read_animation({**GOOD, "seed": seed, "num_frames": 2, "format": "frames"})
                clips.append([message async for message in engine.stream(animation, 60)][-1])
                if seed > 5 and clips[-1].version == "2":
                    return clips
            return clips

        clips = asyncio.run(go())
    assert (clips[0].version, clips[-1].version) == ("1", "2")
    for seed, clip in list(enumerate(clips))[-3:]:
        frames = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in clip.files])
        np.testing.assert_array_equal(frames, store.expected(clip.version, photo(), seed, num_frames=2))
    store.point("moving", "1")


def test_a_version_that_does_not_load_keeps_the_old_one_in_use(store, tmp_path):
    store.point("moving", "1")
    with engine_of(store, tmp_path, alias="moving", poll_seconds=3600) as engine:
        store.point("moving", "2")
        (engine._aliased.fetch(engine._aliased.current()) / "trip.json").write_text("{}")
        engine.refresh()
        status = asyncio.run(engine.status())
        assert status.version == "1" and "version 2 of trip does not load" in status.trouble
        assert ask(engine, json={**GOOD, "num_frames": 2}).headers["x-model-version"] == "1"
        store.point("moving", "1")
        engine.refresh()
        assert asyncio.run(engine.status()).trouble == ""


def test_a_version_of_a_model_registered_again_replaces_the_deleted_one_of_the_same_number(store, tmp_path):
    client = connect(store.uri)

    def make(version: str) -> None:
        existing = client.get_model_version("trip", version)
        client.create_registered_model("again")
        client.create_model_version("again", existing.source, tags=existing.tags, model_id=existing.model_id)
        client.set_registered_model_alias("again", "champion", "1")

    make("1")
    engine = Engine(EngineSpec("again", "champion", store.uri, str(tmp_path), poll_seconds=3600))
    engine.refresh()
    before = engine._live
    client.delete_registered_model("again")
    make("2")
    engine.refresh()
    assert before and engine._live and before.version == engine._live.version == "1"
    assert (before.pipe.model.config.guidance, engine._live.pipe.model.config.guidance) == (1.0, 3.0)
    client.delete_registered_model("again")


def test_an_unknown_alias_and_a_registry_that_is_down_are_reported_until_they_exist(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with engine_of(store, tmp_path / "a", alias="nobody", poll_seconds=3600) as engine:
        for answer in (ask(engine, "GET", "/readyz"), ask(engine, json=GOOD)):
            assert answer.status_code == 503 and "no version trip@nobody" in answer.text
        assert ask(engine, "GET", "/healthz").text == "ok\n"
        store.point("nobody", "1")
        engine.refresh()
        assert ask(engine, "GET", "/readyz").json()["version"] == "1"
    connect(store.uri).delete_registered_model_alias("trip", "nobody")
    down = Store("http://127.0.0.1:9", {})
    with engine_of(down, tmp_path / "b", poll_seconds=3600) as engine:
        answer = ask(engine, "GET", "/readyz")
        assert answer.status_code == 503 and "http://127.0.0.1:9 does not answer" in answer.json()["trouble"]
        assert ask(engine, json=GOOD).headers["retry-after"] == "5"
    mlflow.set_tracking_uri(store.uri)
    mlflow.set_registry_uri(store.uri)


def test_metrics_docs_and_description(engine):
    gateway = Gateway(engine, 60)
    ask(gateway, json={**GOOD, "num_frames": 2})
    ask(gateway, json={**GOOD, "steps": -1})
    text = ask(gateway, "GET", "/metrics").text
    assert 'trip_requests_total{status="200"} 1.0' in text and 'trip_requests_total{status="422"} 1.0' in text
    assert 'trip_clips_total{model="trip",version="2"} 1.0' in text and "process_resident_memory_bytes" in text
    assert "trip_requests_in_flight 0.0" in text
    assert "# TYPE trip_request_retries_total counter\ntrip_request_retries_total 0.0" in text
    described = ask(gateway, "GET", "/openapi.json").json()["paths"]["/v1/animate"]["post"]
    example = described["requestBody"]["content"]["application/json"]["example"]
    assert ask(gateway, json=example).status_code == 200
    assert "//cdn" not in ask(gateway, "GET", "/docs").text


def test_a_closing_gateway_refuses_requests(engine):
    gateway = Gateway(engine, 60)
    gateway.closing = True
    assert ask(gateway, json=GOOD).status_code == ask(gateway, "GET", "/readyz").status_code == 503


def test_an_engine_sends_its_first_progress_before_any_step(engine):
    first, *_ = asyncio.run(messages_of(engine, 1, num_frames=2))[0]
    assert first == Progress(0, 0)
