"""What a judge of frames is: its honest name, and a hash that is checked before its weights are loaded.

A judge's name is part of its metric's name. "F-Consistency" (section 4.1) is printed only for OpenAI's own ViT-L/14
file; whatever else looks at the frames carries its hash and the words "not comparable with published values".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from torch import nn

NOT_COMPARABLE = "not comparable with published values"


class JudgeError(ValueError):
    """A judge's weights that cannot be used; one sentence with the value, what was expected, and the remedy."""


@dataclass(frozen=True)
class JudgeName:
    """A judge's identity, known before its weights are loaded."""

    metric: str
    official: bool
    sha256: str


def state_sha256(module: nn.Module) -> str:
    """Hex sha256 over names, shapes and float32 bytes of a module's state: the identity of a random net."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
        total.update(f"{name}{array.shape}".encode() + array.astype("<f4").tobytes())
    return total.hexdigest()
