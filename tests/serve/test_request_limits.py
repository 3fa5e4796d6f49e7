"""One table of bounds: library, command line, logged model and API accept and reject the same values."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks.register import pyfunc_model
from tasks.register.packaging import bounds, drawn_photo
from tasks.serve.api import AppOptions, create_app
from tasks.serve.gateway import Gateway
from tasks.serve.messages import Clip, Progress, Status
from tasks.serve.server_limits import ServerLimits, VideoLimits
from tasks.serve.videos import Videos
from trip_model.__main__ import main
from trip_model.images import check_video_target, write_video
from trip_model.pipeline import TripPipeline
from trip_model.request_limits import BOUNDS, MAX_PHOTO_BYTES, RequestError, check_number, read_photo, read_prompt

# The library's argument `seed`, which works until 0.3.
pytestmark = pytest.mark.filterwarnings(r"ignore:TripPipeline\(image, prompt, seed:DeprecationWarning")

PHOTO = drawn_photo(32)


class Accepted(Exception):
    """Raised instead of the denoising, with the values that reach it."""


@dataclass
class Recorder:
    """A backend that records the requests that the gateway accepts."""

    retries: int = 0
    max_steps: int = 700

    async def stream(self, animation: Any, seconds: float):
        yield Progress(0, 1)
        yield Clip((animation.prompt.encode(),), "mp4", 0, 2, 8, 8, 4.0, 1, 1.0, "trip", "1", 1, 0.1)

    async def status(self) -> Status:
        return Status("trip", "1", "", 0, 1, "cpu", {}, self.max_steps)


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> TripPipeline:
    return TripPipeline.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def interfaces(tiny_model, pipe, tmp_path_factory) -> Iterator[dict[str, Callable[..., bool]]]:
    """Each interface as a function of a request's values: whether it accepts them. None denoises or loads a model."""
    folder = tmp_path_factory.mktemp("interfaces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trip_model.pipeline.encode_pixels", lambda *_: (_ for _ in ()).throw(Accepted))
        patch.setattr(TripPipeline, "from_pretrained", lambda _: pipe)
        yield interfaces_of(pipe, tiny_model, folder)


def interfaces_of(pipe: TripPipeline, model_folder: Path, folder: Path) -> dict[str, Callable[..., bool]]:
    model = pyfunc_model.TripModel()
    model.pipe = pipe
    gateway, many = Gateway(Recorder(), 60), 10**6
    videos = Videos(gateway, "memory://limits", VideoLimits(waiting=many, kept=many))
    app = create_app(gateway, videos, AppOptions(ServerLimits(requests_per_minute=many, burst=many)))

    def run(call: Callable[[], Any]) -> bool:
        try:
            call()
        except Accepted:
            return True
        except ValueError:
            return False
        raise AssertionError("neither accepted nor rejected")

    def library(image: Any = PHOTO, prompt: Any = "a cat", **numbers: Any) -> bool:
        numbers.pop("fps", None)
        return run(lambda: pipe(image, prompt, **numbers))

    def command_line(image: Any = PHOTO, prompt: Any = "a cat", **numbers: Any) -> bool:
        (folder / "photo").write_bytes(image)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in numbers.items()]
        target = str(folder / "out.mp4")
        try:
            return main([str(folder / "photo"), prompt, "-m", str(model_folder), "-o", target, *flags]) != 2
        except Accepted:
            return True

    def logged_model(image: Any = PHOTO, prompt: Any = "a cat", **numbers: Any) -> bool:
        rows = pd.DataFrame({"image": [image], "prompt": [prompt]})
        return run(lambda: model.predict(None, rows, numbers))  # type: ignore[arg-type]

    def post(route: str = "/v1/animate", **request: Any) -> bool:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://trip") as client:
                return await client.post(route, **request)

        status = asyncio.run(go()).status_code
        assert status in (200, 202, 400, 413, 422), status
        return status < 300

    def api_json(image: Any = PHOTO, prompt: Any = "a cat", **numbers: Any) -> bool:
        text = base64.b64encode(image).decode() if isinstance(image, bytes) else image
        # NaN and Infinity are not JSON, but Python and others write them.
        content = json.dumps({"image": text, "prompt": prompt, **numbers})
        return post(content=content, headers={"Content-Type": "application/json"})

    def api_form(image: Any = PHOTO, prompt: Any = "a cat", **numbers: Any) -> bool:
        data = {"prompt": prompt, **{name: str(value) for name, value in numbers.items()}}
        return post(data=data, files={"image": ("photo", image)})

    def background(image: Any = PHOTO, prompt: Any = "a cat", **numbers: Any) -> bool:
        data = {"prompt": prompt, **{name: str(value) for name, value in numbers.items()}}
        return post("/v1/videos", data=data, files={"image": ("photo", image)})

    return {
        "library": library,
        "command line": command_line,
        "logged model": logged_model,
        "API, JSON": api_json,
        "API, form": api_form,
        "videos, which the web UI uses": background,
    }


