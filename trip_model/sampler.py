"""Sampling (Section 4.1: DDIM, 50 steps): each solver steps with the fused noise, its prior computed at the same t.

Legend of shape suffixes: B batch, C latent channels, F frames, H and W latent height and width, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from trip_model.model import Trip
from trip_model.noise_prior import image_noise_prior
from trip_model.schedule import NoiseSchedule
from trip_model.unet import DeepFeatures

SamplerName = Literal["ddim", "dpm++", "unipc", "euler"]
Start = Literal["noise", "photo", "low-pass"]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
STARTS: tuple[str, ...] = get_args(Start)
LOW_PASS_CUTOFF = 0.25  # of the Nyquist frequency, in time and space: where the photo's part of `low-pass` ends
# Called after each step with (index, time step, tensors by name); the tensors that it returns replace those.
StepHook = Callable[[int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class Solver(Protocol):
    """One run of an ODE solver over the time steps of a noise schedule."""

    times: list[int]

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        """Returns the solver's state for the noised latent z_t of its first time step."""
        ...

    def z_t(self, state: torch.Tensor, index: int) -> torch.Tensor:
        """Returns the noised latent z_t that a state stands for, at step `index`."""
        ...

    def step(self, state: torch.Tensor, noise: torch.Tensor, index: int) -> torch.Tensor:
        """Returns the next state, after the last step the clean latent."""
        ...


class DDIM:
    """DDIM (eta 0) on its own grid; its states are z_t."""

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        self._schedule = schedule
        self._pairs = schedule.sampling_times(steps)
        self.times = [t for t, _ in self._pairs]

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        return noise

    def z_t(self, state: torch.Tensor, index: int) -> torch.Tensor:
        return state

    def step(self, state: torch.Tensor, noise: torch.Tensor, index: int) -> torch.Tensor:
        return self._schedule.ddim_step(state, noise, *self._pairs[index])


class DiffusersSolver:
    """One of diffusers' schedulers, with the betas of the model and integer time steps.

    Raises:
        ValueError: other betas, another prediction type, or time steps that the schedule does not have.
    """

    def __init__(self, scheduler: Any, schedule: NoiseSchedule, steps: int, device: torch.device) -> None:
        name = type(scheduler).__name__
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(f"{name} has prediction_type {scheduler.config.prediction_type!r}, expected 'epsilon'")
        if not torch.allclose(scheduler.alphas_cumprod.cpu(), schedule.alphas_cumprod_T, rtol=1e-4, atol=1e-7):
            raise ValueError(f"the betas of {name} are not the model's; make it by from_config(pipe.scheduler.config)")
        self._scheduler = type(scheduler).from_config(scheduler.config)  # a scheduler keeps the state of one run
        self._scheduler.set_timesteps(steps, device=device)
        self._timesteps = self._scheduler.timesteps
        times = [float(t) for t in self._timesteps]
        if any(t != int(t) or not 0 <= t < len(schedule.alphas_cumprod_T) for t in times):
            raise ValueError(
                f"{name} with {steps} steps visits time steps that are not of the schedule's"
                f" {len(schedule.alphas_cumprod_T)}; give another number of steps, or the sampler 'ddim'"
            )
        self.times = [int(t) for t in times]
        schedule.check_start(self.times[0], steps)
        if sorted(set(self.times), reverse=True) != self.times:
            raise ValueError(f"{name} with {steps} steps repeats a time step; give fewer steps, or the sampler 'ddim'")

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        return noise / self._scheduler.scale_model_input(torch.ones_like(noise), self._timesteps[0])

    def z_t(self, state: torch.Tensor, index: int) -> torch.Tensor:
        return self._scheduler.scale_model_input(state, self._timesteps[index])

    def step(self, state: torch.Tensor, noise: torch.Tensor, index: int) -> torch.Tensor:
        return self._scheduler.step(noise, self._timesteps[index], state, return_dict=False)[0]


