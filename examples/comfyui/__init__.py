"""Nodes of ComfyUI for a TRIP model: load a model folder, and animate an image into a batch of frames."""

from __future__ import annotations

import sys
from typing import Any

import torch

from trip_model import TripPipeline
from trip_model.pipeline import MAX_MOTION, seed_generator
from trip_model.request_limits import BOUNDS


class TripLoader:
    """Loads a TRIP model."""

    CATEGORY = "TRIP"
    RETURN_TYPES = ("TRIP_MODEL",)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
        folder = {"default": "runs/demo/model", "tooltip": "a model folder, or a name on the hub"}
        return {"required": {"model": ("STRING", folder), "device": (devices, {"default": devices[0]})}}

    def load(self, model: str, device: str) -> tuple[TripPipeline]:
        pipe = TripPipeline.from_pretrained(model).to(device)
        pipe.set_progress_bar_config(disable=True)
        return (pipe,)


class TripAnimate:
    """Animates the first image of a batch; returns frames as an image batch, and their rate."""

    CATEGORY = "TRIP"
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("frames", "fps")
    FUNCTION = "animate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        frames, steps, guidance, seed = (BOUNDS[name] for name in ("num_frames", "steps", "guidance", "seed"))
        own = "; 0 is the model's own"
        return {
            "required": {
                "model": ("TRIP_MODEL",),
                "image": ("IMAGE",),
                "prompt": ("STRING", {"multiline": True, "default": "a red circle moving left quickly"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": int(seed.maximum)}),
                "num_frames": ("INT", {"default": 16, "min": int(frames.minimum), "max": int(frames.maximum)}),
                "steps": ("INT", {"default": 0, "min": 0, "max": int(steps.maximum), "tooltip": steps.meaning + own}),
                "guidance": ("FLOAT", {"default": 1.0, "min": guidance.minimum, "max": guidance.maximum, "step": 0.1}),
                "motion_strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": MAX_MOTION, "step": 0.05}),
            },
            "optional": {"negative_prompt": ("STRING", {"multiline": True, "default": ""})},
        }

    def animate(
        self,
        model: TripPipeline,
        image: torch.Tensor,
        prompt: str,
        seed: int,
        num_frames: int,
        steps: int,
        guidance: float,
        motion_strength: float,
        negative_prompt: str = "",
    ) -> tuple[torch.Tensor, float]:
        """Returns float32 [F, H, W, 3] of 0..1 for an image [B, H, W, C] of 0..1."""
        own = model.trip_config
        steps = steps or own.schedule.sampling_steps
        comfy = sys.modules.get("comfy.utils")  # there inside of ComfyUI only
        bar = comfy.ProgressBar(steps) if comfy is not None else None

        def show(_pipe: Any, _step: int, _time: int, _tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if bar is not None:
                bar.update(1)
            management = sys.modules.get("comfy.model_management")
            if management is not None:  # the button "Cancel"
                management.throw_exception_if_processing_interrupted()
            return {}

        video = model(
            image[0].permute(2, 0, 1),
            prompt,
            negative_prompt=negative_prompt or None,
            generator=seed_generator(seed),
            num_frames=num_frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            motion_strength=motion_strength,
            long="joint" if num_frames > own.num_frames else None,
            callback_on_step_end=show,
            output_type="np",
        ).frames[0]
        return torch.from_numpy(video), float(model.fps)


NODE_CLASS_MAPPINGS = {"TripLoader": TripLoader, "TripAnimate": TripAnimate}
NODE_DISPLAY_NAME_MAPPINGS = {"TripLoader": "Load TRIP model", "TripAnimate": "Animate an image (TRIP)"}
