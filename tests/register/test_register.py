"""Registration: one version per model and report, promotion by the gate, and a consumer that knows only the alias."""

from __future__ import annotations

import base64
import io
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from infra.tracking import connect
from tasks.evaluation_record import Gate
from tasks.metrics.statistics import Estimate
from tasks.records import UserError
from tasks.register import registry
from tasks.register.model_card import write_model_card
from tasks.register.packaging import drawn_photo
from tasks.register.promotion import promote
from tasks.register.registry import RegisterSpec, register
from tasks.register.report_facts import read_report
from tasks.video.decode import read_clip
from tests.support.reports import write_record
from trip_model import folders
from trip_model.folders import file_hashes

CONSUMER = Path(__file__).resolve().parents[2] / "examples" / "consumer.py"
ROWS = {
    "trip": {"motion_ratio": Estimate(0.9, 0.8, 1.0), "F-Consistency/4": Estimate(97.5)},
    "frozen": {"motion_ratio": Estimate(0.0)},
}


def write_report(folder: Path, passed: bool = True, note: str = "another extractor, not comparable") -> str:
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    reasons = () if passed else ("motion ratio 0.1 lies outside 0.5 to 1.5",)
    write_record(
        folder, passed, reasons, rows=ROWS, notes=[note], files=("report.md", "consistency.png", "videos/a.mp4")
    )
    (folder / "report.md").write_text("# Evaluation")
    Image.new("RGB", (8, 8)).save(folder / "consistency.png")
    (folder / "videos" / "a.mp4").write_bytes(b"mp4")
    return str(folder)


def version_of(spec: RegisterSpec, alias: str) -> str:
    return str(connect(spec.tracking_uri).get_model_version_by_alias(spec.name, alias).version)


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def registered(tiny_model, tmp_path_factory):
    """A store with one promoted version, its spec and its report."""
    home = tmp_path_factory.mktemp("registry")
    spec = RegisterSpec(
        model=str(tiny_model),
        report=write_report(home / "report"),
        tracking_uri=f"sqlite:///{home}/mlflow.db",
        lineage={"data_digest": "0123abcd", "data_uri": "file:///data/latents", "recipe": "demo"},
        check_steps=2,
    )
    return spec, register(spec, silent), home


@pytest.fixture(scope="module")
def champion(registered):
    """The model that `mlflow.pyfunc.load_model` returns for the alias."""
    spec, _, _ = registered
    mlflow.set_tracking_uri(spec.tracking_uri)
    mlflow.set_registry_uri(spec.tracking_uri)
    return mlflow.pyfunc.load_model("models:/trip@champion")


def test_a_passed_gate_makes_the_version_candidate_and_champion(registered):
    spec, report, _ = registered
    assert report.promoted and report.aliases == ("candidate", "champion")
    assert report.model_uri == "models:/trip@champion"
    assert report.consumer_check.startswith("answered with ")
    version = connect(spec.tracking_uri).get_model_version("trip", report.version)
    tags = version.tags
    assert tags["trip.gate"] == "passed" and tags["lineage.recipe"] == "demo"
    assert version.description.startswith("Image-to-video"), "the list of versions shows the first line"
    assert report.run_id in report.run_page


