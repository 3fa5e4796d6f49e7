"""Which version is live: a log of promotions in which one writer at a time can be first, and aliases that follow it.

The log is a registered model of its own, `NAME-promotions`; each of its versions is one promotion or rollback
(`docs/decisions/promotion.md`).
"""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from infra import tracking
from infra.redaction import redact, without_userinfo
from tasks.records import UserError

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
PROMOTE, ROLLBACK = "promote", "rollback"
WRITE_TRIES = 10
DEPTH = 100  # champions that an entry remembers; a tag takes 5000 characters


class Refused(UserError):
    """A promotion or rollback that may not be; the sentence says every reason."""


@dataclass(frozen=True)
class Named:
    """A version as the log names it: its number, and when the registry made it, in milliseconds.

    The number is not enough: a model that is deleted and registered again counts from 1 again.
    """

    number: str
    created: int

    def __str__(self) -> str:
        return f"{self.number}:{self.created}"


@dataclass(frozen=True)
class Entry:
    """One promotion or rollback that counts.

    `number` orders the log; `promoted` became champion instead of `former` (None where there was none), `champions` are
    the versions that were before and can be gone back to, with `promoted` last; `time` is the store's.
    """

    number: int
    action: str
    former: Named | None
    champions: tuple[Named, ...]
    reasons: str
    time: datetime

    @property
    def promoted(self) -> Named:
        return self.champions[-1]

    @property
    def version(self) -> str:
        """The number of the version that became champion."""
        return self.promoted.number

    @property
    def replaced(self) -> str:
        """The number of the version that was champion before, or ""."""
        return self.former.number if self.former else ""


@dataclass(frozen=True)
class Standing:
    """The log, the versions by number, and the aliases, as they were read."""

    entries: tuple[Entry, ...]
    versions: dict[str, ModelVersion]
    aliases: dict[str, str]

    @property
    def champions(self) -> tuple[Named, ...]:
        """Champions one above the other, deleted ones among them. Before the first entry, what the aliases say."""
        if self.entries:
            return self.entries[-1].champions
        aliased = (self.aliases[alias] for alias in (PREVIOUS, CHAMPION) if alias in self.aliases)
        return tuple(named(self.versions[number]) for number in aliased if number in self.versions)

    def find(self, logged: Named) -> ModelVersion | None:
        """The version that the log names; None when it was deleted, also if another has its number now."""
        version = self.versions.get(logged.number)
        return version if version is not None and named(version) == logged else None

    @property
    def champion(self) -> str:
        """The version that is live; "" where there is none, or when it was deleted."""
        return self.champions[-1].number if self.champions and self.find(self.champions[-1]) else ""

    @property
    def earlier(self) -> tuple[Named, ...]:
        """What is left of `champions` after a rollback, passing over versions that are no more."""
        rest = self.champions[:-1]
        while rest and (self.find(rest[-1]) is None or rest[-1] == self.champions[-1]):
            rest = rest[:-1]
        return rest


def named(version: ModelVersion) -> Named:
    return Named(str(version.version), int(version.creation_timestamp))


def open_registry(uri: str) -> MlflowClient:
    """A client of a tracking store and registry that answers. Raises UserError."""
    if uri.startswith(("http://", "https://")):
        # MLflow itself keeps trying for minutes before it says that nobody is there.
        try:
            urllib.request.urlopen(without_userinfo(uri).rstrip("/") + "/health", timeout=10).close()
        except urllib.error.HTTPError:
            pass  # somebody is there; what it refuses will be said by the call that needs it
        except OSError as error:
            raise UserError(
                f"the tracking server {uri!r} does not answer ({error}); start it, or give a sqlite:/// address"
            ) from error
    try:
        client = tracking.connect(uri)
        client.search_registered_models(max_results=1)
    except tracking.TROUBLE as error:
        reason = redact(str(error)).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"the tracking store {uri!r} cannot be used ({reason}); give a server's address or sqlite:///FILE in a"
            " folder that can be written"
        ) from error
    return client


def log_name(name: str) -> str:
    """The registered model whose versions are the log of `name`."""
    return f"{name}-promotions"


