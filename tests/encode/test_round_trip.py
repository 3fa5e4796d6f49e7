"""What comes back: the same data set from every store, and the frames that the VAE gives without a store between."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra import storage
from infra.settings import CHECKOUT
from tasks.curate.verify import problems
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareSpec
from tasks.ingest.demo import write_demo_corpus
from tasks.ingest.spec import SourceSpec
from tasks.shards import ShardDataset, report_addresses
from trip_model.encoders import decode_latents, encode_pixels, load_vae

DEMO_BASE = CHECKOUT / "examples" / "demo_base" / "weights"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_demo_corpus(tmp_path_factory.mktemp("corpus"), clips=5, size=32))


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "s3":
        yield request.getfixturevalue("s3_folder")
        return
    folder = f"memory://{uuid.uuid4().hex}"
    yield folder
    storage.delete(folder)


def contents(folder: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_dir(folder)}


def test_a_data_set_has_the_same_bytes_in_every_store(
    tiny_base: Path, corpus: Path, store: str, tmp_path: Path
) -> None:
    here = PrepareSpec(
        SourceSpec(str(corpus)), str(tmp_path / "set"), str(tiny_base), size=32, clips_per_shard=2, workers=0
    )
    prepare(here)
    for path in corpus.parent.rglob("*.*"):
        storage.upload_file(path, storage.join(store, "corpus", path.relative_to(corpus.parent).as_posix()))
    table = storage.join(store, "corpus", corpus.name)
    there = replace(here, source=SourceSpec(table), output=storage.join(store, "set"))
    report = prepare(there)
    assert contents(report.dataset) == contents(here.output) and len(contents(report.dataset)) == 9
    assert list(problems(report.dataset)) == []
    assert all(storage.exists(address) for address in report_addresses(report.dataset).values())
    assert prepare(there).shards_reused == 3
    data, local = ShardDataset(report.dataset), ShardDataset(here.output)
    for place in range(len(local)):
        np.testing.assert_array_equal(data.read(place)["latents"], local.read(place)["latents"])


def test_stored_latents_of_real_clips_decode_to_the_frames_that_the_vae_gives_directly(
    real_clips: Path, tmp_path: Path
) -> None:
    spec = PrepareSpec(
        SourceSpec(str(real_clips)), str(tmp_path / "set"), str(DEMO_BASE), size=64, keep_pixels=True, workers=0
    )
    data = ShardDataset(prepare(spec).dataset)
    vae: Any = load_vae(DEMO_BASE)
    scale = vae.config.scaling_factor
    assert len(data) == 5
    for place in range(len(data)):
        sample = data.read(place, ("latents", "pixels"))
        direct = encode_pixels(vae, sample["pixels"])
        stored = torch.from_numpy(sample["latents"].astype(np.float32))
        # fp16 keeps 11 bits: half a unit of the last of them is 2^-11 of a value, and a call of the VAE rounds as well.
        torch.testing.assert_close(stored, direct, rtol=2**-11, atol=1e-4)
        want = decode_latents(vae, direct * scale).astype(int)
        error = np.abs(decode_latents(vae, stored * scale) - want)
        # A rounding of 2^-11 moves a pixel by less than a level, so by one at most where it lay between two.
        assert error.max() <= 1 and error.mean() < 0.05
