"""Trains the base of the demo: a small tokenizer, VAE, CLIP text encoder and text-to-video 3D-UNet.

    python examples/demo_base/make.py --out examples/demo_base/weights

The output folder has the layout of `text-to-video-ms-1.7b`, so that one loader reads both. Four steps, each saved when
it finishes: `tokenizer`, `vae`, `decoder` (the VAE's, trained against flicker), `denoiser` (text encoder and 3D-UNet
jointly, with the denoising loss). The last step can run in several processes:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/demo_base/make.py --only denoiser

and resumes when the same command is given again. Scenes come from seeds below 1,000,000; the demo corpus and its
held-out clips start there.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tasks.ingest.drawing import COLOURS, DIRECTIONS, SHAPES, SPEEDS, draw_frame, draw_scene
from trip_model.conditioning import drop_condition_slot, unet_input
from trip_model.encoders import decode_latents, encode_pixels, load_text_encoder, load_vae
from trip_model.images import write_video
from trip_model.objective import addressed_generator
from trip_model.unet import UNet3D, UNetConfig, load_unet, save_unet, set_dropout

SIZE, NUM_FRAMES, FPS = 64, 16, 4.0
TEXT_LENGTH, TEXT_WIDTH = 32, 64
UNET_RATE, TEXT_RATE = 1.8e-3, 5e-4  # with one rate for both, the text is learned late or not at all
FIRST_FRAME_SHARE = 0.75
LATENT_NOISE = 0.03  # standard deviation in final latents, as left by a sampler of this size
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
HELD_OUT_SCENES = range(990_000, 990_016)


def make_tokenizer(out: Path) -> None:
    """Trains a byte-pair tokenizer in CLIP's format on the captions' words; other words become letters."""
    captions = [f"a {c} {s} moving {d} {p}" for c in COLOURS for s in SHAPES for d in DIRECTIONS for p in SPEEDS]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=sorted(letters),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(captions + [" ".join(sorted(letters))] * 2, trainer)
    folder = out / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = bpe.model.save(str(folder))
    print(f"tokenizer: {bpe.get_vocab_size()} tokens")
    tokenizer = CLIPTokenizer(
        vocab=json.loads(Path(vocab_file).read_text()),
        merges=[
            tuple(line.split(" ")) for line in Path(merges_file).read_text().splitlines() if not line.startswith("#")
        ],
        model_max_length=TEXT_LENGTH,
    )
    Path(vocab_file).unlink()
    Path(merges_file).unlink()
    tokenizer.save_pretrained(folder)


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


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up over 3 % of the steps, then a cosine to 2 % of the peak."""
    warm = max(1, int(0.03 * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


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
    _score(out, "vae_rmse_held_out", round(rmse, 5))
    _score(out, "vae_motion_ratio_held_out", round(motion[0] / motion[1], 4))
    print(f"vae on unseen clips: rmse {rmse:.4f}, motion ratio {motion[0] / motion[1]:.3f}", flush=True)
    vae.half().save_pretrained(out / "vae", safe_serialization=True)
    _forget_origin(out / "vae")
    strip = np.concatenate([truth[0][::2], decoded[0][::2]], axis=1)
    write_video(out.parent / "vae_preview", np.concatenate(list(strip), axis=1)[None], 1.0)


def _forget_origin(folder: Path) -> None:
    """Removes the folder that a configuration was read from, which diffusers writes into it."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _score(out: Path, name: str, value: float) -> None:
    file = out / "scores.json"
    scores = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(scores | {name: value}, indent=2, sort_keys=True) + "\n")


def clip_pixels(seed: int) -> tuple[np.ndarray, str]:
    """Draws the 16 frames at 4 fps of one scene and returns them with its caption."""
    scene = draw_scene(seed)
    return np.stack([draw_frame(scene, k / FPS, SIZE) for k in range(NUM_FRAMES)]), scene.caption


def load_training_clips(out: Path, scenes: range) -> tuple[torch.Tensor, list[str]]:
    """Returns final latents [N, F, C, H, W] and captions of these scenes; encoded once and kept for later calls."""
    vae_sha256 = hashlib.sha256((out / "vae" / VAE_WEIGHTS).read_bytes()).hexdigest()
    file = training_folder(out) / f"clips-{scenes.start}-{scenes.stop}-{scenes.step}-{vae_sha256[:12]}.pt"
    if file.is_file():
        saved = torch.load(file, weights_only=True)
        return saved["latents"], saved["captions"]
    vae, start = load_vae(out), time.time()
    latents, captions = [], []
    for index, scene in enumerate(scenes):
        pixels, caption = clip_pixels(scene)
        latents.append(encode_pixels(vae, pixels))
        captions.append(caption)
        if (index + 1) % 500 == 0:
            print(f"encoded {index + 1}/{len(scenes)} clips  {time.time() - start:.0f} s", flush=True)
    final = torch.stack(latents) * vae.config.scaling_factor
    save_atomically({"latents": final, "captions": captions}, file)
    return final, captions


def training_folder(out: Path) -> Path:
    """Where encoded clips and the state of an unfinished training lie; not part of the base."""
    folder = out.parent / "training"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_atomically(value: dict[str, Any], file: Path) -> None:
    torch.save(value, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=TEXT_WIDTH,
        )
    )


def new_unet() -> UNet3D:
    config = UNetConfig(
        sample_size=SIZE // 8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return UNet3D(config)


class Denoiser(torch.nn.Module):
    """Text encoder and 3D-UNet in one module, so that one optimiser step and one all-reduce cover both."""

    def __init__(self, text: CLIPTextModel, unet: UNet3D) -> None:
        super().__init__()
        self.text, self.unet = text, unet
        set_dropout(self.unet, 0.0)

    def forward(
        self, z_t: torch.Tensor, z_first: torch.Tensor, t: torch.Tensor, token_ids: torch.Tensor, with_first: bool
    ) -> torch.Tensor:
        text = self.text(token_ids)[0]
        if not with_first:
            return self.unet(z_t, t, text)
        return drop_condition_slot(self.unet(unet_input(z_t, z_first, "head"), t, text), "head")


def make_denoiser(
    out: Path,
    steps: int,
    clips: int,
    seed: int,
    batch: int,
    go_on: bool,
    target: str,
    first_frame_share: float,
    time_power: float,
) -> None:
    """Trains text encoder and 3D-UNet on velocity or noise with the paper's schedule and a text dropout of 0.1.

    In `first_frame_share` of the steps the clean first frame precedes the noised ones (Figure 1 (a), without prior
    or fusion); the others are text-to-video. Time steps are uniform on [0, 1) to the `time_power`: below 1 more of them
    are near the noisy end, where only photo and caption say what a frame shows. Under `torchrun` every process draws
    its own scenes and its own batches, and gradients are averaged. `go_on` continues from the pair in `out` at half the
    rates. A training that was stopped resumes from its last hundred steps when the same command is given again.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    command = {"steps": steps, "clips": clips, "seed": seed, "batch": batch, "go_on": go_on, "world": world}
    command |= {"target": target, "first_frame_share": first_frame_share, "time_power": time_power}
    state_file = training_folder(out) / "denoiser.pt"
    state = torch.load(state_file, weights_only=True) if state_file.is_file() else None
    if state is not None and state["command"] != command:
        raise SystemExit(
            f"{state_file} holds step {state['step']} of the training {state['command']}, this one is {command};"
            " repeat that command, or delete the file"
        )
    z_NFCHW, captions = load_training_clips(out, range(rank, clips, world))
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")

    def ids(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")[
            "input_ids"
        ]

    token_ids, empty_ids = ids(captions), ids([""])
    torch.manual_seed(seed)
    if go_on:
        text = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32)
        denoiser = Denoiser(text, load_unet(out)).train()
    else:
        denoiser = Denoiser(new_text_encoder(tokenizer), new_unet()).train()
    scale = 0.5 if go_on else 1.0
    groups = [(denoiser.unet, scale * UNET_RATE), (denoiser.text, scale * TEXT_RATE)]
    if world > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(denoiser, broadcast_buffers=False)
    else:
        model = denoiser
    if rank == 0:
        print("unet and text encoder: M parameters", [sum(p.numel() for p in m.parameters()) / 1e6 for m, _ in groups])
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False, prediction_type=target,
        timestep_spacing="trailing", set_alpha_to_one=True, steps_offset=0,
    )  # fmt: skip
    alphas = scheduler.alphas_cumprod
    averaged = [p.detach().clone() for p in denoiser.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": list(module.parameters()), "peak": peak} for module, peak in groups],
        lr=0.0, weight_decay=1e-2, betas=(0.9, 0.99), fused=True,
    )  # fmt: skip
    trail: list[float] = []
    first_step = 0
    if state is not None:
        denoiser.load_state_dict(state["denoiser"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, trail, first_step = state["averaged"], state["trail"], state["step"]
        print(f"denoiser: resuming at step {first_step} of {steps}", flush=True)
    start = time.time()
    for step in range(first_step, steps):
        draw = addressed_generator("base", seed, step, rank)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, group["peak"])
        pick = torch.randint(0, len(captions), (batch,), generator=draw)
        z0 = z_NFCHW[pick].permute(0, 2, 1, 3, 4)
        spread = (torch.rand((), generator=draw) + torch.arange(batch) / batch) % 1.0
        t = (spread**time_power * 1000).long()
        noise = torch.randn(z0.shape, generator=draw)
        a = alphas[t].sqrt().view(-1, 1, 1, 1, 1)
        s = (1 - alphas[t]).sqrt().view(-1, 1, 1, 1, 1)
        tokens = torch.where((torch.rand(batch, generator=draw) < 0.1)[:, None], empty_ids, token_ids[pick])
        same_everywhere = addressed_generator("base first frame", seed, step)
        with_first = bool(torch.rand((), generator=same_everywhere) < first_frame_share)
        goal = noise if target == "epsilon" else a * noise - s * z0
        loss = F.mse_loss(model(a * z0 + s * noise, z0[:, :, :1], t, tokens, with_first), goal)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, [p.detach() for p in denoiser.parameters()], 1 - decay)
        trail.append(loss.item())
        if rank:
            continue
        if (step + 1) % 100 == 0:
            seconds = time.time() - start
            left = seconds / (step + 1 - first_step) * (steps - step - 1)
            loss_now = np.mean(trail[-100:])
            print(f"denoiser {step + 1}/{steps}  loss {loss_now:.4f}  {seconds:.0f} s, {left:.0f} s left", flush=True)
            done = {"step": step + 1, "trail": trail[-500:], "averaged": averaged, "command": command}
            weights = {"denoiser": denoiser.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically(done | weights, state_file)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            saved = copy.deepcopy(denoiser)
            with torch.no_grad():
                torch._foreach_copy_(list(saved.parameters()), averaged)
            save_unet(saved.unet.half(), out / "unet")
            saved.text.half().save_pretrained(out / "text_encoder", safe_serialization=True)
            scheduler.save_pretrained(out / "scheduler")
            _forget_origin(out / "unet")
            loss_name = "denoiser_noise_loss" if target == "epsilon" else "denoiser_velocity_loss"
            _score(out, loss_name, round(float(np.mean(trail[-500:])), 5))
    if rank == 0:
        state_file.unlink(missing_ok=True)


@torch.no_grad()
def preview(out: Path, seed: int = 0) -> None:
    """Samples four clips from text for visual inspection."""
    vae, text = load_vae(out), load_text_encoder(out)
    unet = load_unet(out).eval()
    scheduler = DDIMScheduler.from_pretrained(out / "scheduler")
    scheduler.set_timesteps(50)
    captions = [
        "a red circle moving right quickly",
        "a blue square moving down slowly",
        "a yellow triangle moving left quickly",
        "a white circle moving up slowly",
    ]
    features = text.encode(text.tokenize(captions))
    empty = text.encode(text.tokenize([""])).expand_as(features)
    z = torch.randn(4, 4, NUM_FRAMES, 8, 8, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        with_text, without = unet(torch.cat([z, z]), t, torch.cat([features, empty])).chunk(2)
        z = scheduler.step(without + 2.0 * (with_text - without), t, z).prev_sample
    rows = [decode_latents(vae, z[i].permute(1, 0, 2, 3)) for i in range(4)]
    sheet = np.concatenate([np.concatenate(list(row[::3]), axis=1) for row in rows])
    write_video(out.parent / "t2v_preview", sheet[None], 1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--only", choices=["tokenizer", "vae", "decoder", "denoiser", "preview"])
    parser.add_argument("--vae-steps", type=int, default=3500)
    parser.add_argument("--decoder-steps", type=int, default=3000)
    parser.add_argument("--steadiness", type=float, default=2.0, help="weight of the flicker in the decoder's loss")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--go-on", action="store_true", help="train the denoiser in --out further")
    parser.add_argument("--batch", type=int, default=4, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=["v_prediction", "epsilon"], default="v_prediction")
    parser.add_argument("--first-frame-share", type=float, default=FIRST_FRAME_SHARE, help="0: text-to-video only")
    parser.add_argument("--time-power", type=float, default=1.0, help="below 1: more time steps near the noisy end")
    parser.add_argument("--parts-of", type=Path, help="take tokenizer and VAE from this base")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.parts_of is not None:
        for part in ("tokenizer", "vae"):
            shutil.copytree(args.parts_of / part, args.out / part, dirs_exist_ok=True)
    if args.only in (None, "tokenizer"):
        make_tokenizer(args.out)
    if args.only in (None, "vae"):
        make_vae(args.out, args.vae_steps, args.seed)
    if args.only in (None, "decoder"):
        steady_decoder(args.out, args.decoder_steps, args.seed, args.steadiness)
    if args.only in (None, "denoiser"):
        make_denoiser(
            args.out,
            args.steps,
            args.clips,
            args.seed,
            args.batch,
            args.go_on,
            args.target,
            args.first_frame_share,
            args.time_power,
        )
    if args.only in (None, "preview"):
        preview(args.out)
