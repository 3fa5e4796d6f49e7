"""I3D, the extractor of FVD: Kinetics-400 logits of a whole clip, by the TorchScript file of StyleGAN-V.

Feature: "i3d" [1, 400].
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.metrics.extractors.extractor import ExtractorError
from tasks.metrics.extractors.identity import identify_i3d


class I3D:
    """I3D as TorchScript: `forward(x, rescale, resize, return_features)`, x float [B, 3, T, H, W].

    Frames go in as they are, in 0-255, with `rescale` and `resize` on: the file itself squashes them to 224 x 224 and
    maps them to [-1, 1], which is what most published FVD did. All frames of the clip are seen at once.

    Raises:
        ExtractorError: no file, or another hash than the known or the stated one.
    """

    def __init__(self, path: str, sha256: str | None = None, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self.info = identify_i3d(path, sha256)

    @cached_property
    def _net(self) -> Any:
        try:
            return torch.jit.load(self.path, map_location=self.device).eval()  # its hash is known by now
        except RuntimeError as error:
            raise ExtractorError(f"{self.path} is no TorchScript file; give I3D in that form") from error

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8], caption: str) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F >= 16, H, W, 3] -> "i3d" [1, D]; the caption is not read."""
        net = self._net
        clip = torch.from_numpy(pixels).to(self.device).permute(3, 0, 1, 2)[None].float()
        try:
            logits = net(clip, rescale=True, resize=True, return_features=True)
        except (RuntimeError, torch.jit.Error) as error:
            raise ExtractorError(
                f"{self.path} did not take a clip of {pixels.shape}; expected I3D with the signature"
                " forward(x, rescale, resize, return_features) and memory enough for a clip"
            ) from error
        if logits.ndim != 2 or len(logits) != 1:
            raise ExtractorError(f"{self.path} gave features of {tuple(logits.shape)} for a clip, expected [1, 400]")
        return {"i3d": logits.float().cpu().numpy()}
