"""Clips of other methods, made with pipelines of diffusers, as the evaluation reads them."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.cli.app import main
from infra import storage
from tasks.evaluate.baseline_pipelines import ADAPTERS, RECORD, BaselineSpec, canvas, make_baseline
from tasks.evaluate.job import evaluate
from tasks.evaluate.protocol.baselines import find_method, missing_of
from tasks.evaluate.protocol.protocol import Protocol, held_out_protocol
from tasks.evaluate.spec import EvaluateSpec
from tasks.ingest.drawing import draw_clip
from tasks.records import UserError
from tasks.shards import Sample, ShardDataset, publish_dataset, sample_key, write_shard
from tasks.video.clip_files import read_frames
from tests.support.baseline_pipelines import SIDE, build

FRAMES, SIZE = 6, 16
STEPS = {"num_inference_steps": 2}
# What the tiny ones need: their text encoders read 32 tokens.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "cogvideox-i2v": {"max_sequence_length": 32},
    "wan-i2v": {"max_sequence_length": 32},
    "ltx-i2v": {"max_sequence_length": 32},
    "text-to-video-zero": {"t0": 0, "t1": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ShardDataset:
    """Three drawn clips of 6 frames of 16x16 pixels."""
    folder = str(tmp_path_factory.mktemp("drawn") / "data")
    zeros, tokens = np.zeros((FRAMES, 4, SIZE // 8, SIZE // 8), np.float16), np.zeros(77, np.int32)
    rows = []
    for i in range(3):
        pixels, caption = draw_clip(i, SIZE)[0][::3][:FRAMES], draw_clip(i, 8)[1]
        rows.append([Sample(sample_key(f"clip{i}", 0), caption, zeros, pixels[0], tokens, {}, pixels)])
    shard = write_shard(folder, 0, (0, 3), rows, "hash")
    publish_dataset(folder, {"fps": 4.0, "size": SIZE}, "hash", {}, [shard.summary()])
    return ShardDataset(folder)


@pytest.fixture(scope="module")
def protocol(data: ShardDataset) -> Protocol:
    return held_out_protocol(data, 1.0, 3, 0)


@pytest.fixture(scope="module")
def tiny_svd(tmp_path_factory) -> Path:
    return build("svd", tmp_path_factory.mktemp("svd"))


def spec_for(method: str, model: Path, output: Path, **changes: Any) -> BaselineSpec:
    arguments = STEPS | ARGUMENTS.get(method, {})
    side = 64 if method in ("svd", "i2vgen-xl", "text-to-video-zero") else SIDE
    spec = BaselineSpec(method, str(model), str(output), side, side, arguments=arguments)
    return replace(spec, **changes)


def silent(_: str) -> None:
    pass


# Diffusers' text-to-video-zero calls both in an older way.
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning", "ignore:Default grid_sample:UserWarning")
@pytest.mark.parametrize("method", ADAPTERS)
def test_the_clips_of_a_method_are_complete_and_seeded(method: str, data, protocol, tmp_path: Path) -> None:
    model = build(method, tmp_path)
    first, again = (spec_for(method, model, tmp_path / name) for name in ("first", "again"))
    assert make_baseline(first, data, protocol, silent) == 3
    found = find_method(method, first.output, protocol.items)
    assert not missing_of([found], protocol.items)
    clips = [read_frames(found.files[item.key], FRAMES, SIZE) for item in protocol.items]
    assert all(clip.shape == (FRAMES, SIZE, SIZE, 3) and clip.std() > 0 for clip in clips)
    assert not np.array_equal(clips[0], clips[1]), "photo, prompt and seed differ"
    # An item's clip does not depend on those before it.
    make_baseline(replace(again, part=(2, 3)), data, protocol, silent)
    item = protocol.items[1]
    assert sorted(storage.list_dir(again.output)) == sorted([RECORD, f"{item.key}.npz"])
    assert np.array_equal(read_frames([storage.join(again.output, f"{item.key}.npz")], FRAMES, SIZE), clips[1])


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_names_arguments_that_its_class_has(method: str) -> None:
    import diffusers

    adapter = ADAPTERS[method]
    given = inspect.signature(getattr(diffusers, adapter.pipeline).__call__).parameters
    wanted = {"height", "width", "generator", "output_type", adapter.count}
    wanted |= ({"image"} if adapter.image else set()) | ({"prompt"} if adapter.prompt else set())
    assert wanted <= set(given)
    assert adapter.height % adapter.multiple == adapter.width % adapter.multiple == 0
    assert [adapter.frames(n) for n in (1, 16, 17)] == {
        1: [1, 16, 17], 4: [1, 17, 17], 8: [1, 17, 17]
    }[adapter.frame_step]  # fmt: skip


def test_a_folder_continues_and_keeps_one_setting(tiny_svd: Path, data, protocol, tmp_path: Path) -> None:
    spec = spec_for("svd", tiny_svd, tmp_path / "clips")
    make_baseline(spec, data, protocol, silent)
    kept, removed = (tmp_path / "clips" / f"{item.key}.npz" for item in protocol.items[:2])
    before, content = kept.stat().st_mtime_ns, removed.read_bytes()
    removed.unlink()
    lines: list[str] = []
    assert make_baseline(spec, data, protocol, lines.append) == 3
    assert kept.stat().st_mtime_ns == before and removed.read_bytes() == content
    assert any("2/3 clips found from before" in line for line in lines)

    record = storage.read_json(storage.join(spec.output, RECORD))
    assert record["method"] == "svd" and record["arguments"] == {
        "num_inference_steps": 2, "height": 64, "width": 64, "num_frames": FRAMES
    }  # fmt: skip
    assert record["model"].startswith("sha256:") and record["protocol_sha"] == protocol.sha
    with pytest.raises(UserError, match=r"made with arguments .*'num_inference_steps': 2.*give a new folder"):
        make_baseline(replace(spec, arguments={"num_inference_steps": 3}), data, protocol, silent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"has files but no {RECORD}"):
        make_baseline(replace(spec, output=str(tmp_path / "other")), data, protocol, silent)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "sora"}, "method 'sora', expected one of svd, "),
        ({"height": 60}, "height 60, expected a multiple of 64 for svd"),
        ({"frames": 5}, "frames 5, expected at least 6 for svd"),
        ({"method": "wan-i2v", "frames": 8}, "frames 8, expected at least 6, a multiple of 4 plus 1 for wan-i2v"),
        ({"arguments": {"steps": 2}}, "svd has no argument 'steps'; it has .*num_inference_steps"),
        ({"arguments": {"generator": 2}}, "svd has no argument 'generator'"),
        ({"part": (3, 2)}, "part 3/2, expected K/N"),
        ({"model": "runs/none/here"}, "model 'runs/none/here' is neither a folder nor a name on the hub"),
        ({"dtype": "int"}, "dtype 'int', expected float32"),
        ({"arguments": {"num_inference_steps": 2, "num_videos_per_prompt": "x"}}, "StableVideoDiffusionPipeline: "),
    ],
)
def test_what_cannot_be_made_is_one_sentence(
    tiny_svd: Path, data, protocol, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        make_baseline(replace(spec_for("svd", tiny_svd, tmp_path / "clips"), **changes), data, protocol, silent)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "clips").glob("*.npz"))


def test_a_folder_that_is_no_pipeline_or_another_one_is_refused(
    tiny_svd: Path, tiny_base: Path, data, protocol, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has no model_index\.json; give the folder of a diffusers pipeline"):
        make_baseline(spec_for("svd", tiny_base, tmp_path / "clips"), data, protocol, silent)
    with pytest.raises(UserError, match="cannot be loaded as I2VGenXLPipeline: "):
        make_baseline(spec_for("i2vgen-xl", tiny_svd, tmp_path / "more"), data, protocol, silent)


def test_a_photo_lies_in_the_centre_of_a_wide_frame() -> None:
    photo = draw_clip(0, 32)[0][0]
    wide, tall = canvas(photo, 32, 56), canvas(photo, 50, 32)
    assert wide.shape == (32, 56, 3) and tall.shape == (50, 32, 3)
    assert np.array_equal(wide[:, 12:44], photo) and np.array_equal(tall[9:41], photo)
    assert np.array_equal(wide[:, :12], photo[:, :12][:, ::-1])
    assert np.array_equal(canvas(photo, 32, 32), photo)


def test_the_evaluation_has_the_method_as_a_row(
    tiny_svd: Path, tiny_model: Path, data: ShardDataset, tmp_path: Path
) -> None:
    """The command takes the items of the evaluation, and its folder is a row of the table."""
    clips = tmp_path / "svd"
    flags = ["generate-baseline", "--method", "svd", "--model", str(tiny_svd), "-o", str(clips), "--device", "cpu"]
    flags += ["--held-out", data.uri, "--protocol", "held-out", "--height", "64", "--width", "64"]
    assert main([*flags, "--argument", "num_inference_steps=1"]) == 0
    spec = EvaluateSpec(str(tiny_model), data.uri, str(tmp_path / "out"), held_out_fraction=1.0, bootstrap=50)
    spec = replace(spec, steps=1, workers=0, examples=1, references=False, samples=1, methods={"SVD": str(clips)})
    # The untrained model makes frames of 32 pixels.
    rules = tmp_path / "own.toml"
    rules.write_text('title = "Own"\nnumber = "asked"\nscaled = true\n')
    report = evaluate(replace(spec, protocol=str(rules)), silent)
    assert set(report.metrics) == {"frozen", "SVD", "trip", "real"}
    assert report.items == 3 and report.metrics["SVD"]["motion_ratio"]["value"] is not None
    provenance = storage.read_json(storage.join(report.uri, "report.json"))["provenance"]
    assert provenance["baselines"]["SVD"]["pipeline"] == "StableVideoDiffusionPipeline"


def test_the_command_says_what_it_needs(capsys, tmp_path: Path) -> None:
    start = ["generate-baseline", "--method", "svd", "--model", "m", "-o", str(tmp_path / "clips")]
    assert main(start) == 2
    assert "give either --held-out or --dataset" in capsys.readouterr().err
    assert main([*start, "--held-out", "x", "--part", "all"]) == 2
    assert "--part all, expected K/N such as 1/4" in capsys.readouterr().err
