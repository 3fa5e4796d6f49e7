"""Tiny pipelines of diffusers, of the classes of other methods: random weights, a few thousand parameters each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.conftest import DEMO_BASE, TINY_UNET

SIDE = 32  # pixels of the frames that they make


def build(method: str, folder: Path) -> Path:
    """Writes the tiny pipeline of a method of `ADAPTERS` to a folder."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    BUILDERS[method](folder / "parts").save_pretrained(folder / "model")
    torch.set_rng_state(state)
    return folder / "model"


def _clip_text(parts: Path) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    shutil.copytree(DEMO_BASE / "tokenizer", parts / "tokenizer")
    vocabulary = len(json.loads((parts / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    config = CLIPTextConfig(
        vocab_size=vocabulary + 2,
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return {
        "text_encoder": CLIPTextModel(config),
        "tokenizer": CLIPTokenizer.from_pretrained(parts / "tokenizer", model_max_length=32),
    }


def _t5_text() -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(letter, -2.0) for letter in ["\u2581", *letters, *(f"\u2581{letter}" for letter in letters)]]
    config = T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, is_encoder_decoder=False)
    return {
        "text_encoder": T5EncoderModel(config),
        "tokenizer": T5Tokenizer(vocab=[*special, *words], extra_ids=0, model_max_length=32),
    }


def _clip_vision(projection: bool = True) -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=56,
    )
    model = CLIPVisionModelWithProjection(config) if projection else CLIPVisionModel(config)
    return {"image_encoder": model, "feature_extractor": CLIPImageProcessor()}


def _image_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIDE,
    )


def _svd(_: Path) -> Any:
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )

    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=4,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
        num_frames=14,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=SIDE,
    )
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1)
    return StableVideoDiffusionPipeline(unet=unet, vae=vae, scheduler=scheduler, **_clip_vision())


def _i2vgen_xl(parts: Path) -> Any:
    from diffusers import DDIMScheduler, I2VGenXLPipeline, I2VGenXLUNet

    unet = I2VGenXLUNet(
        block_out_channels=(16, 16),
        layers_per_block=1,
        sample_size=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        num_attention_heads=None,
        norm_num_groups=2,
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    return I2VGenXLPipeline(unet=unet, vae=_image_vae(), scheduler=scheduler, **_clip_text(parts), **_clip_vision())


def _modelscope(parts: Path) -> Any:
    from diffusers import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel

    unet = UNet3DConditionModel(**TINY_UNET)
    return TextToVideoSDPipeline(
        unet=unet, vae=_image_vae(), scheduler=DDIMScheduler(clip_sample=False), **_clip_text(parts)
    )


def _text_to_video_zero(parts: Path) -> Any:
    from diffusers import DDIMScheduler, TextToVideoZeroPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        **TINY_UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
    )
    return TextToVideoZeroPipeline(
        unet=unet,
        vae=_image_vae(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **_clip_text(parts),
    )


def _cogvideox(_: Path) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=17,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=32,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return CogVideoXImageToVideoPipeline(
        transformer=transformer, vae=vae, scheduler=CogVideoXDDIMScheduler(), **_t5_text()
    )


def _wan(_: Path) -> Any:
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanImageToVideoPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=16,
        freq_dim=64,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        image_dim=16,
    )
    text = _t5_text()
    config = UMT5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vision = _clip_vision(projection=False)
    return WanImageToVideoPipeline(
        tokenizer=text["tokenizer"],
        text_encoder=UMT5EncoderModel(config),
        transformer=transformer,
        transformer_2=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_encoder=vision["image_encoder"],
        image_processor=vision["feature_extractor"],
    )


def _ltx(_: Path) -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXImageToVideoPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=16,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return LTXImageToVideoPipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **_t5_text()
    )


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "svd": _svd,
    "i2vgen-xl": _i2vgen_xl,
    "modelscope": _modelscope,
    "text-to-video-zero": _text_to_video_zero,
    "cogvideox-i2v": _cogvideox,
    "wan-i2v": _wan,
    "ltx-i2v": _ltx,
}
