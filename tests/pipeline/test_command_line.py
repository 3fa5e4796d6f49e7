"""What a person at the terminal sees: sentences instead of tracebacks, exit codes, one command at a time on a root."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import numpy as np
import pytest

from flows.__main__ import curable, main, parse, sentence
from flows.console import tick_line
from tasks import shards
from tasks.ingest.sources import clean_key
from tasks.records import UserError, digest
from tasks.shards import Sample, ShardDataset


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
    }


def test_an_unknown_recipe_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--recipe", "demp", "--root", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: no recipe 'demp'") and said.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "--recipes", "demo"])
    assert ended.value.code in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_root_below_a_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["prepare-latents", "--root", str(tmp_path / "file" / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "give a --root" in said and "Traceback" not in said


def test_two_commands_do_not_share_a_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["prepare-latents", "--root", str(tmp_path)]) == 2
    assert "another command is at work" in capsys.readouterr().err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A finished data set of three clips below a root: runs/data/set."""
    folder = tmp_path / "runs" / "data" / "set"
    recipe = {"size": 32}
    shards.open_dataset(str(folder), recipe)
    outcomes = [
        [
            Sample(
                key=shards.sample_key(key, 0),
                caption="a shape",
                latents=np.zeros((2, 4, 4, 4), np.float16),
                first=np.zeros((32, 32, 3), np.uint8),
                tokens=np.zeros(7, np.int32),
                meta={"url": f"videos/{key}.mp4"},
            )
        ]
        for key in ("a", clean_key("b.1"), "c")
    ]
    shard = shards.write_shard(str(folder), 0, (0, 3), outcomes, digest(recipe))
    shards.publish_dataset(str(folder), recipe, digest(recipe), {}, [shard.summary()])
    return folder


def test_verify_names_each_problem_and_says_so_to_a_script(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--data", str(data)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"verify      {data}: whole"
    (data / "notes.txt").write_text("")
    assert main(["verify", "--data", str(data)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["notes.txt: belongs to no data set", f"verify      {data}: 1 problems"]


def test_forget_takes_ids_as_the_table_has_them(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("b.1\n\nvideos/c.mp4\nd\n")
    assert main(["forget", "--data", str(data), "--ids", str(ids), "--reason", "letter of May"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["not in the data set: d", "forget      2 rows (2 samples) removed, 1 shards made anew"]
    assert main(["verify", "--data", str(data)]) == 0 and ShardDataset(str(data)).keys == ["a_000"]
    ids.write_text("a\n")
    assert main(["forget", "--data", str(data), "--ids", str(ids)]) == 0
    assert main(["forget", "--data", str(data), "--ids", str(tmp_path / "none.txt")]) == 2
    assert "give a text file with an id in each line" in capsys.readouterr().err


def test_forget_is_refused_while_another_command_is_at_work(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.txt").write_text("a\n")
    with open(tmp_path / "runs" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["forget", "--data", str(data), "--ids", str(tmp_path / "ids.txt")]) == 2
    assert "another command is at work" in capsys.readouterr().err and "a_000" in ShardDataset(str(data)).keys


def test_the_curable_error_is_found_below_what_frameworks_wrap_around_it() -> None:
    cause = UserError("table t.csv lacks a column 'name'; give a column map")
    wrapper = RuntimeError("task failed")
    wrapper.__cause__ = cause
    assert curable(wrapper) is cause

    class LikeRays(UserError):
        """Ray's copy: of the same class, with the worker's traceback as its text."""

    copy = LikeRays("Traceback (most recent call last): ...")
    copy.cause = cause  # type: ignore[attr-defined]
    assert curable(copy) is cause

    class LikeRayTrains(RuntimeError):
        worker_failures = {0: copy}

    assert curable(LikeRayTrains("workers failed")) is cause
    assert curable(KeyError("ours")) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_one_sentence_with_a_remedy(number: int) -> None:
    error = OSError(number, "said by the system", "/data/run/x")
    assert curable(error) is error
    assert sentence(error).startswith("/data/run/x: said by the system; ")
    assert "--root" in sentence(error)


def test_a_tick_has_its_estimate_last() -> None:
    line = tick_line({"stage": "train", "done": 20, "total": 600, "eta_seconds": 83.2, "loss": 0.123456})
    assert line == "train        20/600  loss 0.1235  left 1:23"
