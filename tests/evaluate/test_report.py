"""The score sheet, the gate's rule and the report, on drawn clips with known motion."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from flows.evaluate_trip import track_evaluation
from infra.tracking import connect
from tasks.evaluate.gate import Gate
from tasks.evaluate.progress import Ticks, duration
from tasks.evaluate.protocol.presets import AS_PUBLISHED, load_preset
from tasks.evaluate.protocol.protocol import Item, Protocol
from tasks.evaluate.report.aggregate import Summary, summarise
from tasks.evaluate.report.distances import Sums, together
from tasks.evaluate.report.figures import Example, side_by_side, strip_png
from tasks.evaluate.report.page import build
from tasks.evaluate.report.tables import Table, all_tables, own_table, paper_tables
from tasks.evaluate.spec import EvaluateReport
from tasks.evaluate.systems import measure
from tasks.ingest.drawing import draw_clip
from tasks.metrics.extractors.extractor import NOT_COMPARABLE, ExtractorInfo, MetricKind, extract_features
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.metrics.extractors.loading import load_extractors
from tasks.metrics.frechet import kernel_distance
from tasks.metrics.statistics import Estimate, student_quantile
from tasks.video.decode import read_clip
from tests.support.reports import write_record


def real_clip(seed: int) -> np.ndarray:
    return draw_clip(seed, 64)[0][::3][:16]


def items(count: int) -> list[Item]:
    return [Item(f"clip{i}_000", f"clip{i}", i, draw_clip(i, 8)[1], i) for i in range(count)]


def noisy(pixels: np.ndarray, seed: int, sd: float = 4.0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sd, pixels.shape[1:])
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


EXTRACTORS = load_extractors(ExtractorFiles())
NAMES = [extractor.info for extractor in EXTRACTORS]


def protocol_of(count: int) -> Protocol:
    return Protocol("held-out", load_preset("held-out"), tuple(items(count)), 16, 4.0, 64)


def made(make: str, i: int) -> np.ndarray:
    real = real_clip(i)
    return {
        "real": real,
        "frozen": np.repeat(real[:1], 16, axis=0),
        "noisy": noisy(real, i),
        "half speed": real[np.arange(16) // 2],
        "shuffled": real[np.random.default_rng(i).permutation(16)],
    }[make]


KEPT: dict[tuple[object, ...], Any] = {}


def kept(work: Callable[..., Any], *inputs: Any) -> Any:
    """What `work` returns for these inputs, computed once: the tables of this file share most of their clips."""
    key = (work, *(value.tobytes() if isinstance(value, np.ndarray) else value for value in inputs))
    if key not in KEPT:
        KEPT[key] = work(*inputs)
    return KEPT[key]


def summarised(protocol: Protocol, clips: dict[str, list[np.ndarray]]) -> Summary:
    """The table of these clips by row; of a generated one the given image takes the place of frame 1."""
    real, items_ = clips["real"], protocol.items
    firsts = {row: [None if row in ("frozen", "real") else p[0] for p in found] for row, found in clips.items()}
    shown = {row: [np.concatenate([real[i][:1], p[1:]]) for i, p in enumerate(found)] for row, found in clips.items()}
    records = {row: [kept(measure, *of) for of in zip(shown[row], real, firsts[row], strict=True)] for row in clips}

    def features(name: ExtractorInfo, row: str) -> list[dict[str, np.ndarray]]:
        extractor = next(extractor for extractor in EXTRACTORS if extractor.info == name)
        return [
            kept(extract_features, extractor, item.key, shown[row][i], item.caption) for i, item in enumerate(items_)
        ]

    return summarise(protocol, items_, records, features, NAMES, bootstrap=200)


def summary_of(make: str, *others: str, count: int = 6) -> Summary:
    rows = {"frozen": "frozen", **{other: other for other in others}, "trip": make, "real": "real"}
    return summarised(protocol_of(count), {row: [made(of, i) for i in range(count)] for row, of in rows.items()})


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summary_of("noisy")


def values(summary: Summary, row: str) -> dict[str, float]:
    """Values by the start of their name: the hash of an extractor is not what is tested here."""
    return {name.split("@")[0] + name.partition("/")[2]: e.value for name, e in summary.metrics[row].items()}


def test_reference_rows_stand_where_theory_puts_them(summary: Summary):
    frozen, real = values(summary, "frozen"), values(summary, "real")
    assert frozen["rfc-clip-random4"] == pytest.approx(100) and frozen["rfc-clip-randomall"] == pytest.approx(100)
    assert frozen["motion_ratio"] == 0 and real["motion_ratio"] == 1
    assert real["clip_distance"] == 0 < frozen["clip_distance"]
    assert real["rfc-clip-randomall"] < 100
    assert real["rfd-app"] > 0  # the floor is the distance of disjoint halves, not of a set to itself


def test_real_frames_as_generated_ones_score_like_the_real_row():
    result = summary_of("real")
    trip, real = values(result, "trip"), values(result, "real")
    for name in ("rfc-clip-random4", "rfc-clip-randomall", "motion_ratio", "clip_distance"):
        assert trip[name] == pytest.approx(real[name], abs=1e-9)
    assert trip["rfd-app"] == 0 and trip["rfd-motion"] == 0
    assert trip["first_frame_psnr_db"] == 100 and trip["first_frame_ssim"] == pytest.approx(1)


def test_freezing_slowing_and_shuffling_are_seen_by_the_right_metric():
    table = summary_of("frozen", "half speed", "shuffled", count=8)
    slow, shuffled, still, real = (values(table, row) for row in ("half speed", "shuffled", "trip", "real"))
    assert slow["motion_ratio"] == pytest.approx(0.5, abs=0.08)
    assert shuffled["motion_ratio"] > 2
    assert shuffled["rfc-clip-randomall"] < real["rfc-clip-randomall"]
    floor = real["rfd-motion"]
    assert still["rfd-motion"] > floor and shuffled["rfd-motion"] > 10 * floor
    assert table.floors[NAMES[2].metric].value == floor
    assert table.metrics["trip"]["clip_distance_minus_frozen"].value == 0
    # Of the still itself TRIP differs by nothing, of the shuffled clips by an interval that leaves out 0.
    minus = table.differences["frozen"]["clip_distance"]
    assert (minus.value, minus.ci_low, minus.ci_high) == (0, 0, 0)
    motion = table.differences["shuffled"][NAMES[2].metric]
    assert motion.ci_low is not None and 0 < motion.ci_low < motion.value
    assert motion.value == pytest.approx(shuffled["rfd-motion"] - still["rfd-motion"])


def test_distances_of_categories_are_the_mean_of_their_own():
    """Of two categories, each judged alone, not pooled; the numbers of clips are told by category."""
    plain = protocol_of(16)
    of_two = replace(plain, items=tuple(replace(item, category="ab"[i % 2]) for i, item in enumerate(plain.items)))
    clips = {
        row: [made(of, i) for i in range(16)] for row, of in (("frozen", "frozen"), ("trip", "noisy"), ("real", "real"))
    }
    alone = [
        summarised(replace(plain, items=plain.items[of::2]), {row: found[of::2] for row, found in clips.items()})
        for of in (0, 1)
    ]
    together = summarised(of_two, clips)
    assert together.counts["clips_by_category"] == {"a": 8, "b": 8}
    for name in (NAMES[1].metric, NAMES[1].kernel_metric):
        for row in ("trip", "real"):
            expected = np.mean([part.metrics[row][name].value for part in alone])
            assert together.metrics[row][name].value == pytest.approx(expected)
    found, parts = (
        together.differences["frozen"][NAMES[1].metric],
        [p.differences["frozen"][NAMES[1].metric] for p in alone],
    )
    widths = [part.ci_high - part.value for part in parts]
    assert found.ci_high is not None and max(widths) / 2 < found.ci_high - found.value < np.hypot(*widths) / 2


def test_variances_of_categories_add_with_the_degrees_of_freedom_of_welch():
    """Of equal variances the degrees add; a category that varies alone keeps its own."""
    one, none = Estimate(2.0, 1.0, 3.0), Estimate(4.0, 4.0, 4.0)
    equal = together([one, one], [8, 8])
    error = 1 / student_quantile(7) / 2**0.5
    assert (equal.value, equal.ci_high) == pytest.approx((2.0, 2.0 + student_quantile(14) * error))
    alone = together([one, none], [8, 8])
    assert (alone.value, alone.ci_low, alone.ci_high) == pytest.approx((3.0, 2.5, 3.5))
    assert together([none, none], [8, 8]) == none
    assert together([one, Estimate(4.0)], [8, 8]) == Estimate(3.0)


def test_a_value_at_infinity_needs_a_quarter_of_twice_as_many_clips_as_features():
    for clips, there in ((16, True), (15, False)):
        rng, protocol = np.random.default_rng(6), protocol_of(clips)
        by_row = {row: [rng.normal(size=(1, 2)) for _ in range(clips)] for row in ("trip", "real")}
        sums = Sums(protocol.items, ("trip", "real"), 100)
        sums.add_distances(NAMES[1], by_row)
        assert (NAMES[1].metric in sums.infinity["trip"]) is there
        x, y = (np.concatenate(by_row[row]) for row in ("trip", "real"))
        names = [item.clip for item in protocol.items]
        assert len(set(names)) == clips
        assert sums.metrics["trip"][NAMES[1].kernel_metric].value == pytest.approx(kernel_distance(x, y, names, names))
        halves = kernel_distance(y[::2], y[1::2])  # of other clips: nothing is left out between them
        assert sums.floors[NAMES[1].kernel_metric].value == pytest.approx(halves)


def written(*metrics: str, categories: dict[str, int] | None = None) -> Summary:
    """Numbers that nobody measured, of a still, another method, TRIP and the real clips."""
    rows = ("frozen", "My_Method", "trip", "real")
    found = {row: {name: Estimate(10.0 * i + j, 1, 99) for j, name in enumerate(metrics)} for i, row in enumerate(rows)}
    counts = {"asked": 9, "items": 8, "clips": 8, "clips_by_category": categories or {}}
    counts["excluded"] = {"My_Method": {"too_short": 1}}
    minus = {row: found[row] for row in rows if row != "trip"}
    return Summary(rows, found, minus, {"FVD": Estimate(3.0)}, {"trip": {"FVD": Estimate(5.0)}}, {}, [], counts, [])


OFFICIAL = [
    ExtractorInfo("F-Consistency", True, "0" * 64, ("clip_frames",), "", MetricKind.CONSISTENCY),
    ExtractorInfo("FVD", True, "1" * 64, ("i3d",), "", MetricKind.CLIP_SETS, 16),
    ExtractorInfo("FID", True, "2" * 64, ("inception",), "", MetricKind.FRAME_SETS),
]


def test_tables_never_name_a_metric_it_is_not(summary: Summary):
    own, papers = own_table(summary, NAMES), paper_tables(summary, NAMES, protocol_of(6))
    assert own.header[1:] == ["Prior only: a still", "TRIP (this run)", "Real video"]
    of_extractors = [row for row in own.rows if row[0].startswith("r")]
    assert len(of_extractors) == 10 and all(NOT_COMPARABLE in cell for row in of_extractors for cell in row[1:])
    for row in own.rows:
        assert not any(name in row[0] for name in ("FVD", "FID", "F-Consistency"))
    for paper in papers.values():
        for row in paper.rows[:3]:
            assert all(NOT_COMPARABLE in cell for cell in row[1:4]) and AS_PUBLISHED not in row[4]
        assert all(AS_PUBLISHED in row[4] and NOT_COMPARABLE not in "".join(row) for row in paper.rows[3:])
        assert paper.rows[-1][:4] == ["TRIP", "95.36", "96.41", "38.9"]
        assert "only their order" in paper.notes[0]  # the clips are not WebVid's


def test_the_protocol_decides_which_of_the_papers_tables_are_filled():
    webvid, dtdb, msrvtt = (
        replace(protocol_of(8), rules=load_preset(name)) for name in ("webvid-2048", "dtdb-clean", "msrvtt-all-20")
    )
    found = written("F-Consistency/4", "F-Consistency/all", "FVD", "FID", categories={"fire": 4, "clouds": 4})
    tables = paper_tables(found, OFFICIAL, webvid)
    assert list(tables) == ["table_1", "table_5", "table_6"]
    assert [row[0] for row in tables["table_5"].rows[4:]] == ["TRIP_C", "TRIP_TE", "TRIP"]
    assert tables["table_1"].rows[1][:4] == [
        "My_Method",
        "10.00 (1.00 to 99.00)",
        "11.00 (1.00 to 99.00)",
        "12 (1 to 99)",
    ]
    assert not any(NOT_COMPARABLE in cell for row in tables["table_1"].rows for cell in row)
    (two,) = paper_tables(found, OFFICIAL, dtdb).values()
    assert two.header[1:3] == ["FID \u2193", "FVD \u2193"] and "mean over 2 categories" in two.notes[0]
    (three,) = paper_tables(found, OFFICIAL, msrvtt).values()
    assert "T2V and I2V rows are not comparable" in three.notes[-1]
    assert ["Make-A-Video (T2V)", "13.17", "-"] in [row[:3] for row in three.rows]


def test_floors_limits_differences_and_exclusions_are_told():
    tables = all_tables(written("FVD", "clip_distance"), OFFICIAL, protocol_of(8))
    assert tables["limits"].rows == [["FVD (lower)", "3", "-", "-", "5"]]
    halves = "two halves of the real clips, not paired"
    assert halves in tables["this_run"].rows[0][-1] and halves not in tables["this_run"].rows[1][-1]
    assert tables["differences"].header[1:] == [
        f"{n} minus TRIP" for n in ("Prior only: a still", "My_Method", "Real video")
    ]
    assert ["left out of all rows: My_Method lacks (too_short)", "1"] in tables["counts"].rows


def test_latex_is_a_whole_fragment_with_nothing_left_unescaped():
    odd = Table(
        "50% & more_", ["Approach", "F-Consistency_4 \u2191"], [["[a]\\{b}~^$#", "1\nnot so"], ["TRIP^W", "<|>"]]
    )
    text = odd.latex()
    lines = text.splitlines()
    assert r"\caption{50\% \& more\_}" in lines and r"Approach & F-Consistency$_\mathrm{4}$ $\uparrow$ \\" in lines
    assert r"{[}a]\textbackslash{}\{b\}\textasciitilde{}\textasciicircum{}\$\# & " in text
    assert r"\begin{tabular}[t]{@{}l@{}}1\\{\tiny not so}\end{tabular} \\" in text
    assert r"TRIP$^\mathrm{W}$ & \textless{}\textbar{}\textgreater{} \\" in lines
    for table in all_tables(written("FVD"), OFFICIAL, protocol_of(8)).values():
        text = table.latex()
        plain = re.sub(r"\\[\\{}&%$#_]", "", text)
        assert plain.count("{") == plain.count("}") and text.count(r"\begin{") == text.count(r"\end{") >= 2
        body = plain[plain.index(r"\toprule") : plain.index(r"\bottomrule")]
        assert {line.count("&") for line in body.splitlines() if "&" in line} == {len(table.header) - 1}


def test_report_files_open_and_repeat(summary: Summary):
    examples = [Example(f"clip{i}_000", draw_clip(i, 8)[1], real_clip(i), noisy(real_clip(i), i)) for i in range(2)]
    refused, provenance = Gate(False, ("few clips",)), {"seed": 0, "a": {"b": "c"}}
    arguments = (summary, refused, NAMES, protocol_of(6), examples, provenance)
    files = build(*arguments)
    again = build(*arguments)
    assert set(files) == set(again)
    for name in files:  # the page holds the mp4 files, and libx264 does not always repeat itself to the last bit
        assert name.endswith((".mp4", ".html")) or files[name] == again[name], name
    assert {"report.md", "report.html", "consistency.png", "lag.png", "tables/table_1.tex"} <= set(files)
    strip = Image.open(io.BytesIO(files["strips/clip0_000.png"]))
    assert strip.width > 4 * 192 and strip.height > 3 * 192
    video = read_clip(files["videos/clip0_000.mp4"], 16, 4.0, 192)
    assert video.pixels.shape == (16, 192, 192, 3)
    assert files["videos/clip0_000.gif"][:3] == b"GIF"
    rows = list(csv.DictReader(io.StringIO(files["per_clip.csv"].decode())))
    assert len(rows) == 6 and float(rows[0]["distance_trip"]) < float(rows[0]["distance_frozen"])
    assert parquet.read_table(io.BytesIO(files["per_clip.parquet"])).to_pylist() == summary.per_clip
    page = files["report.html"].decode()
    assert "http" not in page and page.count("data:video/mp4") == 2 and "few clips" in page
    assert "| a.b | c |" in files["report.md"].decode()


def test_all_methods_play_in_one_picture_and_stand_in_the_strip():
    real, drawn = real_clip(0), real_clip(1)
    pair = Example("a", "a ball", real, drawn)
    four = replace(pair, others={"VideoComposer": drawn, "T2V-Zero": real})
    assert side_by_side(pair).shape == (16, 224, 416, 3)
    shown = side_by_side(four)
    assert shown.shape == (16, 448, 416, 3)
    assert (shown[5, 28:220, 200:392] == drawn[5].repeat(3, 0).repeat(3, 1)).all()  # TRIP stands right of the real clip
    assert (shown[5, 248:440, 200:392] == real[5].repeat(3, 0).repeat(3, 1)).all()
    heights = [Image.open(io.BytesIO(strip_png(example))).height for example in (pair, four)]
    assert heights[1] - heights[0] == 2 * (192 + 4)
    three = side_by_side(replace(pair, others={"base": real}))  # in one line, the untrained base before TRIP
    assert three.shape == (16, 224, 608, 3)
    assert (three[5, 28:220, 200:392] == real[5].repeat(3, 0).repeat(3, 1)).all()
    assert (three[5, 28:220, 400:592] == drawn[5].repeat(3, 0).repeat(3, 1)).all()


def test_an_evaluation_is_one_mlflow_run_linked_to_model_data_and_code(tmp_path: Path):
    made_of = ("model_sha256", "dataset_manifest_sha256", "protocol_sha", "protocol", "model", "dataset")
    rows, gate = {"trip": {"clip_distance": Estimate(0.1)}}, Gate(False, ("few clips",))
    provenance = {name: f"the {name}" for name in made_of}
    write_record(tmp_path, False, gate.reasons, rows=rows, files=("report.md",), provenance=provenance)
    (tmp_path / "report.md").write_text("# Evaluation")
    report = EvaluateReport(str(tmp_path), "k", {}, gate, 8, 8, ("report.md",), 0.0)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    pages = [track_evaluation.fn(report, "data", store) for _ in range(2)]
    assert pages[0] == pages[1] != ""
    client = connect(store)
    (run,) = client.search_runs([client.get_experiment_by_name("trip").experiment_id])
    assert run.data.metrics == {"trip/clip_distance": 0.1}
    assert run.data.tags["evaluation.model_sha256"] == "the model_sha256"
    assert run.data.tags["evaluation.code_version"] and run.inputs.dataset_inputs[0].dataset.name == "latents"
    assert {f.path for f in client.list_artifacts(run.info.run_id, "evaluation")} >= {"evaluation/report.md"}


def test_still_source_clips_have_no_motion_ratio_and_fail_the_gate():
    still = [made("frozen", 0)] * 2
    result = summarised(protocol_of(2), dict.fromkeys(("frozen", "trip", "real"), still))
    assert "motion_ratio" not in result.metrics["trip"] and result.per_clip[0]["motion_ratio"] is None


def test_clips_of_fewer_than_four_frames_are_an_error():
    short = [real_clip(0)[:3]] * 2
    with pytest.raises(ValueError, match="first 4 frames asked of a video of 3"):
        summarised(protocol_of(2), dict.fromkeys(("frozen", "trip", "real"), short))


def test_ticks_tell_what_is_left():
    now, lines = [0.0], []
    ticks = Ticks("generate", 40, lines.append, done=10, every_seconds=5, clock=lambda: now[0])
    for seconds in (2.0, 4.0, 30.0):
        now[0] = seconds
        ticks.tick(5)
    assert lines[0] == "generate   10/40 clips found from before"
    assert lines[1].split() == ["generate", "15/40", "clips", "38%", "0.40", "s/clip", "left", "10s"]
    assert lines[2].split()[-2:] == ["left", "30s"] and len(lines) == 3
    assert [duration(s) for s in (41.6, 185, 7620)] == ["42s", "3m05s", "2h07m"]
