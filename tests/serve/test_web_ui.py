"""The web UI in a browser: photo, crop, line, clip, history, keyboard, phone, errors, key, accessibility.

Screenshots go to `runs/screenshots`, or below TRIP_ARTIFACTS where that is set.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tasks.serve.api import AppOptions
from tasks.serve.engine import Engine
from tasks.serve.keys import Keys
from tasks.serve.messages import EngineSpec
from tasks.video.decode import read_clip
from tests.support.reports import write_record
from tests.support.service import QuickBackend, Running, running_service
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


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[Running]:
    with running_service(engine, seconds=120) as running:
        yield running


@pytest.fixture
def visit(service: Running):
    """Opens a page in a window of a named size; at the end, all requests must be to the service, without an error."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        asked: list[tuple[str, str]] = []
        errors: list[str] = []

        def open_page(size: str = "desktop", scheme: str = "light", at: str = service.url, context=None):
            width, height = SIZES[size]
            context = context or browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
            )
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.on("request", lambda request: asked.append((at.split("#")[0], request.url)))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on(
                "console", lambda m: errors.append(m.text) if m.type == "error" and "status of" not in m.text else None
            )
            page.goto(at)
            until(page, "document.getElementById('about').textContent.trim() !== ''")
            return page

        yield open_page
        browser.close()
        strangers = [url for at, url in asked if not url.startswith((at, "blob:", "data:"))]
        assert not strangers and not errors, (strangers, errors)


