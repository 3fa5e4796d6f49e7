"""`TripPipeline` behaves as a pipeline of diffusers: arguments, outputs, loading, saving, half precision, adapters."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image

from trip_model.checkpoint import load_model
from trip_model.folders import BaseFolderError
from trip_model.pipeline import TripPipeline, seed_generator

PHOTO = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
PROMPT = "a red circle"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> TripPipeline:
    pipe = TripPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animate(pipe: Any, seed: int = 3, **options: Any) -> Any:
    given = {"generator": seed_generator(seed), "num_frames": 3, "output_type": "np", **options}
    return pipe(PHOTO, **({} if "prompt_embeds" in options else {"prompt": PROMPT}) | given).frames


def test_the_same_seed_gives_the_frames_of_generate_to_the_digit(pipe):
    frames = animate(pipe)[0]
    expected = pipe.generate([PHOTO], [PROMPT], [3], num_frames=3)[0]
    assert np.array_equal(np.rint(frames * 255).astype(np.uint8), expected)
    assert np.array_equal(expected[0], PHOTO) and expected[1:].std() > 1


def embeds(pipe: TripPipeline, text: str = PROMPT) -> torch.Tensor:
    return pipe.text.encode(pipe.text.tokenize([text]))


def noise(seed: int = 3) -> torch.Tensor:
    return torch.randn(1, 4, 3, 4, 4, generator=seed_generator(seed))


# Calls that mean the same as the plain call.
SAME: dict[str, Callable[[Any], dict[str, Any]]] = {
    "generator list": lambda pipe: {"generator": [seed_generator(3)]},
    "latents": lambda pipe: {"latents": noise(), "generator": None},
    "prompt_embeds": lambda pipe: {"prompt_embeds": embeds(pipe)},
    "steps of the model": lambda pipe: {"num_inference_steps": 2},
    "size of the model": lambda pipe: {"height": 32, "width": 32},
    "guidance off": lambda pipe: {"guidance_scale": 1.0, "image_guidance_scale": 1.0, "negative_prompt": "blurred"},
    "its own sampler": lambda pipe: {"scheduler": "ddim"},
    "scheduler": lambda pipe: {"scheduler": pipe.scheduler},
    "a tensor": lambda pipe: {"image": torch.from_numpy(PHOTO).permute(2, 0, 1) / 255},
    "a PIL image": lambda pipe: {"image": Image.fromarray(PHOTO)},
    "a square photo, kept": lambda pipe: {"fit": "keep"},
    "a square photo, padded": lambda pipe: {"fit": "pad"},
}


@pytest.mark.parametrize("name", SAME)
def test_calls_that_mean_the_same_give_the_same_frames(pipe, name):
    options = SAME[name](pipe)
    image = options.pop("image", PHOTO)
    text = {} if "prompt_embeds" in options else {"prompt": PROMPT}
    given = {"generator": seed_generator(3), "num_frames": 3, "output_type": "np"} | options
    assert np.array_equal(pipe(image, **text, **given).frames, animate(pipe))


# Arguments that change the frames.
CHANGES: dict[str, dict[str, Any]] = {
    "generator": {"generator": seed_generator(4)},
    "num_inference_steps": {"num_inference_steps": 5},
    "guidance_scale": {"guidance_scale": 30.0},
    "image_guidance_scale": {"image_guidance_scale": 30.0},
    "motion_strength": {"motion_strength": 0.3},
    "start from the photo": {"start": "photo", "num_inference_steps": 1},
    "scheduler": {"scheduler": "dpm++", "num_inference_steps": 5},
    "feature_reuse": {"feature_reuse": 2},
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_argument_changes_the_frames(pipe, name):
    assert not np.array_equal(animate(pipe, **CHANGES[name]), animate(pipe))


def test_the_negative_prompt_replaces_the_empty_text(pipe):
    without = animate(pipe, guidance_scale=30.0)
    assert np.array_equal(animate(pipe, guidance_scale=30.0, negative_prompt=""), without)
    negative = animate(pipe, guidance_scale=30.0, negative_prompt="a blue square moving up")
    assert not np.array_equal(negative, without)
    given = animate(pipe, guidance_scale=30.0, negative_prompt_embeds=embeds(pipe, "a blue square moving up"))
    assert np.array_equal(given, negative)


def test_both_guidances_follow_their_formula(pipe):
    model, z, first = pipe.model, noise(), torch.randn(1, 4, 1, 4, 4, generator=seed_generator(9))
    text, empty, t = embeds(pipe), embeds(pipe, ""), torch.tensor([999])
    none = model(z, first, t, empty, unet_first_BC1HW=0 * first)  # the prior is that of the photo in every branch
    image, both = model(z, first, t, empty), model(z, first, t, text)

    from trip_model.sampler import SamplingOptions, sample_latents

    for guidance in (3.0, 1.0):  # without guidance on the text, guidance on the image does not guide the text either
        expected = none + 2 * (image - none) + guidance * (both - image)
        made = sample_latents(model, first, text, empty, z, 1, guidance, options=SamplingOptions(image_guidance=2.0))
        torch.testing.assert_close(made, model.schedule.ddim_step(z, expected, 999, None), rtol=1e-4, atol=1e-4)


def test_guidance_on_the_image_keeps_the_photo_where_there_is_a_prior(pipe):
    """Frame 1 of a model with shrinkage is the prior's, which is exact; it was scaled by the guidance."""
    from trip_model.sampler import SamplingOptions, sample_latents

    model, z, first = pipe.model, noise(), torch.randn(1, 4, 1, 4, 4, generator=seed_generator(9))
    assert model.config.fusion.prediction == "shrinkage"
    made = sample_latents(
        model, first, embeds(pipe), embeds(pipe, ""), z, 2, 1.0, options=SamplingOptions(image_guidance=3.0)
    )
    torch.testing.assert_close(made[:, :, :1], first, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("output_type", ["np", "pil", "pt", "latent"])
def test_output_types(pipe, output_type):
    frames = animate(pipe, output_type=output_type, num_videos_per_prompt=2)
    if output_type == "np":
        assert (
            frames.shape == (2, 3, 32, 32, 3) and frames.dtype == np.float32 and 0 <= frames.min() < frames.max() <= 1
        )
    elif output_type == "pil":
        assert [len(video) for video in frames] == [3, 3] and frames[0][0].size == (32, 32)
    elif output_type == "pt":
        assert tuple(frames.shape) == (2, 3, 3, 32, 32)
    else:
        assert tuple(frames.shape) == (2, 4, 3, 4, 4)


def test_several_prompts_and_videos_have_their_own_noise(pipe):
    frames = pipe(
        [PHOTO, PHOTO[::-1].copy()], [PROMPT, "a dog"], num_frames=2, num_videos_per_prompt=2, output_type="np",
        generator=[seed_generator(seed) for seed in (1, 2, 3, 4)],
    ).frames  # fmt: skip
    assert frames.shape[0] == 4
    single = pipe(PHOTO, PROMPT, num_frames=2, generator=seed_generator(2), output_type="np").frames[0]
    assert np.abs(frames[1] - single).max() < 1.5 / 255
    assert pipe(PHOTO, PROMPT, num_frames=2, return_dict=False, output_type="np")[0].shape == (1, 2, 32, 32, 3)


def test_a_callback_reads_and_replaces_tensors_and_may_interrupt(pipe):
    seen = []

    def callback(given: Any, step: int, t: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((given is pipe, step, t, sorted(tensors)))
        pipe._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "prompt_embeds"]
    latents = animate(
        pipe, num_inference_steps=5, output_type="latent", callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )  # fmt: skip
    assert seen == [(True, step, t, names) for step, t in ((0, 999), (1, 799), (2, 599))]
    assert latents.abs().max() == 0
    with pytest.raises(ValueError, match="'unet'"):
        animate(pipe, callback_on_step_end_tensor_inputs=["unet"])


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "height": ({"height": 30}, "height is 30; use a multiple of 8"),
    "width": ({"width": 4096}, "width is 4096"),
    "frames": ({"num_frames": 65}, "num_frames is 65"),
    "long frames": ({"num_frames": 5000, "long": "joint"}, "num_frames is 5000"),
    "long": ({"long": "yes"}, "long 'yes'"),
    "output": ({"output_type": "gif"}, "output_type 'gif'"),
    "latents": ({"latents": torch.zeros(1, 4, 3, 4, 5)}, "latents of shape"),
    "embeds": ({"prompt_embeds": torch.zeros(1, 3, 3)}, "prompt_embeds of shape"),
    "motion": ({"motion_strength": -1}, "motion_strength is -1"),
    "reuse": ({"feature_reuse": 0}, "feature_reuse is 0; use a number of steps from 1"),
    "start": ({"start": "video"}, "start 'video'"),
    "sampler": ({"scheduler": "magic"}, "sampler 'magic'"),
    "fit": ({"fit": "stretch"}, "fit 'stretch'"),
    "guidance": ({"guidance_scale": 99}, "guidance is 99"),
    "videos": ({"num_videos_per_prompt": 1000}, "1000 videos"),
    "other betas": ({"scheduler": DPMSolverMultistepScheduler(beta_end=0.012)}, "betas of DPMSolverMultistepScheduler"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_wrong_value_is_named_before_work_begins(pipe, name, monkeypatch):
    monkeypatch.setattr("trip_model.model.Trip.forward", lambda *_: pytest.fail("the network ran"))
    options, message = REJECTED[name]
    with pytest.raises(ValueError, match=message):
        animate(pipe, **options)


def test_an_unknown_argument_is_a_type_error(pipe):
    with pytest.raises(TypeError, match="'promt'"):
        pipe(PHOTO, PROMPT, promt="x")


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe(PHOTO, PROMPT, seed=3, num_frames=3),
        lambda pipe: pipe(PHOTO, PROMPT, 3, 3),
        lambda pipe: pipe(PHOTO, PROMPT, steps=2, seed=3, num_frames=3, guidance=1.0),
    ],
)
def test_the_old_calls_work_with_a_warning(pipe, call):
    with pytest.warns(DeprecationWarning, match=r"generator=\.\.\., or TripPipeline\.generate"):
        frames = call(pipe)
    assert np.array_equal(frames, pipe.generate([PHOTO], [PROMPT], [3], num_frames=3)[0])


