"""The layers of the 3D-UNet: ResNet block, temporal convolution, spatial and temporal transformer, resampling.

They follow ModelScope's text-to-video network (arXiv 2308.06571, Section 3) with the parameter names of diffusers'
`UNet3DConditionModel`. Activations are images, [N, C, H, W] with N = B F, channels last: in memory one array ordered
(B, F, H, W, C), so that the input of each layer is a view of it:

    images_NCHW   convolution and normalisation of each frame
    clip_BCFS     convolution along time, normalisation over all frames
    tokens_BFSC   linear layers and attention

Legend of shape suffixes: B batch, F frames, N = B F, C channels, H and W height and width, S = H W places, L text
tokens, D text width, T width of the time embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

DROPOUT = 0.1  # of the temporal convolutions, as in the training of the text-to-video weights; see `unet.set_dropout`
SHORT = 64  # up to this length plain products are faster on a CPU than PyTorch's fused kernel
MAX_HEADS = 65_535  # CUDA's attention kernels map the heads to a grid axis of this length


def to_tokens(x_NCHW: torch.Tensor) -> torch.Tensor:
    """Reshapes images to tokens [N, S, C]."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def to_clip(x_NCHW: torch.Tensor, frames: int) -> torch.Tensor:
    """Reshapes images to a clip [B, C, F, S]."""
    return to_tokens(x_NCHW).unflatten(0, (-1, frames)).permute(0, 3, 1, 2)


def to_images(tokens: torch.Tensor, like_NCHW: torch.Tensor) -> torch.Tensor:
    """Reshapes tokens [N, S, C] or [B, F, S, C] to images [N, C, H, W] with the height and width of `like_NCHW`."""
    count, _, height, width = like_NCHW.shape
    return tokens.reshape(count, height, width, -1).permute(0, 3, 1, 2)


def repeat_texts(x: torch.Tensor, texts: int) -> torch.Tensor:
    """Repeats a batch for several texts of each sample, text by text; with one text it is the same tensor."""
    return x if texts == 1 else torch.cat([x] * texts)


class ResnetBlock(nn.Module):
    """Two convolutions per frame with the time embedding added between them, and a skip around both."""

    def __init__(self, channels_in: int, channels_out: int, time_width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, channels_out)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x_NCHW: torch.Tensor, time_NT: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x_NCHW)))
        h = h + self.time_emb_proj(time_NT)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x_NCHW if self.conv_shortcut is None else self.conv_shortcut(x_NCHW))


class TemporalConv(nn.Conv3d):
    """A (3, 1, 1) convolution, computed as a (3, 1) convolution of a clip [B, C, F, S] with the same weights.

    CPU kernels for Conv3d fall back to im2col, and several GPU releases had slow or wrong bfloat16 Conv3d.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(input, self.weight[..., 0], self.bias, padding=(1, 0))


class TemporalConvLayer(nn.Module):
    """Four convolutions along time with a skip around them; the last starts at zero, so a new layer is the identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()

        def stage(*dropouts: nn.Module) -> nn.Sequential:
            return nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), *dropouts, TemporalConv(channels))

        self.conv1 = stage()
        self.conv2 = stage(nn.Dropout(DROPOUT))
        self.conv3 = stage(nn.Dropout(DROPOUT))
        self.conv4 = stage(nn.Dropout(DROPOUT))
        for parameter in self.conv4[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_NCHW: torch.Tensor, frames: int) -> torch.Tensor:
        h_BCFS = self.conv4(self.conv3(self.conv2(self.conv1(to_clip(x_NCHW, frames)))))
        return x_NCHW + to_images(h_BCFS.permute(0, 2, 3, 1), x_NCHW)