def until(page, expression: str, seconds: float = 60) -> None:
    """Waits for an expression; the page's policy forbids the `eval` that Playwright's own wait uses."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def fill(page, photo: Path, prompt: str = PROMPT, **settings) -> None:
    page.locator("#photo").set_input_files(photo)
    page.wait_for_selector("#preview", state="visible")
    page.locator("#prompt").fill(prompt)
    if settings and not page.locator("#seed").is_visible():
        page.locator("#settings summary").click()
    for name, value in settings.items():
        page.locator(f"#{name}").fill(str(value)) if name != "format" else page.locator("#format").select_option(value)


def shown_clip(page, count: int) -> bytes:
    """The bytes of the clip on the page, once the history holds `count` clips."""
    until(page, f"document.querySelectorAll('#clips li').length == {count}")
    return file_of(page, "#stage :is(video, img)")


def file_of(page, selector: str) -> bytes:
    read = "async (e) => Array.from(new Uint8Array(await (await fetch(e.src ?? e.href)).arrayBuffer()))"
    return bytes(page.locator(selector).first.evaluate(read))


def fits(page) -> bool:
    """Whether the page is no wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def picture(page, name: str) -> None:
    until(page, "[...document.querySelectorAll('video')].every(video => video.readyState >= 2)")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def accessible(page) -> None:
    """Asserts that axe finds no violation of WCAG 2.2 AA, and that everything to click is at least 24 pixels high."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = axe.run(page, options={"resultTypes": ["violations"], "runOnly": {"type": "tag", "values": tags}})
    violations = [(v["id"], v["nodes"][0]["html"][:200]) for v in found.response["violations"]]
    assert not violations
    small = page.evaluate(
        "() => [...document.querySelectorAll('main :is(button, a, summary, input, select, textarea)')].filter("
        "e => e.offsetParent && e.getBoundingClientRect().height < 24).map(e => e.outerHTML)"
    )
    assert not small


def test_a_photo_becomes_a_clip_with_progress_and_its_seed_gives_it_again(visit, photo):
    page = visit()
    picture(page, "desktop-empty")
    fill(page, photo, seed=7, steps=400, num_frames=16)
    page.locator("#animate").click(click_count=3)  # is one clip, and hits nothing else
    assert page.locator("#photo").evaluate("input => input.files.length") == 1
    page.get_by_text(re.compile(r"Step \d+ of 400")).wait_for()
    picture(page, "desktop-progress")
    video = shown_clip(page, 1)
    clip = read_clip(video, 16, 4, 32)
    assert np.abs(clip.pixels[0].astype(int) - load_image(photo.read_bytes(), 32)).mean() < 20
    assert "Seed 7" in page.locator("#facts").inner_text()
    page.locator("#animate").click()
    again = shown_clip(page, 2)  # x264 does not always write the same bytes for the same frames
    assert np.abs(read_clip(again, 16, 4, 32).pixels.astype(int) - clip.pixels).mean() < 1
    with page.expect_download() as download:
        page.locator("#download").click()
    assert Path(download.value.path()).read_bytes() == again
    assert download.value.suggested_filename == "trip-7.mp4"
    picture(page, "desktop-clip")
    accessible(page)


def test_the_photo_is_shown_next_to_the_clip(visit, photo):
    page = visit("phone")
    fill(page, photo, steps=2, num_frames=4, seed=3)
    page.locator("#animate").click()
    shown_clip(page, 1)
    page.locator("#compare").click()
    until(page, "document.querySelector('#stage .before').readyState >= 2")
    assert page.locator("#stage video").count() == 2 and page.evaluate("document.querySelector('.before').paused")
    boxes = [box for box in (page.locator("#stage video").nth(i).bounding_box() for i in range(2)) if box]
    assert boxes[0]["width"] == boxes[1]["width"] and boxes[0]["x"] < boxes[1]["x"] and fits(page)
    picture(page, "phone-compared")
    accessible(page)
    page.locator("#compare").click()
    assert page.locator("#stage video").count() == 1
    page.locator("#compare").click()
    page.locator("#animate").click()
    shown_clip(page, 2)
    assert page.locator("#stage video").count() == 1
    assert page.locator("#compare").get_attribute("aria-pressed") == "false"


def test_the_part_of_the_photo_that_is_animated_is_shown_and_moved(visit, photo):
    page = visit()
    fill(page, photo, steps=2, seed=1, num_frames=2)
    box, whole = (page.locator(where).bounding_box() for where in ("#crop", "#shown"))
    assert box and whole and abs(box["width"] - box["height"]) < 2 and abs(box["height"] - whole["height"]) < 2
    assert abs((box["x"] - whole["x"]) - (whole["width"] - box["width"]) / 2) < 2
    page.locator("#position").focus()
    page.keyboard.press("Home")
    picture(page, "desktop-crop")
    page.locator("#animate").click()
    first = read_clip(shown_clip(page, 1), 2, 4, 32).pixels[0].astype(int)
    left = Image.open(photo).crop((0, 0, 120, 120))
    moved, centre = (np.abs(first - load_image(part, 32)).mean() for part in (left, photo.read_bytes()))
    assert moved < 20 and moved < centre
    page.locator("#last").click()
    until(page, "document.getElementById('shown').naturalWidth == 32")
    assert page.locator("#move").is_hidden()  # a square


def test_history_and_clip_are_there_after_a_reload_and_can_be_deleted(visit, photo):
    page = visit()
    fill(page, photo, steps=2, num_frames=2, format="gif")
    page.locator("#animate").click()
    gif = shown_clip(page, 1)
    assert gif.startswith(b"GIF8")
    page.locator("#format").select_option("mp4")
    page.locator("#again").click()
    video = shown_clip(page, 2)
    page.reload()
    assert shown_clip(page, 2) == video
    picture(page, "desktop-reloaded")
    page.get_by_role("button", name="Delete the clip").first.click()
    until(page, "document.querySelectorAll('#clips li').length == 1")
    page.reload()
    page.wait_for_selector("#stage img")
    assert shown_clip(page, 1) == gif


def test_a_link_opens_the_clip_with_its_prompt_and_settings_elsewhere(visit, photo):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    fill(page, photo, prompt="a <b>red</b> circle & more", steps=2, num_frames=2, seed=11)
    page.locator("#animate").click()
    video = shown_clip(page, 1)
    page.locator("#share").click()
    page.get_by_text("The link is copied").wait_for()
    other = visit(at=page.evaluate("navigator.clipboard.readText()"))
    other.wait_for_selector("#stage video")
    assert file_of(other, "#stage video") == video
    assert other.locator("#prompt").input_value() == "a <b>red</b> circle & more"
    assert (other.locator("#seed").input_value(), other.locator("#steps").input_value()) == ("11", "2")
    assert other.locator("#history").is_hidden()


def test_the_place_in_the_line_is_shown_and_a_clip_is_cancelled(visit, photo):
    with running_service(QuickBackend(60)) as busy:
        form = {"data": {"prompt": "a cat"}, "files": {"image": photo.read_bytes()}}
        for _ in range(3):
            assert httpx.post(f"{busy.url}/v1/videos", **form).status_code == 202
        page = visit(at=busy.url)
        fill(page, photo)
        page.locator("#animate").click()
        page.get_by_text("Place 3 in the line").wait_for()
        picture(page, "desktop-line")
        page.reload()  # the page goes on waiting
        page.get_by_text("Place 3 in the line").wait_for()
        page.locator("#cancel").click()
        page.wait_for_selector("#waiting", state="hidden")
        assert page.locator("#animate").get_attribute("aria-disabled") is None


def test_all_controls_are_reached_by_keyboard_with_visible_focus(visit, photo):
    page = visit()
    order = []
    # From here on, before the first key: the browser learns of `expect_file_chooser` only some time after the call.
    choosers = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    for _ in range(12):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "() => { const e = document.activeElement;"
            " return [e.id || e.closest('[id]')?.id || e.className, getComputedStyle(e).outline] }"
        )
        assert "solid 3px" in outline, name
        order.append(name)
        if name == "photo":
            page.keyboard.press("Enter")
            end = time.monotonic() + 60
            while not choosers:
                assert time.monotonic() < end, "Enter opens no file chooser"
                page.wait_for_timeout(50)
            choosers[0].set_files(photo)
            page.wait_for_selector("#preview", state="visible")
        if name == "prompt":
            page.keyboard.type(PROMPT)
        if name == "settings":
            break
    # The first is the link that skips to the form; the wide photo has a part to choose.
    assert list(dict.fromkeys(order[1:])) == ["photo", "position", "prompt", "examples", "settings"], order
    page.keyboard.press("Enter")  # opens the settings
    page.locator("#seed").wait_for(state="visible")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "seed"
    page.keyboard.type("3")
    page.locator("#steps").fill("2")
    picture(page, "desktop-settings")
    accessible(page)
    page.locator("#animate").focus()
    page.keyboard.press("Enter")
    shown_clip(page, 1)
    assert "Seed 3" in page.locator("#facts").inner_text()
    page.locator("#prompt").focus()
    page.keyboard.press("Enter")
    shown_clip(page, 2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_horizontal_scrolling(visit, photo, scheme):
    page = visit("phone", scheme)
    fill(page, photo, steps=300)
    page.locator("#animate").click()
    page.wait_for_selector("#waiting", state="visible")
    until(
        page,  # the window scrolls to the clip and its progress
        "() => { const box = document.getElementById('waiting').getBoundingClientRect();"
        " return box.top >= 0 && box.bottom <= window.innerHeight + 1 }",
        10,
    )
    shown_clip(page, 1)
    page.locator("#steps").fill("2")
    page.locator("#animate").click()
    shown_clip(page, 2)
    seeds = page.locator("#clips li p.quiet").all_inner_texts()
    assert seeds[0] != seeds[1], "without a seed each clip has another one"
    page.locator("#keep").click()
    page.locator("#animate").click()
    shown_clip(page, 3)
    seeds = page.locator("#clips li p.quiet").all_inner_texts()
    assert seeds[0] == seeds[1]
    assert fits(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 300) == (scheme == "dark")
    picture(page, f"phone-{scheme}")
    accessible(page)


def test_an_error_stands_at_its_field_and_the_last_clip_stays(visit, photo, tmp_path):
    page = visit("phone")
    page.locator("#animate").click()
    assert page.locator("#photo-error").inner_text() == "Choose a photo."
    assert page.locator("#prompt-error").inner_text() == "Describe what should move."
    assert page.evaluate("document.activeElement.id") == "photo"
    picture(page, "phone-missing")
    accessible(page)
    page.locator("#examples button").first.click()
    page.wait_for_selector("#preview", state="visible")
    assert page.locator("#prompt").input_value() == PROMPT and not page.locator("#photo-error").inner_text()
    page.locator("#settings summary").click()
    page.locator("#steps").fill("2")
    page.locator("#animate").click()
    video = shown_clip(page, 1)
    page.locator("#steps").fill("2.5")
    page.locator("#animate").click()
    page.get_by_text("Steps is 2.5; use an integer").wait_for()
    assert page.evaluate("document.activeElement.id") == "steps" and page.locator("#steps-error").is_visible()
    page.locator("#steps").fill("2")
    dot = tmp_path / "dot.png"
    Image.new("RGB", (1, 1)).save(dot)
    page.locator("#photo").set_input_files(dot)
    page.locator("#animate").click()
    page.get_by_text("1x1 pixels; use at least 8").wait_for()
    picture(page, "phone-refused")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    page.locator("#photo").set_input_files(tmp_path / "photo.heic")
    page.get_by_text("save it as JPEG").wait_for()
    (tmp_path / "big.jpg").write_bytes(bytes(17 * 2**20))
    page.locator("#photo").set_input_files(tmp_path / "big.jpg")
    page.get_by_text("The file has 17 MiB; choose one of at most 16 MiB").wait_for()
    assert file_of(page, "#stage video") == video


def test_with_a_key_the_web_ui_asks_for_it_and_keeps_it_in_the_tab(visit, engine, photo):
    with running_service(engine, AppOptions(keys=Keys(key=KEY))) as locked:
        page = visit("phone", at=locked.url)
        picture(page, "phone-key")
        accessible(page)
        assert fits(page)
        page.locator("#key").fill("wrong")
        fill(page, photo, steps=2)
        page.locator("#animate").click()
        page.get_by_text("The service does not accept this key").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        picture(page, "phone-key-refused")
        page.locator("#key").fill(KEY)
        page.locator("#animate").click()
        video = shown_clip(page, 1)
        page.reload()
        assert shown_clip(page, 1) == video
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
        id = page.evaluate("JSON.parse(localStorage.getItem('trip-videos'))[0]")
        assert httpx.get(f"{locked.url}/v1/videos/{id}/content").status_code == 401
        other = visit("phone", at=f"{locked.url}/#video={id}")  # another tab has no key
        assert other.locator("#key").is_visible() and not other.locator("#stage video").count()
