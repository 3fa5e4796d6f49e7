"""The evaluate stage on an untrained model: held-out items, resumption with identical numbers, honest errors."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pyarrow import parquet

from flows.cli.app import main
from flows.evaluate_trip import with_base_row
from flows.layout import Run
from flows.recipes import demo
from infra import storage
from infra.cluster import ray_session
from infra.tracking import connect
from tasks.evaluate import generate
from tasks.evaluate.gate import SCORES
from tasks.evaluate.job import evaluate
from tasks.evaluate.protocol.protocol import held_out_protocol, item_seed
from tasks.evaluate.spec import EvaluateSpec
from tasks.evaluate.vbench import prompt_of
from tasks.evaluation_record import read_evaluation
from tasks.ingest.drawing import draw_clip
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.records import Artifact, UserError, to_json
from tasks.shards import Sample, ShardDataset, publish_dataset, sample_key, split_keys, write_shard
from tasks.study.plan import read_key, read_plan
from tasks.study.store import Store, Vote
from trip_model.checkpoint import save_model
from trip_model.config import FusionConfig, ScheduleConfig, TripConfig
from trip_model.folders import folder_hash
from trip_model.images import write_video
from trip_model.model import Trip

FRAMES, SIZE = 6, 32


def drawn_dataset(folder: Path, clips: int = 12, windows: int = 1, size: int = SIZE, keep_pixels: bool = True) -> str:
    """A published data set of drawn clips with real pixels; its latents are zeros, nobody here reads them."""
    rows: list[list[Sample]] = []
    for i in range(clips):
        pixels, caption = draw_clip(i, size)
        samples = []
        for window in range(windows):
            part = pixels[window * FRAMES * 3 :: 3][:FRAMES]
            zeros = np.zeros((FRAMES, 4, size // 8, size // 8), np.float16)
            tokens = np.zeros(77, np.int32)
            kept = part if keep_pixels else None
            samples.append(Sample(sample_key(f"clip{i}", window), caption, zeros, part[0], tokens, {}, kept))
        rows.append(samples)
    recipe = {"fps": 4.0, "size": size}
    shard = write_shard(str(folder), 0, (0, clips), rows, "hash")
    publish_dataset(str(folder), recipe, "hash", {}, [shard.summary()])
    return str(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return drawn_dataset(tmp_path_factory.mktemp("drawn") / "dataset")


@pytest.fixture(scope="module")
def others(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another method's videos of the five items, the real clips backwards, in every form that is read."""
    folder = tmp_path_factory.mktemp("others")
    data = ShardDataset(dataset)
    for number, item in enumerate(held_out_protocol(data, 0.5, 5, 0).items):
        pixels = generate.real_pixels(data, item, FRAMES)[::-1]
        if number == 0:
            np.savez(folder / f"{item.key}.npz", frames=pixels)
        else:
            name = [f"{item.key}.mp4", f"{item.key}.gif", item.key, f"{item.clip}.mp4"][number - 1]
            write_video(folder / name, pixels, 8.0)
    return str(folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session(None, 2):
        yield


@pytest.fixture(scope="module")
def whole(
    cluster: None, dataset: str, others: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvaluateSpec, Any, list[str]]:
    """One evaluation that nobody interrupted, beside another method: its spec, its report, and what it said."""
    spec = spec_for(tiny_model, dataset, tmp_path_factory.mktemp("whole"), workers=1, methods={"Other": others})
    spec = replace(spec, references=True, samples=2)
    lines: list[str] = []
    return spec, evaluate(spec, lines.append), lines


def spec_for(model: Path, dataset: str, output: Path, **changes: Any) -> EvaluateSpec:
    # In this process: what costs here is the imports of each worker.
    spec = EvaluateSpec(str(model), dataset, str(output), clips=5, batch=2, held_out_fraction=0.5, bootstrap=100)
    return replace(spec, **({"examples": 2, "steps": 2, "workers": 0, "references": False, "samples": 1} | changes))


def test_only_windows_of_held_out_clips_are_judged(tmp_path: Path):
    data = ShardDataset(drawn_dataset(tmp_path, clips=10, windows=2))
    protocol = held_out_protocol(data, 0.3, limit=100, seed=0)
    _, held_out = split_keys([f"clip{i}" for i in range(10)], 0.3)
    assert {item.clip for item in protocol.items} == set(held_out) and protocol.clips == len(held_out)
    assert len(protocol.items) == 2 * len(held_out)
    assert [item.key[-3:] for item in protocol.items] == ["000"] * len(held_out) + ["001"] * len(held_out)
    for item in protocol.items:
        assert data.read(item.index, ("caption",)) == {"key": item.key, "caption": item.caption}


def test_a_smaller_protocol_is_a_subset_with_the_same_seeds(dataset: str):
    data = ShardDataset(dataset)
    few, many = (held_out_protocol(data, 0.5, limit, seed=3) for limit in (2, 5))
    assert few.items == many.items[:2] and few.sha != many.sha
    assert many.items[0].seed == item_seed(many.items[0].key, 3) != item_seed(many.items[0].key, 4)
    assert held_out_protocol(data, 0.5, 5, seed=3) == many


def test_of_a_data_set_never_trained_on_every_clip_is_held_out(dataset: str):
    assert held_out_protocol(ShardDataset(dataset), 1.0, 100, seed=0).clips == 12


def test_a_batch_with_a_missing_item_is_done_again_as_a_whole(dataset: str, tmp_path: Path):
    items = held_out_protocol(ShardDataset(dataset), 0.5, 5, seed=0).items
    plan = generate.batches(items, 2)
    assert [len(batch) for batch in plan] == [2, 2, 1]
    for item in items[:3]:
        generate.save_arrays(str(tmp_path / generate.file_name(item)), {"frames": np.zeros(1)})
    assert generate.unfinished(plan, str(tmp_path)) == plan[1:]


def test_evaluation_gives_rows_gate_files_and_progress(whole: tuple[EvaluateSpec, Any, list[str]]):
    spec, report, lines = whole
    assert report.clips == report.items == 5
    assert set(report.metrics) == {"frozen", "closed_form", "Other", "trip", "best_of_k", "round_trip", "real"}
    trip = report.metrics["trip"]
    assert trip["clip_distance"]["ci_low"] <= trip["clip_distance"]["value"] <= trip["clip_distance"]["ci_high"]
    assert report.metrics["frozen"]["motion_ratio"]["value"] == 0
    for name in ("warp_error", "photo_error", "part_distance"):
        assert report.metrics["frozen"][name]["value"] == 0 < report.metrics["real"][name]["value"]
    assert not report.passed and "5 held-out clips" in report.gate.reasons[0]
    assert not report.gate.rules[0].passed and any("energy score" in verdict.rule for verdict in report.gate.rules)
    json.dumps(to_json(report), allow_nan=False)
    other = report.metrics["Other"]  # the real clips backwards, four of five through a codec
    assert 1 < other["motion_ratio"]["value"] < 1.5 and other["clip_distance"]["value"] > 0.05
    own = {"clip_distance_minus_frozen", "energy_score_minus_frozen", "energy_score", "spread_ratio"}
    assert set(other) == set(trip) - own  # a folder has one clip for each item
    names = ("report.json", "report.md", "report.html", "protocol.json", "per_clip.csv", "consistency.png")
    for name in (*names, "per_clip.parquet", "tables/table_1.tex"):
        assert name in report.files and storage.exists(storage.join(report.uri, name))
    assert sum(name.endswith(".mp4") for name in report.files) == 2
    assert sum(name.endswith(".gif") for name in report.files) == 1
    assert any(line.startswith("generate   5/5 clips") for line in lines)
    assert any(line.startswith("judge      5/5 clips") for line in lines)
    content = storage.read_json(storage.join(report.uri, "report.json"))
    assert content["schema_version"] == 4 and content["provenance"]["seed"] == spec.seed
    assert all(len(content["curves"]["consecutive"][row]) == FRAMES - 1 for row in report.metrics)
    minus = content["differences"]["Other"]["clip_distance"]
    assert minus["value"] == pytest.approx(other["clip_distance"]["value"] - trip["clip_distance"]["value"])
    assert content["counts"] == {"asked": 5, "items": 5, "clips": 5, "clips_by_category": {}, "excluded": {}}
    assert "| Other |" in storage.read_bytes(storage.join(report.uri, "report.md")).decode()


def test_the_same_command_again_finds_its_report(whole: tuple[EvaluateSpec, Any, list[str]]):
    spec, report, _ = whole
    lines: list[str] = []
    again = evaluate(spec, lines.append)
    assert replace(again, seconds=0) == replace(report, seconds=0)
    assert len(lines) == 1 and "up to date" in lines[0]


def test_what_is_missing_is_made_again_with_identical_numbers(
    whole: tuple[EvaluateSpec, Any, list[str]], tmp_path: Path
):
    import shutil

    spec, report, _ = whole
    shutil.copytree(spec.output, tmp_path / "copy")
    (tmp_path / "copy" / "report.json").unlink()
    for folder in ("records", "features", "generations"):  # one file each, and what follows from it is looked up
        next(path for path in sorted((tmp_path / "copy" / folder).rglob("*")) if path.is_file()).unlink()
    lines: list[str] = []
    again = evaluate(replace(spec, output=str(tmp_path / "copy"), workers=0), lines.append)
    assert again.metrics == report.metrics and again.key == report.key
    assert any(not line.startswith("judge") and "found from before" in line for line in lines)
    for name in report.files:
        if name.endswith((".mp4", ".html")):  # libx264 does not always repeat itself to the last bit
            continue
        assert storage.read_bytes(f"{again.uri}/{name}") == storage.read_bytes(f"{report.uri}/{name}"), name


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_with_identical_numbers(
    whole: tuple[EvaluateSpec, Any, list[str]], tmp_path: Path
):
    spec, report, _ = whole
    spec = replace(spec, workers=2)
    fields = to_json(replace(spec, output=str(tmp_path / "killed")))
    script = (
        f"from tasks.evaluate.job import *; from tasks.json_records import *; "
        f"evaluate(parse_record(EvaluateSpec, {json.dumps(fields)!r}))"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while (
            not list((tmp_path / "killed" / "generations").rglob("*.npz"))
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        begun = len(list((tmp_path / "killed" / "generations").rglob("*.npz")))
        process.send_signal(signal.SIGKILL)
    assert begun > 0, "no clip was generated before the kill"
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    again = evaluate(replace(spec, output=str(tmp_path / "killed")), lambda line: None)
    assert again.metrics == report.metrics
    assert storage.read_bytes(f"{again.uri}/per_clip.csv") == storage.read_bytes(f"{report.uri}/per_clip.csv")


def test_another_seed_is_another_evaluation(whole: tuple[EvaluateSpec, Any, list[str]], tmp_path: Path):
    spec, report, _ = whole
    few = replace(spec, output=str(tmp_path), seed=1, clips=2, workers=0, methods={}, references=False, samples=1)
    other = evaluate(few, lambda line: None)
    assert other.key != report.key and other.metrics["trip"] != report.metrics["trip"]


def test_generated_frames_are_kept_lossless_and_frame_1_is_the_models_own(
    whole: tuple[EvaluateSpec, Any, list[str]], dataset: str
):
    _, report, _ = whole
    data = ShardDataset(dataset)
    item = held_out_protocol(data, 0.5, 5, seed=0).items[0]
    path = Path(report.uri) / read_evaluation(report.uri).generations / f"{item.key}.npz"
    frames = generate.load_arrays(str(path))["frames"]
    real = generate.real_pixels(data, item, FRAMES)
    assert frames.shape == real.shape == (FRAMES, SIZE, SIZE, 3) and frames.dtype == np.uint8
    assert (frames[0] != real[0]).any()  # an untrained VAE cannot return the photo
    seen = generate.shown(frames, real)
    np.testing.assert_array_equal(seen[0], real[0])
    np.testing.assert_array_equal(seen[1:], frames[1:])


def test_the_champion_is_a_row_and_the_gate_asks_for_it(
    whole: tuple[EvaluateSpec, Any, list[str]], tmp_path: Path
) -> None:
    """Held against itself a model is neither better nor worse, to the last bit."""
    spec, report, _ = whole
    protocol = storage.join(report.uri, "protocol.json")
    lines: list[str] = []
    again = evaluate(
        replace(
            spec, output=str(tmp_path), protocol=protocol, champion=report.uri, methods={}, workers=0, references=False
        ),
        lines.append,
    )
    assert set(again.metrics) == {"frozen", "champion", "trip", "real"}
    assert again.metrics["champion"]["energy_score"] == again.metrics["trip"]["energy_score"]
    content = storage.read_json(storage.join(again.uri, "report.json"))
    assert content["provenance"]["protocol_sha"] == storage.read_json(protocol)["sha256"]
    minus = content["differences"]["champion"].values()  # five clips give distances of sets no interval
    assert all(value["value"] == 0 and not value["ci_low"] and not value["ci_high"] for value in minus)
    assert not any("champion" in reason for reason in again.gate.reasons)
    with pytest.raises(UserError, match=r"champion's report at .* is of other items"):
        evaluate(replace(spec, champion=report.uri, seed=7, methods={}, workers=0), lambda line: None)


def exported(folder: Path, base: Path, config: TripConfig) -> Path:
    """A model folder as training writes it: with the hash of the base that it comes from."""
    return save_model(folder, Trip.from_base(base, config), base, {"base_sha256": folder_hash(base)})


@pytest.mark.parametrize("prediction", ["noise", pytest.param("velocity", marks=pytest.mark.slow)])
def test_the_base_untrained_is_a_row_sampled_as_trip_minus_and_made_once_for_all_models(
    prediction: str, dataset: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue("tiny_base" if prediction == "noise" else "tiny_velocity_base")
    schedule, output = ScheduleConfig(sampling_steps=3), cast(Any, prediction)
    fusion = FusionConfig(width=16, heads=2, prediction="shrinkage", residual="unit")
    config = TripConfig(size=32, fusion=fusion, schedule=schedule, unet_output=output, guidance=2.0)
    with_prior = exported(tmp_path / "with_prior", base, config)
    minus = exported(tmp_path / "minus", base, replace(config, fusion=FusionConfig(kind="none")))
    spec = spec_for(with_prior, dataset, tmp_path / "a", steps=None, clips=3)
    spec = replace(spec, base=Artifact(str(base), folder_hash(base)), base_clips=str(tmp_path / "base_clips"))
    spec = replace(spec, samples=2)
    report = evaluate(spec, lambda line: None)
    assert set(report.metrics) == {"frozen", "base", "trip", "real"}
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "base_clips").rglob("*.npz")}
    assert len(made) == 2 * 3  # two samples of three items

    # An export of the base as TRIP^- makes the clips of the row, and finds those of the row made before. A
    # loaded weight lies elsewhere in memory, which changes the order of a sum: a pixel may differ by one level.
    lines: list[str] = []
    other = evaluate(replace(spec, model=str(minus), output=str(tmp_path / "b")), lines.append)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "base_clips").rglob("*.npz")} == made
    assert other.metrics["base"] == report.metrics["base"]
    own = dict(other.metrics["trip"])
    zeros = [own.pop(f"{metric}_minus_{row}") for metric in SCORES for row in ("base", "frozen")][2]
    assert own.keys() == other.metrics["base"].keys() and zeros == pytest.approx(dict.fromkeys(zeros, 0), abs=1e-6)
    for metric, estimate in own.items():
        assert estimate["value"] == pytest.approx(other.metrics["base"][metric]["value"], rel=1e-2, abs=1e-6), metric
    assert report.metrics["trip"]["clip_distance"] != report.metrics["base"]["clip_distance"]

    # The row adds a paired difference, and changes neither the gate nor another row.
    content = storage.read_json(storage.join(report.uri, "report.json"))
    minus_trip = content["differences"]["base"]["clip_distance"]["value"]
    assert report.metrics["trip"]["clip_distance_minus_base"]["value"] == pytest.approx(-minus_trip)
    page = storage.read_bytes(storage.join(report.uri, "report.html")).decode()
    assert "Base, not trained" in page and "what training started from" in page
    without = evaluate(replace(spec, base=None), lambda line: None)
    assert without.gate == report.gate
    trip = {name: value for name, value in report.metrics["trip"].items() if not name.endswith("_minus_base")}
    assert without.metrics == {"frozen": report.metrics["frozen"], "trip": trip, "real": report.metrics["real"]}
    page = storage.read_bytes(storage.join(without.uri, "report.html")).decode()
    assert "Base, not trained" not in page and "what training started from" not in page

    # What is missing of it is made again with identical numbers.
    next(iter(made)).unlink()
    again = evaluate(replace(spec, output=str(tmp_path / "c")), lines.append)
    assert again.metrics == report.metrics and again.key == report.key
    assert any(line.startswith("base ") and "found from before" in line for line in lines)


