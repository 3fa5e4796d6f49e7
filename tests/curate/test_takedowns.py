"""Takedowns: a removed clip stays out of all data sets of its root, for any table, recipe or key."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from tasks import shards
from tasks.curate.forget import forget
from tasks.curate.verify import problems
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareSpec
from tasks.ingest.demo import FIRST_SEED, write_demo_corpus
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import ClipRef, UserError
from tasks.shards import ShardDataset, Takedowns
from tests.support.kills import Killed, kill_at

CLIPS = 5
HEADER = "videoid,contentUrl,name\n"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder and keeps what was asked for."""

    asked: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path.lstrip("/"))
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def link(row: int) -> str:
    return f"videos/32px/{FIRST_SEED + row}.mp4"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_demo_corpus(folder, clips=CLIPS, size=32)
    shutil.copy(folder / link(1), folder / "copy.mp4")
    return folder


@pytest.fixture
def server(corpus: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(corpus))) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def table(folder: Path, *rows: tuple[str, str]) -> str:
    """Address of a table of (key, link)."""
    folder.mkdir(parents=True, exist_ok=True)
    address = folder / "t.csv"
    address.write_text(HEADER + "".join(f"{key},{link},a shape\n" for key, link in rows))
    return str(address)


@pytest.fixture
def spec(server: Server, tiny_base: Path, tmp_path: Path) -> PrepareSpec:
    """The first data set of a root: five clips."""
    rows = [(f"k{row}", link(row)) for row in range(CLIPS)]
    return PrepareSpec(
        SourceSpec(table(tmp_path / "first", *rows), base_url=server.url),
        str(tmp_path / "run" / "data" / f"{1:016x}"),
        str(tiny_base),
        size=32,
        clips_per_shard=2,
        workers=0,
        download=DownloadSpec(attempts=1, allow_private=True),
    )


def another(spec: PrepareSpec, number: int, source: SourceSpec, **changes: Any) -> PrepareSpec:
    return replace(spec, source=source, output=f"{storage.parent(spec.output)}/{number:016x}", **changes)


def keys(dataset: str) -> list[str]:
    return [shards.clip_key_of(key) for key in ShardDataset(dataset).keys]


def test_removed_clips_are_not_asked_for_again_by_any_data_set_of_the_root(
    spec: PrepareSpec, server: Server, tmp_path: Path
) -> None:
    prepare(spec)
    assert forget(spec.output, ["k1", link(3)], "letter of May").rows == 2
    rows = [(f"k{row}", link(row)) for row in range(CLIPS)]
    grown = SourceSpec(table(tmp_path / "grown", *rows, ("new", "copy.mp4")), base_url=server.url)
    absolute = SourceSpec(table(tmp_path / "absolute", *((f"x{row}", server.url + link(row)) for row in range(CLIPS))))
    others = ((f"x{row}", link(row)) for row in range(CLIPS))
    renamed = SourceSpec(table(tmp_path / "renamed", *others), base_url=server.url)
    cases: dict[str, tuple[PrepareSpec, int]] = {
        "a row more": (another(spec, 2, grown), 3),  # the file of k1 under another key and link: read, not encoded
        "a limit": (another(spec, 3, replace(grown, limit=4)), 2),
        "another recipe": (another(spec, 4, grown, num_frames=8), 3),
        "other keys, the same links": (another(spec, 5, renamed), 2),
    }
    for name, (case, forgotten) in cases.items():
        server.asked = []
        report = prepare(case)
        assert report.failed == {"forgotten": forgotten}, name
        assert not {link(1), link(3)} & set(server.asked), name
        assert list(problems(case.output)) == [] and not {"k1", "k3", "x1", "x3", "new"} & set(keys(case.output))

    # The links of this table say where the file is found; those of the removed clip were relative.
    server.asked = []
    forget(spec.output, [server.url + link(1)])
    assert prepare(another(spec, 6, absolute)).failed == {"forgotten": 2} and link(1) not in server.asked

    # Another run knows nothing of it.
    elsewhere = replace(spec, output=str(tmp_path / "other" / "data" / f"{1:016x}"))
    assert prepare(elsewhere).failed == {}


def test_a_data_set_that_was_there_before_loses_the_clip_at_its_next_prepare(spec: PrepareSpec, server: Server) -> None:
    prepare(spec)
    second = another(spec, 2, replace(spec.source, limit=4))
    third = another(spec, 3, replace(spec.source, limit=3))
    prepare(second)
    before = prepare(third)
    forget(spec.output, ["k3"])
    server.asked = []
    assert prepare(second).failed == {"forgotten": 1} and "k3" not in keys(second.output)
    # A data set that never had the clip stays as it is, to the byte.
    assert prepare(third).manifest_sha == before.manifest_sha and server.asked == []


