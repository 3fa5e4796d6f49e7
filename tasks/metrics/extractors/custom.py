"""An extractor of your own: `package.module:factory` names a function that makes it.

Feature: "custom" [N, D], of which a Frechet and a kernel distance to the real clips are computed.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tasks.metrics.extractors.extractor import ExtractorError, ExtractorInfo, MetricKind, file_sha256, state_sha256


class Custom:
    """What `factory(device)` returns: an object with `name`, a word, and `features(pixels, caption)` -> [N, D].

    Its metric is named after module and word, in small letters as no published one is, and after a hash of the module's
    source and, where the object is a torch module, its state: so numbers of another state are other numbers.

    Raises:
        ExtractorError: not of the form module:factory, a module that cannot be imported, a factory that fails, or an
            object of another kind.
    """

    def __init__(self, address: str, device: str = "cpu") -> None:
        self.address = address
        if not re.fullmatch(r"[\w.]+:\w+", address):
            raise ExtractorError(f"custom extractor {address!r}, expected package.module:factory")
        module_name, _, factory = address.partition(":")
        try:
            module = importlib.import_module(module_name)
            self._extractor: Any = getattr(module, factory)(device)
        except Exception as error:  # whatever somebody else's code raises
            raise ExtractorError(
                f"custom extractor {address} cannot be made ({_said(error)}); see that every worker has it"
            ) from error
        word = getattr(self._extractor, "name", None)
        if not isinstance(word, str) or not re.fullmatch(r"[\w-]+", word):
            raise ExtractorError(
                f"custom extractor {address} has the name {word!r}, expected a word of letters, digits, - or _"
            )
        if not callable(getattr(self._extractor, "features", None)) or module.__file__ is None:
            raise ExtractorError(f"custom extractor {address} has no method features(pixels, caption); give it one")
        identity = file_sha256(Path(module.__file__))
        if isinstance(self._extractor, nn.Module):
            identity += state_sha256(self._extractor)
        sha256 = hashlib.sha256(identity.encode()).hexdigest()
        metric = f"cfd-{module_name}.{word}".lower()
        self.info = ExtractorInfo(
            f"{metric}@{sha256[:8]}", False, sha256, ("custom",), f"as {address} does", MetricKind.CLIP_SETS
        )

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8], caption: str) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F, H, W, 3] and their caption -> "custom" [N, D], as the module gives it."""
        try:
            values = torch.as_tensor(self._extractor.features(pixels.copy(), caption)).float().cpu().numpy()
        except Exception as error:  # as above
            raise ExtractorError(
                f"custom extractor {self.address} failed ({_said(error)}); fix it, or leave it out"
            ) from error
        if values.ndim != 2 or not values.size:
            raise ExtractorError(f"custom extractor {self.address} gave an array of {values.shape}, expected [N, D]")
        return {"custom": values}


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