def test_the_old_loading_works_with_a_warning(tiny_model):
    with pytest.warns(DeprecationWarning, match="from_pretrained"):
        assert TripPipeline.from_folder(tiny_model).size == 32


def test_diffusers_loads_an_export_by_its_own_class(pipe, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    loaded = DiffusionPipeline.from_pretrained(tiny_model, custom_pipeline=str(tiny_model), trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded, TripPipeline)
    assert np.array_equal(animate(loaded), animate(pipe))


def test_saving_and_loading_keeps_everything(pipe, tiny_model, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = TripPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(animate(again), animate(pipe))
    assert load_model(tmp_path / "model").config == load_model(tiny_model).config
    record, index = (json.loads((tmp_path / "model" / name).read_text()) for name in ("trip.json", "model_index.json"))
    assert record["config"] == index["trip_config"]


def test_a_variant_is_loaded_by_its_name(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model", variant="fp16")
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = TripPipeline.from_pretrained(tmp_path / "model", variant="fp16")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(animate(again), animate(pipe))


def test_a_folder_of_an_older_version_loads(pipe, tiny_model, tmp_path):
    older = shutil.copytree(tiny_model, tmp_path / "older")
    index = {"_class_name": "TripPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (older / "model_index.json").write_text(json.dumps(index))
    (older / "fusion" / "config.json").unlink()
    (older / "fusion" / "diffusion_pytorch_model.safetensors").rename(older / "fusion" / "model.safetensors")
    again = TripPipeline.from_pretrained(older)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(animate(again), animate(pipe))


@pytest.mark.parametrize("part", ["unet", "fusion", "vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_one_sentence(tiny_model, tmp_path, part):
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    shutil.rmtree(broken / part)
    with pytest.raises(BaseFolderError, match="cannot be loaded"):
        TripPipeline.from_pretrained(broken)
    for wrong in (tmp_path, tmp_path / "typo", "./typo"):
        with pytest.raises(BaseFolderError, match=r"no trip\.json"):
            TripPipeline.from_pretrained(wrong)


def test_pushing_to_the_hub_uploads_the_whole_folder(pipe, monkeypatch):
    sent: dict[str, Any] = {}

    def upload(self: Any, folder: Any, repo_id: str, **options: Any) -> str:
        sent.update(repo=repo_id, files=sorted(path.name for path in Path(folder).iterdir()))
        return ""

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda name, **_: type("R", (), {"repo_id": name}))
    monkeypatch.setattr("diffusers.utils.hub_utils.PushToHubMixin._upload_folder", upload)
    pipe.push_to_hub("someone/trip")
    assert sent["repo"] == "someone/trip" and {"trip.json", "pipeline.py", "unet", "fusion"} <= set(sent["files"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_prior_fusion_and_vae_in_float32(pipe, tiny_model, dtype):
    half = TripPipeline.from_pretrained(tiny_model, dtype=dtype)
    half.set_progress_bar_config(disable=True)
    dtypes = [half.unet.dtype, half.text_encoder.dtype, half.fusion.dtype, half.vae.dtype]
    assert dtypes == [dtype, dtype, torch.float32, torch.float32]
    moved = TripPipeline.from_pretrained(tiny_model).to(dtype)
    assert [moved.unet.dtype, moved.vae.dtype] == [dtype, torch.float32]
    levels = 255 * np.abs(animate(half) - animate(pipe))
    # bfloat16 has 8 bits: a few pixels differ by one level more.
    assert levels.max() < (2.5 if dtype is torch.float16 else 4.5) and (levels > 2.5).mean() < 1e-3


def test_slicing_and_tiling_of_the_vae(pipe, tiny_model):
    sliced = TripPipeline.from_pretrained(tiny_model)
    sliced.set_progress_bar_config(disable=True)
    sliced.enable_vae_slicing()
    assert sliced.vae.use_slicing and np.abs(animate(sliced) - animate(pipe)).max() < 1.5 / 255
    sliced.enable_vae_tiling()
    assert sliced.vae.use_tiling and animate(sliced, width=64).shape == (1, 3, 32, 64, 3)
    sliced.disable_vae_slicing(), sliced.disable_vae_tiling()
    assert not sliced.vae.use_slicing and not sliced.vae.use_tiling


def test_offloading_needs_an_accelerator_and_says_so(tiny_model):
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU offloads")
    with pytest.raises(RuntimeError, match="accelerator"):
        TripPipeline.from_pretrained(tiny_model).enable_model_cpu_offload()


def test_adapters_load_from_a_training_and_from_diffusers_layout(pipe, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    trained = TripPipeline.from_pretrained(tiny_model)
    trained.set_progress_bar_config(disable=True)
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    torch.manual_seed(0)
    adapters: Any = get_peft_model(trained.unet, settings)  # type: ignore[arg-type]
    for name, parameter in adapters.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapters.save_pretrained(str(tmp_path / "adapter"))
    expected = animate(trained)
    assert not np.array_equal(expected, animate(pipe))

    loaded = TripPipeline.from_pretrained(tiny_model)
    loaded.set_progress_bar_config(disable=True)
    loaded.load_lora_weights(tmp_path / "adapter")
    assert np.abs(animate(loaded) - expected).max() < 1.5 / 255
    loaded.unload_lora_weights()
    assert np.array_equal(animate(loaded), animate(pipe))


def test_a_deprecated_name_is_not_used_inside(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        animate(pipe)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (40, 24), (8, 72)])
def test_any_multiple_of_the_factor_is_a_size(pipe, height, width):
    assert animate(pipe, height=height, width=width).shape == (1, 3, height, width, 3)


def test_the_aspect_of_the_photo_is_kept(pipe):
    wide = Image.fromarray(np.tile(PHOTO, (1, 3, 1)))
    frames = pipe(wide, PROMPT, num_frames=2, fit="keep", output_type="np").frames
    assert frames.shape == (1, 2, 16, 56, 3)
    padded = pipe(wide, PROMPT, num_frames=2, fit="pad", output_type="np").frames
    assert padded.shape == (1, 2, 32, 32, 3) and padded[0, 0, :10].max() == 0 and padded[0, 0, 16].max() > 0


@pytest.mark.parametrize("fps_frames", [2, 5])
def test_no_motion_is_the_photo_bit_for_bit(pipe, fps_frames):
    frames = animate(pipe, motion_strength=0, num_frames=fps_frames)
    assert np.array_equal(np.rint(frames * 255).astype(np.uint8)[0], np.repeat(PHOTO[None], fps_frames, axis=0))


@pytest.mark.parametrize("long", ["joint", "chunks"])
def test_long_videos(pipe, long):
    frames = animate(pipe, num_frames=70, long=long, num_inference_steps=1)
    assert frames.shape == (1, 70, 32, 32, 3)
    assert np.array_equal(frames[0, 0], PHOTO.astype(np.float32) / 255)
    within = animate(pipe, num_frames=12, long=long)  # not longer than the model's: as without
    assert np.array_equal(within, animate(pipe, num_frames=12))
