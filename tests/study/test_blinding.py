"""Nothing but the pictures tells the two sides of a pair apart: not names, sizes, headers, rates, order or time."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from math import sqrt
from pathlib import Path

import av
import numpy as np
import pytest
from fastapi.testclient import TestClient

from tasks.study.media import common_sizes, frame_sizes, padded
from tasks.study.plan import BUNDLE
from tasks.study.server import ServerLimits, create_app
from tasks.study.store import Store
from tests.support.studies import FRAMES, make_study, write_clips
from trip_model.images import video_bytes

PAIRS = 400
OPEN = ServerLimits(1e6, 1e6, 1e6, 1e6, 1e6, 1e6)


def clip(noise: float, frames: int = 8) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (1, 32, 32, 3)).repeat(frames, 0).astype(np.uint8) if noise == 0 else (
        rng.integers(0, 256, (frames, 32, 32, 3)).astype(np.uint8)
    )  # fmt: skip


def decoded(video: bytes) -> np.ndarray:
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_still_and_a_noisy_clip_become_files_that_differ_only_in_their_coded_pictures():
    videos = [video_bytes(clip(noise), 8) for noise in (0, 1)]
    sizes = [frame_sizes(video) for video in videos]
    common = common_sizes(sizes)
    still, noisy = (padded(video, common) for video in videos)
    assert len(still) == len(noisy) and frame_sizes(still) == frame_sizes(noisy) == common
    start, end = still.index(b"mdat") + 4, still.index(b"moov") - 4
    assert still[:start] == noisy[:start] and still[end:] == noisy[end:]
    for video, plain in zip((still, noisy), videos, strict=True):
        np.testing.assert_array_equal(decoded(video), decoded(plain))


@pytest.mark.parametrize("extra", range(48, 330))
def test_a_frame_is_padded_to_any_size(extra):
    video = video_bytes(clip(0, 2), 8)
    sizes = [size + extra for size in frame_sizes(video)]
    assert frame_sizes(padded(video, sizes)) == sizes


def features(name: str, content: bytes, headers: dict[str, str], seconds: float, path: Path) -> list[float]:
    """All that can be known of a clip without looking at it."""
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        rates = [container.bit_rate, stream.bit_rate or 0, container.size, container.duration or 0, stream.frames]
    stat = path.stat()
    digits = [int(digit, 16) for digit in name[:32]]
    return [
        *digits,
        *frame_sizes(content),
        *rates,
        len(headers),
        *(float(sum(value.encode())) for key, value in sorted(headers.items()) if key != "date"),
        seconds,
        stat.st_size,
        stat.st_mtime,
        stat.st_mode,
    ]


def accuracy(differences: np.ndarray, labels: np.ndarray) -> list[float]:
    """The share of sides that a linear and a tree classifier find, each pair predicted by models of the others."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    linear = pytest.importorskip("sklearn.linear_model")
    selection = pytest.importorskip("sklearn.model_selection")
    scaled = differences / np.maximum(np.abs(differences).max(axis=0), 1e-12)
    models = [linear.LogisticRegression(max_iter=2000), ensemble.RandomForestClassifier(200, random_state=0)]
    folds = selection.KFold(5, shuffle=True, random_state=0)
    return [float(selection.cross_val_score(model, scaled, labels, cv=folds).mean()) for model in models]


