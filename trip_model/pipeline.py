"""`TripPipeline`: generates frames from a photo, a prompt and a seed (Section 4.1: DDIM, 50 steps)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trip_model.checkpoint import load_model
from trip_model.encoders import TextEncoder, decode_latents, encode_pixels, load_text_encoder, load_vae, vae_factor
from trip_model.images import load_image
from trip_model.model import Trip
from trip_model.objective import addressed_generator
from trip_model.request_limits import check_number

ImageSource = bytes | str | Path | Image.Image | np.ndarray


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
) -> torch.Tensor:
    """Samples final latents [B, C, F, H, W] from `noise_BCFHW` by DDIM, in float32; each step computes the prior again.

    With guidance other than 1, the fused noise is computed with and without text (both with the image) and
    extrapolated after the fusion.
    """
    times = model.schedule.sampling_times(steps)
    z = noise_BCFHW.float()
    batch = z.shape[0]
    for index, (t, t_next) in enumerate(times):
        t_B = torch.full((batch,), t, dtype=torch.int64, device=z.device)
        noise = model(z, z_first_BC1HW, t_B, text_BLD)
        if guidance != 1.0:
            without = model(z, z_first_BC1HW, t_B, empty_text_1LD.expand_as(text_BLD))
            noise = without + guidance * (noise - without)
        z = model.schedule.ddim_step(z, noise, t, t_next)
        if on_step is not None:
            on_step(index + 1, steps)
    return z


class TripPipeline:
    """Image-to-video with a trained TRIP model.

    >>> pipe = TripPipeline.from_folder("runs/demo/model")
    >>> frames = pipe("photo.jpg", "a red circle moving right quickly", seed=7)  # uint8 [16, 64, 64, 3]
    """

    def __init__(
        self, model: Trip, vae: torch.nn.Module, text: TextEncoder, device: str | torch.device = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self.vae: Any = vae.to(self.device)
        self.text = text.to(self.device)

    @classmethod
    def from_folder(cls, folder: str | Path, device: str | torch.device = "cpu") -> TripPipeline:
        """Loads a model folder (`trip_model.checkpoint`); raises `BaseFolderError` for any other folder."""
        return cls(load_model(folder), load_vae(folder), load_text_encoder(folder), device)

    @property
    def size(self) -> int:
        """Side of the square frames, in pixels."""
        return self.model.config.size

    @property
    def fps(self) -> float:
        """Frames per second of the videos."""
        return self.model.config.fps

    def __call__(
        self,
        image: ImageSource,
        prompt: str,
        seed: int = 0,
        num_frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        keep_first_frame: bool = True,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Animates one photo and returns uint8 [F, H, W, 3]. See `generate`."""
        return self.generate([image], [prompt], [seed], num_frames, steps, guidance, keep_first_frame, on_step)[0]

    @torch.no_grad()
    def generate(
        self,
        images: Sequence[ImageSource],
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        keep_first_frame: bool = True,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Animates a batch of photos and returns uint8 [B, F, H, W, 3]; each item's noise depends only on its seed.

        Args:
            images: photos, centre-cropped to the model's square.
            prompts: descriptions, one for each photo.
            seeds: one for each photo.
            num_frames: frames of each video, the given one included.
            steps: DDIM steps.
            guidance: scale, 1 is off.
            keep_first_frame: copies the given image to frame 1 instead of decoding frame 1.
            on_step: called with (finished steps, steps) after each step.
        Raises:
            ValueError: an empty prompt, an invalid image, or a number out of bounds.
        """
        config = self.model.config
        num_frames = config.num_frames if num_frames is None else num_frames
        steps = config.schedule.sampling_steps if steps is None else steps
        guidance = config.guidance if guidance is None else guidance
        if not len(images) == len(prompts) == len(seeds):
            raise ValueError(
                f"{len(images)} images, {len(prompts)} prompts and {len(seeds)} seeds; give one of each per video"
            )
        seeds = [int(check_number("seed", seed)) for seed in seeds]
        num_frames = int(check_number("num_frames", num_frames))
        steps = int(check_number("steps", steps, config.schedule.num_train_timesteps))
        guidance = check_number("guidance", guidance)
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("the prompt is empty; say in a few words what should happen in the video")
        photos = np.stack([load_image(image, config.size) for image in images])

        raw_BCHW = encode_pixels(self.vae, photos)
        z_first = (raw_BCHW * self.vae.config.scaling_factor).unsqueeze(2).to(self.device)
        cells = config.size // vae_factor(self.vae)
        shape = (z_first.shape[1], num_frames, cells, cells)
        noise = torch.stack([torch.randn(shape, generator=addressed_generator("sample", seed)) for seed in seeds])
        text = self.text.encode(self.text.tokenize(list(prompts)))
        empty = self.text.encode(self.text.tokenize([""]))
        z = sample_latents(self.model, z_first, text, empty, noise.to(self.device), steps, guidance, on_step)
        videos = np.stack([decode_latents(self.vae, clip.permute(1, 0, 2, 3)) for clip in z])
        if keep_first_frame:
            videos[:, 0] = photos
        return videos