def test_a_base_that_the_model_was_not_trained_from_is_no_row(
    dataset: str, tiny_base: Path, tiny_velocity_base: Path, tmp_path: Path
) -> None:
    model = exported(tmp_path / "model", tiny_base, TripConfig(size=32, fusion=FusionConfig(kind="none")))
    spec = spec_for(
        model, dataset, tmp_path / "out", base=Artifact(str(tiny_velocity_base), folder_hash(tiny_velocity_base))
    )
    with pytest.raises(UserError, match="was not trained from base"):
        evaluate(spec, lambda line: None)
    recipe = demo()
    for base, expected in ((tiny_velocity_base, None), (tiny_base, Artifact(str(tiny_base), folder_hash(tiny_base)))):
        run = Run(replace(recipe, train=replace(recipe.train, base=str(base))), None, str(tmp_path))
        assert with_base_row(replace(spec, base=None), run).base == expected


def test_bad_input_is_one_sentence(cluster: None, dataset: str, tiny_model: Path, tiny_base: Path, tmp_path: Path):
    spec = spec_for(tiny_model, dataset, tmp_path / "out")
    bare = drawn_dataset(tmp_path / "bare", keep_pixels=False)
    large = drawn_dataset(tmp_path / "large", clips=2, size=48)
    (tmp_path / "file").write_text("")
    cases = {
        "no model folder at": replace(spec, model=str(tmp_path / "nothing")),
        "has no trip.json": replace(spec, model=str(tiny_base)),
        "no finished data set": replace(spec, dataset=str(tmp_path / "nothing")),
        "holds no real frames": replace(spec, dataset=bare),
        "makes frames of 32x32": replace(spec, dataset=large),
        "clips 0": replace(spec, clips=0),
        "batch 0": replace(spec, batch=0),
        "no CLIP weights": replace(spec, judges=ExtractorFiles(clip_model=str(tmp_path / "clip.pt"))),
        "no protocol 'webvid'": replace(spec, protocol="webvid"),
        "no videos of method Other at": replace(spec, methods={"Other": str(tmp_path / "nothing")}),
        "champion: no report.json at": replace(spec, champion=str(tmp_path / "nothing")),
        "a worker of 64 CPUs .* does not fit": replace(spec, workers=1, cpus_per_worker=64),
        "steps is 5000": replace(spec, steps=5000),
        "choose another output": replace(spec, output=str(tmp_path / "file")),
    }
    for message, case in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            evaluate(case, lambda line: None)
        assert "\n" not in str(caught.value), message
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_preference_study_of_a_report_is_shown_in_its_page_beside_its_metrics(
    whole: tuple[EvaluateSpec, Any, list[str]], tmp_path: Path
):
    report = str(tmp_path / "report")
    shutil.copytree(whole[0].output, report)
    study, tracking = str(tmp_path / "study"), f"sqlite:///{tmp_path}/mlflow.db"
    systems = ["--system", f"ours={report}", "--system", f"still={report}#frozen", "--system", f"Other={report}#Other"]
    assert main(["preference-study", "-o", study, *systems, "--raters", "3", "--gold", "2", "--repeats", "1"]) == 0
    plan = read_plan(study)
    sealed = {pair.name: pair for pair in read_key(f"{study}-key.json", plan).pairs}
    votes = Store(f"sqlite:///{study}/votes.db", plan)
    for rater in range(3):
        votes.enrol(f"token {rater}", None)
        for position, place in enumerate(plan.assignments[rater]):
            pair = sealed[plan.pairs[place.pair].name]
            left, right = (pair.second, pair.first) if place.swapped else (pair.first, pair.second)
            side = "right" if right in ("ours", "real") else "left" if left in ("ours", "real") else "unsure"
            answers = {question.name: side for question in plan.questions}
            votes.add(Vote(rater, position, pair.name, place.swapped, answers, 5000, 1, "desktop", 0))
    votes.close()
    for _ in range(2):
        assert main(["preference-tally", "--study", study, "--report", report, "--tracking-uri", tracking]) == 0
    page = (Path(report) / "report.html").read_text()
    assert page.count("<h1>Preference study</h1>") == 1 and page.count("<h2>Curves</h2>") == 1
    assert "Automatic metrics of the evaluation" in page
    content = json.loads((Path(study) / "tally" / "tally.json").read_text())
    lines = {(line["first"], line["second"]): line for line in content["all_raters"]["comparisons"]}
    assert lines["ours", "still"]["win_rate"]["value"] == 1 and lines["still", "Other"]["ties"] == 15
    assert not content["excluded"] and content["systems"] == ["ours", "still", "Other"]
    client = connect(tracking)
    runs = client.search_runs([client.get_experiment_by_name("trip").experiment_id])
    assert len(runs) == 1
    assert runs[0].data.metrics["preference/all/ours_vs_still/visual_quality/win_rate"] == 1
    table = parquet.read_table(Path(study) / "tally" / "votes.parquet").to_pylist()
    assert len(table) == 3 * len(plan.assignments[0])
    assert {line["visual_quality_system"] for line in table} == {"ours", "real", ""}


