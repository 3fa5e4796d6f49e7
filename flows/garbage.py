"""What may be removed: results below a root and versions of models that nothing in use refers to, ended Ray sessions.

In use is what an alias of the registry, one of the last nights or a running stage refers to, and what is young.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from flows.console import log
from flows.nights import read_nights
from flows.parameters import VERSIONS
from infra import leases, ray_sessions, storage
from infra.redaction import redact
from infra.tracking import EVALUATED_MODEL, LINEAGE, REPORT_DIGEST, TROUBLE, connect, sqlite_file
from tasks.evaluation_record import REPORT_FILE, EvaluationRecord, read_evaluation
from tasks.records import UserError
from tasks.shards import MANIFEST, names_of
from tasks.shards.places import POOLS
from tasks.shards.pool import remove_shard, unused_shards
from tasks.shards.reading import read_manifest
from tasks.train.spec import TrainReport

# Folders of the root with results by content, and the file that marks one as finished.
MARKS = {"data": MANIFEST, "train": REPORT_FILE, "evaluate": REPORT_FILE}
_RESULT = re.compile(r"[0-9a-f]{16}")
_REMOVING = ".removing-"  # before the name of a local folder whose removal has begun


@dataclass(frozen=True)
class Result:
    """One result below a root.

    Attributes:
        address: of its folder.
        stage: data, train or evaluate.
        age_hours: since it was last written.
        kept_by: what is in use and refers to it; "" if it can be removed.
    """

    address: str
    stage: str
    age_hours: float
    kept_by: str = ""


@dataclass
class _InUse:
    """Why results are kept: by address, hash of a model, hash of a manifest, and digest of a report."""

    addresses: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)

    def add_address(self, address: str, reason: str) -> None:
        if address:
            self.addresses.setdefault(storage.absolute(address), reason)

    def by_address(self, folder: str) -> str:
        """The reason of an address that is the folder or lies below it."""
        found = (why for used, why in self.addresses.items() if f"{used}/".startswith(f"{folder}/"))
        return next(found, "")


def results(root: str, tracking_uri: str, nights: int, hours: float) -> list[Result]:
    """Every result below a root, with what keeps it.

    Args:
        root: absolute address.
        tracking_uri: address of the registry whose aliases count; all models and aliases of it.
        nights: how many of the last nights count.
        hours: results that were written later than this before now are kept.
    Raises:
        UserError: the registry does not answer. Without it nothing can be known to be out of use.
    """
    used = _InUse()
    _use_aliases(used, tracking_uri)
    for night in read_nights(root)[-nights:] if nights > 0 else []:
        for address in (night.data.uri, night.trained_on, night.model, night.report):
            used.add_address(address, f"the night of {night.time}")
    evaluations = {address: record for address in _folders(root, "evaluate") if (record := _evaluation(address))}
    for _ in evaluations:  # a champion's report may have a champion
        for address, record in evaluations.items():
            reason = used.by_address(address) or used.reports.get(record.digest, "")
            if reason and record.champion:
                used.add_address(record.champion, f"{address}, which is compared with it")
    found = []
    for stage in MARKS:
        for address in _folders(root, stage):
            age = _age_hours(address, MARKS[stage])
            reason = used.by_address(address) or _by_content(used, stage, address, evaluations)
            if not reason and leases.is_held(address):
                reason = "a running stage"
            if not reason and age < hours:
                reason = f"written {age:.1f} hours ago"
            found.append(Result(address, stage, age, reason))
    return found


def remove(result: Result) -> None:
    """Removes a result, so that a kill at any moment leaves either all of it or nothing that looks finished.

    A local folder is renamed first. In another store the mark of completion goes first, then the indexes, then the
    rest; what is left after a kill is found by the next call, as an unfinished result.

    Raises:
        LeaseHeld: a stage has begun to write to it.
    """
    with leases.lease(result.address):
        path = storage.local_path(result.address)
        if path is not None:
            doomed = path.with_name(_REMOVING + path.name)
            storage.delete(str(doomed))  # of an earlier removal
            path.rename(doomed)
            storage.delete(str(doomed))
        else:
            storage.delete(storage.join(result.address, MARKS[result.stage]))
            for name in storage.list_dir(result.address):
                if name.endswith(".json"):
                    storage.delete(storage.join(result.address, name))
            storage.delete(result.address)


def old_shards(root: str, hours: float) -> list[str]:
    """The tars in the pools that no version of a data set names, and that were written `hours` ago or before.

    Empty while a prepare below the root is running: its shards have no manifest yet.
    """
    if any(leases.is_held(name) for name in names_of(root)):
        return []
    limit = time.time() - 3600 * hours
    return [tar for tar in unused_shards(root) if (storage.modified(tar) or 0.0) <= limit]


def remove_unfinished(root: str) -> int:
    """Completes removals of local folders that a kill has interrupted; returns their number."""
    count = 0
    for stage in MARKS:
        folder = storage.join(root, stage)
        for name in storage.list_dir(folder):
            if name.startswith(_REMOVING):
                storage.delete(storage.join(folder, name))
                count += 1
    return count


def _folders(root: str, stage: str) -> Iterator[str]:
    folder = storage.join(root, stage)
    for name in storage.list_dir(folder):
        if _RESULT.fullmatch(name):
            yield storage.join(folder, name)


@contextlib.contextmanager
def _answering(tracking_uri: str, remedy: str = "run the same command again") -> Iterator[None]:
    """Converts the errors of a registry in the block into a `UserError`."""
    try:
        yield
    except TROUBLE as error:
        raise UserError(f"the registry at {tracking_uri} does not answer ({redact(str(error))}); {remedy}") from error


def _use_aliases(used: _InUse, tracking_uri: str) -> None:
    file = sqlite_file(tracking_uri)
    if file is not None and not file.is_file():
        return
    with _answering(tracking_uri, "nothing was removed"):
        client = connect(tracking_uri)
        for model in client.search_registered_models():
            for alias, number in model.aliases.items():
                tags = client.get_model_version(model.name, number).tags
                reason = f"models:/{model.name}@{alias}"
                used.add_address(tags.get(f"{LINEAGE}data_uri", ""), reason)
                used.manifests.setdefault(tags.get(f"{LINEAGE}data_digest", ""), reason)
                used.models.setdefault(tags.get(EVALUATED_MODEL, ""), reason)
                used.reports.setdefault(tags.get(REPORT_DIGEST, ""), reason)


def _evaluation(address: str) -> EvaluationRecord | None:
    try:
        return read_evaluation(address)
    except UserError:  # unfinished, or of another schema
        return None


def _by_content(used: _InUse, stage: str, address: str, evaluations: dict[str, EvaluationRecord]) -> str:
    if stage == "evaluate":
        record = evaluations.get(address)
        return used.reports.get(record.digest, "") if record else ""
    try:
        if stage == "train":
            report = TrainReport(**storage.read_json(storage.join(address, REPORT_FILE)))
            return used.models.get(report.model_digest, "")
        return used.manifests.get(read_manifest(address)[1], "")
    except (FileNotFoundError, ValueError, TypeError):  # unfinished, or of another version
        return ""


def _age_hours(address: str, mark: str) -> float:
    """Hours since the mark of completion was written, or since the last renewal of the lease, whichever is later."""
    written = storage.modified(storage.join(address, mark)) or storage.modified(address) or 0.0
    current = leases.newest(address)[1]
    return (time.time() - max(written, current.renewed if current is not None else 0.0)) / 3600


def collect(
    root: str, tracking_uri: str, nights: int, hours: float, dry_run: bool, versions: int = VERSIONS
) -> dict[str, int]:
    """Logs everything with what keeps it, and removes the rest unless `dry_run`; returns counts.

    Args:
        root: folder or address.
        tracking_uri: address of the registry.
        nights: how many of the last nights count.
        hours: what was written later than this before now is kept.
        dry_run: only log.
        versions: how many of a model's last versions and of its last champions are kept.
    Raises:
        UserError: the registry does not answer.
    """
    root = storage.absolute(root)
    counts = {"kept": 0, "removed": 0}
    _collect_results(root, tracking_uri, nights, hours, dry_run, counts)
    if not dry_run:
        remove_unfinished(root)
    shards = old_shards(root, hours)
    if shards:
        log(f"gc          remove  {len(shards)} shards of {storage.join(root, POOLS)} that no data set names")
    for tar in [] if dry_run else shards:
        remove_shard(tar)
    with _answering(tracking_uri):
        _collect_versions(root, tracking_uri, nights, hours, dry_run, versions, counts)
    sessions = ray_sessions.ended_folders(hours)
    for session in sessions:
        log(f"gc          remove  session   {session}: it has ended")
        if not dry_run:
            ray_sessions.remove_folder(session)
    counts["removed"] += len(sessions)
    log(f"gc          {counts['kept']} kept, {counts['removed']} {'would be ' if dry_run else ''}removed")
    return counts


def _collect_results(
    root: str, tracking_uri: str, nights: int, hours: float, dry_run: bool, counts: dict[str, int]
) -> None:
    every = results(root, tracking_uri, nights, hours)
    for result in every:
        place = f"{result.stage:<9} {result.address}"
        if _kept(place, result.kept_by, result.age_hours, counts):
            continue
        if not dry_run:
            try:
                remove(result)
            except leases.LeaseHeld as error:
                log(f"gc          keep    {place}: {error}")
                continue
        counts["removed"] += 1


def _kept(place: str, kept_by: str, age_hours: float, counts: dict[str, int]) -> bool:
    """Logs and counts what is kept, and logs what is to be removed."""
    if kept_by:
        log(f"gc          keep    {place}: {kept_by}")
        counts["kept"] += 1
    else:
        log(f"gc          remove  {place}: {age_hours:.0f} hours old, nothing in use refers to it")
    return bool(kept_by)


def _collect_versions(
    root: str, tracking_uri: str, nights: int, hours: float, dry_run: bool, last: int, counts: dict[str, int]
) -> None:
    file = sqlite_file(tracking_uri)
    if file is not None and not file.is_file():
        return
    from tasks.register import retention  # imports mlflow's models

    client = connect(tracking_uri)
    named = {night.version for night in read_nights(root)[-nights:]} if nights > 0 else set()
    for version in retention.registered_versions(client, redact(root), last, hours, named):
        place = f"{'version':<9} {version.address}"
        if _kept(place, version.kept_by, version.age_hours, counts):
            continue
        if not dry_run and not retention.remove_version(client, tracking_uri, version):
            log(f"gc          keep    {place}: an alias names it now")
            continue
        counts["removed"] += 1
    if not dry_run:
        retention.remove_unfinished(client, tracking_uri)