def promote(client: MlflowClient, name: str, version: str, reason: str = "") -> Standing:
    """Makes a version champion, if everything speaks for it; nothing changes when it is champion already.

    Args:
        reason: why, in words; needed for a version that was rolled back.
    Raises:
        Refused: the gate of its report did not pass, it has not answered a consumer, its report compared it with
            another champion, it was rolled back, or another promotion came first.
        UserError: no such model or version.
    """
    standing = settle(client, name)
    found = standing.versions.get(version)
    if found is None:
        raise UserError(
            f"{name} has no version {version}; it has {', '.join(sorted(standing.versions, key=int)) or 'none'}"
        )
    if standing.champion == version:
        return standing
    against = _objections(standing, found, reason)
    if against:
        raise _refused(client, name, version, f"version {version} of {name} is not promoted: {'; '.join(against)}")
    report = found.tags.get("trip.report", "")
    reasons = [f"the gate of report {report} passed", found.tags["trip.consumer_check"], *filter(None, [reason])]
    first, now = _append(client, name, standing, PROMOTE, (*standing.champions, named(found)), "; ".join(reasons))
    if first.promoted != named(found):
        remedy = f"evaluate version {version} against version {now.champion} and promote again"
        raise _refused(client, name, version, f"{_overtaken(name, first)}; {remedy}")
    return now


def rollback(client: MlflowClient, name: str, reason: str = "") -> Standing:
    """Makes the champion of before champion again.

    Raises:
        Refused: there is none to go back to, or another promotion came first.
        UserError: no such model.
    """
    standing = settle(client, name)
    if not standing.champions:
        raise Refused(f"{name} has no champion, so there is nothing to roll back; promote a version first")
    if not standing.earlier:
        raise Refused(
            f"before version {standing.champions[-1].number} no other version of {name} was champion, so there is none"
            " to go back to; promote another version instead"
        )
    first, now = _append(client, name, standing, ROLLBACK, standing.earlier, reason or "no reason given")
    if first.promoted != standing.earlier[-1]:
        raise Refused(f"{_overtaken(name, first)}; look at what is live, and roll back again if that is still wanted")
    return now


def settle(client: MlflowClient, name: str) -> Standing:
    """Makes the aliases say what the log says, also where the log's last writer was killed before it could.

    An alias can only be overwritten, so a slow writer may put back what a newer entry has changed. Whoever changes an
    alias therefore looks again, and is done when it finds the aliases as the newest entry wants them.
    """
    failures = 0
    while True:
        standing = _read(client, name)
        if not standing.entries:
            return standing
        last, earlier = standing.entries[-1], standing.earlier
        wanted: dict[str, str | None] = {PREVIOUS: earlier[-1].number if earlier else None}
        if standing.champion:  # else it was deleted, and its alias with it
            wanted[CHAMPION] = standing.champion
        wrong = {alias: to for alias, to in wanted.items() if standing.aliases.get(alias) != to}
        if not wrong:
            return standing
        try:
            _tag(client, name, standing, last)
            for alias, to in wrong.items():  # champion last: when it is right, so is all else
                if to is None:
                    client.delete_registered_model_alias(name, alias)
                else:
                    client.set_registered_model_alias(name, alias, to)
        except MlflowException:
            # MLflow looks before it inserts, so that of several who write the same at once, one may get an error.
            failures += 1
            if failures == WRITE_TRIES:
                raise


def _read(client: MlflowClient, name: str) -> Standing:
    """The log last, so that what is decided by it is as new as can be."""
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"the registry has no model {name!r}; run the command register-trip, or give --name") from error
    versions = {str(found.version): found for found in client.search_model_versions(f"name = '{name}'")}
    entries: list[Entry] = []
    lines = client.search_model_versions(f"name = '{log_name(name)}'")
    for line in sorted(lines, key=lambda found: int(found.version)):
        # Its writer had seen all that counts up to `after`; when more counts by now, another was first.
        if int(line.tags.get("after", -1)) >= (entries[-1].number if entries else 0):
            entries.append(_entry(line, versions))
    return Standing(tuple(entries), versions, {alias: str(version) for alias, version in aliases.items()})