def attend(q_BHLD: torch.Tensor, k_BHMD: torch.Tensor, v_BHMD: torch.Tensor) -> torch.Tensor:
    """Softmax attention [B, H, L, D]; on a CPU, sequences up to `SHORT` use plain matrix products (4 times as fast)."""
    if q_BHLD.device.type == "cpu" and max(q_BHLD.shape[2], k_BHMD.shape[2]) <= SHORT:
        q, k, v = (x.contiguous() for x in (q_BHLD * q_BHLD.shape[3] ** -0.5, k_BHMD, v_BHMD))
        return (q @ k.transpose(2, 3)).softmax(dim=3) @ v
    if q_BHLD.shape[1] <= MAX_HEADS:
        return F.scaled_dot_product_attention(q_BHLD, k_BHMD, v_BHMD)
    parts = zip(*(x.split(MAX_HEADS, dim=1) for x in (q_BHLD, k_BHMD, v_BHMD)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=1)


class Attention(nn.Module):
    """Multi-head attention along axis 1 of [batch, sequence, ..., width]; the axes in between act as additional heads.

    Tokens [N, S, C] attend over space; tokens [B, F, S, C] attend over time, separately at each place, without a copy.
    Keys and values of a context [B, L, D] are projected once per sample and shared by its frames.
    """

    def __init__(self, width: int, head_width: int, context_width: int | None = None) -> None:
        super().__init__()
        self.head_width = head_width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor, context_BLD: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context_BLD is None else context_BLD
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if context_BLD is not None:
            k, v = (p.repeat_interleave(len(x) // len(p), dim=0) for p in (k, v))
        q, k, v = (p.flatten(2).unflatten(2, (-1, self.head_width)).transpose(1, 2) for p in (q, k, v))
        return self.to_out[0](attend(q, k, v).transpose(1, 2).reshape(x.shape))


class _GatedGELU(torch.autograd.Function):
    """value * gelu(gate) of [..., value | gate]; saves only its input and writes both gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, joined: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(joined)
        value, gate = joined.chunk(2, dim=-1)
        return value * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (joined,) = ctx.saved_tensors
        value, gate = joined.chunk(2, dim=-1)
        out = torch.empty_like(joined)
        grad_value, grad_gate = out.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=grad_value)
        torch.ops.aten.gelu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return out


class GatedGELU(nn.Module):
    """A linear layer, half of whose output gates the other half (arXiv 2002.05202)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width_in, 2 * width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _GatedGELU.apply(self.proj(x))


class FeedForward(nn.Module):
    """The feed-forward layers of a transformer block, with 4 times the width inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GatedGELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text (self-attention if there is none), then a feed-forward."""

    def __init__(self, width: int, head_width: int, text_width: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, head_width)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, head_width, text_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: torch.Tensor, text_BLD: torch.Tensor | None = None, texts: int = 1) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = repeat_texts(x, texts)
        x = x + self.attn2(self.norm2(x), text_BLD)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """One transformer block over the places of each frame with cross-attention to the text, and a skip around it."""

    def __init__(self, channels: int, head_width: int, groups: int, text_width: int) -> None:
        super().__init__()
        width = channels // head_width * head_width
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, head_width, text_width)])
        self.proj_out = nn.Linear(width, channels)

    def forward(self, x_NCHW: torch.Tensor, text_BLD: torch.Tensor, texts: int = 1) -> torch.Tensor:
        """With `texts` above 1 the text has as many times the samples of the images, and so has the result."""
        h_NSC = self.proj_in(to_tokens(self.norm(x_NCHW)))
        h_NSC = self.proj_out(self.transformer_blocks[0](h_NSC, text_BLD, texts))
        x_NCHW = repeat_texts(x_NCHW, texts)
        return x_NCHW + to_images(h_NSC, x_NCHW)


class TemporalTransformer(nn.Module):
    """One transformer block over the frames of each place without position embedding, and a skip around it."""

    def __init__(self, channels: int, heads: int, head_width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, heads * head_width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(heads * head_width, head_width, None)])
        self.proj_out = nn.Linear(heads * head_width, channels)

    def forward(self, x_NCHW: torch.Tensor, frames: int) -> torch.Tensor:
        h_BFSC = self.proj_in(self.norm(to_clip(x_NCHW, frames)).permute(0, 2, 3, 1))
        return x_NCHW + to_images(self.proj_out(self.transformer_blocks[0](h_BFSC)), x_NCHW)


class Downsample(nn.Module):
    """Halves height and width with a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(x_NCHW)


class Upsample(nn.Module):
    """Nearest-neighbour interpolation to a given height and width, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_NCHW: torch.Tensor, size: torch.Size) -> torch.Tensor:
        return self.conv(F.interpolate(x_NCHW, size=tuple(size), mode="nearest"))
