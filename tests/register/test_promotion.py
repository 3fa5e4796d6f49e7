"""Promotion: the gate, one winner of a race, rollback, and a consistent log after a kill between any two calls."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flows.cli import promote as commands
from infra.tracking import connect
from tasks.records import UserError
from tasks.register.promotion import PromotionRefused, log_name, promote, rollback, sync_aliases
from tasks.register.report_facts import read_report
from tests.register.test_register import silent, write_report
from tests.support.kills import Killed
from tests.support.reports import write_record

PASSED = {"trip.gate": "passed", "trip.consumer_check": "answered with 16 frames of 32x32 as mp4"}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return connect(f"sqlite:///{tmp_path_factory.mktemp('promotion')}/mlflow.db")


@pytest.fixture
def name(request):
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


def make(client, name, *tags):
    """Registers a model with one version for each dict of tags, which are added to those of a passed gate."""
    client.create_registered_model(name)
    for number, more in enumerate(tags, 1):
        client.create_model_version(name, f"s3://models/{name}/{number}", tags={**PASSED, **more})


def aliases(client, name):
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def entries_of(client, name):
    return [(entry.action, entry.replaced, entry.version) for entry in sync_aliases(client, name).entries]


class Watched:
    """A client that calls `at` before its call number `n`, and counts its calls."""

    def __init__(self, client, n, at):
        self.client, self.n, self.at, self.calls = client, n, at, 0

    def __getattr__(self, method):
        def call(*args, **kwargs):
            if self.calls == self.n:
                self.calls += 1  # the calls of `at` are not counted
                self.at()
            else:
                self.calls += 1
            return getattr(self.client, method)(*args, **kwargs)

        return call


def kill():
    raise Killed


def test_a_promotion_tags_the_version_with_time_and_reason_and_a_repetition_changes_nothing(client, name):
    make(client, name, {"trip.report": "0123abcd"}, {})
    promote(client, name, "1")
    state = promote(client, name, "1")
    assert entries_of(client, name) == [("promote", "", "1")] and aliases(client, name) == {"champion": "1"}
    tags = state.versions["1"].tags
    assert tags["trip.promoted_at"] == state.entries[0].time.isoformat(timespec="seconds")
    assert "report 0123abcd passed" in tags["trip.promotion_reasons"] and "16 frames" in tags["trip.promotion_reasons"]
    promote(client, name, "2", "a better prior")
    assert aliases(client, name) == {"champion": "2", "previous": "1"}
    assert sync_aliases(client, name).entries[-1].reasons.endswith("a better prior")


def test_a_version_without_a_passed_gate_or_consumer_check_is_refused_with_every_reason(client, name):
    weak = {"trip.gate": "not passed", "trip.gate_reasons": "motion ratio 0.1", "trip.consumer_check": ""}
    make(client, name, weak)
    with pytest.raises(PromotionRefused, match=r"version 1 of .*motion ratio 0\.1\); its consumer check is missing"):
        promote(client, name, "1")
    assert aliases(client, name) == {} and entries_of(client, name) == []
    assert "motion ratio" in client.get_model_version(name, "1").tags["trip.promotion_refused"]
    with pytest.raises(UserError, match="has no version 5; it has 1"):
        promote(client, name, "5")
    with pytest.raises(UserError, match="no model 'absent'"):
        promote(client, "absent", "1")


def test_a_report_that_compared_with_another_champion_is_refused(client, name):
    first, second = {"trip.report": "r1", "trip.judged_model": "m1"}, {"trip.report": "r2", "trip.judged_model": "m2"}
    by_report, by_model = {"trip.compared_report": "r1"}, {"trip.compared_report": "r9", "trip.compared_model": "m1"}
    make(client, name, first, second, by_report, by_model)
    promote(client, name, "2")
    for version in ("3", "4"):
        with pytest.raises(PromotionRefused, match="another model than version 2, which is champion now"):
            promote(client, name, version)
    promote(client, name, "1")
    promote(client, name, "3")
    rollback(client, name)
    promote(client, name, "4")
    assert aliases(client, name) == {"champion": "4", "previous": "1"}


def test_a_report_names_its_model_and_the_champion_of_the_comparison(tmp_path):
    def report(folder, model, champion=None):
        compared = {"champion": champion} if champion else {}
        return write_record(tmp_path / folder, provenance={"model_sha256": model, "folders": compared})

    old = report("old", "m1")
    new = report("new", "m2", old)
    assert read_report(old).origin() == {"trip.judged_model": "m1"}
    compared = {"trip.compared_report": read_report(old).record.digest, "trip.compared_model": "m1"}
    assert read_report(new).origin() == {"trip.judged_model": "m2"} | compared
    (tmp_path / "old" / "report.json").unlink()
    assert read_report(new).origin() == {"trip.judged_model": "m2", "trip.compared_report": "cannot be read"}


def test_rollbacks_skip_deleted_versions_and_end_with_an_error(client, name):
    make(client, name, {}, {}, {}, {})
    with pytest.raises(PromotionRefused, match="no champion, so there is nothing to roll back"):
        rollback(client, name)
    for version in "1234":
        promote(client, name, version)
    rollback(client, name, "blurred faces")
    assert aliases(client, name) == {"champion": "3", "previous": "2"}
    assert client.get_model_version(name, "4").tags["trip.rollback_reason"] == "blurred faces"
    client.delete_model_version(name, "2")
    rollback(client, name)
    assert aliases(client, name) == {"champion": "1"}
    with pytest.raises(PromotionRefused, match="before version 1 no other version"):
        rollback(client, name)
    with pytest.raises(PromotionRefused, match=r"rolled back on .* \(blurred faces\); give a --reason"):
        promote(client, name, "4")
    promote(client, name, "4", "the faces were the data's")
    assert aliases(client, name) == {"champion": "4", "previous": "1"}


def test_a_rollback_returns_to_aliases_that_are_older_than_the_log(client, name):
    make(client, name, {}, {}, {})
    client.set_registered_model_alias(name, "previous", "1")
    client.set_registered_model_alias(name, "champion", "2")
    promote(client, name, "3")
    rollback(client, name)
    assert aliases(client, name) == {"champion": "2", "previous": "1"}


def test_an_alias_moved_by_hand_and_an_entry_deleted_by_hand_are_repaired(client, name):
    make(client, name, {}, {}, {})
    for version in "123":
        promote(client, name, version)
    client.set_registered_model_alias(name, "champion", "1")
    assert sync_aliases(client, name).champion == aliases(client, name)["champion"] == "3"
    client.delete_model_version(log_name(name), "3")
    promote(client, name, "1")
    assert aliases(client, name) == {"champion": "1", "previous": "2"}


def start_over(client, name, *tags):
    """Deletes a model and registers another one with the same name and version numbers."""
    client.delete_registered_model(name)
    make(client, name, *tags)


FAILED = {"trip.gate": "not passed", "trip.gate_reasons": "motion ratio 0.1"}


def test_a_model_registered_again_inherits_nothing_from_the_log_of_the_deleted_one(client, name):
    make(client, name, {}, {})
    promote(client, name, "1")
    promote(client, name, "2")
    rollback(client, name, "blurred faces")
    start_over(client, name, FAILED, {})
    state = sync_aliases(client, name)
    assert state.champion == "" and state.earlier == () and aliases(client, name) == {}
    with pytest.raises(PromotionRefused, match="motion ratio"):
        promote(client, name, "1")
    with pytest.raises(PromotionRefused, match="no other version"):
        rollback(client, name)
    assert aliases(client, name) == {} and "trip.promoted_at" not in client.get_model_version(name, "1").tags
    promote(client, name, "2")  # the rolled back version was another one
    assert aliases(client, name) == {"champion": "2"} and entries_of(client, name)[-1] == ("promote", "1", "2")
    with pytest.raises(PromotionRefused, match="no other version"):
        rollback(client, name)
    assert sync_aliases(client, name).champion == "2"


def test_entries_without_times_do_not_name_newer_versions(client, name):
    make(client, name, {}, FAILED)
    client.create_registered_model(log_name(name))
    tags = {"action": "promote", "after": "0", "champions": "1", "replaced": " ", "reasons": "good"}
    client.create_model_version(log_name(name), f"models:/{name}/1", tags=tags)
    assert sync_aliases(client, name).champion == aliases(client, name)["champion"] == "1"
    start_over(client, name, FAILED)
    assert sync_aliases(client, name).champion == "" and aliases(client, name) == {}


def test_a_version_registered_again_after_its_model_was_deleted_needs_its_own_passed_gate(
    client, name, tiny_model, tmp_path
):
    from tasks.register.registry import RegisterSpec, register

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    good = RegisterSpec(str(tiny_model), write_report(tmp_path / "good"), uri, name, check_steps=1)
    assert register(good, silent).promoted
    connect(uri).delete_registered_model(name)
    weak = replace(good, report=write_report(tmp_path / "weak", passed=False))
    again = register(weak, silent)
    assert again.version == "1" and not again.promoted and again.aliases == ("candidate",)
    assert register(good, silent).promoted  # a new version, of the same model and report as the deleted one


def test_live_fails_for_a_deleted_version(tmp_path):
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    make(client, "trip", {}, {})
    for version in "12":
        promote(client, "trip", version)
    client.delete_model_version("trip", "2")
    with pytest.raises(UserError, match="version 2 of trip, live according to the log, was deleted; promote another"):
        commands.live(root=str(tmp_path))
    rollback(client, "trip")
    assert aliases(client, "trip") == {"champion": "1"}
    start_over(client, "trip", {})
    with pytest.raises(UserError, match="version 1 of trip, live according to the log, was deleted"):
        commands.live(root=str(tmp_path))


def act(client, name, action):
    promote(client, name, "3", "again") if action == "promote" else rollback(client, name, "blurred faces")


@pytest.mark.parametrize("action", ["promote", pytest.param("rollback", marks=pytest.mark.slow)])
def test_a_kill_between_any_two_calls_is_completed_by_the_next_caller(client, name, action):
    make(client, name, {}, {}, {})
    promote(client, name, "1")
    written = set()
    for n in range(100):
        promote(client, name, "2", "again")
        before = sync_aliases(client, name).entries
        watched = Watched(client, n, kill)
        with contextlib.suppress(Killed):
            act(watched, name, action)
        after = sync_aliases(client, name).entries
        new = [(entry.action, entry.replaced) for entry in after[len(before) :]]
        assert new in ([], [(action, "2")])
        written.add(len(new))
        assert aliases(client, name)["champion"] == after[-1].version
        if new:
            version, tag = ("3", "trip.promoted_at") if action == "promote" else ("2", "trip.rolled_back_at")
            assert client.get_model_version(name, version).tags[tag] == after[-1].time.isoformat(timespec="seconds")
        if watched.calls <= n:
            break
    assert written == {0, 1} and n > 8


@pytest.mark.slow
@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_rival_between_any_two_calls_leaves_one_winner_and_aliases_that_agree_with_the_log(client, name, action):
    make(client, name, {}, {}, {}, {})
    promote(client, name, "1")
    sentences = []
    for n in range(100):
        promote(client, name, "2", "again")
        watched = Watched(client, n, lambda: promote(client, name, "4", "again"))
        try:
            act(watched, name, action)
        except PromotionRefused as error:
            sentences.append(str(error))
        actual, state = aliases(client, name), sync_aliases(client, name)  # read before they are synchronised
        earlier = {"previous": state.earlier[-1].number} if state.earlier else {}
        assert actual == {"champion": state.champion, **earlier}
        if watched.calls <= n:
            break
    remedy = {"promote": "evaluate version 3 against version 4", "rollback": "run `live`"}[action]
    message = f"version 4 of {name} was promoted meanwhile; {remedy}"
    assert sentences and all(sentence.startswith(message) for sentence in sentences)
    entries = state.entries
    assert [entry.replaced for entry in entries[1:]] == [entry.version for entry in entries[:-1]]


def test_the_commands_show_the_champion_and_errors(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match=r"no MLflow store at .*register-trip first"):
        commands.live(root=str(tmp_path))
    client = connect(uri)
    make(client, "trip", {"lineage.recipe": "demo"}, {"lineage.recipe": "paper"})
    with pytest.raises(UserError, match="no version of trip is live"):
        commands.live(root=str(tmp_path))
    commands.promote(1, root=str(tmp_path))
    commands.promote(2, root=str(tmp_path))
    commands.rollback("blurred faces", root=str(tmp_path))
    capsys.readouterr()
    commands.live(tracking_uri=uri)
    shown = capsys.readouterr().out
    for piece in ("version 1 is live", "why        rollback: blurred faces", "previous   none", "recipe  demo"):
        assert piece in shown
    assert "3  20" in shown and "rollback version 1 instead of 2: blurred faces" in shown


# Reads rounds from its input: forks a promoter for each version, lets all of them read before the first writes, kills
# one of them, and prints the result of each. Forks need no imports.
PROMOTERS = """
import json, os, random, signal, sys, time
from pathlib import Path
from infra.tracking import connect
from tasks.register.promotion import PromotionRefused, promote

