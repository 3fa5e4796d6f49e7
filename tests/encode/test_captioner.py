"""A captioner of a recipe writes the captions of samples; one that fails ends the stage with one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.curate.verify import problems
from tasks.encode.fingerprint import check_spec, fingerprint_of
from tasks.encode.hooks import load_captioner
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareSpec
from tasks.ingest.sources import MAX_CAPTION
from tasks.ingest.spec import SourceSpec
from tasks.records import UserError
from tasks.shards import ShardDataset
from trip_model.encoders import load_text_encoder
from trip_model.images import video_bytes

CAPTIONERS = "tests.support.captioners"
FRAMES = np.full((4, 8, 8, 3), 90, np.uint8)


@pytest.fixture
def spec(tiny_base: Path, tmp_path: Path) -> PrepareSpec:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, level in (("a", 40), ("b", 200)):
        (folder / f"{name}.mp4").write_bytes(video_bytes(np.full((8, 32, 32, 3), level, np.uint8), 4.0))
        (folder / f"{name}.txt").write_text(f"clip {name}")
    sizes: dict[str, Any] = {"num_frames": 4, "size": 32, "windows_per_clip": 2, "workers": 0}
    return PrepareSpec(SourceSpec(str(folder)), str(tmp_path / "data"), str(tiny_base), **sizes)


def test_the_captions_of_a_captioner_are_stored_next_to_those_of_the_source(spec: PrepareSpec, tmp_path: Path) -> None:
    plain = prepare(replace(spec, output=str(tmp_path / "plain"), keep_pixels=True))
    named = replace(spec, captioner=f"{CAPTIONERS}:brightness", keep_pixels=True, keep_text=True)
    report = prepare(named)
    assert (report.encoded, report.failed, report.samples) == (2, {}, 4) and list(problems(report.dataset)) == []
    before, after = ShardDataset(plain.dataset), ShardDataset(report.dataset)
    text = load_text_encoder(spec.base)
    for place, key in enumerate(after.keys):
        old, new = (data.read(place, ("caption", "meta", "pixels", "tokens")) for data in (before, after))
        first = before.read(before.keys.index(f"{key[:-4]}_000"), ("pixels",))["pixels"]  # the clip's first window
        caption = f"clip {key[0]}, 4 frames of brightness {first.mean():.0f}"
        assert old["caption"] == f"clip {key[0]}" and new["caption"] == caption
        assert new["meta"]["source_caption"] == old["caption"] and "source_caption" not in old["meta"]
        np.testing.assert_array_equal(new["tokens"], text.tokenize([caption])[0].numpy())
        np.testing.assert_array_equal(new["pixels"], old["pixels"])
    assert fingerprint_of(named)["captioner"] == named.captioner and "captioner" not in before.published.recipe


def test_an_edited_caption_goes_through_the_captioner_again(spec: PrepareSpec) -> None:
    named = replace(spec, captioner=f"{CAPTIONERS}:brightness")
    prepare(named)
    (Path(spec.source.table) / "a.txt").write_text("another text")
    report = prepare(named)
    data = ShardDataset(report.dataset)
    captions = {data.read(place, ("caption",))["caption"].partition(", ")[0] for place in range(len(data.keys))}
    assert captions == {"another text", "clip b"}


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("fails", r"captioner tests\S+:fails failed \(RuntimeError: no weights\); fix it or disable it"),
        ("returns_nothing", f"returned NoneType, expected a text of 1 to {MAX_CAPTION} characters; fix it"),
        ("returns_spaces", "returned 2 characters, expected a text of 1 to"),
        ("returns_much", "returned 100001 characters, expected a text of 1 to"),
    ],
)
def test_a_captioner_that_fails_is_one_sentence(function: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_captioner(f"{CAPTIONERS}:{function}")(FRAMES, "a clip")


def test_a_failure_of_the_captioner_ends_the_stage(spec: PrepareSpec) -> None:
    with pytest.raises(UserError, match="no weights"):
        prepare(replace(spec, captioner=f"{CAPTIONERS}:fails"))


def test_a_caption_that_utf8_cannot_hold_is_repaired() -> None:
    assert load_captioner(f"{CAPTIONERS}:returns_half_a_pair")(FRAMES, "") == "a dog ?"


@pytest.mark.parametrize("name", [f"{CAPTIONERS}:missing", "tests.support.missing:caption"])
def test_a_captioner_that_cannot_be_imported_is_named(name: str) -> None:
    with pytest.raises(UserError, match=r"captioner \S+ cannot be imported .*; install it on every worker"):
        load_captioner(name)


def test_a_name_that_is_no_function_is_refused() -> None:
    with pytest.raises(UserError, match="captioner 'import os', expected module:function"):
        check_spec(PrepareSpec(captioner="import os"))
