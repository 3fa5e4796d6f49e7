"""What a study cannot be built from is one sentence before work begins; what is secret lies apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.cli.app import main
from flows.cli.preference import database_address
from infra import storage
from tasks.records import UserError
from tasks.study.build import StudySpec, build
from tasks.study.plan import PLAN_FILE, read_key, read_plan
from tasks.study.sources import Folder, parse_systems, read_photo, read_prompts
from tests.support.studies import FRAMES, SIZE, make_study, write_clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 3)
    (folder / "empty").mkdir()
    write_clips(folder / "elsewhere", 1)
    (folder / "elsewhere" / "other" / "item000.mp4").rename(folder / "elsewhere" / "other" / "another.mp4")
    return folder


def spec_of(clips: Path, output: Path, **values) -> StudySpec:
    systems = {name: str(clips / name) for name in ("ours", "other")}
    fixed = {"systems": systems, "output": str(output), "real": str(clips / "real"), "frames": FRAMES, "size": SIZE}
    return StudySpec(**(fixed | values))


CASES = {
    "no true clips for gold pairs": ({"real": None, "photos": "real"}, "--gold 0"),
    "no photos": ({"real": None, "gold": 0}, "--photos"),
    "too many items": ({"items": 4}, "4 items of 3"),
    "one item": ({"items": 1}, "expected 2"),
    "odd size": ({"size": 33}, "odd"),
    "one rater": ({"raters": 1}, "--raters 1"),
    "no rate": ({"fps": 200.0}, "--fps 200"),
    "too many repeats": ({"repeats": 2}, "--repeats 2"),
    "too many pairs": ({"per_rater": 9}, "--per-rater 9"),
    "too much gold": ({"gold": 7}, "--gold 7"),
    "clips too short": ({"frames": 99}, "99"),
    "a row without a report": ({"real": "real#real"}, "no report.json"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_built_is_one_sentence(name, clips, tmp_path):
    values, words = CASES[name]
    values = {k: str(clips / v) if k in ("photos", "real") and v else v for k, v in values.items()}
    with pytest.raises(UserError, match=words):
        build(spec_of(clips, tmp_path / "study", **values), lambda _: None)
    assert not (tmp_path / "study-key.json").exists() and not (tmp_path / "study" / PLAN_FILE).exists()


def test_systems_without_a_common_item_and_an_empty_folder_are_refused(clips, tmp_path):
    for other in ("elsewhere/other", "empty"):
        systems = {"ours": str(clips / "ours"), "other": str(clips / other)}
        with pytest.raises(UserError):
            build(spec_of(clips, tmp_path / "study", systems=systems), lambda _: None)


@pytest.mark.parametrize("given", [["a=x"], ["a=x", "a=y"], ["a=x", "b"], ["a=x", "b/c=y"]])
def test_systems_need_two_names(given):
    with pytest.raises(UserError):
        parse_systems(given)


def test_a_study_is_never_changed_and_its_key_lies_apart(tmp_path):
    plan, key = make_study(tmp_path, 2, raters=2, gold=2, repeats=1)
    study = str(tmp_path / "study")
    with pytest.raises(UserError, match="not empty"):
        build(spec_of(tmp_path, tmp_path / "study"), lambda _: None)
    with pytest.raises(UserError, match="lies inside"):
        build(spec_of(tmp_path, tmp_path / "new", key=str(tmp_path / "new" / "key.json")), lambda _: None)
    assert (tmp_path / "study-key.json").stat().st_mode & 0o077 == 0
    assert read_plan(study) == plan
    served = "".join(path.read_text() for path in (tmp_path / "study").glob("*.json"))
    assert not [word for word in ("ours", "shuffled", "frozen", key.salt) if word in served]
    changed = json.loads((tmp_path / "study-key.json").read_text()) | {"report": "x"}
    storage.write_json(str(tmp_path / "other-key.json"), changed)
    with pytest.raises(UserError, match="not the key"):
        read_key(str(tmp_path / "other-key.json"), plan)
    assert main(["preference-tally", "--study", study]) == 2  # no votes yet
    assert main(["preference-tally", "--study", str(tmp_path)]) == 2  # no study


def test_photos_prompts_and_keys_are_read_as_they_come(clips, tmp_path):
    assert Folder(str(clips / "ours")).keys == {"item000", "item001", "item002"}
    assert read_photo(str(clips / "real"), "item001", SIZE).shape == (SIZE, SIZE, 3)
    assert read_prompts(str(clips / "prompts.csv"))["item002"].endswith("scene 2")
    (tmp_path / "prompts.csv").write_text("id,text\n1,x\n")
    with pytest.raises(UserError, match="id, text"):
        read_prompts(str(tmp_path / "prompts.csv"))


def test_a_password_goes_by_the_environment(monkeypatch):
    with pytest.raises(UserError, match="TRIP_STUDY_DATABASE"):
        database_address("postgresql+psycopg2://me:secret@db/study", "s")
    monkeypatch.setenv("TRIP_STUDY_DATABASE", "postgresql+psycopg2://me:secret@db/study")
    assert database_address(None, "s").endswith("db/study")
