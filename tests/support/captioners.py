"""Captioners for tests, as a recipe would name somebody's own function, and what may be wrong with one."""

from __future__ import annotations

import numpy as np


def brightness(pixels: np.ndarray, caption: str) -> str:
    """A caption of the frames and the source's caption."""
    text = f"  {caption}, {len(pixels)} frames of brightness {pixels.mean():.0f}\n"
    pixels[:] = 0  # a captioner may write to its frames
    return text


def fails(pixels: np.ndarray, caption: str) -> str:
    raise RuntimeError("no weights")


def returns_nothing(pixels: np.ndarray, caption: str) -> None:
    return None


def returns_spaces(pixels: np.ndarray, caption: str) -> str:
    return " \n"


def returns_much(pixels: np.ndarray, caption: str) -> str:
    return "x" * 100_001


def returns_half_a_pair(pixels: np.ndarray, caption: str) -> str:
    return "a dog \ud83d"
