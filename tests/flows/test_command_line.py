"""What the user at the terminal sees: sentences instead of tracebacks, exit codes, one command at a time on a root."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
from prefect import Flow
from prefect.utilities.callables import parameter_schema

from flows import layout
from flows.cli.app import main, parse, sentence, user_error
from flows.console import tick_line
from flows.evaluate_trip import evaluate_trip
from flows.prepare_latents import prepare_latents
from flows.register_trip import register_trip
from flows.reproduce import reproduce
from flows.source import SourceOptions
from flows.train_trip import train_trip
from infra.cluster import ray_session
from tasks.encode.job import prepare
from tasks.encode.spec import FilterSpec, PrepareSpec
from tasks.ingest.demo import FIRST_SEED, write_demo_corpus
from tasks.ingest.sources import count_rows, read_rows
from tasks.ingest.spec import SourceSpec
from tasks.records import ClipRef, UserError
from tasks.shards import ShardDataset


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address where nobody answers: these tests end before a flow would ask it."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")


def test_flags_follow_from_the_signature() -> None:
    given = parse(["train-trip", "--recipe", "paper", "--root", "s3://bucket/run", "--dataset", "s3://bucket/data"])
    assert given == {
        "recipe": "paper",
        "source": None,
        "root": "s3://bucket/run",
        "base": None,
        "dataset": "s3://bucket/data",
        "tracking_uri": None,
        "start": "base",
        "profile": 0,
        "values": None,
        "options": SourceOptions(),
    }


MSRVTT = {
    "videos": [{"video_id": f"video{n}", "split": "train" if n else "test"} for n in range(5)],
    "sentences": [{"video_id": f"video{n}", "caption": f"caption {n}"} for n in range(5)],
}
READINGS = [
    ("MSRVTT.json", []),
    ("MSRVTT.json", ["--split", "train", "--captions", "all"]),
    ("own.csv", ["--columns.key", "id", "--columns.url", "link", "--columns.caption", "text"]),
    ("webvid.csv", ["--split", "train", "--held-out-share", "0.2"]),
    ("webvid.csv", ["--limit", "3", "--format", "csv", "--base-url", "https://example.org/"]),
]


@pytest.mark.parametrize(("name", "flags"), READINGS)
def test_all_commands_read_a_source_alike_and_find_its_data_set(
    name: str, flags: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "MSRVTT.json").write_text(json.dumps(MSRVTT))
    for table, header in (("own.csv", "id,link,text"), ("webvid.csv", "videoid,contentUrl,name")):
        (tmp_path / table).write_text(header + "\n" + "".join(f"{row},v/{row}.mp4,caption {row}\n" for row in range(8)))
    source = ["--source", str(tmp_path / name)]
    common = [*source, "--root", str(tmp_path), "--base", str(tiny_base)]
    given = parse(["prepare-latents", *common, *flags])
    root, base = str(tmp_path), str(tiny_base)
    spec = layout.resolve("demo", given["source"], root, base, given["options"]).prepare
    assert 0 < count_rows(spec.source) == len([row for row in read_rows(spec.source) if isinstance(row, ClipRef)])
    plain = layout.resolve("demo", given["source"], root, base, SourceOptions()).prepare
    assert (plain.output == spec.output) == (not flags)
    for command, flow in (
        ("train-trip", train_trip),
        ("evaluate-trip", evaluate_trip),
        ("register-trip", register_trip),
    ):
        with pytest.raises(UserError, match=re.escape(f"no finished data set at {spec.output}:")):
            flow.fn(**parse([command, *common, *flags]))
    assert parse(["sample", *source, "-o", "s.json", *flags])["options"] == given["options"]
    assert parse(["reproduce", *common, *flags])["options"] == given["options"]


def test_a_second_source_is_read_its_own_way() -> None:
    flags = ["--source", "m.json", "--split", "train", "--held-out-source", "m.json", "--held-out-source.split", "test"]
    given = parse(["reproduce", *flags])
    assert (given["options"], given["held_out_options"]) == (SourceOptions(split="train"), SourceOptions(split="test"))


@pytest.mark.parametrize("flow", [prepare_latents, train_trip, evaluate_trip, register_trip, reproduce])
def test_a_deployment_says_a_reading_as_json(flow: Flow[..., Any]) -> None:
    json.dumps(parameter_schema(flow).model_dump())
    parameters = {"source": "t.csv", "options": {"split": "train", "columns": {"key": "id"}, "captions": 7}}
    expected = SourceOptions(split="train", columns={"key": "id"}, captions=7)
    assert flow.validate_parameters(parameters)["options"] == expected
    assert flow.validate_parameters(flow.serialize_parameters({"options": expected}))["options"] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0", "--source", "t.csv"], "limit 0, expected the number of rows to read, at least 1"),
        (["--split", "train"], "name a table or a folder: --source TABLE"),
    ],
)
def test_a_reading_of_nothing_is_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare_latents.fn(**parse(["prepare-latents", "--root", str(tmp_path), *flags]))


def test_an_unknown_recipe_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--recipe", "demp", "--root", str(tmp_path / "run")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: no recipe 'demp'") and output.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "--recipes", "demo"])
    assert ended.value.code in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_root_below_a_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["prepare-latents", "--root", str(tmp_path / "file" / "run")]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ") and "give a --root" in output and "Traceback" not in output


def test_two_commands_do_not_share_a_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["prepare-latents", "--root", str(tmp_path)]) == 2
    assert "another command is running" in capsys.readouterr().err


VIDEOS = [f"videos/32px/{FIRST_SEED + number}.mp4" for number in range(3)]


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a prepared data set: four rows of three drawn clips, the last one of the first row's file."""
    root = tmp_path_factory.mktemp("made")
    table = Path(write_demo_corpus(root / "corpus", 3, 32)).with_name("rows.csv")
    rows = zip(["a", "b.1", "c", "again"], [*VIDEOS, VIDEOS[0]], strict=True)
    table.write_text("videoid,contentUrl,name\n" + "".join(f"{key},{url},a shape\n" for key, url in rows))
    base, filters = str(tiny_base), FilterSpec(least_side=32)
    prepare(PrepareSpec(SourceSpec(str(table)), str(root / "data" / "set"), base, size=32, filters=filters, workers=0))
    return root


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy of that data set below its own root: runs/data/set."""
    shutil.copytree(made / "data", tmp_path / "runs" / "data")
    return tmp_path / "runs" / "data" / "set"


def test_verify_names_each_problem_and_says_so_to_a_script(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--data", str(data)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"verify      {data}: no problems"
    (data / "notes.txt").write_text("")
    assert main(["verify", "--data", str(data), "--workers", "2"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["notes.txt: is not part of the data set", f"verify      {data}: 1 problems"]
    assert main(["verify", "--data", str(data), "--workers", "0"]) == 2
    assert capsys.readouterr().err == "error: workers 0, expected at least 1\n"


def test_forget_takes_ids_as_the_table_has_them(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text(f"b.1\n\n{VIDEOS[2]}\nd\n")
    assert main(["forget", "--data", str(data), "--ids", str(ids), "--reason", "letter of May"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["not in the data set: d", "forget      2 rows (2 samples) removed, 1 shards rebuilt"]
    assert main(["verify", "--data", str(data)]) == 0 and ShardDataset(str(data)).keys == ["a_000", "again_000"]
    ids.write_text("a\n")
    assert main(["forget", "--data", str(data), "--ids", str(ids)]) == 0
    capsys.readouterr()
    assert main(["forget", "--data", str(data), "--ids", str(tmp_path / "none.txt")]) == 2
    said = capsys.readouterr().err
    assert "give a text file with one id per line" in said and said.count("\n") == 1


def test_deduplicate_removes_the_later_row(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deduplicate", "--data", str(data), "--distance", "9"]) == 2
    assert capsys.readouterr().err == "error: distance 9, expected a number of bits from 0 to 8\n"
    assert main(["deduplicate", "--data", str(data), "--distance", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "deduplicate 1 rows (1 samples) removed, 1 shards rebuilt"
    assert main(["verify", "--data", str(data)]) == 0 and "again_000" not in ShardDataset(str(data)).keys
    assert main(["deduplicate", "--data", str(data.parent / "none")]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: no finished data set") and output.count("\n") == 1


def test_forget_is_refused_while_another_command_is_at_work(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.txt").write_text("a\n")
    with open(tmp_path / "runs" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["forget", "--data", str(data), "--ids", str(tmp_path / "ids.txt")]) == 2
    assert "another command is running" in capsys.readouterr().err and "a_000" in ShardDataset(str(data)).keys


def test_the_user_error_error_is_found_below_what_frameworks_wrap_around_it() -> None:
    cause = UserError("table t.csv lacks a column 'name'; give a column map")
    wrapper = RuntimeError("task failed")
    wrapper.__cause__ = cause
    assert user_error(wrapper) is cause

    class LikeRays(UserError):
        """Ray's copy: of the same class, with the worker's traceback as its text."""

    copy = LikeRays("Traceback (most recent call last): ...")
    copy.cause = cause  # type: ignore[attr-defined]
    assert user_error(copy) is cause

    class LikeRayTrains(RuntimeError):
        worker_failures: ClassVar[dict[int, BaseException]] = {0: copy}

    assert user_error(LikeRayTrains("workers failed")) is cause
    assert user_error(KeyError("ours")) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_one_sentence_with_a_remedy(number: int) -> None:
    error = OSError(number, "said by the system", "/data/run/x")
    assert user_error(error) is error
    assert sentence(error).startswith("/data/run/x: said by the system; ")
    assert "--root" in sentence(error)


def test_a_temporary_folder_too_deep_for_sockets_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(deep))
    with pytest.raises(OSError, match="too long for Ray") as caught, ray_session(None, 1):
        pass
    error = user_error(caught.value)
    assert error is caught.value and sentence(error).startswith(f"{deep}: ") and "TMPDIR" in sentence(error)


def test_a_tick_has_its_estimate_last() -> None:
    line = tick_line({"stage": "train", "done": 20, "total": 600, "eta_seconds": 83.2, "loss": 0.123456})
    assert line == "train        20/600  loss 0.1235  left 1:23"
