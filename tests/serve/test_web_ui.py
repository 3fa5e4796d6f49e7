"""The web UI in a browser: photo, progress, clip, keyboard, phone, errors, login.

Screenshots go to `runs/screenshots`, or below TRIP_ARTIFACTS where that is set.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from tasks.serve.api import create_app
from tasks.serve.engine import Engine
from tasks.serve.gateway import Gateway
from tasks.serve.messages import EngineSpec
from tasks.video.decode import read_clip
from tests.support.reports import write_record
from trip_model.images import load_image

sync_api = pytest.importorskip("playwright.sync_api")

SCREENSHOTS = Path(os.environ.get("TRIP_ARTIFACTS") or Path(__file__).resolve().parents[2] / "runs") / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SEED = "#seed :is(input, textarea)"
PROMPT = "a red circle moving right slowly"
KEY = "a key with spaces and \N{LATIN SMALL LETTER E WITH ACUTE}"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo with a red disc on a gradient, wider than high."""
    y, x = np.mgrid[0:120, 0:160] / 120
    pixels = np.stack([70 + 40 * x, 90 + 50 * y, 130 + 30 * x], axis=-1)
    pixels[(x - 0.6) ** 2 + (y - 0.5) ** 2 < 0.15**2] = (226, 54, 48)
    path = tmp_path_factory.mktemp("photo") / "disc.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    from tasks.register.registry import RegisterSpec, register

    home = tmp_path_factory.mktemp("page")
    write_record(home)
    uri = f"sqlite:///{home}/mlflow.db"
    register(RegisterSpec(str(tiny_model), str(home), uri, check_steps=1), lambda _: None)
    engine = Engine(EngineSpec("trip", "champion", uri, str(home / "cache")))
    engine.start()
    yield engine
    engine.stop()


@contextmanager
def served(engine: Engine, key: str | None = None) -> Iterator[str]:
    """The service with its web UI in this process, without Ray."""
    from tasks.serve.web_ui import mount_web_ui

    gateway = Gateway(engine, 120)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = mount_web_ui(create_app(gateway, key), gateway, key)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(engine) as address:
        yield address


@pytest.fixture
def visit(address: str):
    """Opens a page in a window of a named size; at the end, all requests must be to the service."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        asked: list[tuple[str, str]] = []

        def open_page(size: str = "desktop", scheme: str = "light", at: str = address, until: str = "#animate"):
            width, height = SIZES[size]
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.set_default_timeout(60_000)
            page.on("request", lambda request: asked.append((at, request.url)))
            page.goto(at)
            page.wait_for_selector(until)
            return page

        yield open_page
        browser.close()
        strangers = [url for at, url in asked if not url.startswith((at, "blob:", "data:"))]
        assert not strangers


def fill(page, photo: Path, prompt: str = PROMPT, **settings) -> None:
    page.locator("#photo input[type=file]").set_input_files(photo)
    page.wait_for_selector("#photo img")
    page.locator("#prompt textarea").fill(prompt)
    if settings:
        if not page.locator(SEED).is_visible():
            page.locator("#settings button").first.click()
        for name, value in settings.items():
            field = page.locator(SEED if name == "seed" else f"#{name} input[type=number]")
            field.fill(str(value))
            field.press("Tab")


def shown_clip(page, count: int) -> bytes:
    """The bytes of the video on the page, once the session holds `count` clips."""
    page.wait_for_function(f"document.querySelectorAll('#history figure').length == {count}")
    source = page.locator("#clip video").get_attribute("src")
    return page.request.get(source).body()


def fits(page) -> bool:
    """Whether the page is no wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def picture(page, name: str) -> None:
    page.wait_for_function("[...document.querySelectorAll('#history video')].every(video => video.readyState >= 2)")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def test_a_photo_becomes_a_clip_with_progress_and_its_seed_gives_it_again(visit, photo):
    page = visit()
    picture(page, "desktop-empty")
    fill(page, photo, seed=7, steps=100, frames=16)
    page.locator("#animate").click()
    page.get_by_text("Denoising").first.wait_for()
    picture(page, "desktop-progress")
    video = shown_clip(page, 1)
    clip = read_clip(video, 16, 4, 32)
    assert np.abs(clip.pixels[0].astype(int) - load_image(photo.read_bytes(), 32)).mean() < 20
    assert "Seed 7" in page.locator("#facts").inner_text()
    page.locator("#animate").click()
    assert shown_clip(page, 2) == video
    with page.expect_download() as download:
        page.locator("#clip a[download], #clip [aria-label=Download], #clip [title=Download]").first.click()
    assert Path(download.value.path()).read_bytes() == video
    picture(page, "desktop-clip")