def test_clips_go_to_vbench_and_its_result_comes_back(whole: tuple[EvaluateSpec, Any, list[str]], tmp_path: Path):
    report, output = str(tmp_path / "report"), tmp_path / "vbench"
    shutil.copytree(whole[0].output, report)
    assert main(["vbench-export", "--report", report, "-o", str(output)]) == 0
    videos = sorted(path.name for path in (output / "videos").iterdir())
    images = {path.stem for path in (output / "images").iterdir()}
    assert len(videos) == 10 and {prompt_of(name) for name in videos} == images  # five items, two samples of each
    assert {name[-6:] for name in videos} == {"-0.mp4", "-1.mp4"}
    scores = {name: 60 + 3.0 * number for number, name in enumerate(videos)}
    lines = [{"video_path": f"/elsewhere/videos/{name}", "video_results": score} for name, score in scores.items()]
    mean = sum(scores.values()) / 1000
    subject = [line | {"image_path": "x.png", "video_results": line["video_results"] / 100} for line in lines]
    content = {"imaging_quality": [mean, lines], "i2v_subject": [mean, subject]}
    result = tmp_path / "ours_eval_results.json"
    result.write_text(json.dumps(content))
    rows = tmp_path / "rows.json"
    words = ["--result", f"ours={result}", "--export", str(output), "--report", report, "--output", str(rows)]
    assert main(["vbench-read", *words]) == 0
    (row,) = json.loads(rows.read_text())
    assert row["clips"] == 5 and row["metrics"]["vbench-imaging_quality"]["value"] == pytest.approx(mean)
    assert "Video-Image Subject Consistency" in (Path(report) / "report.html").read_text()
    result.write_text(json.dumps({"imaging_quality": [0.1, lines]}))
    assert main(["vbench-read", *words]) == 2
