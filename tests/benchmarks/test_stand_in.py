"""The stand-in for the VAE that the comparisons of prepare use: it takes the place of the VAE in the encoder."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.peers.stand_in import StandIn, install
from flows.recipes import DEMO_BASE, demo
from tasks.encode.encoder import ClipEncoder
from trip_model import encoders


def test_an_encoder_computes_with_the_stand_in_and_a_page_can_still_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "load_vae", encoders.load_vae)
    install()
    vae = encoders.load_vae(DEMO_BASE)
    assert isinstance(vae, StandIn)
    assert encoders.decode_latents(vae, encoders.encode_pixels(vae, np.zeros((1, 64, 64, 3), np.uint8))).shape[1] == 64
    assert isinstance(ClipEncoder(DEMO_BASE, demo().prepare)._vae, StandIn)