def test_all_controls_are_reached_by_keyboard_with_visible_focus(visit, photo):
    page = visit()
    order, choosers = [], []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    for _ in range(9):
        page.keyboard.press("Tab")
        focus = page.evaluate(
            "() => { const e = document.activeElement;"
            " return [e.closest('#photo, #prompt, #animate, #settings')?.id, getComputedStyle(e).outline] }"
        )
        if focus[0] == "photo" and "photo" not in order:
            for _ in range(60):  # Gradio shows the button before it reacts to it
                page.keyboard.press("Enter")
                page.wait_for_timeout(1000)
                if choosers:
                    break
            choosers[0].set_files(photo)
            page.wait_for_selector("#photo img")
        if focus[0] == "prompt":
            page.keyboard.type(PROMPT)
        assert focus[0] is None or "solid 3px" in focus[1], focus
        order += [focus[0]] if focus[0] not in order else []
        if focus[0] == "settings":
            break
    assert [place for place in order if place] == ["photo", "prompt", "animate", "settings"]
    page.keyboard.press("Enter")  # opens the settings
    page.locator(SEED).wait_for(state="visible")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#seed') !== null")
    page.keyboard.type("3")
    picture(page, "desktop-settings")
    page.locator("#animate").focus()
    page.keyboard.press("Enter")
    shown_clip(page, 1)
    assert "Seed 3" in page.locator("#facts").inner_text()
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Enter")
    shown_clip(page, 2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_horizontal_scrolling(visit, photo, scheme):
    page = visit("phone", scheme)
    fill(page, photo, steps=2)
    page.locator("#animate").click()
    page.wait_for_function(  # the window scrolls to the clip
        "() => { const box = document.getElementById('clip').getBoundingClientRect();"
        " return box.top >= 0 && box.bottom <= window.innerHeight + 1 }",
        timeout=10_000,
    )
    shown_clip(page, 1)
    page.locator("#animate").click()
    shown_clip(page, 2)
    first, second = page.locator("#history figcaption").all_inner_texts()
    assert first != second, "without a seed each clip has another one"
    page.locator("#keep").click()
    page.locator("#animate").click()
    shown_clip(page, 3)
    first, second, _ = page.locator("#history figcaption").all_inner_texts()
    assert first == second
    assert fits(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in background.removeprefix("rgb(").rstrip(")").split(",")) < 300) == (
        scheme == "dark"
    )
    picture(page, f"phone-{scheme}")


def test_a_rejected_request_shows_a_message(visit, photo, tmp_path):
    page = visit()
    page.locator("#animate").click()
    page.get_by_text("Choose a photo first").wait_for()
    dot = tmp_path / "dot.png"
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    dot.write_bytes(buffer.getvalue())
    fill(page, dot)
    page.locator("#animate").click()
    page.get_by_text("1x1 pixels; use at least 8").wait_for()
    picture(page, "desktop-refused")
    page.reload()
    page.wait_for_selector("#animate")
    fill(page, photo, steps=1)
    page.locator("#animate").click()
    shown_clip(page, 1)


def test_with_a_key_the_web_ui_requires_a_login(visit, engine, photo):
    with served(engine, KEY) as locked:
        page = visit("phone", at=locked, until="input[type=password]")
        picture(page, "phone-login")
        assert fits(page)
        page.keyboard.press("Tab")
        page.keyboard.type("anybody")
        page.keyboard.press("Tab")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("Incorrect").first.wait_for()
        picture(page, "phone-login-refused")
        assert not page.locator("#animate").count()
        page.get_by_label("username").fill("anybody")
        page.get_by_label("password").fill(KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#animate")
        fill(page, photo, steps=2)
        page.locator("#animate").click()
        shown_clip(page, 1)
        picture(page, "phone-unlocked")
        clip = page.locator("#clip video").get_attribute("src")
        upload = f"{locked}/gradio_api/upload"
        assert httpx.get(clip).status_code == 401
        assert httpx.post(upload, files={"files": photo.read_bytes()}).status_code == 401
