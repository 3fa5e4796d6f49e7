"""`TripPipeline`: generates frames from a photo, a prompt and a seed, as one of diffusers' pipelines (Section 4.1)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn

from trip_model.checkpoint import INDEX, config_from_json, load_model, read_record, write_record
from trip_model.config import TripConfig
from trip_model.encoders import (
    TextEncoder,
    decode_latents,
    encode_pixels,
    load_text_encoder,
    load_vae,
    text_encoder,
    vae_factor,
)
from trip_model.folders import BaseFolderError, is_hub_name
from trip_model.images import PhotoFit, PhotoSource, frame_size, load_image
from trip_model.model import Trip
from trip_model.objective import addressed_generator
from trip_model.request_limits import check_number
from trip_model.sampler import SamplingOptions, Start, StepHook, chunks, sample_latents

ImageSource = PhotoSource | torch.Tensor
Fit = Literal["crop", "pad", "keep"]
LongMode = Literal["joint", "chunks"]
FITS = ("crop", "pad", "keep")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_LONG_FRAMES = 1024
MAX_SIDE = 2048  # pixels
MAX_MOTION = 3.0
MAX_REUSE = 10  # steps
MAX_VIDEOS = 64  # of one call
_OLD_ARGUMENTS = ("seed", "num_frames", "steps", "guidance", "keep_first_frame", "on_step")


@dataclass
class TripPipelineOutput(BaseOutput):
    """The videos of a call.

    `frames` has one video for each prompt and video per prompt: a list of lists of PIL images (`pil`), float32 0..1
    [B, F, H, W, 3] (`np`) or [B, F, 3, H, W] (`pt`), or final latents [B, C, F, h, w] (`latent`).
    """

    frames: Any


class _Interrupted(Exception):
    """Ends sampling with the latents of the last finished step."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__()
        self.latents = latents


@dataclass(frozen=True)
class _Request:
    """What `__call__` and `generate` have in common, checked."""

    photos: np.ndarray  # uint8 [B, H, W, 3]
    text_BLD: torch.Tensor
    empty_BLD: torch.Tensor
    noise: torch.Tensor  # [B, C, F, h, w]
    steps: int
    guidance: float
    options: SamplingOptions
    long: LongMode | None = None


class TripPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Image-to-video with a trained TRIP model.

    >>> pipe = TripPipeline.from_pretrained("runs/demo/model")
    >>> generator = torch.Generator().manual_seed(7)
    >>> video = pipe("photo.jpg", "a red circle moving right quickly", generator=generator).frames[0]

    In half precision the 3D-UNet and the text encoder compute in the given type; the prior, the fusion module, the
    solver and the VAE stay in float32.

    Args:
        unet: the 3D-UNet of the residual path.
        fusion: the fusion module, None where the configuration has none.
        vae: diffusers' `AutoencoderKL`.
        text_encoder: CLIP's text model.
        tokenizer: its tokenizer.
        scheduler: a scheduler of diffusers with the model's betas. `DDIMScheduler` stands for this project's DDIM,
            whose grid is right for every number of steps; another class is used as it is.
        trip_config: the JSON form of a `TripConfig`.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["unet", "fusion"]  # noqa: RUF012 - diffusers' own annotation
    _exclude_from_cpu_offload = ["fusion"]  # noqa: RUF012 - small, and called between two calls of the 3D-UNet
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012

    def __init__(
        self,
        unet: Any,
        fusion: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        trip_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if trip_config is None:
            raise ValueError("trip_config is None, expected a TripConfig as JSON; use TripPipeline.from_pretrained")
        for module in (fusion, vae):
            if module is not None:
                nn.Module.to(module, torch.float32)
        self.register_modules(
            unet=unet, fusion=fusion, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(trip_config=trip_config)
        self.provenance: dict[str, Any] = {}
        self._model: Any = None
        self._interrupt = False

    # --- loading and saving

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] - also takes a Path
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> TripPipeline:
        """Loads a model folder or a model of the hub; the keywords are those of diffusers' `from_pretrained`.

        Weights are read from safetensors only, in float32 unless `dtype` (or `torch_dtype`) gives another type.

        Raises:
            BaseFolderError: a folder that is not a TRIP model, or a part that is missing or does not fit.
        """
        older_name = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or older_name or torch.float32
        types = {"default": dtype, "vae": torch.float32, "fusion": torch.float32}
        kwargs.setdefault("use_safetensors", True)
        folder = Path(pretrained_model_name_or_path)
        record = None if is_hub_name(str(pretrained_model_name_or_path)) else read_record(folder)
        index: dict[str, Any] = json.loads((folder / INDEX).read_text()) if record is not None else {}
        if record is not None:
            kwargs["trip_config"] = record["config"]  # of a folder, `trip.json` holds the configuration
        parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
        missing = [part for part in parts if not (folder / part).is_dir() and part not in kwargs]
        if missing:
            raise BaseFolderError(f"{folder} cannot be loaded: it has no {', '.join(missing)}; export the model again")
        if record is not None and "trip_config" not in index:
            pipe = cls.from_model(load_model(folder), load_vae(folder), load_text_encoder(folder))
            pipe.to(dtype)  # the folder is of a version that wrote no index for diffusers
        else:
            try:
                pipe = super().from_pretrained(str(pretrained_model_name_or_path), dtype=types, **kwargs)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise BaseFolderError(
                    f"{pretrained_model_name_or_path} cannot be loaded: {' '.join(str(error).split())[:300]}"
                ) from error
        assert isinstance(pipe, cls)
        pipe.provenance = record["provenance"] if record is not None else {}
        return pipe

    @classmethod
    def from_model(
        cls, model: Any, vae: Any, text: TextEncoder, device: str | torch.device | None = None
    ) -> TripPipeline:
        """Returns the pipeline of a `Trip`, or of a module with its interface, and the encoders of its base."""
        pipe = cls(
            unet=getattr(model, "unet", None),
            fusion=getattr(model, "fusion", None),
            vae=vae,
            text_encoder=text.model,
            tokenizer=text.tokenizer,
            scheduler=model.schedule.ddim(),
            trip_config=asdict(model.config),
        )
        pipe._model = model.eval()
        return pipe if device is None else pipe.to(device)

    @classmethod
    def from_folder(cls, folder: str | Path, device: str | torch.device = "cpu") -> TripPipeline:
        """Deprecated: `from_pretrained(folder).to(device)`."""
        _deprecated("TripPipeline.from_folder", "TripPipeline.from_pretrained(folder).to(device)")
        return cls.from_pretrained(folder).to(device)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest is in the keywords
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes a model folder that diffusers and `trip_model` load; `trip.json` is written last.

        The keywords are those of diffusers' `save_pretrained`; with `push_to_hub`, those of `push_to_hub` too.
        """
        hub = {name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private", "token") if name in kwargs}
        super().save_pretrained(str(save_directory), **kwargs)
        write_record(Path(save_directory), self.trip_config, self.provenance)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    def load_lora_weights(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest is in the keywords
        self, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any
    ) -> None:
        """Adds low-rank adapters: a folder `adapter/` of a training, or what diffusers' method of this name takes.

        Raises:
            ValueError: weights that are not adapters of this 3D-UNet.
        """
        source: Any = pretrained_model_name_or_path_or_dict
        if isinstance(source, str | Path) and (Path(source) / "adapter_config.json").is_file():
            from safetensors.torch import load_file

            settings = json.loads((Path(source) / "adapter_config.json").read_text())
            scale = settings["lora_alpha"] / settings["r"]  # diffusers scales weights without an alpha by 1
            source = {
                f"unet.{name.removeprefix('base_model.model.')}": value * scale if "lora_B" in name else value
                for name, value in load_file(Path(source) / "adapter_model.safetensors").items()
            }
        weights: Any = source if isinstance(source, dict) else str(source)
        super().load_lora_weights(weights, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> TripPipeline:
        """Moves the pipeline to a device; a data type is that of the 3D-UNet and the text encoder only."""
        kwargs = {name: value for name, value in kwargs.items() if name != "torch_dtype"} | (
            {"dtype": kwargs["torch_dtype"]} if "torch_dtype" in kwargs else {}
        )
        dtype = next((value for value in (*args, kwargs.pop("dtype", None)) if isinstance(value, torch.dtype)), None)
        rest = [value for value in args if not isinstance(value, torch.dtype)]
        if rest or kwargs:
            super().to(*rest, **kwargs)
        if dtype is not None:
            for module in (self.unet, self.text_encoder):
                if module is not None:
                    nn.Module.to(module, dtype)
        return self

    # --- parts

    @property
    def trip_config(self) -> TripConfig:
        """The configuration of the model."""
        return config_from_json(dict(self.config["trip_config"]))

    @property
    def model(self) -> Trip:
        """The model, assembled from the 3D-UNet and the fusion module."""
        stale = self.unet is not None and (
            self._model is None or self._model.unet is not self.unet or self._model.fusion is not self.fusion
        )
        if stale:
            unet: Any = self.unet
            self._model = Trip(unet, self.trip_config, self.fusion).eval()
        model: Any = self._model
        return model

    @property
    def text(self) -> TextEncoder:
        """The text encoder with its tokenizer."""
        return text_encoder(self.text_encoder, self.tokenizer)

    @property
    def size(self) -> int:
        """Side of the square frames that the model was trained on, in pixels."""
        return self.model.config.size

    @property
    def fps(self) -> float:
        """Frames per second of the videos."""
        return self.model.config.fps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the step; the latents so far are decoded."""
        return self._interrupt

    def enable_vae_slicing(self) -> None:
        """Decodes one frame at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decodes large frames tile by tile; tiles overlap, so pixels change a little."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    # --- calls

    @torch.no_grad()
    def __call__(
        self,
        image: ImageSource | Sequence[ImageSource],
        prompt: str | Sequence[str] | None = None,
        *old: Any,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        scheduler: Any = None,
        fit: Fit = "crop",
        motion_strength: float = 1.0,
        start: Start = "noise",
        feature_reuse: int = 1,
        long: LongMode | None = None,
        overlap: int = 4,
        keep_first_frame: bool = True,
        **deprecated: Any,
    ) -> Any:
        """Animates photos and returns a `TripPipelineOutput`.

        Args:
            image: a photo, or one for each prompt: path, bytes, PIL image, array, or tensor [3, H, W] of 0..1.
            prompt: what should move, or a list of descriptions.
            height: of the frames in pixels, a multiple of the VAE's factor; by default the model's size.
            width: likewise.
            num_frames: frames of each video, the given one included.
            num_inference_steps: steps of the solver.
            guidance_scale: scale of guidance on the text; 1 is off.
            image_guidance_scale: scale of guidance on the photo; 1 is off. The model was not trained without a photo.
            negative_prompt: replaces the empty text in guidance.
            num_videos_per_prompt: videos of different noise for each prompt.
            generator: of the noise; or one for each video.
            latents: noise [B, C, F, h, w] to start from, instead of a generator.
            prompt_embeds: text features [B, L, D], instead of `prompt`.
            negative_prompt_embeds: those of the negative prompt.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: False returns the tuple (frames,).
            callback_on_step_end: called with (pipeline, step, time step, tensors); what it returns replaces them.
            callback_on_step_end_tensor_inputs: names of these tensors: latents, prompt_embeds, negative_prompt_embeds.
            scheduler: `ddim`, `dpm++`, `unipc`, `euler` or a scheduler of diffusers; by default the pipeline's own.
            fit: `crop`, `pad`, or `keep`: frames of the photo's aspect ratio and about the model's area.
            motion_strength: factor of the motion; 1 is the model's own, 0 returns the photo in every frame.
            start: what sampling starts from: `noise`, the noised `photo`, or its low frequencies (`low-pass`).
            feature_reuse: steps that share the deep features of the 3D-UNet; 1 computes them at every step
                (docs/decisions/unet.md has time and quality).
            long: for videos longer than the model's: `joint` denoises overlapping windows together, `chunks` animates
                the last frame of each chunk again.
            overlap: frames that two windows or chunks share.
            keep_first_frame: copies the photo to frame 1 instead of decoding frame 1.
            *old: deprecated, the positional arguments of `generate`.
            **deprecated: `seed`, `steps`, `guidance` and `on_step` of `generate`.
        Raises:
            ValueError: an invalid image, an empty prompt, or a value out of bounds.
        """
        old_arguments = deprecated | dict(zip(_OLD_ARGUMENTS, old, strict=False))
        if old_arguments:
            unknown = sorted(set(old_arguments) - set(_OLD_ARGUMENTS))
            if unknown:
                raise TypeError(f"TripPipeline got an unexpected argument {unknown[0]!r}")
            _deprecated("TripPipeline(image, prompt, seed=...)", "generator=..., or TripPipeline.generate for seeds")
            old_arguments.setdefault("num_frames", num_frames)
            old_arguments.setdefault("keep_first_frame", keep_first_frame)
            seed = old_arguments.pop("seed", 0)
            return self.generate([image], [prompt], [seed], **old_arguments)[0]  # type: ignore[list-item]

        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")
        unknown_tensors = sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown_tensors:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown_tensors[0]!r}, expected some of"
                f" {', '.join(self._callback_tensor_inputs)}"
            )
        device, config = self._execution_device, self.model.config
        frames = self._checked_frames(num_frames, long)
        steps = config.schedule.sampling_steps if num_inference_steps is None else num_inference_steps
        steps = int(check_number("steps", steps, config.schedule.num_train_timesteps))
        guidance = check_number("guidance", config.guidance if guidance_scale is None else guidance_scale)
        text = self._text_features(prompt, prompt_embeds, "prompt")
        images = _as_list(image)
        if len(images) == 1:
            images = images * len(text)
        if len(images) != len(text):
            raise ValueError(f"{len(images)} images and {len(text)} prompts; give one image, or one for each prompt")
        if negative_prompt_embeds is None:
            negative = "" if negative_prompt is None else negative_prompt
            empty = self.text.encode(self.text.tokenize([negative] if isinstance(negative, str) else list(negative)))
        else:
            empty = negative_prompt_embeds
        if len(empty) not in (1, len(text)):
            raise ValueError(f"{len(empty)} negative prompts for {len(text)} prompts; give one, or one for each prompt")
        photos = self._photos(images, height, width, fit)
        repeats = int(num_videos_per_prompt)
        if not 1 <= repeats * len(text) <= MAX_VIDEOS:
            raise ValueError(
                f"{repeats} videos for each of {len(text)} prompts, expected 1 to {MAX_VIDEOS} in one call"
            )
        photos = np.repeat(photos, repeats, axis=0)
        text = text.repeat_interleave(repeats, dim=0).to(device)
        empty = (empty.repeat_interleave(repeats, dim=0) if len(empty) > 1 else empty).to(device)
        shape = self._latent_shape(photos, frames)
        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {list(latents.shape)}, expected {list(shape)}")
        else:
            noise = latents.to(device, torch.float32)
        options = SamplingOptions(
            sampler=self._sampler(scheduler),
            image_guidance=check_number("guidance", image_guidance_scale),
            motion=_checked_motion(motion_strength),
            start=start,
            overlap=overlap,
            reuse=_checked_reuse(feature_reuse),
        )
        request = _Request(photos, text, empty, noise, steps, guidance, options, long)

        self._interrupt = False
        show: Any = self.progress_bar
        with show(total=steps) as bar:

            def hook(index: int, t: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
                bar.update()
                changed: dict[str, torch.Tensor] = {}
                if callback_on_step_end is not None:
                    shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, index, t, shown) or {}
                if self._interrupt:
                    raise _Interrupted((tensors | changed)["latents"])
                return changed

            try:
                z = self._sample(request, hook=hook)
            except _Interrupted as interrupted:
                z = interrupted.latents
        made: Any = z if output_type == "latent" else self._pixels(z, request, keep_first_frame)
        if output_type == "np":
            made = made.astype(np.float32) / 255
        elif output_type == "pt":
            made = torch.from_numpy(made).permute(0, 1, 4, 2, 3).float() / 255
        elif output_type == "pil":
            made = [[Image.fromarray(frame) for frame in video] for video in made]
        self.maybe_free_model_hooks()
        return TripPipelineOutput(frames=made) if return_dict else (made,)

    @torch.no_grad()
    def generate(
        self,
        images: Sequence[PhotoSource],
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
            seeds: one for each photo; the noise is that of `seed_generator`.
            num_frames: frames of each video, the given one included.
            steps: steps of the solver.
            guidance: scale, 1 is off.
            keep_first_frame: copies the given image to frame 1 instead of decoding frame 1.
            on_step: called with (finished steps, steps) after each step.
        Raises:
            ValueError: an empty prompt, an invalid image, or a number out of bounds.
        """
        config = self.model.config
        steps = config.schedule.sampling_steps if steps is None else steps
        guidance = config.guidance if guidance is None else guidance
        if not len(images) == len(prompts) == len(seeds):
            raise ValueError(
                f"{len(images)} images, {len(prompts)} prompts and {len(seeds)} seeds; give one of each per video"
            )
        seeds = [int(check_number("seed", seed)) for seed in seeds]
        num_frames = self._checked_frames(num_frames, None)
        steps = int(check_number("steps", steps, config.schedule.num_train_timesteps))
        guidance = check_number("guidance", guidance)
        for prompt in prompts:
            _check_prompt(prompt)
        photos = np.stack([load_image(image, config.size) for image in images])
        shape = self._latent_shape(photos, num_frames)
        noise = torch.stack([torch.randn(shape[1:], generator=seed_generator(seed)) for seed in seeds])
        request = _Request(
            photos=photos,
            text_BLD=self.text.encode(self.text.tokenize(list(prompts))),
            empty_BLD=self.text.encode(self.text.tokenize([""])),
            noise=noise.to(self._execution_device),
            steps=steps,
            guidance=guidance,
            options=SamplingOptions(sampler=self._sampler(None)),
        )
        videos = self._pixels(self._sample(request, on_step=on_step), request, keep_first_frame)
        self.maybe_free_model_hooks()
        return videos

    # --- steps of a call

    def _sample(
        self, request: _Request, on_step: Callable[[int, int], None] | None = None, hook: StepHook | None = None
    ) -> torch.Tensor:
        """Returns final latents [B, C, F, h, w]."""
        raw_BCHW = encode_pixels(self.vae, request.photos, 32, self._execution_device)
        z_first = (raw_BCHW * self.vae.config.scaling_factor).unsqueeze(2).to(request.noise.device)
        frames, window = request.noise.shape[2], self.model.config.num_frames
        if request.options.motion == 0:
            return z_first.repeat(1, 1, frames, 1, 1)

        def sample(z_first: torch.Tensor, noise: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
            return sample_latents(
                self.model,
                z_first,
                request.text_BLD,
                request.empty_BLD,
                noise,
                request.steps,
                request.guidance,
                on_step,
                options,
                hook,
            )

        if request.long is None or frames <= window:
            return sample(z_first, request.noise, request.options)
        if request.long == "joint":
            return sample(z_first, request.noise, replace(request.options, window=window))
        made: torch.Tensor | None = None
        for start, stop in chunks(frames, window, request.options.overlap):
            noise = request.noise[:, :, start:stop]
            if made is None:
                made = sample(z_first, noise, request.options)
                continue
            known = made[:, :, start:]
            later = sample(known[:, :, :1], noise, replace(request.options, known=known))
            made = torch.cat([made, later[:, :, known.shape[2] :]], dim=2)
        assert made is not None
        return made

    def _pixels(self, z: torch.Tensor, request: _Request, keep_first_frame: bool) -> np.ndarray:
        """Returns uint8 [B, F, H, W, 3]."""
        if request.options.motion == 0 and keep_first_frame:
            return np.repeat(request.photos[:, None], z.shape[2], axis=1)
        device = self._execution_device
        videos = np.stack([decode_latents(self.vae, clip.permute(1, 0, 2, 3), 32, device) for clip in z])
        if keep_first_frame:
            videos[:, 0] = request.photos
        return videos

    def _checked_frames(self, num_frames: Any, long: str | None) -> int:
        frames = self.model.config.num_frames if num_frames is None else num_frames
        if long is None:
            return int(check_number("num_frames", frames))
        if long not in ("joint", "chunks"):
            raise ValueError(f"long {long!r}, expected 'joint' or 'chunks'")
        if isinstance(frames, bool) or not isinstance(frames, int) or not 2 <= frames <= MAX_LONG_FRAMES:
            raise ValueError(f"num_frames is {frames!r}; use an integer from 2 to {MAX_LONG_FRAMES}")
        return frames

    def _text_features(
        self, prompt: str | Sequence[str] | None, embeds: torch.Tensor | None, name: str
    ) -> torch.Tensor:
        if (prompt is None) == (embeds is None):
            raise ValueError(f"give either {name} or {name}_embeds")
        if embeds is not None:
            text = self.text
            if embeds.ndim != 3 or embeds.shape[1:] != (text.length, text.width):
                raise ValueError(
                    f"{name}_embeds of shape {list(embeds.shape)}, expected [B, {text.length}, {text.width}]"
                )
            return embeds
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        for each in prompts:
            _check_prompt(each)
        if not prompts:
            raise ValueError(f"{name} is an empty list; give a text, or one for each image")
        return self.text.encode(self.text.tokenize(prompts))

    def _photos(self, images: Sequence[ImageSource], height: Any, width: Any, fit: str) -> np.ndarray:
        if fit not in FITS:
            raise ValueError(f"fit {fit!r}, expected one of {', '.join(FITS)}")
        factor = vae_factor(self.vae)
        for name, side in (("height", height), ("width", width)):
            if side is not None and (
                isinstance(side, bool) or not isinstance(side, int) or side % factor or not factor <= side <= MAX_SIDE
            ):
                raise ValueError(f"{name} is {side!r}; use a multiple of {factor} from {factor} to {MAX_SIDE} pixels")
        sources = [_as_array(image) for image in images]
        if fit == "keep":
            sizes = {frame_size(source, self.size, factor, height, width) for source in sources}
            if len(sizes) > 1:
                raise ValueError(f"photos of {len(sizes)} aspect ratios in one call; animate them one by one")
            (size,) = sizes
        else:
            size = (height or self.size, width or self.size)
        how: PhotoFit = "pad" if fit == "pad" else "crop"  # `keep` crops what rounding leaves over
        return np.stack([load_image(source, size, how) for source in sources])

    def _latent_shape(self, photos: np.ndarray, frames: int) -> tuple[int, ...]:
        factor = vae_factor(self.vae)
        channels = int(self.vae.config.latent_channels)
        return len(photos), channels, frames, photos.shape[1] // factor, photos.shape[2] // factor

    def _sampler(self, scheduler: Any) -> Any:
        """Returns the sampler of `SamplingOptions` for the argument `scheduler`, or for the pipeline's own."""
        chosen = self.scheduler if scheduler is None else scheduler
        return "ddim" if type(chosen) is DDIMScheduler else chosen


def seed_generator(seed: int) -> torch.Generator:
    """Returns the generator of `generate` for a seed: as `generator`, it gives the same frames in `__call__`."""
    return addressed_generator("sample", seed)


def _deprecated(old: str, new: str) -> None:
    warnings.warn(f"{old} is deprecated and will be removed in 0.3; use {new}", DeprecationWarning, stacklevel=3)


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("the prompt is empty; say in a few words what should happen in the video")


def _checked_motion(strength: Any) -> float:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= MAX_MOTION:
        raise ValueError(f"motion_strength is {strength!r}; use a number from 0 (still) to {MAX_MOTION:g}")
    return float(strength)


def _checked_reuse(steps: Any) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_REUSE:
        raise ValueError(f"feature_reuse is {steps!r}; use a number of steps from 1 (off) to {MAX_REUSE}")
    return steps


def _as_list(image: Any) -> list[Any]:
    if isinstance(image, torch.Tensor | np.ndarray) and image.ndim == 4:
        return list(image)
    return list(image) if isinstance(image, list | tuple) else [image]


def _as_array(image: Any) -> Any:
    """Returns a tensor [C, H, W] as an array [H, W, C]; other sources unchanged."""
    return image.detach().float().cpu().permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else image
