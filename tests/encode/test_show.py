"""The command `show` decodes a stored sample next to its source, and says in one sentence what it cannot do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flows.cli.app import main
from tasks.encode.job import prepare
from tasks.encode.show import show_sample
from tasks.encode.spec import PrepareSpec
from tasks.ingest.demo import write_demo_corpus
from tasks.ingest.spec import SourceSpec
from tasks.shards import ShardDataset
from tasks.video.decode import read_windows
from tests.conftest import DEMO_BASE


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A table of two drawn clips, the data set that the demo's base made of it, and the key of its first clip."""
    folder = tmp_path_factory.mktemp("show")
    table = write_demo_corpus(folder / "corpus", 2, 64)
    spec = PrepareSpec(SourceSpec(table), str(folder / "data"), str(DEMO_BASE), size=64, workers=0)
    prepare(spec)
    return table, spec.output, ShardDataset(spec.output).clip_of(0)


def test_a_sample_is_shown_next_to_its_source(demo: tuple[str, str, str], tmp_path: Path) -> None:
    table, data, key = demo
    shown = show_sample(data, key, str(DEMO_BASE), SourceSpec(table))
    assert shown.original is not None and shown.original.shape == shown.decoded.shape == (16, 64, 64, 3)
    error = np.sqrt(np.mean((shown.original.astype(float) - shown.decoded) ** 2))
    assert error < 20 < np.sqrt(np.mean((shown.original.astype(float) - shown.decoded[:, ::-1]) ** 2))
    target = tmp_path / "clip.mp4"
    assert main(["show", "--data", data, "--key", f"{key}_000", "--source", table, "-o", str(target)]) == 0
    [clip] = read_windows(target, 16, 4.0, 64, fit="squash")
    assert clip.info["width"] == 132 and len(clip.pixels) == 16


def test_without_its_source_a_sample_is_shown_as_stored(demo: tuple[str, str, str], tmp_path: Path) -> None:
    table, data, key = demo
    shown = show_sample(data, key, str(DEMO_BASE))
    assert shown.original is None and shown.side_by_side().shape == (16, 64, 64, 3)
    assert "needs its table; name it (--source)" in shown.why_no_original
    other = tmp_path / "other.csv"
    other.write_text("videoid,name,contentUrl\nx,a,b.mp4\n")
    assert "has no row with the key" in show_sample(data, key, str(DEMO_BASE), SourceSpec(str(other))).why_no_original
    other.write_text(f"videoid,name,contentUrl\n{key},a,b.mp4\n")
    assert "missing_file" in show_sample(data, key, str(DEMO_BASE), SourceSpec(str(other))).why_no_original
    (tmp_path / "b.mp4").write_bytes(next(Path(table).parent.rglob("*.mp4")).read_bytes() + b"\0" * 9)
    assert "has changed" in show_sample(data, key, str(DEMO_BASE), SourceSpec(str(other))).why_no_original


def test_what_cannot_be_shown_is_one_sentence(
    demo: tuple[str, str, str], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, data, key = demo
    for change, words in (
        ({"--key": "nobody"}, "key 'nobody' is not in"),
        ({"--data": str(tmp_path / "none")}, "none"),
        ({"-o": str(tmp_path / "clip.avi")}, "ends in '.avi'"),
        ({"--base": str(tiny_base)}, "has another VAE than the one that encoded the data set"),
        ({"--base": str(tmp_path)}, "vae"),
        ({"--scale": "99"}, "--scale 99, expected 1 to 16"),
    ):
        flags = {"--data": data, "--key": key, "-o": str(tmp_path / "clip.mp4")} | change
        assert main(["show", *(word for pair in flags.items() for word in pair)]) == 2, change
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
