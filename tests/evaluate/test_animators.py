"""What animates: seeds of further samples, the closed form without a network, and the round trip through the VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flows.layout import Run
from flows.recipes import demo
from tasks.evaluate.animators import AnimatorSpec, load_animator, sample_seed
from tasks.evaluate.closed_form import ClosedForm
from tasks.evaluate.protocol.protocol import Item
from tasks.ingest.drawing import draw_clip
from tasks.ingest.spec import SourceSpec
from tasks.records import Artifact
from trip_model.config import TripConfig
from trip_model.encoders import decode_latents, encode_pixels, load_vae
from trip_model.pipeline import sample_latents

ITEMS = [Item("a_000", "a", 0, "a red circle", 7), Item("b_000", "b", 1, "a blue square", 7)]


def test_each_sample_of_each_item_has_a_seed_of_its_own_and_the_first_is_the_items() -> None:
    seeds = [[sample_seed(item, sample) for sample in range(3)] for item in ITEMS]
    assert seeds[0][0] == seeds[1][0] == 7
    assert len({seed for line in seeds for seed in line[1:]}) == 4
    assert all(0 <= seed < 2**31 for line in seeds for seed in line)
    assert seeds == [[sample_seed(item, sample) for sample in range(3)] for item in ITEMS]


def test_the_closed_form_samples_the_photo_under_noise_of_the_measured_deviation() -> None:
    """lambda* prior is exact for z_0^1 + s_i n, so DDIM returns draws of it; frame 1 is the photo itself."""
    std = (0.0, 0.3, 0.6, 1.2)
    model = ClosedForm(TripConfig(num_frames=4, residual_std=std))
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, 4, 1, 16, 16, generator=generator), torch.randn(2, 4, 4, 16, 16, generator=generator)
    text = torch.zeros(2, 1, 1)
    z = sample_latents(model, first, text, text[:1], noise, 200, 1.0)  # type: ignore[arg-type]
    residual = z - first
    assert residual[:, :, 0].abs().max() < 1e-3
    assert residual.std(dim=(0, 1, 3, 4))[1:].tolist() == pytest.approx(std[1:], rel=0.1)


def test_references_are_loaded_from_the_export_and_the_round_trip_is_the_vaes(tiny_model: Path) -> None:
    real = [draw_clip(i, 32)[0][::3][:4] for i in range(2)]

    def animated(spec: AnimatorSpec) -> np.ndarray:
        return load_animator(spec, str(tiny_model), 4, 2, None, "cpu").animate(real, ITEMS)

    vae = load_vae(tiny_model)
    factor = vae.config.scaling_factor  # type: ignore[union-attr]
    expected = decode_latents(vae, encode_pixels(vae, real[1]) * factor)
    np.testing.assert_array_equal(animated(AnimatorSpec("round_trip"))[1], expected)
    samples = [animated(AnimatorSpec("closed_form", sample)) for sample in (0, 1, 0)]
    assert samples[0].shape == (2, 4, 32, 32, 3) and (samples[0] == samples[2]).all()
    assert (samples[0] != samples[1]).any() and (samples[0] != animated(AnimatorSpec("model"))).any()


def test_only_the_drawn_corpus_declares_deterministic_motion(tmp_path: Path) -> None:
    model, data = Artifact(str(tmp_path / "m"), "m"), Artifact(str(tmp_path / "d"), "d")
    drawn, given = (Run(demo(), source, str(tmp_path)) for source in (None, SourceSpec("clips.csv")))
    assert drawn.evaluate(model, data).deterministic_motion
    assert not drawn.evaluate(model, data, foreign=True).deterministic_motion
    assert not given.evaluate(model, data).deterministic_motion
    plain = replace(demo(), evaluate=replace(demo().evaluate, deterministic_motion=False))
    # It changes the verdict, not the clips, so the address stays.
    assert replace(drawn, recipe=plain).evaluate(model, data).output == drawn.evaluate(model, data).output