def test_lists_of_data_sets_from_before_there_were_takedowns_count_and_outlive_them(
    spec: PrepareSpec, server: Server
) -> None:
    prepare(spec)
    shards.write_takedowns(spec.output, Takedowns({shards.mark("k1"): "asked for"}))
    second = another(spec, 2, replace(spec.source, limit=3))
    assert prepare(second).failed == {"forgotten": 1}
    storage.delete(spec.output)
    storage.delete(second.output)
    server.asked = []
    assert prepare(spec).failed == {"forgotten": 1} and link(1) not in server.asked


def test_a_removal_killed_between_its_writes_keeps_the_clip_away_everywhere(
    spec: PrepareSpec, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(spec)
    for step in range(99):
        root = tmp_path / f"killed{step}"
        shutil.copytree(tmp_path / "run", root)
        dataset = f"{root}/data/{1:016x}"
        with monkeypatch.context() as patch:
            happened = kill_at(patch, step)
            try:
                forget(dataset, ["k1", link(3)])
            except Killed:
                pass
            else:
                break
        if step == 0:  # nothing was written, nothing was removed
            assert keys(dataset) == keys(spec.output) and list(problems(dataset)) == []
        elif step < 4:
            server.asked = []
            fresh = replace(spec, source=replace(spec.source, limit=4), output=f"{root}/data/{2:016x}")
            assert prepare(fresh).failed == {"forgotten": 2} and not {link(1), link(3)} & set(server.asked)
        forget(dataset, ["k1", link(3)])
        assert list(problems(dataset)) == [] and keys(dataset) == ["k0", "k2", "k4"]
        assert len(storage.list_dir(f"{root}/takedowns")) == 1
    assert happened[0].startswith(f"write_bytes {root}/takedowns/") and "forgotten.json" in happened[1]


def test_rows_of_the_same_link_or_bytes_go_with_the_clip_that_is_named(
    spec: PrepareSpec, server: Server, tmp_path: Path
) -> None:
    rows = [("twin", link(0)), ("a", link(0)), ("b", link(1)), ("bytes", "copy.mp4"), ("c", link(2)), ("d", link(3))]
    source = SourceSpec(table(tmp_path / "twins", *rows), base_url=server.url)
    case = another(spec, 7, source)
    assert prepare(case).failed == {}
    report = forget(case.output, ["a", "b"])
    assert report.rows == 4 and report.unknown == () and keys(case.output) == ["c", "d"]
    assert list(problems(case.output)) == [] and prepare(case).failed == {"forgotten": 4}


def test_two_removals_at_once_lose_nothing_of_each_other(uri: str) -> None:
    root = storage.parent(uri) + f"/run{storage.parent(uri).rsplit('/', 1)[-1]}"
    datasets = [f"{root}/data/{number:016x}" for number in range(8)]
    threads = [
        threading.Thread(target=shards.add_root_takedowns, args=(dataset, Takedowns({shards.mark(dataset): "asked"})))
        for dataset in datasets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shards.read_root_takedowns(datasets[0]).marks.keys() == {shards.mark(dataset) for dataset in datasets}
    shards.add_root_takedowns(datasets[3], Takedowns({shards.mark(datasets[5]): "another letter"}))
    entries = storage.list_dir(f"{root}/takedowns")
    assert len(entries) == 8, "what is known is not written again"
    content = storage.read_bytes(f"{root}/takedowns/{entries[0]}")
    storage.write_bytes(f"{root}/takedowns/{entries[0]}", content.replace(b"asked", b"other"))
    with pytest.raises(UserError, match="was changed, its name is not its sha256; restore it"):
        shards.read_root_takedowns(datasets[0])


@pytest.mark.parametrize(
    "written",
    [
        "https://host/a%20b.mp4",
        "HTTPS://Host/a%20b.mp4#t=3",
        "https://user:word@host:443/a b.mp4",
        "http://host./a%20b.mp4",
    ],
)
def test_a_link_is_known_however_it_is_written(written: str) -> None:
    known = Takedowns(dict.fromkeys(shards.link_marks("http://host:80/a b.mp4"), "asked"))
    assert known.failure(ClipRef("k", written, "c", 0)) is not None
    for other in (
        "https://host/a%20b.mp4?v=2",
        "https://host:8443/a%20b.mp4",
        "a b.mp4",
        "//[bad",
        "https://h/a b.mp4",
    ):
        assert known.failure(ClipRef("k", other, "c", 0)) is None
