"""Inception v3, the extractor of frame-wise FID, in torch-fidelity's layout and geometry, or clean-fid's geometry.

Feature: "inception" [F, 2048], or "inception_clean" [F, 2048]; row 0 is the given frame.
"""

from __future__ import annotations

import io
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tasks.metrics.extractors.extractor import ExtractorError
from tasks.metrics.extractors.identity import identify_inception

_SIZE = 299


class Inception:
    """The 2015 Inception of FID, of which torch-fidelity keeps the weights that were converted from TensorFlow's.

    Args:
        path: file of the state dict.
        sha256: the hash that it must have; without it only that of torch-fidelity's own file.
        clean: resize as clean-fid does, where the others resize as TensorFlow 1 did. Frames of 256 pixels grow, so the
            two differ by the shift of TensorFlow's grid and the kernel; where frames shrink, by aliasing as well.
        device: where it runs.

    Raises:
        ExtractorError: no file, or another hash.
    """

    def __init__(self, path: str, sha256: str | None = None, clean: bool = False, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self._resize = clean_frames if clean else legacy_frames
        self.info = identify_inception(path, sha256, clean)

    @cached_property
    def _net(self) -> nn.Module:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The extractor unpickles what it is given; so it gets tensors that were read without unpickling, and rewritten.
        safe = io.BytesIO()
        try:
            torch.save(torch.load(self.path, map_location="cpu", weights_only=True), safe)
            safe.seek(0)
            whole = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=safe)
        except Exception as error:  # whatever torch says of a file that is something else
            raise ExtractorError(f"{self.path} holds no Inception weights in the layout of torch-fidelity") from error
        # All layers in their order but the classifier: forward() resizes as well, and takes no frames resized before.
        return nn.Sequential(*list(whole.children())[:-1], nn.Flatten()).to(self.device)

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8], caption: str, batch: int = 16) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F, H, W, 3] -> [F, 2048] by the feature's name; the caption is not read."""
        (feature,) = self.info.features
        net = self._net
        parts = [net(self._resize(part).to(self.device)) for part in np.array_split(pixels, -(-len(pixels) // batch))]
        return {feature: torch.cat(parts).cpu().numpy()}


def legacy_frames(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [F, H, W, 3] -> float32 [F, 3, 299, 299] in [-1, 1): TensorFlow 1's bilinear, unfiltered and off-centre."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    return (interpolate_bilinear_2d_like_tensorflow1x(frames, (_SIZE, _SIZE), align_corners=False) - 128) / 128


def clean_frames(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [F, H, W, 3] -> float32 [F, 3, 299, 299] in [-1, 1): Pillow's bicubic in float (Parmar et al., 2022)."""
    from PIL import Image

    def resized(channel: NDArray[np.uint8]) -> NDArray[np.float32]:
        image = Image.fromarray(channel.astype(np.float32)).resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
        return np.asarray(image).clip(0, 255)

    frames = np.stack([[resized(frame[..., c]) for c in range(3)] for frame in pixels])
    return (torch.from_numpy(frames) - 128) / 128
