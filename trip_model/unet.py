"""The 3D-UNet of the residual path: an own forward pass for weights and folders of diffusers' `UNet3DConditionModel`.

docs/decisions/unet.md explains the reasons and the differences. Shape suffixes as in `unet_blocks`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from trip_model.folders import BaseFolderError
from trip_model.unet_blocks import (
    Downsample,
    ResnetBlock,
    SpatialTransformer,
    TemporalConvLayer,
    TemporalTransformer,
    Upsample,
    repeat_texts,
)

CLASS_NAME = "UNet3DConditionModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCK_TYPES = ("CrossAttnDownBlock3D", "DownBlock3D", "CrossAttnUpBlock3D", "UpBlock3D")
FIXED = ("downsample_padding", "mid_block_scale_factor", "act_fn", "num_attention_heads", "time_cond_proj_dim")


@dataclass(frozen=True)
class UNetConfig:
    """A 3D-UNet's `config.json`, with diffusers' names; the defaults are those of text-to-video-ms-1.7b."""

    sample_size: int | None = None  # latent side of the training; other sides work too
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock3D",) * 3, "DownBlock3D")
    up_block_types: tuple[str, ...] = ("UpBlock3D", *("CrossAttnUpBlock3D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1024
    attention_head_dim: int = 64
    num_attention_heads: None = None
    time_cond_proj_dim: None = None

    def __post_init__(self) -> None:
        for kind in (*self.down_block_types, *self.up_block_types):
            if kind not in BLOCK_TYPES:
                raise ValueError(f"block type {kind!r}, expected one of {', '.join(BLOCK_TYPES)}")
        if not len(self.down_block_types) == len(self.up_block_types) == len(self.block_out_channels):
            raise ValueError(f"{len(self.block_out_channels)} widths, expected one for each down and each up block")
        for setting in fields(self):
            if setting.name in FIXED and getattr(self, setting.name) != setting.default:
                raise ValueError(f"{setting.name} {getattr(self, setting.name)!r}, expected {setting.default!r}")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> UNetConfig:
        """Reads the contents of a `config.json`; keys that start with an underscore are metadata and ignored."""
        known = {name: value for name, value in data.items() if not name.startswith("_")}
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        unknown = sorted(settings.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}")
        return cls(**settings)

    def to_json(self) -> str:
        """Returns the text of `config.json` as diffusers writes it."""
        named = {"_class_name": CLASS_NAME, "_diffusers_version": diffusers.__version__, **asdict(self)}
        return json.dumps(named, indent=2, sort_keys=True) + "\n"


class Level(nn.Module):
    """One resolution: layers of ResNet block and temporal convolution, the first `transformers` with transformers."""

    def __init__(self, config: UNetConfig, channels_in: Sequence[int], channels: int, transformers: int) -> None:
        super().__init__()
        groups, head = config.norm_num_groups, config.attention_head_dim
        time_width = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(c, channels, time_width, groups, config.norm_eps) for c in channels_in)
        self.temp_convs = nn.ModuleList(TemporalConvLayer(channels, groups) for _ in channels_in)
        self.attentions = nn.ModuleList(
            SpatialTransformer(channels, head, groups, config.cross_attention_dim) for _ in range(transformers)
        )
        self.temp_attentions = nn.ModuleList(
            TemporalTransformer(channels, channels // head, head, groups) for _ in range(transformers)
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(
        self,
        layer: int,
        x_NCHW: torch.Tensor,
        time_NT: torch.Tensor,
        text_BLD: torch.Tensor,
        frames: int,
        skip_NCHW: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs one layer of the level; on the way up its input is concatenated with the skip from the way down.

        Where the text has several times the samples of the input, so has the result of the first transformer.
        """
        x = x_NCHW
        if skip_NCHW is not None:
            x = torch.cat([x, repeat_texts(skip_NCHW, len(x) // len(skip_NCHW))], dim=1)
        x = self.temp_convs[layer](self.resnets[layer](x, time_NT[: len(x)]), frames)
        if layer < len(self.attentions):
            x = self.attentions[layer](x, text_BLD, frames * len(text_BLD) // len(x))
            x = self.temp_attentions[layer](x, frames)
        return x


@dataclass
class DeepFeatures:
    """What enters the last level of the way up, [N, C, H, W], kept from one pass for later ones (arXiv 2312.00858).

    A pass with `value` None computes everything and sets it; with a value, only the first and the last level run.
    """

    value: torch.Tensor | None = None


class UNet3D(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The 3D-UNet eps(x, t, c), with the state dict of diffusers' `UNet3DConditionModel`, name for name.

    It is one of diffusers' models, so that a pipeline loads, saves, moves and offloads it and adds low-rank adapters.

    `recompute_activations` stores only the input of each layer and recomputes the rest in the backward pass (a third
    more computation, bitwise equal results, dropout included); diffusers' class does not support it.
    """

    recompute_activations = False

    config_name = "config.json"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self._config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        channels = widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        self.time_proj = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels, 4 * channels)
        self.transformer_in = TemporalTransformer(channels, 8, config.attention_head_dim, config.norm_num_groups)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [channels]
        for kind, width in zip(config.down_block_types, widths, strict=True):
            level = Level(config, [channels, *[width] * (layers - 1)], width, layers if "CrossAttn" in kind else 0)
            self.down_blocks.append(level)
            channels = width
            skips += [width] * layers
            if len(self.down_blocks) < len(widths):
                level.downsamplers.append(Downsample(width))
                skips.append(width)
        self.mid_block = Level(config, [channels, channels], channels, 1)
        for kind, width in zip(config.up_block_types, reversed(widths), strict=True):
            joined = [c + skips.pop() for c in (channels, *[width] * layers)]
            level = Level(config, joined, width, len(joined) if "CrossAttn" in kind else 0)
            self.up_blocks.append(level)
            channels = width
            if skips:
                level.upsamplers.append(Upsample(width))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    @property
    def config(self) -> UNetConfig:  # pyright: ignore[reportIncompatibleMethodOverride] - a frozen dataclass of it
        """The network's `config.json`."""
        return self._config

    @config.setter
    def config(self, config: UNetConfig) -> None:
        self._config = config

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> UNet3D:
        """Returns a new network; `from_pretrained` calls it with the contents of `config.json`."""
        return cls(UNetConfig.from_json(dict(config)))

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes `config.json`; `save_pretrained` calls it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.config_name).write_text(self.config.to_json())

    def forward(
        self, x_BCFHW: torch.Tensor, t: torch.Tensor, text_BLD: torch.Tensor, deep: DeepFeatures | None = None
    ) -> torch.Tensor:
        """The network's output, [B, C, F, H, W] with `out_channels`, in the data type of the weights.

        Args:
            x_BCFHW: noised latents with the condition.
            t: time steps, 0-based, one for each sample (B,) or for each of its frames (B, F), or one for all ().
            text_BLD: text features c, one for each sample, or several, text by text: the first of every sample, then
                the second of every sample. The result has the batch of the texts; what precedes the first
                cross-attention is computed once for all texts.
            deep: the features of an earlier pass to reuse, or an empty object that keeps those of this pass.
        """
        batch, _, frames = x_BCFHW.shape[:3]
        if len(text_BLD) % batch:
            raise ValueError(f"{len(text_BLD)} texts for {batch} samples, expected the same number for each sample")
        dtype = self.conv_in.weight.dtype
        text_BLD = text_BLD.to(dtype)
        t = t if t.ndim == 2 else t.expand(batch)
        time = F.silu(self.time_embedding(self.time_proj(t.flatten()).to(dtype)))
        time_NT = time.unflatten(0, (batch, -1)).expand(-1, frames, -1).flatten(0, 1)
        time_NT = repeat_texts(time_NT, len(text_BLD) // batch)

        x = x_BCFHW.to(dtype).transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = self._run(self.transformer_in, self.conv_in(x), frames)
        skips = [x]
        kept = None if deep is None else deep.value
        *way_up, last = _levels(self.up_blocks)
        for level in _levels(self.down_blocks):
            for layer in range(len(level.resnets)):
                x = self._run(level, layer, x, time_NT, text_BLD, frames)
                skips.append(x)
            if kept is not None:
                break
            for downsample in level.downsamplers:
                x = downsample(x)
                skips.append(x)
        if kept is None:
            for layer in range(len(self.mid_block.resnets)):
                x = self._run(self.mid_block, layer, x, time_NT, text_BLD, frames)
            for level in way_up:
                for layer in range(len(level.resnets)):
                    x = self._run(level, layer, x, time_NT, text_BLD, frames, skips.pop())
                for upsample in level.upsamplers:
                    x = upsample(x, skips[-1].shape[2:])
            if deep is not None:
                deep.value = x
        else:
            x = kept
        for layer in range(len(last.resnets)):
            x = self._run(last, layer, x, time_NT, text_BLD, frames, skips.pop())
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x.unflatten(0, (-1, frames)).transpose(1, 2)

    def layers(self) -> Iterator[nn.Module]:
        """Yields the layers that hold nearly all weights; a forward pass calls each once."""
        kinds = (ResnetBlock, TemporalConvLayer, SpatialTransformer, TemporalTransformer, Downsample, Upsample)
        return (module for module in self.modules() if isinstance(module, kinds))

    def _run(self, module: nn.Module, *inputs: Any) -> torch.Tensor:
        if self.recompute_activations and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


def _levels(blocks: nn.ModuleList) -> Iterator[Level]:
    for block in blocks:
        assert isinstance(block, Level)
        yield block


def load_unet(base: str | Path) -> UNet3D:
    """Loads the 3D-UNet of a base or model folder (`unet/`) in float32, from one file or from shards with an index.

    Raises:
        BaseFolderError: no such folder, another kind of network, or weights that do not fit.
    """
    folder = Path(base) / "unet"
    try:
        with torch.device("meta"):
            unet = UNet3D(UNetConfig.from_json(json.loads((folder / "config.json").read_text())))
        index = folder / f"{WEIGHTS}.index.json"
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {WEIGHTS}
        tensors = {name: tensor for file in sorted(names) for name, tensor in load_file(folder / file).items()}
        unet.to_empty(device="cpu").load_state_dict(tensors)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaseFolderError(
            f"the 3D-UNet of {base} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    return unet


def save_unet(unet: UNet3D, folder: str | Path) -> None:
    """Writes `config.json` and the weights, readable by `load_unet` and by diffusers' `UNet3DConditionModel`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in unet.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(unet.config.to_json())


def widen_input(unet: UNet3D) -> UNet3D:
    """TRIP_C (Table 5): doubles `conv_in`'s input channels; the new weights are zero, so the output is unchanged."""
    old = unet.conv_in
    wide = nn.Conv2d(2 * old.in_channels, old.out_channels, (3, 3), padding=(1, 1))
    assert old.bias is not None and wide.bias is not None
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : old.in_channels] = old.weight
        wide.bias.copy_(old.bias)
    unet.conv_in = wide
    unet.config = replace(unet.config, in_channels=wide.in_channels)
    return unet


def set_dropout(unet: nn.Module, probability: float) -> None:
    """Sets the dropout probability of the temporal convolutions; the base was trained with 0.1."""
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
