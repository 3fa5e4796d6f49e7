"""Functions that a recipe names as `module:function`: scorers of windows, and a captioner of clips."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tasks.ingest.sources import MAX_CAPTION
from tasks.records import UserError

Scorer = Callable[[np.ndarray], float]
Captioner = Callable[[np.ndarray, str], str]


def check_name(field: str, name: str | None) -> None:
    """Raises UserError for a name that is not `module:function`."""
    if name is not None and not re.fullmatch(r"[\w.]+:\w+", name):
        raise UserError(f"{field} {name!r}, expected module:function")


def load_scorer(name: str, what: str) -> Scorer:
    """Returns a function from frames, uint8 [F, H, W, 3], to a score from 0 to 1, rounded to 4 digits.

    Raises:
        UserError: it cannot be imported. The returned function raises it if the scorer fails or returns anything else.
    """
    scorer = _load(name, f"{what} scorer")

    def score(pixels: np.ndarray) -> float:
        try:
            value = float(scorer(pixels.copy()))  # a copy: changes of the scorer must not be encoded
        except Exception as error:  # a user's function may raise anything
            raise UserError(f"{what} scorer {name} failed ({_summary(error)}); fix it or disable it") from error
        if not 0 <= value <= 1:
            raise UserError(f"{what} scorer {name} returned {value}, expected a number from 0 to 1; fix it")
        return round(value, 4)

    return score


def load_captioner(name: str) -> Captioner:
    """Returns a function from frames, uint8 [F, H, W, 3], and the source's caption to the caption to store.

    Raises:
        UserError: as `load_scorer`.
    """
    captioner = _load(name, "captioner")

    def caption(pixels: np.ndarray, source_caption: str) -> str:
        try:
            text = captioner(pixels.copy(), source_caption)
        except Exception as error:  # as above
            raise UserError(f"captioner {name} failed ({_summary(error)}); fix it or disable it") from error
        if not isinstance(text, str) or not 0 < len(text.strip()) <= MAX_CAPTION:
            shown = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
            raise UserError(
                f"captioner {name} returned {shown}, expected a text of 1 to {MAX_CAPTION} characters; fix it"
            )
        return text.strip().encode("utf-8", "replace").decode()

    return caption


def _load(name: str, what: str) -> Callable[..., Any]:
    module, function = name.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # the import of a user's module may raise anything
        raise UserError(f"{what} {name} cannot be imported ({_summary(error)}); install it on every worker") from error


def _summary(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
