"""Watermark scorers for tests, as a recipe would name somebody's own function, and what may be wrong with one."""

from __future__ import annotations

import numpy as np


def white_corner(pixels: np.ndarray) -> float:
    """The share of white in the lower right eighth."""
    share = float((pixels[:, -pixels.shape[1] // 8 :, -pixels.shape[2] // 8 :] == 255).mean())
    pixels[:] = 0  # what it does to its frames is its own affair
    return share


def fails(pixels: np.ndarray) -> float:
    raise RuntimeError("no weights")


def far_off(pixels: np.ndarray) -> float:
    return 1.5


def says_nothing(pixels: np.ndarray) -> None:
    return None
