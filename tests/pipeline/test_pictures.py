"""Pictures made before they are animated, with tiny pipelines of diffusers' own classes (Section 4.5)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from trip_model.__main__ import main
from trip_model.folders import BaseFolderError
from trip_model.pictures import PictureSpec, edges, make_picture


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_unet(channels: int, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=8, in_channels=channels, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an SDXL, an InstructPix2Pix and a ControlNet pipeline with random weights."""
    from diffusers import (
        AutoencoderKL,
        ControlNetModel,
        DDIMScheduler,
        StableDiffusionControlNetPipeline,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionXLPipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pictures")
    vae: Any = AutoencoderKL.from_pretrained(tiny_base / "vae")
    text: Any = CLIPTextModel.from_pretrained(tiny_base / "text_encoder")
    tokenizer: Any = CLIPTokenizer.from_pretrained(tiny_base / "tokenizer", model_max_length=32)
    known: dict[str, Any] = {"vae": vae, "text_encoder": text, "tokenizer": tokenizer, "scheduler": DDIMScheduler()}
    plain: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    second = CLIPTextModelWithProjection(CLIPTextConfig(**{**text.config.to_dict(), "projection_dim": 16}))
    StableDiffusionXLPipeline(
        **known, text_encoder_2=second, tokenizer_2=tokenizer,
        unet=tiny_unet(
            4, cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
        ),
    ).save_pretrained(root / "text-to-image")  # fmt: skip
    StableDiffusionInstructPix2PixPipeline(**known, **plain, unet=tiny_unet(8, cross_attention_dim=16)).save_pretrained(
        root / "edit"
    )
    unet = tiny_unet(4, cross_attention_dim=16)
    control: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 8))
    StableDiffusionControlNetPipeline(**known, **plain, unet=unet, controlnet=control).save_pretrained(root / "edges")
    control.save_pretrained(root / "controlnet")
    shutil.rmtree(root / "edges" / "controlnet")
    return {path.name: path for path in root.iterdir()}


def photo() -> Image.Image:
    image = Image.new("RGB", (48, 32), (200, 200, 180))
    ImageDraw.Draw(image).ellipse((10, 6, 30, 26), fill=(220, 30, 30))
    return image


def spec(pictures: dict[str, Path], kind: Any, seed: int = 0) -> PictureSpec:
    return PictureSpec(kind, "a fox", str(pictures[kind]), str(pictures["controlnet"]), steps=2, seed=seed)


@pytest.mark.parametrize("kind", ["text-to-image", "edit", "edges"])
def test_each_kind_makes_a_picture_from_its_seed_and_says_from_what(pictures, kind):
    size = (64, 64) if kind == "text-to-image" else None
    picture, provenance = make_picture(spec(pictures, kind), photo(), size)
    assert picture.mode == "RGB" and picture.size == ((64, 64) if kind == "text-to-image" else (48, 32))
    again, _ = make_picture(spec(pictures, kind), photo(), size)
    other, _ = make_picture(spec(pictures, kind, seed=1), photo(), size)
    assert np.array_equal(np.asarray(picture), np.asarray(again))
    assert not np.array_equal(np.asarray(picture), np.asarray(other))
    assert provenance["kind"] == kind and provenance["text"] == "a fox" and len(provenance["model_sha256"]) == 64
    assert ("controlnet_sha256" in provenance) == (kind == "edges")


@pytest.mark.parametrize("kind", ["text-to-image", "edit", "edges"])
def test_a_model_that_is_missing_is_named(kind, tmp_path):
    with pytest.raises(BaseFolderError, match=f"the model of {kind}, .*cannot be loaded"):
        make_picture(PictureSpec(kind, "a fox", str(tmp_path), str(tmp_path)), photo())


def test_wrong_values_are_rejected_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("trip_model.pictures._load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="edit changes a picture"):
        make_picture(PictureSpec("edit", "snow"), None)
    with pytest.raises(ValueError, match="text of edges is empty"):
        PictureSpec("edges", " ")
    with pytest.raises(ValueError, match="picture steps 0"):
        PictureSpec("edges", "snow", steps=0)


def test_edges_are_the_outline():
    found = np.asarray(edges(photo()))[..., 0]
    assert found[16, 8:13].max() == 255 and found[16, 20] == 0 and found[2, 2] == 0
    assert np.asarray(edges(Image.new("RGB", (16, 16), "gray"))).max() == 0


FLAGS: dict[str, Callable[[dict[str, Path]], list[str]]] = {
    "text-to-image": lambda made: ["--text-to-image", "a fox"],
    "edit": lambda made: ["--edit", "make it snow"],
    "edges": lambda made: ["--edges", "a fox", "--controlnet", str(made["controlnet"])],
}


@pytest.mark.parametrize("kind", FLAGS)
def test_the_command_line_animates_it_and_the_file_names_both_models(pictures, tiny_model, tmp_path, kind):
    photo().save(tmp_path / "photo.png")
    image = "-" if kind == "text-to-image" else str(tmp_path / "photo.png")
    arguments = [image, "it moves", "-m", str(tiny_model), "-o", str(tmp_path / "out.mp4"), "--num-frames", "2"]
    flags = ["--picture-model", str(pictures[kind]), "--picture-steps", "2", "--device", "cpu"]
    assert main([*arguments, *FLAGS[kind](pictures), *flags]) == 0
    with av.open(str(tmp_path / "out.mp4")) as container:
        said = json.loads(container.metadata["comment"])
    assert said["picture"]["kind"] == kind and said["model"] == "model" and said["prompt"] == "it moves"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1/x.png"], "the photo is a URL"),
        (["photo.png", "--picture-model", "x"], "--picture-model needs"),
        (["photo.png", "--text-to-image", "x"], "give - in place of"),
        (["photo.png", "--motion", "9"], "motion_strength is 9"),
        (["photo.png", "--long", "joint", "--num-frames", "x"], "--num-frames x"),
        (["photo.png", "--width", "33"], "width is 33"),
    ],
)
def test_a_wrong_flag_is_one_sentence(arguments, message, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo().save("photo.png")
    assert main([arguments[0], "it moves", *arguments[1:], "-m", str(tiny_model), "-o", "out.mp4"]) == 2
    assert message in capsys.readouterr().err and not Path("out.mp4").exists()


def test_flags_of_shape_sampler_and_motion_reach_the_pipeline(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo().save("photo.png")
    flags = ["--fit", "keep", "--sampler", "unipc", "--motion", "0", "--num-frames", "70", "--long", "chunks"]
    assert main(["photo.png", "it moves", *flags, "-m", str(tiny_model), "-o", "frames"]) == 0
    frames = sorted(Path("frames").iterdir())
    with Image.open(frames[0]) as first, Image.open(frames[69]) as last:
        assert len(frames) == 70 and first.size == (40, 24)
        assert np.array_equal(np.asarray(first), np.asarray(last))