def test_the_run_holds_scores_plots_clips_card_and_data(registered):
    spec, report, _ = registered
    client = connect(spec.tracking_uri)
    run = client.get_run(report.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["trip/motion_ratio"] == 0.9
    assert run.data.metrics["trip/F-Consistency/4"] == 97.5
    assert run.data.params["lineage.recipe"] == "demo"
    assert run.inputs.dataset_inputs[0].dataset.digest == "0123abcd"
    assert len(run.outputs.model_outputs) == 1
    folders = ("evaluation", "evaluation/videos")
    names = {file.path for folder in folders for file in client.list_artifacts(report.run_id, folder)}
    assert {"evaluation/consistency.png", "evaluation/report.md", "evaluation/videos/a.mp4"} <= names
    card = Path(client.download_artifacts(report.run_id, "model_card/README.md")).read_text()
    assert "0.9 [0.8, 1]" in card and "not comparable" in card and "CC-BY-NC-4.0" in card


def test_registering_the_same_model_and_report_again_creates_nothing(registered):
    spec, report, _ = registered
    assert register(spec, silent) == report
    client = connect(spec.tracking_uri)
    assert len(client.search_model_versions("name = 'trip'")) == 1


def test_a_registration_hashes_the_model_folder_once(registered, monkeypatch):
    spec, _, _ = registered
    hashed: list[Path] = []

    def counted(folder: Path) -> dict[str, bytes]:
        hashed.append(folder)
        return file_hashes(folder)

    monkeypatch.setattr(folders, "file_hashes", counted)
    monkeypatch.setattr(registry, "file_hashes", counted)
    register(spec, silent)
    assert hashed == [Path(spec.model)]


def test_a_registration_that_was_killed_is_completed_under_the_same_version(registered):
    spec, report, _ = registered
    client = connect(spec.tracking_uri)
    client.set_model_version_tag("trip", report.version, "trip.done", "no")
    client.delete_registered_model_alias("trip", "champion")
    again = register(spec, silent)
    assert (again.version, again.run_id, again.promoted) == (report.version, report.run_id, True)


def test_bytes_base64_and_data_url_of_one_photo_give_one_video(champion):
    photo = drawn_photo(32)
    text = base64.b64encode(photo).decode()
    params = {"steps": 2, "seed": 5}
    videos = [
        champion.predict(pd.DataFrame({"image": [image], "prompt": ["a red circle moving left"]}), params=params)
        for image in (photo, text, base64.encodebytes(photo).decode(), f"data:image/png;base64,{text}")
    ]
    first = videos[0].iloc[0]
    assert len({v["video"][0] for v in videos}) == 1
    clip = read_clip(first["video"], int(first["num_frames"]), first["fps"], int(first["height"]))
    assert clip.pixels.shape == (first["num_frames"], first["height"], first["width"], 3)
    given = np.asarray(Image.open(io.BytesIO(photo)).convert("RGB"), dtype=int)
    assert abs(clip.pixels[0].astype(int) - given).mean() < 8


def test_a_row_alone_with_its_seed_gives_the_same_video(champion):
    rows = pd.DataFrame({"image": [drawn_photo(32)] * 2, "prompt": ["a red circle moving left"] * 2})
    both = champion.predict(rows, params={"steps": 2, "seed": 8})
    alone = champion.predict(rows[1:].reset_index(drop=True), params={"steps": 2, "seed": int(both["seed"][1])})
    assert both["video"][1] == alone["video"][0]
    assert both["video"][0] != both["video"][1]


@pytest.mark.parametrize(
    ("image", "prompt", "params", "sentence"),
    [
        (b"not an image", "a cat", {}, "row 0: image cannot be read"),
        (b"", "a cat", {}, "is empty"),
        ("!!!", "a cat", {}, "not base64"),
        ("data:image/png,abc", "a cat", {}, "data URL"),
        (None, "  ", {}, "row 0: prompt is"),
        (None, "a " * 5000, {}, "1 to 2000"),
        (None, "a cat", {"steps": -1}, "steps is -1"),
        (None, "a cat", {"num_frames": 1000}, "num_frames is 1000"),
        (None, "a cat", {"guidance": float("nan")}, "guidance is nan"),
        (None, "a cat", {"format": "avi"}, "format is 'avi'"),
    ],
)
def test_an_invalid_request_is_rejected_with_one_sentence(champion, image, prompt, params, sentence):
    rows = pd.DataFrame({"image": [drawn_photo(32) if image is None else image], "prompt": [prompt]})
    with pytest.raises(ValueError, match=sentence):
        champion.predict(rows, params=params)


@pytest.mark.slow
def test_a_consumer_outside_the_checkout_loads_by_alias_and_gets_a_playable_video(registered, tmp_path):
    spec, _, _ = registered
    (tmp_path / "photo.png").write_bytes(drawn_photo(48))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    environment |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, str(CONSUMER), "photo.png", "a red circle moving left", "-o", "out.mp4"]
    command += ["--tracking", spec.tracking_uri, "--steps", "2"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "out.mp4: " in result.stdout
    assert read_clip(tmp_path / "out.mp4", 2, 4.0, 32).pixels.shape == (2, 32, 32, 3)


def test_the_consumer_reports_errors_without_a_traceback(registered, tmp_path, capsys):
    spec, _, _ = registered
    main = runpy.run_path(str(CONSUMER))["main"]
    (tmp_path / "photo.png").write_bytes(drawn_photo(48))
    assert main([str(tmp_path / "absent.png"), "a cat", "--tracking", spec.tracking_uri]) == 1
    assert "absent.png" in capsys.readouterr().err
    photo = str(tmp_path / "photo.png")
    assert main([photo, "a cat", "--model", "models:/trip@nobody", "--tracking", spec.tracking_uri]) == 1
    assert "nobody" in capsys.readouterr().err


def test_a_gate_that_did_not_pass_keeps_the_champion_and_names_the_reasons(registered):
    spec, first, home = registered
    report = register(replace(spec, report=write_report(home / "weak", passed=False)), silent)
    assert report.version != first.version
    assert report.aliases == ("candidate",) and not report.promoted
    client = connect(spec.tracking_uri)
    assert version_of(spec, "champion") == first.version
    tags = client.get_model_version("trip", report.version).tags
    assert tags["trip.gate"] == "not passed" and "motion ratio" in tags["trip.gate_reasons"]
    assert client.get_model_version("trip", report.version).source == client.get_model_version("trip", "1").source


def test_a_new_champion_makes_the_old_one_previous(registered):
    spec, first, home = registered
    report = register(replace(spec, report=write_report(home / "next", note="a second evaluation")), silent)
    client = connect(spec.tracking_uri)
    assert report.promoted
    assert version_of(spec, "previous") == first.version
    promote(client, "trip", report.version)  # again: nothing moves
    assert version_of(spec, "previous") == first.version


def test_registering_an_old_version_again_does_not_take_the_champion_back(registered):
    spec, _, home = registered
    newer = register(replace(spec, report=write_report(home / "newest", note="a third evaluation")), silent)
    register(spec, silent)
    assert version_of(spec, "champion") == newer.version


def test_an_error_names_what_is_missing_and_the_fix(registered, tmp_path):
    spec, _, _ = registered
    with pytest.raises(UserError, match="no model folder at"):
        register(replace(spec, model=str(tmp_path / "absent")), silent)
    with pytest.raises(UserError, match=r"has no trip\.json"):
        register(replace(spec, model=str(tmp_path)), silent)
    with pytest.raises(UserError, match=r"no report\.json at"):
        register(replace(spec, report=str(tmp_path)), silent)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_report(str(tmp_path))
    write_record(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    for change, expected in (
        ({"schema_version": 2}, "has schema 2, expected 4"),
        ({"gate": {"passed": "yes"}}, "damaged .gate.passed: Input should be a valid boolean"),
        ({"rows": {"trip": {"motion_ratio": 1.0}}}, "damaged .rows.trip.motion_ratio"),
        ({"files": ["../../secret"]}, "lies outside the report's folder"),
        ({"scores": {}}, "damaged .scores: "),
    ):
        (tmp_path / "report.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=expected):
            read_report(str(tmp_path))
    with pytest.raises(UserError, match="photo"):
        register(replace(spec, photo=str(tmp_path / "report.json")), silent)
    with pytest.raises(UserError, match="does not answer"):
        register(replace(spec, tracking_uri="http://127.0.0.1:9"), silent)
    file = tmp_path / "file"
    file.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be used"):
        register(replace(spec, tracking_uri=f"sqlite:///{file}/mlflow.db"), silent)


def test_the_card_contains_origin_terms_scores_gate_and_limits():
    card = write_model_card(
        "trip",
        {"recipe": "demo", "data_terms": "Drawn shapes, free of terms."},
        {"fusion": "tnf"},
        {"beta_start": 1e-4, "clip_sample": False, "unknown": 1},
        [("trip", "motion_ratio", "0.9 [0.8, 1]")],
        Gate(False, ("motion ratio 0.1 lies outside | 0.5 to 1.5",)),
        ["not comparable"],
        {"steps": 25},
    )
    for piece in (
        "| recipe | demo |",
        "Drawn shapes",
        "| fusion | tnf |",
        "| beta_start | 0.0001 |",
        "Not passed",
        "| steps | 25 | 1 to 1000 |",
    ):
        assert piece in card
    assert "unknown" not in card and "| trip | motion_ratio | 0.9 [0.8, 1] |" in card
