"""The denoiser of the demo's base: text encoder and 3D-UNet, trained jointly with the denoising loss."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.demo_base.common import (
    SIZE,
    TEXT_LENGTH,
    TEXT_WIDTH,
    VAE_WEIGHTS,
    clip_pixels,
    forget_origin,
    one_cycle,
    save_atomically,
    training_folder,
    write_score,
)
from trip_model.conditioning import drop_condition_slot, unet_input
from trip_model.encoders import encode_pixels, load_vae
from trip_model.objective import addressed_generator
from trip_model.unet import UNet3D, UNetConfig, load_unet, save_unet, set_dropout

UNET_RATE, TEXT_RATE = 1.8e-3, 5e-4  # with one rate for both, the text is learned late or not at all
FIRST_FRAME_SHARE = 0.75


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


class MuonOnMatrices:
    """`torch.optim.Muon` for the weights inside a 3D-UNet, where a convolution's weight counts as [out, in x kernel].

    The optimiser takes matrices only, so it gets views that share the memory of the weights. Input, output and time
    layers and vectors are in `others` and need another optimiser.
    """

    def __init__(self, unet: UNet3D) -> None:
        outside = ("conv_in", "conv_out", "time_emb")
        weights = {n: p for n, p in unet.named_parameters() if p.ndim > 1 and not any(o in n for o in outside)}
        self.weights = list(weights.values())
        self.others = [p for n, p in unet.named_parameters() if n not in weights]
        self.matrices = [torch.nn.Parameter(p.detach().view(len(p), -1)) for p in self.weights]
        self.optimizer = torch.optim.Muon(self.matrices, lr=0.0, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")

    def step(self, rate: float) -> None:
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            assert weight.grad is not None
            matrix.grad = weight.grad.flatten(1)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        for weight in self.weights:
            weight.grad = None  # another optimiser's `zero_grad` would leave it, and gradients would add up


def draw_time_steps(batch: int, time_power: float, generator: torch.Generator) -> torch.Tensor:
    """Time steps 0 to 999, [B], evenly spread values of [0, 1) to the `time_power`; below 1 more are near the noise."""
    spread = (torch.rand((), generator=generator) + torch.arange(batch) / batch) % 1.0
    return (spread**time_power * 1000).long()


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


@dataclass(frozen=True)
class DenoiserTraining:
    """The numbers of one training of the denoiser; `batch` is of each process."""

    steps: int
    clips: int
    seed: int
    batch: int
    go_on: bool
    target: str
    first_frame_share: float
    time_power: float
    muon_rate: float
    text_dropout: float
    frozen_text: bool
    text_rate: float


def make_denoiser(out: Path, training: DenoiserTraining) -> None:
    """Trains text encoder and 3D-UNet on velocity or noise with the paper's schedule.

    In `first_frame_share` of the steps the clean first frame precedes the noised ones (Figure 1 (a), without prior
    or fusion); the others are text-to-video. Time steps are uniform on [0, 1) to the `time_power`: below 1 more of them
    are near the noisy end, where only photo and caption say what a frame shows. Under `torchrun` every process draws
    its own scenes and its own batches, and gradients are averaged. `go_on` continues from the pair in `out` at half the
    rates. `muon_rate` above 0 gives the matrices and convolutions inside the 3D-UNet to Muon, with this peak rate in
    AdamW's units. A training that was stopped resumes from its last hundred steps when the same command is given again.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    command = asdict(training) | {"world": world}
    steps, seed, batch, target = training.steps, training.seed, training.batch, training.target
    state_file = training_folder(out) / "denoiser.pt"
    state = torch.load(state_file, weights_only=True) if state_file.is_file() else None
    if state is not None and state["command"] != command:
        raise SystemExit(
            f"{state_file} holds step {state['step']} of the training {state['command']}, this one is {command};"
            " repeat that command, or delete the file"
        )
    z_NFCHW, captions = load_training_clips(out, range(rank, training.clips, world))
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")

    def ids(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")[
            "input_ids"
        ]

    token_ids, empty_ids = ids(captions), ids([""])
    torch.manual_seed(seed)
    if training.go_on:
        text = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32)
        denoiser = Denoiser(text, load_unet(out)).train()
    else:
        denoiser = Denoiser(new_text_encoder(tokenizer), new_unet()).train()
    denoiser.text.requires_grad_(not training.frozen_text)
    scale = 0.5 if training.go_on else 1.0
    muon = MuonOnMatrices(denoiser.unet) if training.muon_rate else None
    unet_weights = muon.others if muon else list(denoiser.unet.parameters())
    groups = [(unet_weights, scale * UNET_RATE), (list(denoiser.text.parameters()), scale * training.text_rate)]
    if world > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(denoiser, broadcast_buffers=False)
    else:
        model = denoiser
    if rank == 0:
        sizes = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (denoiser.unet, denoiser.text)]
        print("unet and text encoder: M parameters", sizes)
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False, prediction_type=target,
        timestep_spacing="trailing", set_alpha_to_one=True, steps_offset=0,
    )  # fmt: skip
    alphas = scheduler.alphas_cumprod
    averaged = [p.detach().clone() for p in denoiser.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "peak": peak} for weights, peak in groups],
        lr=0.0, weight_decay=1e-2, betas=(0.9, 0.99), fused=True,
    )  # fmt: skip
    trail: list[float] = []
    first_step = 0
    if state is not None:
        denoiser.load_state_dict(state["denoiser"])
        optimizer.load_state_dict(state["optimizer"])
        if muon:
            muon.optimizer.load_state_dict(state["muon"])
        averaged, trail, first_step = state["averaged"], state["trail"], state["step"]
        print(f"denoiser: resuming at step {first_step} of {steps}", flush=True)
    start = time.time()
    for step in range(first_step, steps):
        draw = addressed_generator("base", seed, step, rank)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, group["peak"])
        pick = torch.randint(0, len(captions), (batch,), generator=draw)
        z0 = z_NFCHW[pick].permute(0, 2, 1, 3, 4)
        t = draw_time_steps(batch, training.time_power, draw)
        noise = torch.randn(z0.shape, generator=draw)
        a = alphas[t].sqrt().view(-1, 1, 1, 1, 1)
        s = (1 - alphas[t]).sqrt().view(-1, 1, 1, 1, 1)
        untold = torch.rand(batch, generator=draw) < training.text_dropout
        tokens = torch.where(untold[:, None], empty_ids, token_ids[pick])
        same_everywhere = addressed_generator("base first frame", seed, step)
        with_first = bool(torch.rand((), generator=same_everywhere) < training.first_frame_share)
        goal = noise if target == "epsilon" else a * noise - s * z0
        loss = F.mse_loss(model(a * z0 + s * noise, z0[:, :, :1], t, tokens, with_first), goal)
        denoiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        if muon:
            muon.step(one_cycle(step, steps, training.muon_rate))
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
            if muon:
                weights["muon"] = muon.optimizer.state_dict()
            save_atomically(done | weights, state_file)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            saved = copy.deepcopy(denoiser)
            with torch.no_grad():
                torch._foreach_copy_(list(saved.parameters()), averaged)
            save_unet(saved.unet.half(), out / "unet")
            saved.text.half().save_pretrained(out / "text_encoder", safe_serialization=True)
            scheduler.save_pretrained(out / "scheduler")
            forget_origin(out / "unet")
            loss_name = "denoiser_noise_loss" if target == "epsilon" else "denoiser_velocity_loss"
            write_score(out, loss_name, round(float(np.mean(trail[-500:])), 5))
    if rank == 0:
        state_file.unlink(missing_ok=True)
