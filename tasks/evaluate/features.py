"""The judges: a CLIP image encoder for frame consistency, and fixed random nets for appearance and motion distances.

A judge's name is part of its metric's name. "F-Consistency" (section 4.1) is printed only for OpenAI's own ViT-L/14
file; whatever else looks at the frames carries its hash and the words "not comparable with published values".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

OPENAI_VIT_L_14_SHA256 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
NOT_COMPARABLE = "not comparable with published values"

# The stand-in for CLIP: open_clip's vision tower, far too small to mean anything, large enough to see frames differ.
# Average pooling, because in an untrained tower the class token hardly looks at the image.
RANDOM_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 96, "head_width": 32, "patch_size": 8, "pool_type": "avg"},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 1, "layers": 1},
}
RANDOM_SEED = 0
# Width of the random features: a Frechet distance wants about 16 samples for each (knowledge of the floor, N >= 16 d).
RANDOM_WIDTH = 32


class JudgeError(ValueError):
    """A judge's weights that cannot be used; one sentence with the value, what was expected, and the remedy."""


@dataclass(frozen=True)
class ImageJudge:
    """Embeds frames. `metric` is the honest name of the consistency it yields, `official` says it is the paper's."""

    metric: str
    official: bool
    sha256: str
    model: Any
    transform: Callable[..., torch.Tensor]

    @torch.no_grad()
    def embed(self, pixels: NDArray[np.uint8], batch: int = 32) -> NDArray[np.float32]:
        """Frames uint8 [F, H, W, 3] -> embeddings float32 [F, D], each frame on its own; not normalised."""
        from PIL import Image

        device = next(self.model.parameters()).device
        inputs = torch.stack([self.transform(Image.fromarray(frame)) for frame in pixels])
        parts = [self.model.encode_image(inputs[i : i + batch].to(device)) for i in range(0, len(inputs), batch)]
        return torch.cat(parts).float().cpu().numpy()


def state_sha256(module: nn.Module) -> str:
    """Hex sha256 over names, shapes and float32 bytes of a module's state: the identity of a random net."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
        total.update(f"{name}{array.shape}".encode() + array.astype("<f4").tobytes())
    return total.hexdigest()


@torch.no_grad()
def _fill(module: nn.Module, seed: int) -> None:
    """Fixed random weights by numpy's generator, whose stream is the same on every machine and torch version."""
    for index, (name, parameter) in enumerate(sorted(module.named_parameters())):
        rng = np.random.default_rng([seed, index])
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            values = rng.standard_normal(parameter.shape) * np.sqrt(2.0 / fan_in)
        elif "embedding" in name:
            values = rng.standard_normal(parameter.shape) * 0.02
        else:
            values = np.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
        parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def random_clip() -> ImageJudge:
    """open_clip's vision tower with fixed random weights: sees that frames differ, knows nothing of their content."""
    import open_clip

    with torch.random.fork_rng(devices=[]):  # its constructor draws from the global generator
        model = open_clip.CLIP(quick_gelu=True, **RANDOM_CLIP)  # type: ignore[arg-type]
    model = model.eval().requires_grad_(False)
    _fill(model.visual, RANDOM_SEED)
    sha256 = state_sha256(model.visual)
    transform = open_clip.image_transform(RANDOM_CLIP["vision_cfg"]["image_size"], is_train=False)
    return ImageJudge(f"rfc-clip-random@{sha256[:8]}", False, sha256, model, transform)  # type: ignore[arg-type]


@dataclass(frozen=True)
class JudgeName:
    """A judge's identity, known before its weights are loaded."""

    metric: str
    official: bool
    sha256: str


