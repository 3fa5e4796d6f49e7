"""The shipped scorers: what they find in drawn frames, and what they say without their package or its weights."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tasks.encode import scorers
from tasks.encode.filters import check_filters
from tasks.encode.scorers import SHIPPED, overlaid_text, unsafe_content
from tasks.encode.spec import FilterSpec
from tasks.ingest.drawing import draw_clip
from tasks.records import UserError

NAMES = {"text": "tasks.encode.scorers:overlaid_text", "unsafe": "tasks.encode.scorers:unsafe_content"}


def bounds(score: str) -> FilterSpec:
    return FilterSpec(**{f"most_{score}": 0.5, f"{score}_scorer": NAMES[score]})


def installed(score: str) -> None:
    if importlib.util.find_spec(SHIPPED[NAMES[score]].module) is None:
        pytest.skip(f"the extra `{score}` is not installed")


@pytest.mark.parametrize("score", NAMES)
def test_without_its_package_a_scorer_is_one_sentence_before_any_work(
    score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorers.importlib.util, "find_spec", lambda name: None)
    sentence = rf"filters\.{score}_scorer .* is not installed; pip install 'trip-i2v\[{score}\]', on every worker"
    with pytest.raises(UserError, match=sentence) as caught:
        check_filters(bounds(score))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("score", NAMES)
def test_other_weights_are_refused_before_they_are_loaded(
    score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = SHIPPED[NAMES[score]]
    package = tmp_path / f"other_{score}"
    (package / known.file).parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / known.file).write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SHIPPED, NAMES[score], replace(known, module=package.name))
    with pytest.raises(UserError, match=f"have the sha256 .*, expected {known.sha256}; install version"):
        check_filters(bounds(score))


def clip_with(text: str, opacity: int, moves: int = 0) -> np.ndarray:
    """A drawn clip of 256 pixels with a text over it: uint8 [16, 256, 256, 3]."""
    pixels = draw_clip(3, 256, fps=4.0, seconds=4.0)[0][:16].copy()
    font = ImageFont.load_default(26)
    for number, frame in enumerate(pixels):
        layer = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(layer).text((48 + number * moves, 112), text, font=font, fill=(255, 255, 255, opacity))
        frame[:] = np.asarray(Image.alpha_composite(Image.fromarray(frame).convert("RGBA"), layer).convert("RGB"))
    return pixels


@pytest.mark.parametrize(("text", "opacity"), [("", 255), ("shutterstock", 255), ("shutterstock", 100)])
def test_overlaid_text_is_found_and_a_clip_without_is_clean(text: str, opacity: int) -> None:
    installed("text")
    score = overlaid_text(clip_with(text, opacity))
    assert 0.02 < score < 0.15 if text else score == 0


def test_text_that_moves_through_the_scene_does_not_count() -> None:
    installed("text")
    assert overlaid_text(clip_with("exit", 255, moves=9)) < 0.005


def test_a_drawn_clip_is_safe() -> None:
    installed("unsafe")
    assert 0 <= unsafe_content(draw_clip(3, 64, fps=4.0, seconds=4.0)[0]) < 0.2