@pytest.mark.slow
def test_a_classifier_on_everything_but_the_pictures_stays_within_chance_over_400_pairs(tmp_path):
    plan, key = make_study(tmp_path, PAIRS // 4, ("a", "b", "c"), raters=2, per_rater=300, gold=100, repeats=0)
    sealed = {pair.name: pair for pair in key.pairs}
    bundle = tmp_path / "study" / BUNDLE
    store = Store(f"sqlite:///{tmp_path}/votes.db", plan)
    client = TestClient(create_app(replace(plan, seconds=0.0), store, bundle, OPEN))
    token = {"Authorization": f"Bearer {client.post('/api/raters', json={'consent': True}).json()['token']}"}
    differences, labels = [], []
    answers = dict.fromkeys((question.name for question in plan.questions), "left")
    order = {"real": 0, "a": 1, "b": 2, "c": 3, "shuffled": 4, "frozen": 5}
    while (pair := client.get("/api/next", headers=token).json()["pair"]) is not None:
        sides = []
        for side in ("left", "right"):
            name = f"{pair[side]}.mp4"
            start = time.perf_counter()
            answer = client.get(f"/media/{name}")
            sides.append(
                features(name, answer.content, answer.headers, time.perf_counter() - start, bundle / "media" / name)
            )
        body = {"pair": pair["name"], "answers": answers, "milliseconds": 1, "plays": 1, "device": "phone"}
        assert client.post("/api/votes", json=body, headers=token).status_code == 201
        kind = sealed[pair["name"]]
        swapped = next(p.swapped for p in plan.assignments[0] if plan.pairs[p.pair].name == pair["name"])
        left, right = (kind.second, kind.first) if swapped else (kind.first, kind.second)
        names = [int(digit, 16) for digit in pair["name"] + pair["photo"]]
        differences.append([*np.subtract(sides[0], sides[1]), *names, len(differences)])
        labels.append(order[left] < order[right])
    store.close()
    differences, labels = np.array(differences, dtype=np.float64), np.array(labels)
    assert len(labels) == PAIRS
    chance = 3.29 * sqrt(0.25 / PAIRS)  # 99.9 %
    found = accuracy(differences, labels)
    assert all(abs(value - 0.5) < chance for value in found), found
    # The same classifiers find the sides of the same clips as they were encoded, by their sizes alone.
    plain = []
    for pair in list(key.pairs)[:200]:
        if pair.kind == "study":
            both = [
                frame_sizes((tmp_path / name / f"{pair.item}.mp4").read_bytes()) for name in (pair.first, pair.second)
            ]
            plain.append((np.subtract(*both), order[pair.first] < order[pair.second], {pair.first, pair.second}))
    known = [(values, label) for values, label, systems in plain if "a" in systems]
    control = accuracy(np.array([values for values, _ in known]), np.array([label for _, label in known]))
    assert max(control) > 0.95, control


def test_sides_are_balanced_by_rater_and_by_pair(tmp_path):
    plan, key = make_study(tmp_path, 6, raters=2, gold=4, repeats=2)
    sealed = {pair.name: pair for pair in key.pairs}
    on_left: dict[str, list[str]] = {}
    for rater, places in enumerate(plan.assignments):
        systems = []
        for place in places:
            pair = sealed[plan.pairs[place.pair].name]
            left = pair.second if place.swapped else pair.first
            on_left.setdefault(pair.name, []).append(left)
            if pair.kind == "study":
                systems.append(left)
        assert abs(systems.count("ours") - systems.count("other")) <= 1, rater
        kinds = [sealed[plan.pairs[place.pair].name] for place in places]
        for repeat in (place for place, kind in zip(places, kinds, strict=True) if kind.kind == "repeat"):
            copy = sealed[plan.pairs[repeat.pair].name]
            original = next(
                place
                for place, kind in zip(places, kinds, strict=True)
                if kind.kind == "study" and kind.item == copy.item
            )
            assert places.index(original) < places.index(repeat)
            first = sealed[plan.pairs[original.pair].name]
            assert (first.second if original.swapped else first.first) != (
                copy.second if repeat.swapped else copy.first
            )
    for lefts in on_left.values():
        assert len(set(lefts)) == 2 and lefts.count(lefts[0]) == len(lefts) / 2
    media = [name for pair in plan.pairs for name in (pair.first, pair.second)]
    assert len(set(media)) == len(media) and plan.seconds == FRAMES / 20
    public = "".join(path.read_text() for path in (tmp_path / "study" / BUNDLE).glob("*.*"))
    assert not [word for word in ("ours", "other/", "shuffled", "frozen", "gold") if word in public]


def test_write_clips_makes_systems_of_different_sizes(tmp_path):
    """The control of the classifier: the same encoder gives a noisy clip more bytes."""
    write_clips(tmp_path, 1)
    assert (tmp_path / "other" / "item000.mp4").stat().st_size > (tmp_path / "ours" / "item000.mp4").stat().st_size