def identify_clip(path: str | None, sha256: str | None = None) -> JudgeName:
    """Checks and names the weights that `load_clip` would load; the hash comes first because loading may run code.

    Raises:
        JudgeError: nothing at the path, another hash, or a folder that leaves open which activation it wants.
    """
    if path is None:
        judge = random_clip()
        return JudgeName(judge.metric, judge.official, judge.sha256)
    place = Path(path)
    weights = place
    if place.is_dir():
        config_file, weights = place / "open_clip_config.json", place / "open_clip_model.safetensors"
        for part in (config_file, weights):
            if not part.is_file():
                raise JudgeError(f"{place} lacks {part.name}; give a folder saved by open_clip, with both files")
        # OpenAI's weights need QuickGELU, and loading them with plain GELU raises no error, only other numbers.
        if "quick_gelu" not in json.loads(config_file.read_text()).get("model_cfg", {}):
            raise JudgeError(f'{config_file} does not say "quick_gelu" in model_cfg; write true for OpenAI weights')
    elif not place.is_file():
        raise JudgeError(f"no CLIP weights at {place}; give OpenAI's ViT-L-14.pt or an open_clip folder")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    wanted = (sha256 or OPENAI_VIT_L_14_SHA256).lower()
    if found != wanted:
        source = "the given clip_sha256" if sha256 else "that of OpenAI's ViT-L-14.pt"
        raise JudgeError(
            f"{weights} has sha256 {found}, {source} is {wanted};"
            " give the official file, or this file's own hash as clip_sha256 to use it under another name"
        )
    official = found == OPENAI_VIT_L_14_SHA256
    return JudgeName("F-Consistency" if official else f"rfc-clip@{found[:8]}", official, found)


def load_clip(path: str | None, sha256: str | None = None, device: str = "cpu") -> ImageJudge:
    """The judge of frame consistency, see `identify_clip` for its errors.

    Args:
        path: OpenAI's `ViT-L-14.pt`, or a folder with `open_clip_config.json` and `open_clip_model.safetensors`,
            or None for the random tower.
        sha256: the hash that the weights file must have; without it only the official one is accepted.
    """
    if path is None:
        judge = random_clip()
        judge.model.to(device)
        return judge
    import open_clip

    name = identify_clip(path, sha256)
    if Path(path).is_dir():
        # This function, unlike create_model, refuses a folder without weights instead of returning random ones.
        loaded: Any = open_clip.create_model_from_pretrained(f"local-dir:{path}", device=device)
        model, transform = loaded
    else:
        model = open_clip.load_openai_model(path, precision="fp32", device=device)  # sets QuickGELU itself
        transform: Any = open_clip.image_transform(model.visual.image_size, is_train=False)  # type: ignore[arg-type]
    return ImageJudge(name.metric, name.official, name.sha256, model.eval().requires_grad_(False), transform)


class RandomConv(nn.Module):
    """A fixed random 2D net without biases: frames [N, 3, H, W] -> features [N, RANDOM_WIDTH], nothing for nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        widths = (3, 16, 24, RANDOM_WIDTH)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        _fill(self, seed)
        self.eval().requires_grad_(False)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_NCHW = torch.relu(layer(x_NCHW))
        return x_NCHW.mean(dim=(2, 3))


class RandomDistances:
    """Features of single frames (`rfd-app`) and of frame differences (`rfd-motion`) for Frechet distances.

    Two numbers and never one: an untrained net over whole clips nearly misses freezing and speed, one over
    differences sees them at once. Frames must be lossless: differences also see a codec's noise.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.appearance, self.motion = RandomConv(seed=1).to(device), RandomConv(seed=2).to(device)
        self.app_sha256, self.motion_sha256 = state_sha256(self.appearance), state_sha256(self.motion)
        self.app_metric = f"rfd-app@{self.app_sha256[:8]}"
        self.motion_metric = f"rfd-motion@{self.motion_sha256[:8]}"
        self.device = device

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Pixels uint8 [F, H, W, 3] -> appearance [F-1, 32] of frames 2..F and motion [F-1, 32] of their differences.

        The given frame is left out of the appearance: real and generated share it, which would flatter the distance.
        """
        frames = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255.0
        appearance, motion = self.appearance(frames[1:]), self.motion(frames.diff(dim=0))
        return appearance.cpu().numpy(), motion.cpu().numpy()
