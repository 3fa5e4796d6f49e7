"""The VAE of the demo's base: its training on single frames, and its decoder's on pairs of frames, against flicker."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from examples.demo_base.common import FPS, SIZE, clip_pixels, forget_origin, one_cycle, write_score
from tasks.ingest.drawing import draw_frame, draw_scene
from trip_model.encoders import decode_latents, encode_pixels, load_vae
from trip_model.images import write_video

LATENT_NOISE = 0.03  # standard deviation in final latents, as left by a sampler of this size
HELD_OUT_SCENES = range(990_000, 990_016)


def textured_frame(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Draws a random picture (waves, patches, lines), so that the VAE sees more than shapes: uint8 [size, size, 3]."""
    grid = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(grid, grid)
    image = np.zeros((size, size, 3))
    for _ in range(int(rng.integers(2, 7))):
        fx, fy = rng.normal(0, 1, 2) * rng.choice([1.0, 3.0, 8.0])
        wave = np.sin(2 * np.pi * (fx * x + fy * y) + rng.uniform(0, 6.3))
        image += wave[..., None] * rng.normal(0, 1, 3) / (1 + 0.5 * math.hypot(fx, fy))
    image = 0.5 + 0.22 * image + rng.normal(0, 0.15, 3)
    for _ in range(int(rng.integers(0, 7))):
        cx, cy, rx, ry = *rng.uniform(0, 1, 2), *rng.uniform(0.03, 0.3, 2)
        turn = rng.uniform(0, np.pi)
        u, v = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn), (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
        kind = rng.integers(3)
        distance = np.hypot(u / rx, v / ry) - 1 if kind == 0 else np.maximum(abs(u) / rx, abs(v) / ry) - 1
        cover = np.clip(0.5 - distance * size * min(rx, ry), 0, 1)[..., None]
        image = image * (1 - cover) + (rng.uniform(0, 1, 3) + 0.1 * image) * cover
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def vae_frames(seed: int, batch: int) -> Iterator[torch.Tensor]:
    """Yields batches [B, 3, 64, 64] in [-1, 1]: seven drawn shapes at random times per texture."""
    rng = np.random.default_rng([seed, 1])
    while True:
        frames = []
        for _ in range(batch):
            if rng.integers(8) == 0:
                frames.append(textured_frame(rng))
            else:
                frames.append(draw_frame(draw_scene(int(rng.integers(1_000_000))), rng.uniform(0, 4.5), SIZE))
        yield torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def identity_start(vae: AutoencoderKL) -> None:
    """Initialises the VAE as a plain pyramid: residual branches are zero, resampling averages and repeats.

    With the default initialisation this small network needs ten times the steps to learn the colours.
    """
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
                if module.conv_shortcut is not None:
                    weight = module.conv_shortcut.weight.mul_(0.3)
                    for channel in range(min(weight.shape[:2])):
                        weight[channel, channel] += 1.0
            elif isinstance(module, Upsample2D):
                torch.nn.init.dirac_(module.conv.weight)
                module.conv.bias.zero_()
            elif isinstance(module, Downsample2D):
                module.conv.weight.zero_()
                module.conv.bias.zero_()
                for channel in range(module.conv.weight.shape[0]):
                    module.conv.weight[channel, channel, :2, :2] = 0.25


def make_vae(out: Path, steps: int, seed: int, batch: int = 4) -> None:
    """Trains the VAE on L1, gradient and a small KL loss; the scaling factor gives latents unit standard deviation."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    identity_start(vae)
    # Nearly noiseless latents from the start: the posterior's log-variance half begins at -6.
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0
        vae.quant_conv.weight[4:] *= 0.1
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, weight_decay=1e-4, betas=(0.9, 0.99))
    frames, start, trail = vae_frames(seed, batch), time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, 1e-3)
        x = next(frames)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        error = y - x
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        loss = error.abs().mean() + 5 * error.square().mean() + 0.1 * edges + 1e-4 * posterior.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        trail.append(error.detach().square().mean().item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            rmse = math.sqrt(np.mean(trail[-100:])) / 2
            print(f"vae {step + 1}/{steps}  rmse {rmse:.4f}  {time.time() - start:.0f} s", flush=True)
    _save_vae(unit_latents(vae.eval()), out)


def frame_pairs(seed: int, batch: int) -> Iterator[torch.Tensor]:
    """Yields batches [B, 2, 3, 64, 64] in [-1, 1]: two consecutive frames of a drawn shape, or one texture twice."""
    rng = np.random.default_rng([seed, 3])
    while True:
        pairs = []
        for _ in range(batch):
            if rng.integers(8) == 0:
                pairs.append([textured_frame(rng)] * 2)
            else:
                scene, time_s = draw_scene(int(rng.integers(1_000_000))), rng.uniform(0, 4.25)
                pairs.append([draw_frame(scene, time_s + k / FPS, SIZE) for k in range(2)])
        yield torch.from_numpy(np.stack([np.stack(pair) for pair in pairs])).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def steady_decoder(out: Path, steps: int, seed: int, steadiness: float, batch: int = 4) -> None:
    """Trains only the VAE's decoder, against flicker of still regions and with small noise on the latents.

    A VAE of single frames flickers: moving objects shift the colours of still regions. The latents do not change.
    """
    torch.manual_seed(seed + 1)
    vae = load_vae(out).float().train()
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in decoder:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder, lr=0.0, weight_decay=1e-4, betas=(0.9, 0.99))
    averaged = [p.detach().clone() for p in decoder]
    pairs, start, trail = frame_pairs(seed, batch), time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, 1e-3)
        x = next(pairs).flatten(0, 1)
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.mean
            latents += LATENT_NOISE / vae.config.scaling_factor * torch.randn_like(latents)
        y = vae.decode(latents).sample
        error = y - x
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        flicker = (error[1::2] - error[::2]).abs().mean()
        loss = error.abs().mean() + 5 * error.square().mean() + 0.1 * edges + steadiness * flicker
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, [p.detach() for p in decoder], 1 - min(0.995, (1 + step) / (10 + step)))
        trail.append([error.detach().square().mean().item(), flicker.item()])
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mse, flickered = np.mean(trail[-100:], axis=0)
            print(
                f"decoder {step + 1}/{steps}  rmse {math.sqrt(mse) / 2:.4f}  flicker {flickered / 2:.5f}"
                f"  {time.time() - start:.0f} s",
                flush=True,
            )
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            saved = copy.deepcopy(vae)
            with torch.no_grad():
                torch._foreach_copy_([*saved.decoder.parameters(), *saved.post_quant_conv.parameters()], averaged)
            _save_vae(saved, out)


def unit_latents(vae: AutoencoderKL) -> AutoencoderKL:
    """Sets the scaling factor so that latents of the corpus have deviation one."""
    with torch.no_grad():
        latents = torch.cat([encode_pixels(vae, clip_pixels(seed)[0]) for seed in HELD_OUT_SCENES])
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return vae


def _save_vae(vae: AutoencoderKL, out: Path) -> None:
    """Writes the VAE in fp16, its scores on unseen clips, and a strip to look at."""
    vae.eval()
    truth = np.stack([clip_pixels(seed)[0] for seed in HELD_OUT_SCENES])
    decoded = np.stack([decode_latents(vae, encode_pixels(vae, clip) * vae.config.scaling_factor) for clip in truth])
    rmse = float(np.sqrt(np.mean((decoded.astype(float) - truth) ** 2)) / 255)
    motion = [float(np.abs(np.diff(clips.astype(float), axis=1)).mean()) for clips in (decoded, truth)]
    write_score(out, "vae_rmse_held_out", round(rmse, 5))
    write_score(out, "vae_motion_ratio_held_out", round(motion[0] / motion[1], 4))
    print(f"vae on unseen clips: rmse {rmse:.4f}, motion ratio {motion[0] / motion[1]:.3f}", flush=True)
    vae.half().save_pretrained(out / "vae", safe_serialization=True)
    forget_origin(out / "vae")
    strip = np.concatenate([truth[0][::2], decoded[0][::2]], axis=1)
    write_video(out.parent / "vae_preview", np.concatenate(list(strip), axis=1)[None], 1.0)