class Together:
    def __init__(self, client, marks, own, all):
        self.client, self.marks, self.own, self.all = client, marks, own, all
    def __getattr__(self, name):
        return getattr(self.client, name)
    def create_model_version(self, *args, **kwargs):
        (self.marks / self.own).touch()
        while not all((self.marks / mark).exists() for mark in self.all):
            time.sleep(0.005)
        return self.client.create_model_version(*args, **kwargs)

for line in sys.stdin:
    marks, versions, victim, late, pause = json.loads(line)
    marks = Path(marks)
    marks.mkdir()
    children = {}
    for version in versions:
        child = os.fork()
        if not child:
            try:
                promote(Together(connect(sys.argv[1]), marks, version, versions), "trip", version)
                result = "promoted"
            except PromotionRefused as error:
                result = str(error)
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
                (marks / version).touch()  # the others need not wait
            os.write(1, (json.dumps([version, result]) + "\\n").encode())
            os._exit(0)
        children[version] = child
    while late and not all((marks / mark).exists() for mark in versions):
        time.sleep(0.005)
    time.sleep(pause)
    os.kill(children[victim], signal.SIGKILL)
    (marks / victim).touch()
    for child in children.values():
        os.waitpid(child, 0)
    print("null", flush=True)
"""


@pytest.mark.slow
def test_eight_processes_at_once_on_postgresql_make_one_champion_a_round(mlflow_server, tmp_path):
    uri = mlflow_server(str(tmp_path / "artifacts"))
    client = connect(uri)
    make(client, "trip", *[{}] * 16)
    promoters = subprocess.Popen(
        [sys.executable, "-c", PROMOTERS, uri],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"PYTHONPATH": "."},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert promoters.stdin and promoters.stdout
    try:
        for turn in range(8):
            versions = [str(8 * (turn % 2) + number) for number in range(1, 9)]
            # Odd rounds kill after all have read, some milliseconds into the race; even ones anywhere before.
            pause = 0.04 * turn if turn % 2 else 0.1 * turn
            order = [str(tmp_path / f"marks-{turn}"), versions, versions[turn], bool(turn % 2), pause]
            promoters.stdin.write(json.dumps(order) + "\n")
            promoters.stdin.flush()
            answers = [json.loads(line) for line in iter(promoters.stdout.readline, "null\n")]
            actual = aliases(client, "trip")  # before `sync_aliases`
            entries = sync_aliases(client, "trip").entries
            assert len(entries) == turn + 1 and len(answers) in (7, 8)
            winner = entries[-1].version
            assert actual["champion"] == winner and actual.get("previous", "") == entries[-1].replaced
            for version, result in answers:
                lost = f"version {winner} of trip was promoted meanwhile; evaluate version {version} against"
                assert result.startswith("promoted" if version == winner else lost), (version, winner, result)
            assert winner in [version for version, _ in answers] or winner == versions[turn]
    finally:
        promoters.kill()
        promoters.communicate()
    lines = client.search_model_versions(f"name = '{log_name('trip')}'")
    assert sorted(int(line.version) for line in lines) == list(range(1, len(lines) + 1)) and len(lines) > 40
    assert [entry.replaced for entry in entries[1:]] == [entry.version for entry in entries[:-1]]


@pytest.mark.slow
def test_from_registration_to_rollback_on_postgresql_and_s3(mlflow_server, s3_folder, tiny_model, tmp_path):
    import mlflow
    import s3fs

    from tasks.register.consumer import addresses, call_as_consumer
    from tasks.register.packaging import drawn_photo
    from tasks.register.registry import RegisterSpec, register

    uri = mlflow_server(f"{s3_folder}/mlflow")
    spec = RegisterSpec(str(tiny_model), write_report(tmp_path / "one"), uri, check_steps=2)
    first = register(spec, silent)
    second = register(replace(spec, report=write_report(tmp_path / "two", note="a second evaluation")), silent)
    weak = register(replace(spec, report=write_report(tmp_path / "weak", passed=False)), silent)
    assert first.promoted and second.promoted and not weak.promoted
    assert weak.reasons == ("motion ratio 0.1 lies outside 0.5 to 1.5",)
    client = connect(uri)
    assert aliases(client, "trip") == {
        "candidate": weak.version,
        "champion": second.version,
        "previous": first.version,
    }
    with pytest.raises(PromotionRefused, match="motion ratio"):
        promote(client, "trip", weak.version)
    rollback(client, "trip", "blurred faces")
    assert aliases(client, "trip") == {"candidate": weak.version, "champion": first.version}
    assert [file for file in s3fs.S3FileSystem().find(s3_folder) if file.endswith(".safetensors")]
    with addresses(uri):
        assert mlflow.pyfunc.load_model("models:/trip@champion").metadata.run_id == first.run_id
        assert call_as_consumer("models:/trip@champion", drawn_photo(32), "a red circle", 2).startswith("answered")
