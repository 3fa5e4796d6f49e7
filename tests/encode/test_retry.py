"""Retry in place: only the rows that failed under a named class, and in the end the bytes of a run without failures."""

from __future__ import annotations

import base64
import http.server
import io
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra import storage
from tasks.curate.forget import forget
from tasks.curate.verify import problems
from tasks.encode.job import prepare
from tasks.encode.report import write_report_apart
from tasks.encode.resume import retry_reasons
from tasks.encode.spec import PrepareSpec
from tasks.ingest.demo import FIRST_SEED, write_demo_corpus
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import RETRY_CLASSES, UserError, to_json
from tasks.shards import ShardDataset, report_addresses
from tests.support.kills import Killed, kill_at
from trip_model.encoders import decode_latents, load_vae

CLIPS = 6


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; paths in `broken` answer with their status instead. Keeps what was asked for."""

    broken: dict[str, int]
    asked: list[str]


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.server.asked.append(path)
        if path in self.server.broken:
            self.send_error(self.server.broken[path])
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_demo_corpus(tmp_path_factory.mktemp("corpus"), clips=CLIPS, size=32))


@pytest.fixture
def server(table: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(table.parent))) as server:
        server.broken, server.asked = {}, []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def spec(table: Path, server: Server, tiny_base: Path, tmp_path: Path) -> PrepareSpec:
    return PrepareSpec(
        SourceSpec(str(table), base_url=f"http://127.0.0.1:{server.server_address[1]}"),
        str(tmp_path / "set"),
        str(tiny_base),
        size=32,
        clips_per_shard=2,
        workers=0,
        download=DownloadSpec(attempts=1),
    )


def contents(uri: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(uri).iterdir()}


def link(row: int) -> str:
    return f"videos/32px/{FIRST_SEED + row}.mp4"


def test_a_retried_data_set_has_the_bytes_of_one_where_nothing_failed(
    spec: PrepareSpec, server: Server, tmp_path: Path
) -> None:
    calm = prepare(replace(spec, output=str(tmp_path / "calm")))
    server.broken = {link(0): 503, link(3): 500, link(4): 429}
    broken = prepare(spec)
    assert broken.failed == {"http_429": 1, "http_500": 1, "http_503": 1} and list(problems(spec.output)) == []

    server.broken, server.asked = {link(3): 404}, []
    report = prepare(replace(spec, retry=("server",)))
    assert sorted(server.asked) == [link(0), link(3)], "a good clip was asked for again"
    assert (report.rows_retried, report.shards_reused, report.failed) == (2, 1, {"http_404": 1, "http_429": 1})
    assert list(problems(spec.output)) == []

    server.broken, server.asked = {}, []
    assert prepare(replace(spec, retry=("network", "timeout"))).rows_retried == 0
    assert prepare(spec).manifest_sha == report.manifest_sha and server.asked == []
    prepare(replace(spec, retry=("throttled",)))
    assert server.asked == [link(4)] and ShardDataset(spec.output).manifest["failed"] == {"http_404": 1}

    server.broken = {link(row): 503 for row in (1, 2, 5)}
    again = replace(spec, output=str(tmp_path / "again"))
    prepare(again)
    server.broken = {}
    assert prepare(replace(again, retry=("server",))).manifest_sha == calm.manifest_sha
    assert contents(again.output) == contents(str(tmp_path / "calm"))


def test_a_retry_that_is_killed_anywhere_ends_in_the_same_bytes(
    spec: PrepareSpec, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(replace(spec, output=str(tmp_path / "calm")))
    server.broken = {link(0): 503, link(3): 503}
    prepare(replace(spec, output=str(tmp_path / "broken")))
    server.broken = {}
    for step in range(99):
        folder = tmp_path / f"killed{step}"
        shutil.copytree(tmp_path / "broken", folder)
        retry = replace(spec, output=str(folder), retry=("server",))
        with monkeypatch.context() as patch:
            happened = kill_at(patch, step)
            try:
                prepare(retry)
            except Killed:
                pass
            else:
                break
        assert len(ShardDataset(str(folder)).keys) in (4, 6), "the data set cannot be read in between"
        server.asked = []
        prepare(retry)
        assert len(server.asked) == 2 - len(
            [write for write in happened if re.search(r"shard-\w+-\w+.json", write)][:2]
        )
        assert contents(str(folder)) == contents(str(tmp_path / "calm")), happened
    # Two shards of two files, index and manifest, the five files they took the place of, the two reports.
    assert len(happened) == 4 + 2 + 5 + 2
    assert contents(str(folder)) == contents(str(tmp_path / "calm"))


def test_an_unfinished_data_set_is_retried_and_finished_at_once(
    spec: PrepareSpec, server: Server, tmp_path: Path
) -> None:
    prepare(replace(spec, output=str(tmp_path / "calm")))
    server.broken = {link(0): 503}

    def kill(tick: dict[str, Any]) -> None:
        raise Killed

    with pytest.raises(Killed):
        prepare(spec, kill)
    (line,) = problems(spec.output)
    assert "rows 0 to 1 (1 encoded)" in line
    server.broken, server.asked = {}, []
    assert prepare(replace(spec, retry=("server",))).rows_retried == 1
    assert link(1) not in server.asked
    assert contents(spec.output) == contents(str(tmp_path / "calm"))


def test_removed_clips_do_not_return(spec: PrepareSpec, server: Server, tmp_path: Path) -> None:
    prepare(replace(spec, source=replace(spec.source, limit=3)))
    removed = forget(spec.output, [str(FIRST_SEED), link(2), link(5)])
    assert removed.rows == 2 and removed.unknown == (link(5),)
    server.asked = []
    grown = prepare(spec)
    assert grown.failed == {"forgotten": 3} and grown.encoded == 3 and list(problems(spec.output)) == []
    assert sorted(server.asked) == [link(3), link(4)]

    for path in [*Path(spec.output).glob("shard-*"), Path(spec.output) / "manifest.json"]:
        path.unlink()
    server.asked = []
    again = prepare(replace(spec, retry=tuple(RETRY_CLASSES)))
    assert again.failed == {"forgotten": 3} and sorted(server.asked) == [link(1), link(3), link(4)]


def test_prepare_completes_a_removal_that_was_cut_off(
    spec: PrepareSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(spec)
    shutil.copytree(spec.output, tmp_path / "whole")
    forget(str(tmp_path / "whole"), [str(FIRST_SEED + 3)])
    with monkeypatch.context() as patch:
        kill_at(patch, 1)
        with pytest.raises(Killed):
            forget(spec.output, [str(FIRST_SEED + 3)])
    with pytest.raises(UserError, match="repeat the command forget"):
        ShardDataset(spec.output)
    prepare(spec)
    assert contents(spec.output) == contents(str(tmp_path / "whole"))


def test_an_unknown_class_is_one_sentence(spec: PrepareSpec) -> None:
    with pytest.raises(UserError, match="retry class 'netwerk' is unknown; the classes are network, timeout"):
        prepare(replace(spec, retry=("netwerk",)))
    assert retry_reasons(("network", "timeout")) >= {"network", "truncated", "timeout"}
    assert retry_reasons(()) == frozenset()


def test_the_report_shows_reasons_and_decoded_latents_and_lies_next_to_the_data(
    spec: PrepareSpec, server: Server
) -> None:
    server.broken = {link(0): 503}
    report = prepare(spec)
    addresses = report_addresses(spec.output)
    numbers = storage.read_json(addresses["json"])
    assert report.page == addresses["html"] and numbers["manifest_sha"] == report.manifest_sha
    assert (numbers["rows"], numbers["encoded"], numbers["rows_made"]) == (6, 5, 6) and numbers["rows_per_second"] > 0
    assert numbers["size_bytes"] == sum(path.stat().st_size for path in Path(spec.output).glob("*.tar"))
    page = storage.read_bytes(addresses["html"]).decode()
    [sheet] = (Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", page))
    assert re.search(r"http_503<br><small>row \d+, \w+: ", page) and f"<h1>{Path(spec.source.table).name}:" in page
    assert "captions have more than 32 tokens" in page and "h264" in page and "matrix" in page
    assert page.count("<svg") >= 4 and "change of the latents" in page and "duration of the video" in page
    # One line for each of three shards: the stored first frame, then decoded ones, enlarged five times.
    data = ShardDataset(spec.output)
    pixels = np.asarray(sheet.convert("RGB"))
    first = data.read(1, ("first",))["first"].repeat(5, axis=0).repeat(5, axis=1)
    line = (sheet.size[1] - 4) // 3
    assert (pixels[line + 28 :, 4:][:160, :160] == first).all()
    vae: Any = load_vae(spec.base)
    raw = torch.from_numpy(data.read(1, ("latents",))["latents"][-1:].astype(np.float32))
    last = decode_latents(vae, raw * vae.config.scaling_factor)[0].repeat(5, axis=0).repeat(5, axis=1)
    assert (pixels[line + 28 :, 4 + 4 * 164 :][:160, :160] == last).all()
    before = storage.read_bytes(addresses["json"])
    prepare(spec)
    assert storage.read_bytes(addresses["json"]) == before


@pytest.mark.slow
def test_the_report_of_a_process_of_its_own_is_the_same_and_its_failure_is_one_line(spec: PrepareSpec) -> None:
    report = prepare(spec)
    addresses = report_addresses(report.dataset)
    held = {address: storage.read_bytes(address) for address in addresses.values()}
    size_bytes = storage.read_json(addresses["json"])["size_bytes"]
    for address in held:
        storage.delete(address)
    with pytest.raises(OSError, match="base 'nowhere/at/all' is not a folder") as caught:
        write_report_apart(to_json(report), "nowhere/at/all", size_bytes, report.rows)
    assert "\n" not in str(caught.value) and not storage.exists(addresses["json"])
    write_report_apart(to_json(report), spec.base, size_bytes, report.rows)
    assert {address: storage.read_bytes(address) for address in held} == held