def _entry(line: ModelVersion, versions: dict[str, ModelVersion]) -> Entry:
    tags = line.tags

    def parse(text: str) -> Named:
        number, _, created = text.partition(":")
        if created:
            return Named(number, int(created))
        # An entry of before versions were named with their time means the one that was there when it was written.
        version = versions.get(number)
        old = version is not None and int(version.creation_timestamp) <= int(line.creation_timestamp)
        return named(version) if version is not None and old else Named(number, 0)

    champions = tuple(map(parse, tags["champions"].split()))
    former = parse(tags["replaced"].strip()) if tags["replaced"].strip() else None
    time = datetime.fromtimestamp(line.creation_timestamp / 1000, UTC)
    return Entry(int(line.version), tags["action"], former, champions, tags["reasons"], time)


def _append(
    client: MlflowClient, name: str, standing: Standing, action: str, champions: tuple[Named, ...], reasons: str
) -> tuple[Entry, Standing]:
    """Writes the entry that follows `standing`, in one call of the store.

    Returns the entry that does follow, which is another writer's where that was first, and what stands after it.
    """
    version, replaced = champions[-1].number, standing.champions[-1] if standing.champions else None
    seen = standing.entries[-1].number if standing.entries else 0
    tags = {
        "action": action,
        "after": str(seen),
        "champions": " ".join(map(str, champions[-DEPTH:])),
        "replaced": str(replaced or " "),
        "reasons": reasons[:4900],
    }
    if not standing.entries:
        about = f"The log of what was champion of {name}; every version is one promotion or rollback. Keep it."
        try:
            client.create_registered_model(log_name(name), description=about)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    instead = f" instead of version {replaced.number}" if replaced else ""
    sentence = f"{action}: version {version}{instead}; {reasons}"[:4900]
    while True:
        try:
            client.create_model_version(
                log_name(name), f"models:/{name}/{version}", tags=tags, description=sentence, await_creation_for=0
            )
        except MlflowException as error:
            if "Giving up after" not in str(error):  # the store itself tries three numbers, all taken meanwhile
                raise
        after = [entry for entry in _read(client, name).entries if entry.number > seen]
        if after:
            break
    return after[0], settle(client, name)


def _overtaken(name: str, first: Entry) -> str:
    if first.action == PROMOTE:
        return f"version {first.version} of {name} was promoted meanwhile"
    return f"{name} was rolled back to version {first.version} meanwhile"


def _refused(client: MlflowClient, name: str, version: str, sentence: str) -> Refused:
    """The error to raise, after it was noted on the version."""
    note = f"{datetime.now(UTC).isoformat(timespec='seconds')}: {sentence}"
    with contextlib.suppress(MlflowException):  # the same version may be refused twice at once, see `settle`
        client.set_model_version_tag(name, version, "trip.promotion_refused", note[:4900])
    return Refused(sentence)


def _objections(standing: Standing, found: ModelVersion, reason: str) -> list[str]:
    tags, champion = found.tags, standing.versions.get(standing.champion)
    against = []
    if tags.get("trip.gate") != "passed":
        against.append(f"the gate of its report did not pass ({tags.get('trip.gate_reasons', 'it has no report')})")
    if not tags.get("trip.consumer_check"):
        against.append("it has not answered a consumer's call; run register-trip for it again")
    compared = {"trip.report": tags.get("trip.compared_report"), "trip.judged_model": tags.get("trip.compared_model")}
    if champion is not None and any(compared.values()):
        same = any(of and of == champion.tags.get(tag) for tag, of in compared.items())
        if not same:
            against.append(
                f"its report compared it with another model than version {champion.version}, which is champion now;"
                f" evaluate it with --champion and the report of version {champion.version}, and register that report"
            )
    undone = [entry for entry in standing.entries if (entry.action, entry.former) == (ROLLBACK, named(found))]
    if undone and not reason:
        against.append(
            f"it was rolled back on {undone[-1].time:%Y-%m-%d} ({undone[-1].reasons}); give a --reason to promote it"
            " all the same"
        )
    return against


def _tag(client: MlflowClient, name: str, standing: Standing, entry: Entry) -> None:
    """Writes on the versions that an entry is about what it did to them."""
    time = entry.time.isoformat(timespec="seconds")
    if entry.action == PROMOTE:
        of, tags = entry.promoted, {"trip.promoted_at": time, "trip.promotion_reasons": entry.reasons}
    else:
        of, tags = entry.former, {"trip.rolled_back_at": time, "trip.rollback_reason": entry.reasons}
    if of is not None and standing.find(of):
        for tag, value in tags.items():
            client.set_model_version_tag(name, of.number, tag, value)
