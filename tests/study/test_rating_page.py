"""The page of a study in a browser: four raters vote, one reloads, one fails the gold pairs; the tally is recomputed.

Screenshots go to `runs/screenshots`, or below TRIP_ARTIFACTS where that is set.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from tasks.study.plan import BUNDLE, Plan
from tasks.study.server import ServerLimits, create_app
from tasks.study.store import Store
from tasks.study.tally import tally
from tests.support.studies import make_study

sync_api = pytest.importorskip("playwright.sync_api")

SCREENSHOTS = Path(os.environ.get("TRIP_ARTIFACTS") or Path(__file__).resolve().parents[2] / "runs") / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
KEYS = {"left": "1", "unsure": "2", "right": "3"}
ITEMS, RATERS = 12, 4
QUICK = ServerLimits(votes_per_second=100, votes_burst=100)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt install chromium)"),
]


@contextmanager
def served(plan: Plan, folder: Path, limits: ServerLimits = QUICK) -> Iterator[tuple[str, Store]]:
    """The server of a study in this process."""
    store = Store(f"sqlite:///{folder}/votes.db", plan)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(plan, store, folder / "study" / BUNDLE, limits)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", store
    finally:
        server.should_exit = True
        thread.join()
        store.close()


@pytest.fixture
def browser():
    """Chromium; at the end, every request must have gone to this machine's server."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        asked: list[str] = []

        def context(size: str, address: str):
            width, height = SIZES[size]
            window = browser.new_context(
                viewport={"width": width, "height": height}, has_touch=size == "phone", reduced_motion="no-preference"
            )
            window.set_default_timeout(30_000)
            window.on("request", lambda request: asked.append(request.url))
            page = window.new_page()
            page.goto(address)
            return page

        yield context
        browser.close()
        assert not [url for url in asked if not url.startswith(("http://127.0.0.1:", "blob:", "data:"))]


def picture(page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"study-{name}.png", full_page=True)


def shown(page, number: int) -> None:
    """Waits for the rater's pair with this number, from 0. The page forbids `eval`, which wait_for_function needs."""
    page.locator("#task:not([hidden]) #heading").filter(has_text=f"Pair {number + 1} of ").wait_for()


def watched(page) -> None:
    """Waits until both clips have played to their end."""
    page.locator("#questions:not([disabled])").wait_for()


def lose_answer(route) -> None:
    route.fetch()
    route.abort()


def wanted(rater: int, kind: str, item: int, question: int, left: str, right: str, repeated: bool) -> str:
    """The answer of a simulated rater, by hand: known from the key alone."""
    if kind in ("shuffled", "frozen"):
        true = "left" if left == "real" else "right"
        return {"left": "right", "right": "left"}[true] if rater == 3 else true
    value = (rater + item * 3 + question * 5) % 7
    if value == 6:
        return "unsure"
    system = "ours" if value < 4 else "other"
    return "left" if left == system else "right"