_CLASSES: dict[str, Any] = {
    "dpm++": DPMSolverMultistepScheduler,  # of order 2 by diffusers' defaults
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


def make_solver(sampler: Any, schedule: NoiseSchedule, steps: int, device: torch.device | None = None) -> Solver:
    """Returns the solver of a name of `SAMPLERS`, or of one of diffusers' schedulers.

    Raises:
        ValueError: an unknown name, or a scheduler that does not fit the model's noise schedule.
    """
    if sampler == "ddim":
        return DDIM(schedule, steps)
    if isinstance(sampler, str):
        if sampler not in _CLASSES:
            raise ValueError(f"sampler {sampler!r}, expected one of {', '.join(SAMPLERS)}")
        sampler = _CLASSES[sampler].from_config(schedule.ddim().config)
    return DiffusersSolver(sampler, schedule, steps, device or torch.device("cpu"))


@dataclass(frozen=True)
class SamplingOptions:
    """How `sample_latents` samples; the defaults are the paper's."""

    # The ODE solver: one of `SAMPLERS`, or a scheduler of diffusers with the model's betas. Paper: DDIM (4.1).
    sampler: Any = "ddim"
    # Scale of guidance on the image: 1 is off. Without the image, the 3D-UNet gets a latent of zeros, as in
    # InstructPix2Pix; the prior is that of the image in every branch.
    image_guidance: float = 1.0
    # Factor of the predicted motion z_0^i - z_0^1 at every step: 1 is the model's, 0 the still.
    motion: float = 1.0
    # What sampling starts from: noise; the photo in every frame, noised; or that for the low frequencies only.
    start: Start = "noise"
    # Frames of one pass through the network, and how many of them two neighbouring windows share; None: all frames.
    window: int | None = None
    overlap: int = 4
    # Steps that share the deep features of the 3D-UNet: 1 computes them at every step, as the paper does.
    reuse: int = 1
    # Clean latents that the first frames must keep, [B, C, K, H, W]: the overlap with an earlier chunk.
    known: torch.Tensor | None = None


def windows(frames: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Returns the (start, stop) of overlapping windows that cover `frames`; the last one ends with the video.

    Raises:
        ValueError: a window of fewer than 2 frames, or an overlap that is not smaller than it.
    """
    if window < 2 or not 0 <= overlap < window:
        raise ValueError(
            f"windows of {window} frames with an overlap of {overlap}, expected 2 or more and less overlap"
        )
    starts = [*range(0, max(frames - window, 0), window - overlap), max(frames - window, 0)]
    return [(start, min(start + window, frames)) for start in starts]


def low_pass(x_BCFHW: torch.Tensor, cutoff: float = LOW_PASS_CUTOFF) -> torch.Tensor:
    """Returns the low frequencies of latents, by a Gaussian over time and space (FreeInit, arXiv 2312.07537)."""
    axes = (2, 3, 4)
    square = torch.zeros((), device=x_BCFHW.device)
    for axis in axes:
        shape = [-1 if other == axis else 1 for other in range(5)]
        square = square + torch.fft.fftfreq(x_BCFHW.shape[axis], device=x_BCFHW.device).square().view(shape)
    gain = torch.exp(-2 * square / cutoff**2)  # fftfreq is in cycles per sample, whose Nyquist frequency is 0.5
    return torch.fft.ifftn(torch.fft.fftn(x_BCFHW.float(), dim=axes) * gain, dim=axes).real


def start_latents(
    schedule: NoiseSchedule, start: Start, z_first_BC1HW: torch.Tensor, noise_BCFHW: torch.Tensor, t: int
) -> torch.Tensor:
    """Returns z_t of the first time step for one of `STARTS`.

    Raises:
        ValueError: another name.
    """
    if start not in STARTS:
        raise ValueError(f"start {start!r}, expected one of {', '.join(STARTS)}")
    noise = noise_BCFHW.float()
    if start == "noise":
        return noise
    t_B = torch.full((len(noise),), t, dtype=torch.int64, device=noise.device)
    photo = schedule.add_noise(z_first_BC1HW.expand_as(noise), noise, t_B)
    return photo if start == "photo" else low_pass(photo) + noise - low_pass(noise)


class _Predictor:
    """The fused noise with guidance, all branches in one batch, averaged over windows."""

    def __init__(self, model: Trip, options: SamplingOptions, guidance: float, frames: int) -> None:
        self._model, self._options, self._guidance = model, options, guidance
        self._windows = None if options.window is None else windows(frames, options.window, options.overlap)
        self._deep: dict[int, DeepFeatures] = {}  # by the first frame of a window

    def __call__(
        self, z: torch.Tensor, z_first: torch.Tensor, t: int, text: torch.Tensor, empty: torch.Tensor, index: int
    ) -> torch.Tensor:
        if index % self._options.reuse == 0:
            self._deep = {}
        if self._windows is None:
            return self._fused(z, z_first, t, text, empty, 0)
        total, count = torch.zeros_like(z), torch.zeros_like(z[:1, :1, :, :1, :1])
        for start, stop in self._windows:
            total[:, :, start:stop] += self._fused(z[:, :, start:stop], z_first, t, text, empty, start)
            count[:, :, start:stop] += 1
        return total / count

    def _fused(
        self, z: torch.Tensor, z_first: torch.Tensor, t: int, text: torch.Tensor, empty: torch.Tensor, offset: int
    ) -> torch.Tensor:
        by_text, by_image = self._guidance != 1.0, self._options.image_guidance != 1.0
        none = empty.expand_as(text)
        texts = [none, text] if by_text or by_image else [text]  # of the branches with the image, which share a pass
        z_t, given = z, z_first
        more: dict[str, Any] = {"offset": offset} if offset else {}
        if by_image:  # another image in each branch: every branch is a sample of its own
            z_t, given = torch.cat([z] * 3), torch.cat([z_first] * 3)
            more["unet_first_BC1HW"] = torch.cat([torch.zeros_like(z_first), z_first, z_first])
            texts.insert(0, none)
        t_B = torch.full((len(z_t),), t, dtype=torch.int64, device=z.device)
        if self._options.reuse > 1:
            more["deep"] = self._deep.setdefault(offset, DeepFeatures())
        noise = self._model(z_t, given, t_B, torch.cat(texts), **more).chunk(len(texts))
        fused = noise[-1]
        if by_text:
            fused = noise[-2] + self._guidance * (noise[-1] - noise[-2])
        if by_image:  # between the branches without text, so that it does not guide the text
            fused = noise[0] + self._options.image_guidance * (noise[1] - noise[0]) + (fused - noise[1])
        if self._options.motion != 1.0:
            signal, sigma = self._model.schedule.signal_and_noise(t_B[: len(z)], 5)
            prior = image_noise_prior(z, z_first, signal, sigma)
            fused = prior + self._options.motion * (fused - prior)
        return fused


@torch.no_grad()
def sample_latents(
    model: Trip,
    z_first_BC1HW: torch.Tensor,
    text_BLD: torch.Tensor,
    empty_text_1LD: torch.Tensor,
    noise_BCFHW: torch.Tensor,
    steps: int,
    guidance: float,
    on_step: Callable[[int, int], None] | None = None,
    options: SamplingOptions | None = None,
    hook: StepHook | None = None,
) -> torch.Tensor:
    """Samples final latents [B, C, F, H, W] from `noise_BCFHW`, in float32; each step computes the prior again.

    Guidance: the fused noise is computed with and without text (both with the image), in one batch, and extrapolated
    after the fusion. Guidance on the image adds a third branch, without text and image, also if the text has none.

    Args:
        model: the model, in eval mode.
        z_first_BC1HW: clean final latent of the photo.
        text_BLD: text features of the prompts.
        empty_text_1LD: those of the empty text or of a negative prompt, [1, L, D] or one for each video.
        noise_BCFHW: standard normal.
        steps: time steps to visit.
        guidance: scale of guidance on the text; 1 is off.
        on_step: called with (finished steps, steps) after each step.
        options: solver, image guidance, motion, start and windows.
        hook: called after each step; what it returns replaces `latents`, `prompt_embeds`, `negative_prompt_embeds`.
    Raises:
        ValueError: an option that does not exist or does not fit the model's schedule.
    """
    options = options or SamplingOptions()
    solver = make_solver(options.sampler, model.schedule, steps, noise_BCFHW.device)
    predict = _Predictor(model, options, guidance, noise_BCFHW.shape[2])
    noise = noise_BCFHW.float()
    state = solver.start(start_latents(model.schedule, options.start, z_first_BC1HW, noise, solver.times[0]))
    for index, t in enumerate(solver.times):
        z = solver.z_t(state, index)
        if options.known is not None:
            z = _with_known(model.schedule, z, options.known, noise, t)
        fused = predict(z, z_first_BC1HW, t, text_BLD, empty_text_1LD, index)
        state = solver.step(state, fused, index)
        if hook is not None:
            tensors = {"latents": state, "prompt_embeds": text_BLD, "negative_prompt_embeds": empty_text_1LD}
            changed = tensors | hook(index, t, tensors)
            state, text_BLD = changed["latents"], changed["prompt_embeds"]
            empty_text_1LD = changed["negative_prompt_embeds"]
        if on_step is not None:
            on_step(index + 1, steps)
    if options.known is not None:
        state = torch.cat([options.known, state[:, :, options.known.shape[2] :]], dim=2)
    return state


def _with_known(
    schedule: NoiseSchedule, z: torch.Tensor, known: torch.Tensor, noise: torch.Tensor, t: int
) -> torch.Tensor:
    """Returns z_t whose first frames are the known clean latents, noised to time step t."""
    frames = known.shape[2]
    t_B = torch.full((len(z),), t, dtype=torch.int64, device=z.device)
    return torch.cat([schedule.add_noise(known, noise[:, :, :frames], t_B), z[:, :, frames:]], dim=2)


def chunks(frames: int, chunk: int, overlap: int) -> Sequence[tuple[int, int]]:
    """Returns the (start, stop) of chunks sampled one after the other; each but the first begins in the one before."""
    if not 1 <= overlap < chunk:
        raise ValueError(f"chunks of {chunk} frames with an overlap of {overlap}, expected 1 to {chunk - 1}")
    found = [(0, min(chunk, frames))]
    while found[-1][1] < frames:
        start = found[-1][1] - overlap
        found.append((start, min(start + chunk, frames)))
    return found
