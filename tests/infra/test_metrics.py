"""Metrics: what a stage writes, an endpoint shows in Prometheus' format; alerts and dashboard are valid."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.metrics import FOLDER_VARIABLE, record, record_progress
from infra.metrics_server import page

yaml = pytest.importorskip("yaml")

REPOSITORY = Path(__file__).resolve().parents[2]
MONITORING = REPOSITORY / "infra" / "monitoring"
RULES = [
    rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "metrics"))
    return tmp_path / "metrics"


def shown(folder: Path, stack: Path | None = None) -> dict[str, float]:
    """The samples of a page by name and labels."""
    families = text_string_to_metric_families(page(folder, stack).decode())
    return {" ".join([s.name, *s.labels.values()]): s.value for family in families for s in family.samples}


def test_progress_of_a_stage_becomes_metrics_and_the_last_tick_dates_the_result(folder: Path) -> None:
    tick = {"stage": "prepare", "done": 5, "total": 10, "failed": 1, "clips_per_second": 2.5, "eta_seconds": None}
    record_progress(tick)
    first = shown(folder)
    assert (first["trip_prepare_done"], first["trip_prepare_clips_per_second"]) == (5, 2.5)
    assert "trip_prepare_complete_timestamp_seconds" not in first and "trip_prepare_eta_seconds" not in first
    record_progress(tick | {"done": 10})
    record("prepare", {}, {"failed_clips": {"timeout": 3}})
    second = shown(folder)
    assert time.time() - second["trip_prepare_complete_timestamp_seconds"] < 60
    assert second["trip_prepare_failed_clips timeout"] == 3 and second["trip_prepare_done"] == 10


def test_stages_share_a_page_and_names_are_valid(folder: Path) -> None:
    record_progress({"stage": "train", "done": 1, "total": 2, "loss": float("nan"), "lr 3D-UNet": 1e-6})
    record_progress({"stage": "prepare", "done": 1, "total": 2})
    values = shown(folder)
    assert values["trip_train_lr_3d_unet"] == 1e-6 and values["trip_train_loss"] != values["trip_train_loss"]


def test_without_a_folder_or_with_a_closed_one_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    record_progress({"stage": "train", "done": 1, "total": 2})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    record_progress({"stage": "train", "done": 1, "total": 2})
    assert (tmp_path / "file").read_text() == ""


def test_the_endpoint_shows_stages_and_services(folder: Path, tmp_path: Path) -> None:
    record_progress({"stage": "train", "done": 1, "total": 2})
    stopped = tmp_path / "up" / "mlflow"
    stopped.mkdir(parents=True)
    (stopped / "process.json").write_text(json.dumps({"pid": 2**22 + 1, "began": "1", "fingerprint": ""}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--folder", str(folder), "--stack", str(tmp_path / "up"), "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-m", "infra.metrics_server", *flags], cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    text = answer.read().decode()
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.1)
    finally:
        server.terminate()
        server.wait(10)
    assert "trip_train_done 1.0" in text and 'trip_service_running{service="mlflow"} 0.0' in text


def test_every_alert_has_a_section_in_the_run_book() -> None:
    headings = re.findall(r"^## (\w+)", (REPOSITORY / "docs" / "guide" / "runbook.md").read_text(), re.MULTILINE)
    for rule in RULES:
        assert rule["alert"] in headings
        assert rule["annotations"]["runbook"] == f"docs/guide/runbook.md#{rule['alert'].lower()}"


def test_the_panels_of_the_dashboard_do_not_overlap_and_have_their_own_numbers() -> None:
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert len(cells) == len(panels) and all(p["targets"] and p["title"] for p in panels)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["check config prometheus.yaml", "check rules alerts.yaml", "test rules alerts_test.yaml"]
)
def test_promtool_accepts(command: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    done = subprocess.run([promtool, *command.split()], cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
