"""Other methods' videos, found in every form, read frame by frame, never silently fewer; and all extractors at once."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flows.cli.app import parse
from infra import storage
from tasks.evaluate.job import evaluate
from tasks.evaluate.protocol.baselines import (
    Method,
    find_method,
    missing_of,
    parse_methods,
    without_missing,
)
from tasks.evaluate.protocol.presets import load_preset
from tasks.evaluate.protocol.protocol import Item, Protocol, held_out_protocol
from tasks.evaluate.spec import EvaluateSpec
from tasks.ingest.drawing import draw_clip
from tasks.metrics.extractors.extractor import NOT_COMPARABLE
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.records import UserError
from tasks.shards import Sample, ShardDataset, publish_dataset, sample_key, write_shard
from tasks.video.clip_files import read_frames
from tasks.video.decode import ClipError
from tests.metrics.test_video_extractors import StandInI3D
from trip_model.images import write_video

FRAMES, SIZE = 16, 32
ITEMS = tuple(Item(f"clip{i}_000", f"clip{i}", i, "a shape", i) for i in range(7))
PROTOCOL = Protocol("folder", load_preset("folder"), ITEMS, FRAMES, 4.0, SIZE)


def clip(seed: int, frames: int = FRAMES, size: int = SIZE) -> np.ndarray:
    return draw_clip(seed, size)[0][::3][:frames]


def test_a_video_is_found_in_every_form_and_read_frame_by_frame(tmp_path: Path) -> None:
    np.savez(tmp_path / "clip0_000.npz", frames=clip(0))
    write_video(tmp_path / "clip1_000", clip(1), 4.0)
    for name, fps in (("clip2_000.mp4", 4.0), ("clip3.mp4", 24.0), ("clip4.gif", 10.0)):
        write_video(tmp_path / name, clip(int(name[4]), frames=20), fps)
    np.savez(tmp_path / "clip5.npz", clip(5, size=2 * SIZE))
    found = find_method("Other", str(tmp_path), ITEMS)
    assert missing_of([found], ITEMS) == {"clip6_000": "missing"}
    for item in ITEMS[:6]:
        pixels = read_frames(found.files[item.key], FRAMES, SIZE)
        assert pixels.shape == (FRAMES, SIZE, SIZE, 3) and pixels.dtype == np.uint8
        # Lossless where the file is, near where a codec or a resize lies between; and no frame twice or left out.
        least = 0 if item.index < 2 else 16
        assert abs(pixels.astype(int) - clip(item.index)).mean(axis=(1, 2, 3)).max() <= least, item.key

    before = found.identity
    write_video(tmp_path / "clip4.gif", clip(3), 10.0)
    assert find_method("Other", str(tmp_path), ITEMS).identity != before
    # Of a clip with two windows the clip's name says too little.
    two = [*ITEMS, Item("clip3_001", "clip3", 7, "a shape", 7)]
    assert set(missing_of([find_method("Other", str(tmp_path), two)], two)) == {"clip3_000", "clip3_001", "clip6_000"}


def gray_frames(folder: Path, names: dict[str, int]) -> Method:
    """A method whose clip0 has frames of these names, each of one gray value; and what else lies in such folders."""
    (folder / "clip0").mkdir(parents=True)
    for name, value in names.items():
        Image.new("L", (SIZE, SIZE), value).save(folder / "clip0" / name)
    for hidden in ("._0.png", ".DS_Store", "Thumbs.db"):
        (folder / "clip0" / hidden).write_bytes(b"no picture")
    return find_method("Other", str(folder), ITEMS)


NAMES = {
    "plain numbers": [f"{i}.png" for i in range(25)],
    "from one, and a word": [f"frame_{i}.png" for i in range(1, 26)],
    "padded, too little": [f"{i:02d}.png" for i in range(95, 120)],
    "capitals and other kinds": [f"{i}.{('PNG', 'jpg', 'webp', 'bmp', 'TIFF')[i % 5]}" for i in range(25)],
    "a number that stays": [f"seed7-{i}-of-25.png" for i in range(25)],
    "a number that grows beside": [f"{i}_at_{i * 40}ms.png" for i in range(25)],
    "every fourth": [f"{4 * i}.png" for i in range(25)],
    "second and frame": [f"{i // 10:02d}_{i % 10:02d}.png" for i in range(25)],
    "a dot within": [f"clip.v2.{i}.png" for i in range(25)],
}


@pytest.mark.parametrize("case", NAMES)
def test_frames_are_read_in_the_order_of_their_numbers(tmp_path: Path, case: str) -> None:
    values = {name: 10 * place for place, name in enumerate(NAMES[case])}
    method = gray_frames(tmp_path, values)
    assert len(method.files["clip0_000"]) == 25
    pixels = read_frames(method.files["clip0_000"], FRAMES, SIZE)
    assert np.abs(pixels.mean(axis=(1, 2, 3)) - [10 * place for place in range(FRAMES)]).max() < 3


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["0.png", "1.png", "3.png", "4.png"], "no number 2, which follows 1; add it"),
        (["1.png", "01.png", "2.png"], "share their numbers .*name them 000.png, 001.png"),
        (["1.png", "1.jpg", "2.png"], "share their numbers"),
        (["-1.png", "0.png", "1.png"], r"differ in more than a number \('-1.png', '0.png'\)"),
        (["a_0.png", "b_0.png"], "differ in more than a number"),
        (["first.png", "second.png"], "differ in more than a number"),
        (["0.5.png", "0.25.png", "1.5.png", "1.0.png"], "share their numbers"),  # a number, or a point in time?
    ],
)
def test_frames_whose_order_is_not_known_are_one_sentence(tmp_path: Path, names: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=f"the frames in {tmp_path}/clip0 .*{sentence}") as caught:
        gray_frames(tmp_path, dict.fromkeys(names, 0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["clip0.webm", "clip0.mov", "clip0.avi", "clip0.mkv", "clip0.MP4"])
def test_videos_of_other_containers_are_found(tmp_path: Path, name: str) -> None:
    codec = "libvpx" if name.endswith("webm") else "libx264"
    with av.open(str(tmp_path / name), "w", format="matroska" if name.endswith("mkv") else None) as container:
        stream = container.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for frame in clip(0):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    found = find_method("Other", str(tmp_path), ITEMS)
    assert np.abs(read_frames(found.files["clip0_000"], FRAMES, SIZE).astype(int) - clip(0)).mean() < 25


def test_a_video_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", clip(0, frames=7), 4.0)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "gray.npz", clip(0)[..., 0])
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    reasons = {"short.mp4": "too_short: .* has 7 frames, 16 are needed"}
    for name in ("short.mp4", "text.mp4", "bad.npz", "gray.npz", "objects.npz"):
        with pytest.raises(ClipError, match=reasons.get(name, "undecodable")):
            read_frames([str(tmp_path / name)], FRAMES, SIZE)


def test_what_is_missing_is_an_error_or_leaves_all_rows_and_is_counted() -> None:
    missing_items = {"A": {item.key: "missing" for item in ITEMS[:6]}, "B": {"clip6_000": "too_short"}, "C": {}}
    with pytest.raises(UserError) as caught:
        without_missing(PROTOCOL, missing_items)
    said = str(caught.value)
    assert "method A lacks 6 of 7 items: clip0_000 (missing), " in said and "clip4_000 (missing), ...;" in said
    assert (
        "clip5_000" not in said and "method B lacks 1 of 7 items: clip6_000 (too_short);" in said and "\n" not in said
    )
    forgiving = replace(PROTOCOL, rules=replace(PROTOCOL.rules, missing="exclude"))
    left, counts = without_missing(forgiving, {"A": {ITEMS[0].key: "missing"}, "B": missing_items["B"], "C": {}})
    assert left == ITEMS[1:6] and counts == {"A": {"missing": 1}, "B": {"too_short": 1}}
    with pytest.raises(UserError, match="no item of protocol folder is left"):
        without_missing(forgiving, missing_items)


def test_a_method_is_named_once_and_by_a_word(tmp_path: Path) -> None:
    assert parse_methods([f"T2V-Zero={tmp_path}", "VideoComposer=s3://b/v"]) == {
        "T2V-Zero": str(tmp_path),
        "VideoComposer": "s3://b/v",
    }
    for given in (["folder"], ["=folder"], ["A="], ["trip=a"], ["champion=a"], ["a/b=c"], ["A=a", "A=b"]):
        with pytest.raises(UserError, match=r"expected NAME=FOLDER|choose another"):
            parse_methods(given)
    flags = ["--method", "A=a", "--method", "B=b", "--protocol", "folder", "--extractors.i3d", "i3d.pt"]
    given = parse(["evaluate-trip", *flags])
    assert given["method"] == ["A=a", "B=b"] and given["extractors"] == ExtractorFiles(i3d="i3d.pt")


def drawn(folder: Path, clips: int) -> str:
    zeros, tokens = np.zeros((FRAMES, 4, SIZE // 8, SIZE // 8), np.float16), np.zeros(77, np.int32)
    rows = [
        [Sample(sample_key(f"clip{i}", 0), draw_clip(i, 8)[1], zeros, clip(i)[0], tokens, {}, clip(i))]
        for i in range(clips)
    ]
    shard = write_shard(str(folder), 0, (0, clips), rows, "hash")
    publish_dataset(str(folder), {"fps": 4.0, "size": SIZE}, "hash", {}, [shard.summary()])
    return str(folder)


def spec_for(model: Path, dataset: str, output: Path, **changes: Any) -> EvaluateSpec:
    spec = EvaluateSpec(
        str(model), dataset, str(output), held_out_fraction=1.0, bootstrap=100, examples=1, references=False
    )
    return replace(spec, **({"steps": 1, "workers": 0, "clips": 6, "batch": 3} | changes))


@pytest.mark.slow
def test_excluded_items_leave_all_rows_and_are_printed(tiny_model: Path, tmp_path: Path) -> None:
    data = drawn(tmp_path / "data", 6)
    keys = [item.key for item in held_out_protocol(ShardDataset(data), 1.0, 6, 0).items]
    for key in keys[1:]:  # the first is missing, the last too short
        write_video(tmp_path / "other" / f"{key}.gif", clip(0, frames=9 if key == keys[-1] else FRAMES), 4.0)
    spec = spec_for(tiny_model, data, tmp_path / "out", methods={"Other": str(tmp_path / "other")})
    with pytest.raises(UserError, match=rf"Other lacks 1 of 6 items: {keys[0]} \(missing\); make them"):
        evaluate(spec, lambda line: None)
    (tmp_path / "other" / f"{keys[0]}.gif").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=rf"lacks 2 of 6 items: {keys[0]} \(undecodable\), {keys[-1]} \(too_short\)"):
        evaluate(spec, lambda line: None)
    assert not (tmp_path / "out" / "generations").exists()  # told before any clip was animated

    (tmp_path / "own.toml").write_text('title = "Own"\nnumber = "asked"\nmissing = "exclude"\n')
    lines: list[str] = []
    report = evaluate(replace(spec, protocol=str(tmp_path / "own.toml")), lines.append)
    content = storage.read_json(storage.join(report.uri, "report.json"))
    assert content["counts"]["excluded"] == {"Other": {"too_short": 1, "undecodable": 1}}
    assert (content["counts"]["asked"], report.items, report.clips) == (6, 4, 4)
    told = "left out of 6 items, in all rows: 1 that Other lacks (too_short)"
    assert told in content["notes"] and any(told in line for line in lines)
    assert "FVD" not in "".join(content["rows"]["trip"]) and set(content["rows"]) == {"frozen", "Other", "trip", "real"}


@pytest.mark.slow
def test_from_files_of_judges_to_the_table(tiny_model: Path, tmp_path: Path) -> None:
    """Stand-ins of the right signatures fill all columns, under no published name; another hash is refused."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
            return None

    i3d, inception = tmp_path / "i3d.pt", tmp_path / "inception.pth"
    torch.jit.script(StandInI3D()).save(str(i3d))
    torch.save({}, inception)
    torch.manual_seed(0)
    net = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception))
    torch.save(net.state_dict(), inception)
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (i3d, inception)}

    data = drawn(tmp_path / "data", 4)
    for i in range(4):
        write_video(tmp_path / "other" / f"clip{i}.mp4", clip(i)[::-1], 8.0)
    spec = spec_for(tiny_model, data, tmp_path / "out", clips=4, methods={"Other": str(tmp_path / "other")})
    for wrong in (None, "0" * 64):
        with pytest.raises(UserError, match=f"i3d.pt has sha256 {hashes[i3d]}"):
            evaluate(replace(spec, judges=ExtractorFiles(i3d=str(i3d), i3d_sha256=wrong)), lambda line: None)
    assert not (tmp_path / "out").exists()

    files = ExtractorFiles(
        i3d=str(i3d), i3d_sha256=hashes[i3d], inception=str(inception), inception_sha256=hashes[inception]
    )
    report = evaluate(replace(spec, judges=files), lambda line: None)
    fvd, fid = f"fvd-i3d@{hashes[i3d][:8]}", f"fid-inception@{hashes[inception][:8]}"
    kernels = {name.replace("f", "k", 1) for name in (fvd, fid)}
    for row in ("frozen", "trip", "Other"):
        assert {fvd, fid, f"{fid}/with_given_frame", *kernels} <= set(report.metrics[row])
    content = storage.read_json(storage.join(report.uri, "report.json"))
    assert {fvd, fid, *kernels} <= set(content["floors"])
    assert {fvd, fid} <= set(content["differences"]["Other"])
    table = storage.read_bytes(storage.join(report.uri, "report.md")).decode()
    assert f"| {fvd} (lower) |" in table and f"<br>{fvd}, {NOT_COMPARABLE}" in table and "| Other |" in table


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill_with_identical_numbers(
    tiny_base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from tests.flows.test_reproduce import TINY, environment, only

    data = drawn(tmp_path / "data", 6)
    for i in range(6):
        write_video(tmp_path / "other" / f"clip{i}.mp4", clip(i)[::-1], 8.0)

    def command(root: Path) -> list[str]:
        flags = ["--model", str(tiny_model), "--held-out", data, "--method", f"Other={tmp_path / 'other'}"]
        start = [sys.executable, str(TINY), str(tiny_base), "evaluate-trip", "--recipe", "tiny"]
        return [*start, "--root", str(root), *flags]

    def rows(root: Path) -> Any:
        return storage.read_json(str(only(root / "evaluate") / "report.json"))["rows"]

    def run(root: Path) -> None:
        done = subprocess.run(command(root), capture_output=True, text=True, timeout=600, env=environment())
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(command(killed), env=environment(), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not list(killed.glob("evaluate/*/generations/*/*.npz")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not list(killed.glob("evaluate/*/report.json"))
    judged = {path: path.stat().st_mtime_ns for path in killed.glob("evaluate/*/features/*/*.npz")}
    assert judged, "the other method's clips are judged before any is animated"
    run(killed)
    assert {path: path.stat().st_mtime_ns for path in judged} == judged
    run(whole)
    assert rows(killed) == rows(whole) and set(rows(whole)) == {
        *("frozen", "closed_form", "Other", "trip", "best_of_k", "round_trip", "real"),
    }
