"""The checkpoint store: complete or absent at every address, off the training thread, always with the newest one."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import storage
from tasks.records import UserError
from tasks.train.checkpoints import COMPLETE, CheckpointStore, SavedCheckpoint, Tensors
from tests.support.kills import Killed, kill_at


def state(seed: int) -> dict[str, Tensors]:
    """Tensors of the kinds a training has: float32, bfloat16, channels-last, 0-d, integer, two of one storage."""
    torch.manual_seed(seed)
    weight = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    tied = torch.randn(7)
    return {
        "weights": {"a": weight, "b": torch.randn(9).bfloat16(), "tied": tied, "same": tied},
        "optimizer": {"0.step": torch.tensor(float(seed)), "0.count": torch.tensor([seed])},
    }


def assert_holds(store: CheckpointStore, step: int) -> None:
    """The newest checkpoint is that of `step`, and all of it."""
    found = store.newest()
    assert found is not None and found.step == step and found.facts == {"lr": step}
    for part, tensors in state(step).items():
        assert {k: v.dtype for k, v in found.parts[part].items()} == {k: v.dtype for k, v in tensors.items()}
        assert all(torch.equal(found.parts[part][key], tensor) for key, tensor in tensors.items())


def filled(uri: str, *steps: int, **options: Any) -> CheckpointStore:
    store = CheckpointStore(uri, **options)
    for step in steps:
        store.save(step, state(step), {"lr": step})
    store.wait()
    return store


def before_drafts(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Lets something happen in the writing thread before it writes a file of tensors."""
    original = storage.local_draft

    @contextlib.contextmanager
    def draft(uri: str) -> Iterator[Path]:
        happens()
        with original(uri) as path:
            yield path

    monkeypatch.setattr(storage, "local_draft", draft)


def test_what_is_saved_comes_back_at_every_address(uri: str) -> None:
    store = filled(uri, 1, 2, 3)
    assert store.steps() == [3, 2]
    assert_holds(store, 3)
    assert storage.list_dir(store.address(3)) == ["complete.json", "optimizer.safetensors", "weights.safetensors"]
    assert storage.list_dir(uri) == ["step-00000002", "step-00000003"]


def test_training_goes_on_while_the_state_of_before_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    before_drafts(monkeypatch, lambda: gate.wait(10) or None)
    with CheckpointStore(str(tmp_path)) as store:
        parts = state(1)
        store.save(1, parts, {"lr": 1})
        parts["weights"]["a"].add_(1)  # the next step of training
        assert store.steps() == []
        threading.Timer(0.3, gate.set).start()
        began = time.monotonic()
        store.save(2, state(2), {"lr": 2})  # one at a time
        assert time.monotonic() - began > 0.25 and store.steps() == [1]
        monkeypatch.undo()
    assert_holds(store, 2)
    storage.delete(store.address(2))
    assert_holds(store, 1)


def test_a_failed_write_is_raised_by_the_next_save_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk() -> None:
        raise OSError(28, "No space left on device")

    store = filled(str(tmp_path), 1)
    before_drafts(monkeypatch, full_disk)
    store.save(2, state(2), {"lr": 2})
    with pytest.raises(OSError, match="No space left"):
        store.save(3, state(3), {"lr": 3})
    monkeypatch.undo()
    assert_holds(store, 1)
    store.save(4, state(4), {"lr": 4})
    store.wait()
    assert_holds(store, 4)
    assert storage.list_dir(str(tmp_path)) == ["step-00000001", "step-00000004"]  # nothing is left of step 2


def test_a_block_that_ends_waits_for_the_save_and_raises_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_drafts(monkeypatch, lambda: time.sleep(0.2))
    with CheckpointStore(str(tmp_path)) as store:
        store.save(1, state(1), {"lr": 1})
    assert_holds(store, 1)
    monkeypatch.setattr(storage, "write_json", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"), CheckpointStore(str(tmp_path)) as store:
        store.save(2, state(2), {"lr": 2})


def test_a_kill_at_any_write_leaves_the_newest_whole_and_what_is_left_is_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for moment in itertools.count():
        uri = str(tmp_path / f"killed-at-{moment}")
        filled(uri, 1, 2)
        with monkeypatch.context() as patch:
            happened = kill_at(patch, moment)

            def write(happened: list[str] = happened, moment: int = moment) -> None:
                if len(happened) == moment:
                    raise Killed
                happened.append("draft")

            before_drafts(patch, write)
            store = CheckpointStore(uri)
            store.save(3, state(3), {"lr": 3})
            with contextlib.suppress(Killed):
                store.wait()
                break  # it had less writes than that
        complete = CheckpointStore(uri).steps()[0]
        assert complete == (3 if any(COMPLETE in line and "write" in line for line in happened) else 2)
        assert_holds(CheckpointStore(uri), complete)
        after = filled(uri, 4)
        assert_holds(after, 4)
        assert after.steps() == [4, complete]
        assert storage.list_dir(uri) == [f"step-{step:08d}" for step in (complete, 4)]
    assert moment >= 5  # two files, the mark, and a checkpoint removed in two moves


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights.safetensors", truncate),
        ("weights.safetensors", flip),
        ("optimizer.safetensors", Path.unlink),
        (COMPLETE, truncate),
    ],
)
def test_resume_walks_back_past_a_damaged_checkpoint_says_so_and_keeps_the_good_one(
    name: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(str(tmp_path), 2, 4)
    damage(tmp_path / "step-00000004" / name)
    with caplog.at_level(logging.WARNING):
        assert_holds(CheckpointStore(str(tmp_path)), 2)
    assert "step-00000004 is damaged" in caplog.text
    after = filled(str(tmp_path), 3, keep=1)  # the damaged one is newer by number and must not push step 3 out
    assert after.steps() == [3]
    assert_holds(after, 3)


def test_training_does_not_start_anew_over_checkpoints_that_are_damaged_or_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CheckpointStore(str(tmp_path)).newest() is None
    store = filled(str(tmp_path), 1, 2)

    def no_answer(path: Path) -> str:
        raise PermissionError(f"not allowed: {path}")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "sha256_file", no_answer)
        with pytest.raises(PermissionError):
            store.newest()
    assert_holds(store, 2)
    for step in (1, 2):
        truncate(tmp_path / f"step-0000000{step}" / "weights.safetensors")
    with pytest.raises(UserError, match="all 2 checkpoints"):
        store.newest()


def test_the_best_by_a_metric_is_kept_beside_the_newest(tmp_path: Path) -> None:
    class Notes:
        def __init__(self) -> None:
            self.happened: list[Any] = []

        def before_mark(self) -> None:
            self.happened.append(store.steps())

        def after_mark(self, saved: SavedCheckpoint) -> None:
            self.happened.append((saved.step, saved.metrics, saved.removed))

    notes = Notes()
    store = CheckpointStore(str(tmp_path), keep=2, best="validation_loss", listener=notes)
    for step, loss in enumerate([0.5, 0.2, float("nan"), 0.3, 0.2, 0.4, 0.6], start=1):
        store.save(step, state(step), {"lr": step}, {"validation_loss": loss})
    store.wait()
    assert store.steps() == [7, 6, 5]
    assert notes.happened[2:6] == [[1], (2, {"validation_loss": 0.2}, ()), [2, 1], (3, {}, (1,))]
    assert notes.happened[7] == (4, {"validation_loss": 0.3}, ())  # step 2 is the best, 3 and 4 the newest
    assert notes.happened[9] == (5, {"validation_loss": 0.2}, (3, 2))  # of equal ones the newest
