"""The shipped bases of the planned ablation: one for each target, with the demo's VAE."""

from __future__ import annotations

from pathlib import Path

import pytest

from trip_model.folders import folder_hash
from trip_model.model import base_unet_output

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("target", ["noise", "velocity"])
def test_each_target_has_a_base_with_the_vae_and_the_tokenizer_of_the_demo(target: str) -> None:
    base = EXAMPLES / "ablation_bases" / target
    assert base_unet_output(base) == target
    for part in ("vae", "tokenizer"):
        assert folder_hash(base, part) == folder_hash(EXAMPLES / "demo_base" / "weights", part)