def test_four_raters_vote_and_the_tally_is_that_of_a_computation_by_hand(tmp_path, browser):
    plan, key = make_study(tmp_path, ITEMS, raters=RATERS)
    sealed = {pair.name: pair for pair in key.pairs}
    by_hand: dict[tuple[str, int], dict[tuple[int, str], float]] = {}
    lefts = {"left": 0, "right": 0}
    with served(plan, tmp_path) as (address, store):
        for rater in range(RATERS):
            size = "phone" if rater % 2 else "desktop"
            page = browser(size, address)
            page.wait_for_selector("#welcome:not([hidden])")
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            if rater < 2:
                picture(page, f"{size}-consent")
            page.locator("#start").click()
            for number, place in enumerate(plan.assignments[rater]):
                shown(page, number)
                assert page.locator("#vote").is_disabled()
                watched(page)
                assert page.locator("input:checked").count() == 0
                if rater < 2 and number == 0:
                    picture(page, f"{size}-pair")
                    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
                if rater == 1 and number == 5:
                    page.reload()
                    shown(page, number)
                    watched(page)
                pair = sealed[plan.pairs[place.pair].name]
                left, right = (pair.second, pair.first) if place.swapped else (pair.first, pair.second)
                item = int(pair.item.removeprefix("item"))
                answers = []
                for question, asked in enumerate(plan.questions):
                    answer = wanted(rater, pair.kind, item, question, left, right, pair.kind == "repeat")
                    answers.append(answer)
                    if pair.kind == "study":
                        chosen = {"left": left, "right": right}.get(answer)
                        score = 0.5 if chosen is None else float(chosen == "ours")
                        by_hand.setdefault((asked.name, rater), {})[item, asked.name] = score
                        if chosen is not None:
                            lefts[answer] += 1
                    if size == "desktop":
                        page.keyboard.press(KEYS[answer])
                    else:
                        page.locator(f"[data-name={asked.name}] label:has([value={answer}])").click()
                if rater < 2 and number == 0:
                    picture(page, f"{size}-answered")
                if size == "desktop":
                    page.keyboard.press("Enter")
                else:
                    page.locator("#vote").click()
            page.wait_for_selector("#done:not([hidden])")
            if rater < 2:
                picture(page, f"{size}-done")
        votes = store.votes()
    assert len(votes) == RATERS * len(plan.assignments[0])
    result = tally(plan, key, votes)
    assert result.excluded == {"gold": 1} and result.raters[3].excluded == "gold"
    for count, raters in ((result.all_raters, range(RATERS)), (result.kept_raters, range(RATERS - 1))):
        assert count is not None and len(count.comparisons) == len(plan.questions)
        for line in count.comparisons:
            scores = [s for rater in raters for s in by_hand[line.question, rater].values()]
            assert (line.first, line.second) == ("ours", "other")
            assert (line.wins, line.ties, line.losses) == tuple(scores.count(value) for value in (1.0, 0.5, 0.0))
            assert line.win_rate.value == pytest.approx(sum(scores) / len(scores), abs=1e-12)
            by_rater = [np.sign(sum(by_hand[line.question, rater].values()) - ITEMS / 2) for rater in raters]
            share = sum((sign + 1) / 2 for sign in by_rater) / len(by_rater)
            assert line.tally_by_rater.value == pytest.approx(share)
            by_item = [
                np.sign(sum(by_hand[line.question, rater][item, line.question] - 0.5 for rater in raters))
                for item in range(ITEMS)
            ]
            assert (line.items_for, line.items_against) == (by_item.count(1), by_item.count(-1))
            assert line.win_rate.ci_low < line.win_rate.value < line.win_rate.ci_high
    assert sum(lefts.values()) == sum(line.wins + line.losses for line in result.all_raters.comparisons)


def test_a_lost_server_costs_no_vote_and_prolific_gets_its_code(tmp_path, browser):
    plan, _ = make_study(tmp_path, 2, raters=2, gold=0, repeats=0, platform="prolific", completion_code="C0DE")
    query = "?PROLIFIC_PID=5f0a2b&STUDY_ID=s1&SESSION_ID=s2x9"
    with served(plan, tmp_path) as (address, store):
        page = browser("desktop", address)  # without a participant
        page.locator("#start").click()
        page.wait_for_selector("#trouble:not([hidden])")
        assert "prolific" in page.locator("#trouble").inner_text()
        page.goto(address + query)
        page.locator("#start").click()
        for number in range(2):
            shown(page, number)
            watched(page)
            for key in "123":
                page.keyboard.press(key)
            page.keyboard.press("Backspace")
            page.keyboard.press("1")
            # The answer to a stored vote is lost on its way: the page asks again and goes on.
            page.route("**/api/votes", lose_answer, times=1)
            page.keyboard.press("Enter")
        page.wait_for_selector("#done:not([hidden])")
        link = page.locator("#back a").get_attribute("href")
        assert link == "https://app.prolific.com/submissions/complete?cc=C0DE"
        votes = store.votes()
    assert [vote.answers["visual_quality"] for vote in votes] == ["left", "left"]