INFINITE = (float("nan"), float("inf"), -float("inf"))
NUMBERS = {
    "num_frames": ((2, 64, 16.0), (1, 65, 2.5, 0, -3, True, *INFINITE)),
    "steps": ((1, 1000, 50.0), (0, 1001, 1.5, -1, True, False, 10**30, *INFINITE)),
    "seed": ((0, 2**63 - 1), (-1, 2**63, 0.5, True, *INFINITE)),
    "guidance": ((0, 50, 7.5), (-0.5, 50.5, True, *INFINITE)),
    "fps": ((1, 60, 23.976), (0, 0.5, 61, -3, True, *INFINITE)),
}
CASES = [
    pytest.param({name: value}, accepted, id=f"{name} {value}")
    for name, lists in NUMBERS.items()
    for accepted, values in zip((True, False), lists, strict=True)
    for value in values
]


@pytest.mark.parametrize(("values", "accepted"), CASES)
def test_every_interface_accepts_and_rejects_the_same_numbers(interfaces, values, accepted):
    (name,) = values
    answers = {where: accepts(**values) for where, accepts in interfaces.items() if (where, name) != ("library", "fps")}
    assert set(answers.values()) == {accepted}, answers


def encoded(size: tuple[int, int], format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, format)
    return buffer.getvalue()


PHOTOS = {
    "the smallest": (encoded((8, 8), "PNG"), True),
    "a WebP": (encoded((32, 16), "WEBP"), True),
    "7 pixels": (encoded((7, 8), "PNG"), False),
    "a strip": (encoded((168, 8), "PNG"), False),
    "a TIFF": (encoded((32, 32), "TIFF"), False),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", False),
    "empty": (b"", False),
    "as many bytes as accepted": (PHOTO + bytes(MAX_PHOTO_BYTES - len(PHOTO)), True),
    "one byte more": (PHOTO + bytes(MAX_PHOTO_BYTES + 1 - len(PHOTO)), False),
}
PROMPTS = {
    "the longest": ("a" * 2000, True),
    "longer": ("a" * 2001, False),
    "empty": ("", False),
    "spaces": (" ", False),
}
TEXTS = [pytest.param("image", *case, id=name) for name, case in PHOTOS.items()]
TEXTS += [pytest.param("prompt", *case, id=f"{name} prompt") for name, case in PROMPTS.items()]


@pytest.mark.parametrize(("name", "value", "accepted"), TEXTS)
def test_every_interface_but_the_library_accepts_and_rejects_the_same_photos_and_prompts(
    interfaces, name, value, accepted
):
    answers = {where: accepts(**{name: value}) for where, accepts in interfaces.items() if where != "library"}
    assert set(answers.values()) == {accepted}, answers


