"""Writes the page that raters see into the bundle of a study: one HTML file, one script, one style sheet."""

from __future__ import annotations

from pathlib import Path

from tasks.pages import render
from tasks.study.plan import Plan

PAGE = Path(__file__).parent / "page"
FILES = ("study.js", "study.css")
# Answer, label and key, from left to right.
CHOICES = (("left", "Left", "1"), ("unsure", "Not sure", "2"), ("right", "Right", "3"))
MINUTES_PER_PAIR = 0.4  # two views and three answers


def write_page(plan: Plan, bundle: Path) -> None:
    """Writes index.html, study.js and study.css into `bundle`."""
    pairs = len(plan.assignments[0])
    page = render(
        "study.html",
        plan=plan,
        choices=CHOICES,
        pairs=pairs,
        minutes=max(1, round(pairs * (MINUTES_PER_PAIR + plan.seconds / 60))),
    )
    (bundle / "index.html").write_text(page, encoding="utf-8")
    for name in FILES:
        (bundle / name).write_bytes((PAGE / name).read_bytes())
