"""The 3D-UNet against diffusers' `UNet3DConditionModel`: outputs, gradients, folders, size and FLOPs."""

from __future__ import annotations

import filecmp
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet3DConditionModel
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from trip_model import unet_blocks
from trip_model.config import FusionConfig, TripConfig
from trip_model.folders import BaseFolderError
from trip_model.model import Trip
from trip_model.unet import DeepFeatures, UNet3D, UNetConfig, load_unet, save_unet, set_dropout
from trip_model.unet_blocks import ResnetBlock

SMALL = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
    up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    cross_attention_dim=16,
    attention_head_dim=8,
    norm_num_groups=8,
)


def diffusers_unet(config: UNetConfig, seed: int = 0) -> UNet3DConditionModel:
    """Returns diffusers' network with noise on every parameter; new temporal convolutions end in zeros."""
    torch.manual_seed(seed)
    theirs = UNet3DConditionModel(**{k: v for k, v in json.loads(config.to_json()).items() if not k.startswith("_")})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return theirs


def ours_with(theirs: UNet3DConditionModel, config: UNetConfig) -> UNet3D:
    ours = UNet3D(config)
    ours.load_state_dict(theirs.state_dict())
    return ours


def batch(side: int = 8, frames: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x [2, 4, F, side, side + 1], t, text [2, 7, 16]); no side is divisible by 4, as in some real videos."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, frames, side, side + 1, generator=generator)
    return x, torch.tensor([3, 700]), torch.randn(2, 7, 16, generator=generator)