def test_the_photo_of_a_request_may_be_any_base64():
    photo = base64.b64decode("iVBORw0K") + bytes(range(256)) * 2  # a header and every byte: the alphabet in full
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trip_model.request_limits.check_photo", lambda _: None)
        for end in range(len(photo) - 3, len(photo)):  # all three kinds of padding
            data = photo[:end]
            text = base64.b64encode(data).decode()
            lines = base64.encodebytes(data).decode()
            forms = (data, bytearray(data), memoryview(data), text, lines, lines.replace("\n", "\r\n"),
                     base64.urlsafe_b64encode(data).decode(), text.rstrip("="), f"data:image/png;base64,{text}",
                     f"DATA:image/png;BASE64,{text.rstrip('=')}", f" {text}\n")  # fmt: skip
            assert {read_photo(form) for form in forms} == {data}
        for bad in (
            "!!!!",
            "AA==AAAA",
            "AAAA AAAA",
            "AAAA===",
            "AAAAA",
            "data:image/png,AAAA",
            "data:image/png;base64",
            "é",
            "=AAA",
        ):
            with pytest.raises(RequestError, match="base64") as raised:
                read_photo(bad)
            assert raised.value.reason == "unreadable"
        with pytest.raises(RequestError, match="at most"):
            read_photo("A" * (MAX_PHOTO_BYTES // 3 * 4 + 8))


@pytest.mark.parametrize("size", [0, 200_000], ids=["small", "more than the parser gets"])
@pytest.mark.parametrize(
    "write",
    [
        lambda text: "\n".join(text[start : start + 76] for start in range(0, len(text), 76)),
        lambda text: text.replace("+", "-").replace("/", "_").rstrip("="),
        lambda text: f"DATA:image/png;base64,{text}",
    ],
    ids=["line breaks", "URL-safe without padding", "data URL in capitals"],
)
def test_the_api_takes_such_base64_in_bodies_of_any_size(interfaces, write, size):
    photo = PHOTO + np.random.default_rng(0).bytes(size)
    text = write(base64.b64encode(photo).decode())
    assert interfaces["API, JSON"](image=text) and interfaces["logged model"](image=text)


def test_json_escapes_in_base64_are_read_in_bodies_of_any_size():
    from tasks.serve.limits import read_json

    for size in (0, 100_000):
        text = base64.b64encode(PHOTO + np.random.default_rng(0).bytes(size)).decode() + "\r\n"
        for escaped in (text.replace("+", r"\u002B"), text.replace("/", r"\/"), text.replace("=", r"\u003d")):
            body = '{"image": "' + escaped.replace("\r\n", r"\r\n") + '"}'
            assert read_json(body.encode()) == {"image": text}


def test_the_service_lowers_the_steps_by_one_setting_and_tells_the_web_ui_the_smaller_of_both_bounds():
    gateway = Gateway(Recorder(), 60, max_steps=80)
    app = create_app(gateway, Videos(gateway, "memory://limits"))

    async def go(method: str, path: str, **request: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://trip") as client:
            return await client.request(method, path, **request)

    body = {"image": base64.b64encode(PHOTO).decode(), "prompt": "a cat"}
    for route in ("/v1/animate", "/v1/videos"):
        described = asyncio.run(go("GET", "/openapi.json")).json()["paths"][route]["post"]["requestBody"]["content"]
        assert {form["schema"]["properties"]["steps"]["maximum"] for form in described.values()} == {80}
        assert asyncio.run(go("POST", route, json={**body, "steps": 80})).is_success
        assert (
            "steps is 81; use an integer from 1 to 80"
            in asyncio.run(go("POST", route, json={**body, "steps": 81})).text
        )
    for limit, shown in ((80, 80), (1000, 700)):
        gateway.max_steps = limit
        assert asyncio.run(go("GET", "/v1/model")).json()["bounds"]["steps"]["maximum"] == shown


def test_a_model_with_fewer_time_steps_than_the_table_rejects_more(pipe):
    assert pipe.model.config.schedule.num_train_timesteps == 1000
    with pytest.raises(RequestError, match="from 1 to 200"):
        check_number("steps", 201, 200)


def test_the_package_and_the_openapi_page_state_the_bounds_of_the_table():
    for name, bound in BOUNDS.items():
        assert bounds()[name] == {"minimum": bound.minimum, "maximum": bound.maximum}
    with pytest.raises(RequestError, match="a large int"):
        check_number("steps", 10**5000)
    assert read_prompt("  a cat ") == "a cat"


TARGETS = {
    "another suffix": ("out.avi", "ends in '.avi'"),
    "a folder where a file is expected": ("folder.mp4", "is a folder"),
    "a file where a folder is expected": ("file", "is a file"),
    "below a file": ("file/out.mp4", "is not a folder"),
    "a folder with other files": ("other", "contains notes.txt"),
    "not writable": ("locked/out.mp4", "is not writable"),
}


@pytest.mark.parametrize(("target", "words"), TARGETS.values(), ids=TARGETS.keys())
def test_the_command_line_checks_its_target_before_it_loads_the_model(target, words, tmp_path, capsys, monkeypatch):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    (tmp_path / "locked").mkdir()
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "locked" and may(path, mode)
    )  # also for root
    (tmp_path / "photo").write_bytes(PHOTO)
    code = main([str(tmp_path / "photo"), "a cat", "-m", str(tmp_path / "no-model"), "-o", str(tmp_path / target)])
    error = capsys.readouterr().err
    assert code == 2 and words in error and "no-model" not in error


def test_the_command_line_checks_its_values_before_it_loads_the_model(tmp_path, capsys):
    (tmp_path / "photo").write_bytes(PHOTO)
    for flag in ("--fps=nan", "--fps=inf", "--fps=0", "--fps=-3", "--steps=2.5", "--seed=1e400", "--guidance=0x1"):
        assert main([str(tmp_path / "photo"), "a cat", "-m", str(tmp_path / "no-model"), flag]) == 2
        assert flag[2:].partition("=")[0] in capsys.readouterr().err.split()[1], flag
    assert main([str(tmp_path / "absent"), "a cat"]) == 2 and "absent: No such file" in capsys.readouterr().err


def test_frames_replace_those_of_an_earlier_longer_clip_and_nothing_else(tmp_path):
    pixels = np.zeros((6, 8, 8, 3), np.uint8)
    folder = write_video(tmp_path / "clip", pixels, 4.0)
    write_video(folder, pixels[:3], 4.0)
    assert sorted(p.name for p in folder.iterdir()) == ["000.png", "001.png", "002.png"]
    (folder / "7.png").write_bytes(b"a photo")
    with pytest.raises(ValueError, match=r"contains 7\.png, which is not a frame"):
        write_video(folder, pixels, 4.0)
    check_video_target(tmp_path / "new" / "folder" / "out.gif")
