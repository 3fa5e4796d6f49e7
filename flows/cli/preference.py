"""The commands of a preference study: `preference-study` builds one, `preference-serve` runs it, `preference-tally`
counts its votes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts

from flows.console import log, results
from flows.layout import EXPERIMENT
from flows.mlflow_store import tracking_address
from infra import storage
from infra.redaction import redact
from infra.settings import DEFAULT_ROOT
from tasks.records import UserError
from tasks.study.plan import PLAN_FILE, ExclusionRule, Platform, read_key, read_plan

if TYPE_CHECKING:
    from tasks.study.plan import Key, Plan
    from tasks.study.tally import Tally

DATABASE_VARIABLE = "TRIP_STUDY_DATABASE"
CLOSE_SECONDS = 2  # for connections that are open after the last answer


def preference_study(
    output: Annotated[str, cyclopts.Parameter(alias="-o")],
    system: list[str],
    key: str | None = None,
    real: str | None = None,
    photos: str | None = None,
    prompts: str | None = None,
    items: int | None = None,
    raters: int = 32,
    per_rater: int | None = None,
    gold: int = 4,
    repeats: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    size: int | None = None,
    seed: int = 0,
    title: str = "Which clip is better?",
    contact: str = "",
    platform: Platform = "none",
    completion_code: str = "",
    *,
    rule: ExclusionRule = ExclusionRule(),  # noqa: B008
) -> None:
    """Build a study in which raters compare clips of two or more systems, and print what it can show.

    Args:
        output: new folder for the plan, the page and the clips; it goes to the server.
        system: NAME=ADDRESS, once for each system: a folder of videos named after their items, a report's folder (the
            model's clips), or REPORT#ROW (real, frozen, or another method of the report).
        key: file for the sealed key, which says whose clip is whose; by default next to the output. It stays with you.
        real: the true clips for gold pairs, a folder or a report; by default those of the first report.
        photos: folder with the given photo of each item; by default the first frames of the true clips.
        prompts: CSV of the columns key and prompt; by default the captions of the first report.
        items: number of items, drawn with the seed; by default all that every system has, at most 256.
        raters: number of raters that are planned; there are places for twice as many.
        per_rater: pairs of each rater, without gold and repeated ones; by default all.
        gold: number of gold pairs, the true clip against itself shuffled or frozen.
        repeats: number of pairs shown twice, sides swapped; by default a tenth.
        frames: frames of each clip; by default the report's, or 16.
        fps: frames a second; by default the report's, or 4.
        size: pixels of a side, to which all clips are cropped and scaled; by default the report's, or 256.
        seed: seed of the draw of items.
        title: heading of the page; it must not name a system.
        contact: whom raters can ask, shown with the consent text.
        platform: where raters come from.
        completion_code: shown at the end, for Prolific and MTurk.
        rule: which raters the second tally leaves out, fixed before the first vote.
    """
    from tasks.study.build import StudySpec, build, parts
    from tasks.study.sources import parse_systems

    spec = StudySpec(
        systems=parse_systems(system),
        output=output,
        key=key,
        real=real,
        photos=photos,
        prompts=prompts,
        items=items,
        raters=raters,
        per_rater=per_rater,
        gold=gold,
        repeats=repeats,
        frames=frames,
        fps=fps,
        size=size,
        seed=seed,
        title=title,
        contact=contact,
        platform=platform,
        completion_code=completion_code,
        rule=rule,
    )
    plan = build(spec, log)
    for sentence in parts(plan):
        log(f"plan        {sentence}")
    results("preference-study", {"study": output, "plan": storage.join(output, PLAN_FILE), "sha256": plan.sha256})


def preference_serve(
    study: str, database: str | None = None, host: str = "127.0.0.1", port: int = 8010, behind_proxy: bool = False
) -> None:
    """Serve the page of a study and store its votes, until a signal ends it; the same command continues.

    Args:
        study: folder of the study, as preference-study wrote it.
        database: sqlite:///FILE or postgresql+psycopg2://HOST/NAME; by default TRIP_STUDY_DATABASE, else votes.db in
            the folder of the study. An address with a password goes by TRIP_STUDY_DATABASE.
        host: address to listen on; 0.0.0.0 stands for all addresses of this machine.
        port: port to listen on.
        behind_proxy: whether a reverse proxy on this machine names each caller in X-Forwarded-For.
    """
    import uvicorn

    from tasks.study.plan import BUNDLE
    from tasks.study.server import create_app
    from tasks.study.store import Store

    plan = read_plan(study)
    store = Store(database_address(database, study), plan)
    app = create_app(plan, store, Path(study) / BUNDLE)
    config = uvicorn.Config(
        app,
        host,
        port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=behind_proxy,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    results("preference-serve", {"page": f"http://{host}:{port}", "plan": plan.sha256})
    try:
        uvicorn.Server(config).run()
    finally:
        store.close()
    log("preference-serve: stopped; all confirmed votes are stored")


def preference_tally(
    study: str,
    key: str | None = None,
    database: str | None = None,
    report: str | None = None,
    output: Annotated[str | None, cyclopts.Parameter(alias="-o")] = None,
    tracking_uri: str | None = None,
    root: str = DEFAULT_ROOT,
) -> None:
    """Count the votes of a study: win rates with intervals, tests, agreement, and the paper's tally by rater.

    Args:
        study: folder of the study.
        key: the sealed key; by default next to the study.
        database: where the votes are, as for preference-serve.
        report: folder of an evaluation of the same items; its page gets the result next to its metrics.
        output: folder for the result; by default `tally` in the folder of the study.
        tracking_uri: address of the MLflow store, to log the result.
        root: the root whose MLflow store is used when tracking_uri is "".
    """
    from tasks.evaluation_record import read_evaluation
    from tasks.study.plan import KEY_FILE
    from tasks.study.results import correlations, tables, write_results
    from tasks.study.sources import report_rows
    from tasks.study.store import Store
    from tasks.study.tally import tally

    plan = read_plan(study)
    sealed = read_key(key or f"{storage.absolute(study)}-{KEY_FILE}", plan)
    store = Store(database_address(database, study), plan)
    try:
        votes = store.votes()
    finally:
        store.close()
    counted = tally(plan, sealed, votes)
    correlated, metrics = {}, {}
    if report is not None:
        record, rows = read_evaluation(report), report_rows(sealed.sources)
        correlated = correlations(counted, report, rows)
        metrics = {name: record.rows[row] for name, row in rows.items() if row in record.rows}
    output = output or storage.join(study, "tally")
    written = write_results(output, plan, sealed, votes, counted, correlated, metrics, report)
    for line in tables(plan, counted)[0].rows:
        log(f"tally       {line[0]}: {line[1]}, {line[2]}; p {line[5]}")
    if counted.excluded:
        log(f"tally       excluded by the rule of the plan: {counted.excluded}")
    if tracking_uri is not None:
        _track(plan, sealed, counted, output, tracking_address(tracking_uri or None, root))
    results("preference-tally", {address.rsplit("/", 1)[-1]: address for address in written})


def database_address(given: str | None, study: str) -> str:
    """The address of a study's database. Raises UserError for a flag with a password."""
    if given is not None and redact(given) != given:
        raise UserError(
            f"--database {given} contains a password, which other users of this machine can read; give the address in"
            f" the environment as {DATABASE_VARIABLE}"
        )
    return given or os.environ.get(DATABASE_VARIABLE) or f"sqlite:///{storage.absolute(study)}/votes.db"


def _track(plan: Plan, key: Key, counted: Tally, output: str, uri: str) -> None:
    """Logs the numbers and files of a tally to MLflow; the same votes are the same run."""
    from infra.telemetry import Tracking
    from tasks.records import digest
    from tasks.study.results import mlflow_metrics

    tracking = Tracking(uri, EXPERIMENT)
    tags = {"preference.plan_sha256": plan.sha256, "preference.systems": ", ".join(key.systems)}
    tracking.start_run(f"preference {plan.study}", key=f"preference-{digest(counted)}", tags=tags)
    tracking.metrics(mlflow_metrics(counted), 0)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("tally.json", "tally.html", "votes.csv"):
            (Path(scratch) / name).write_bytes(storage.read_bytes(storage.join(output, name)))
        tracking.artifacts(scratch, "preference")
        delivered = tracking.finish(wait_seconds=120)
    if delivered:
        log(f"tally       logged to {tracking.run_page}")
    else:
        reason = tracking.last_error or "no answer"
        log(f"tally       the store at {redact(uri)} did not accept the result ({reason}); repeat the command")