def gradients(unet: torch.nn.Module, output: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    return list(torch.autograd.grad((output * weights).sum(), list(unet.parameters())))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the relative difference."""
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_output_and_every_gradient_equal_those_of_diffusers(mode: str, recompute: bool) -> None:
    theirs = diffusers_unet(SMALL).train(mode == "train")
    set_dropout(theirs, 0.0)
    ours = ours_with(theirs, SMALL).train(mode == "train")
    set_dropout(ours, 0.0)
    ours.recompute_activations = recompute
    x, t, text = batch()
    # In double precision both agree to 1e-12: the difference in single precision is rounding.
    for kind, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        theirs.to(kind), ours.to(kind)
        expected, actual = theirs(x.to(kind), t, text.to(kind)).sample, ours(x.to(kind), t, text.to(kind))
        assert relative_error(actual, expected) < limit
        pairs = zip(gradients(ours, actual), gradients(theirs, expected), strict=True)
        assert max(relative_error(a, b) for a, b in pairs) < limit


def test_fused_kernels_in_parts_give_the_numbers_of_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 12, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    plain = unet_blocks.attend(q, k, v)
    monkeypatch.setattr(unet_blocks, "SHORT", 0)
    torch.testing.assert_close(unet_blocks.attend(q, k, v), plain)
    monkeypatch.setattr(unet_blocks, "MAX_HEADS", 5)
    torch.testing.assert_close(unet_blocks.attend(q, k, v), plain)


def test_deep_features_are_reused_and_only_two_levels_run_again() -> None:
    unet = ours_with(diffusers_unet(SMALL), SMALL).eval()
    x, t, text = batch()
    calls: list[str] = []
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    deep = DeepFeatures()
    with torch.no_grad():
        plain = unet(x, t, text)
        assert torch.equal(unet(x, t, text, deep), plain)
        calls.clear()
        assert torch.equal(unet(x, t, text, deep), plain)  # the same input has the same deep features
        other = unet(x + 1, t, text, deep)
    blocks = {".".join(name.split(".")[:2]) for name in calls}
    assert blocks == {"down_blocks.0", f"up_blocks.{len(SMALL.up_block_types) - 1}"}
    assert not torch.equal(other, plain)


@pytest.mark.parametrize("first_level", ["DownBlock3D", "CrossAttnDownBlock3D"])
def test_several_texts_of_a_sample_equal_samples_with_one_text_each(first_level: str) -> None:
    last_level = first_level.replace("Down", "Up")
    config = replace(
        SMALL,
        down_block_types=(first_level, *SMALL.down_block_types[1:]),
        up_block_types=("CrossAttnUpBlock3D", last_level),
    )
    theirs = diffusers_unet(config).double().eval()
    ours = ours_with(theirs, config).double().eval()
    x, t, text = (value.double() if value.is_floating_point() else value for value in batch())
    texts = torch.cat([text, text.flip(0), torch.zeros_like(text)])
    repeated = theirs(x.repeat(3, 1, 1, 1, 1), t.repeat(3), texts, return_dict=False)[0]
    with FlopCounterMode(display=False) as shared_flops:
        shared = ours(x, t, texts)
    assert relative_error(shared, repeated) < 1e-12
    for one, other in zip(gradients(ours, shared), gradients(theirs, repeated), strict=True):
        assert relative_error(one, other) < 1e-12
    with FlopCounterMode(display=False) as flops:
        ours(x.repeat(3, 1, 1, 1, 1), t.repeat(3), texts)
    assert shared_flops.get_total_flops() < 0.9 * flops.get_total_flops()

    deep = DeepFeatures()
    ours(x, t, texts, deep)
    assert relative_error(ours(x, t, texts, deep), repeated) < 1e-12


def test_an_unequal_number_of_texts_is_rejected() -> None:
    x, t, text = batch()
    with pytest.raises(ValueError, match="3 texts for 2 samples"):
        UNet3D(SMALL)(x, t, torch.cat([text, text[:1]]))


def test_recomputation_draws_the_same_dropout_and_stores_less() -> None:
    unet = ours_with(diffusers_unet(SMALL), SMALL).train()
    x, t, text = batch()

    def run(recompute: bool) -> tuple[int, list[torch.Tensor]]:
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        unet.recompute_activations = recompute
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = unet(x, t, text)
        weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
        size = sum(size for address, size in kept.items() if address not in weights)
        return size, [output, *gradients(unet, output)]

    size, values = run(False)
    size_recomputed, values_recomputed = run(True)
    assert all(torch.equal(a, b) for a, b in zip(values, values_recomputed, strict=True))
    assert size_recomputed < 0.1 * size
    torch.manual_seed(4)
    assert not torch.equal(unet(x, t, text), values[0])  # the dropout of the temporal convolutions is on
    set_dropout(unet, 0.0)
    assert torch.equal(unet(x, t, text), unet.eval()(x, t, text))


def test_a_time_step_for_each_frame_is_the_shared_one_when_all_are_equal() -> None:
    unet = ours_with(diffusers_unet(SMALL), SMALL).eval()
    x, t, text = batch()
    shared = unet(x, t, text)
    by_frame = t[:, None].repeat(1, x.shape[2])
    assert relative_error(unet(x, by_frame, text), shared) < 1e-5
    by_frame[:, 0] = 0
    assert relative_error(unet(x, by_frame, text), shared) > 1e-3


class ByFrame(torch.Tensor):
    """Time embeddings by frame: diffusers would repeat the embedding of a clip over its frames."""

    def repeat_interleave(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_a_different_time_step_for_each_frame_is_diffusers_network_with_these_embeddings() -> None:
    theirs = diffusers_unet(SMALL).eval()
    ours = ours_with(theirs, SMALL).eval()
    x, _, text = batch(frames=6)
    t_BF = torch.tensor([[0, 3, 40, 200, 701, 999], [999, 500, 0, 1, 2, 3]])
    with torch.no_grad():
        actual = ours(x, t_BF, text)
        embeddings = theirs.time_embedding(theirs.time_proj(t_BF.flatten())).as_subclass(ByFrame)
        theirs.time_embedding.register_forward_hook(lambda *_: embeddings)
        assert relative_error(actual, theirs(x, t_BF[:, 0], text).sample) < 1e-5
        assert relative_error(ours(x, t_BF.flip(1), text), actual) > 1e-3


@pytest.mark.parametrize(("condition", "place"), [("head", 0), ("tail", -1)])
def test_the_clean_frame_can_have_time_step_zero(tiny_base: Path, condition: Any, place: int) -> None:
    config = TripConfig(size=32, fusion=FusionConfig(width=16, heads=2), condition=condition)
    time_steps: list[torch.Tensor] = []

    def predict(clean_frame_timestep: Any) -> torch.Tensor:
        trip = Trip.from_base(tiny_base, replace(config, clean_frame_timestep=clean_frame_timestep)).eval()
        trip.unet.register_forward_pre_hook(lambda _, args: time_steps.append(args[1]))
        z_t = torch.randn(2, 4, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        return trip(z_t, z_t[:, :, :1], torch.tensor([10, 700]), torch.zeros(2, 32, 16))

    shared, zero = predict("shared"), predict("zero")
    assert time_steps[0].tolist() == [10, 700]
    assert time_steps[1][:, place].tolist() == [0, 0] and sorted(set(time_steps[1].flatten().tolist())) == [0, 10, 700]
    assert time_steps[1].shape == (2, 17) and not torch.equal(shared, zero)
    with pytest.raises(ValueError, match="clean_frame_timestep"):
        replace(config, condition="channel", clean_frame_timestep="zero")


@pytest.mark.parametrize("shard", ["10GB", "500KB"], ids=["one file", "shards"])
def test_folders_go_to_diffusers_and_back_unchanged(tmp_path: Path, shard: str) -> None:
    theirs = diffusers_unet(replace(SMALL, sample_size=8))
    theirs.save_pretrained(tmp_path / "theirs" / "unet", max_shard_size=shard)
    assert (tmp_path / "theirs/unet/diffusion_pytorch_model.safetensors.index.json").is_file() == (shard == "500KB")
    ours = load_unet(tmp_path / "theirs")
    save_unet(ours, tmp_path / "ours" / "unet")
    assert filecmp.cmp(tmp_path / "theirs/unet/config.json", tmp_path / "ours/unet/config.json", shallow=False)
    again = UNet3DConditionModel.from_pretrained(tmp_path / "ours" / "unet", low_cpu_mem_usage=False)
    states = [theirs.state_dict(), ours.state_dict(), again.state_dict()]
    assert list(states[0]) == list(states[1])  # in this order the optimiser numbers its state
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())


def test_an_invalid_unet_folder_is_rejected_in_one_sentence(tmp_path: Path) -> None:
    save_unet(UNet3D(SMALL), tmp_path / "unet")
    file = tmp_path / "unet" / "config.json"
    good = json.loads(file.read_text())
    bad = {
        "block type 'DownBlockMotion', expected one of CrossAttnDownBlock3D": {
            "down_block_types": ["DownBlockMotion", "CrossAttnDownBlock3D"]
        },
        "act_fn 'gelu', expected 'silu'": {"act_fn": "gelu"},
        "unknown settings class_embed_type": {"class_embed_type": "timestep"},
        "size mismatch": {"cross_attention_dim": 8},
        "Missing key": {"layers_per_block": 3},
    }
    for message, change in bad.items():
        file.write_text(json.dumps(good | change))
        with pytest.raises(BaseFolderError, match=message) as caught:
            load_unet(tmp_path)
        assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "unet")
    with pytest.raises(BaseFolderError, match="cannot be loaded"):
        load_unet(tmp_path)


def test_full_size_has_the_known_parameters_and_diffusers_flops_without_repeated_text() -> None:
    with torch.device("meta"):
        theirs, ours = UNet3DConditionModel(), UNet3D(UNetConfig())
        x, t, text = torch.empty(1, 4, 17, 32, 32), torch.zeros(1, dtype=torch.long), torch.empty(1, 77, 1024)
    shapes = [{name: tensor.shape for name, tensor in unet.state_dict().items()} for unet in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == 1411.2

    def flops(unet: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            unet(x, t, text)
        return counter.get_total_flops()

    assert round(flops(theirs) / 1e12, 3) == 5.193
    text_weights = [
        p for n, p in ours.named_parameters() if ".attentions." in n and n.endswith(("2.to_k.weight", "2.to_v.weight"))
    ]
    repeated = 16 * sum(2 * 77 * weight.numel() for weight in text_weights)
    assert flops(theirs) - flops(ours) == repeated


@pytest.mark.slow
def test_a_full_size_folder_loads_saves_and_loads_again_equal(tmp_path: Path) -> None:
    needed = 12 * 2**30
    if shutil.disk_usage(tmp_path).free < 2 * needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of disk and some to spare")
    with torch.device("meta"):
        unet = UNet3D(UNetConfig())
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.uniform_(-1, 1)
    try:
        save_unet(unet, tmp_path / "first" / "unet")
        del unet
        loaded = load_unet(tmp_path / "first")
        save_unet(loaded, tmp_path / "second" / "unet")
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            assert filecmp.cmp(tmp_path / "first/unet" / name, tmp_path / "second/unet" / name, shallow=False)
        del loaded
        again = load_unet(tmp_path / "second")
        with safe_open(tmp_path / "first/unet/diffusion_pytorch_model.safetensors", "pt") as tensors:
            assert set(tensors.keys()) == set(again.state_dict())
            assert all(torch.equal(tensor, tensors.get_tensor(name)) for name, tensor in again.state_dict().items())
    finally:
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
        shutil.rmtree(tmp_path / "second", ignore_errors=True)
