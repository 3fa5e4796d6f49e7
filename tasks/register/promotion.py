"""Promotion and rollback of model versions: an append-only log decides which version is champion; aliases follow it.

The log is a separate registered model, `NAME-promotions`; each of its versions is one promotion or rollback
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
from infra.tracking import EVALUATED_MODEL, REPORT_DIGEST
from tasks.records import UserError

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
PROMOTE, ROLLBACK = "promote", "rollback"
WRITE_TRIES = 10
DEPTH = 100  # former champions in an entry; a tag takes 5000 characters


class PromotionRefused(UserError):
    """A promotion or rollback that is not allowed; the message gives every reason."""


@dataclass(frozen=True)
class VersionRef:
    """A version in the log: its number and its creation time in milliseconds.

    The number alone is not unique: a model that is deleted and registered again starts at 1 again.
    """

    number: str
    created: int

    def __str__(self) -> str:
        return f"{self.number}:{self.created}"


@dataclass(frozen=True)
class Entry:
    """One valid promotion or rollback.

    `number` orders the log. `promoted` replaced `former` (None without one) as champion. `champions` are the versions
    that a rollback can return to, with `promoted` last. `time` is the store's.
    """

    number: int
    action: str
    former: VersionRef | None
    champions: tuple[VersionRef, ...]
    reasons: str
    time: datetime

    @property
    def promoted(self) -> VersionRef:
        return self.champions[-1]

    @property
    def version(self) -> str:
        """The number of the version that became champion."""
        return self.promoted.number

    @property
    def replaced(self) -> str:
        """The number of the champion before, or ""."""
        return self.former.number if self.former else ""


@dataclass(frozen=True)
class PromotionState:
    """The log, the versions by number, and the aliases of a model, as read from the registry."""

    entries: tuple[Entry, ...]
    versions: dict[str, ModelVersion]
    aliases: dict[str, str]

    @property
    def champions(self) -> tuple[VersionRef, ...]:
        """The stack of champions, deleted ones included. Without an entry, those of the aliases."""
        if self.entries:
            return self.entries[-1].champions
        aliased = (self.aliases[alias] for alias in (PREVIOUS, CHAMPION) if alias in self.aliases)
        return tuple(version_ref(self.versions[number]) for number in aliased if number in self.versions)

    def find(self, logged: VersionRef) -> ModelVersion | None:
        """Returns the version of a log entry; None when it was deleted, also if another one has its number now."""
        version = self.versions.get(logged.number)
        return version if version is not None and version_ref(version) == logged else None

    @property
    def champion(self) -> str:
        """The number of the champion; "" without one, or when it was deleted."""
        return self.champions[-1].number if self.champions and self.find(self.champions[-1]) else ""

    @property
    def earlier(self) -> tuple[VersionRef, ...]:
        """The stack of champions after a rollback; deleted versions are skipped."""
        rest = self.champions[:-1]
        while rest and (self.find(rest[-1]) is None or rest[-1] == self.champions[-1]):
            rest = rest[:-1]
        return rest


def version_ref(version: ModelVersion) -> VersionRef:
    return VersionRef(str(version.version), int(version.creation_timestamp))


def open_registry(uri: str) -> MlflowClient:
    """Returns a client of a tracking store and registry, after a test call. Raises UserError."""
    if uri.startswith(("http://", "https://")):
        # MLflow itself retries for minutes before it reports that the server is down.
        try:
            urllib.request.urlopen(without_userinfo(uri).rstrip("/") + "/health", timeout=10).close()
        except urllib.error.HTTPError:
            pass  # the server answers; a later call reports what it refuses
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
    """Returns the name of the registered model whose versions are the log of `name`."""
    return f"{name}-promotions"


def promote(client: MlflowClient, name: str, version: str, reason: str = "") -> PromotionState:
    """Makes a version champion, if it meets all conditions; does nothing when it is champion already.

    Args:
        client: of the registry.
        name: of the registered model.
        version: its number.
        reason: the reason as text; required for a version that was rolled back.
    Raises:
        PromotionRefused: the gate of its report did not pass, its consumer check is missing, its report compared it
            with another champion, it was rolled back, or another promotion was first.
        UserError: no such model or version.
    """
    state = sync_aliases(client, name)
    candidate = state.versions.get(version)
    if candidate is None:
        raise UserError(
            f"{name} has no version {version}; it has {', '.join(sorted(state.versions, key=int)) or 'none'}"
        )
    if state.champion == version:
        return state
    objections = _objections(state, candidate, reason)
    if objections:
        raise _refused(client, name, version, f"version {version} of {name} is not promoted: {'; '.join(objections)}")
    report = candidate.tags.get(REPORT_DIGEST, "")
    reasons = [f"the gate of report {report} passed", candidate.tags["trip.consumer_check"], *filter(None, [reason])]
    first, now = _append(client, name, state, PROMOTE, (*state.champions, version_ref(candidate)), "; ".join(reasons))
    if first.promoted != version_ref(candidate):
        remedy = f"evaluate version {version} against version {now.champion} and promote again"
        raise _refused(client, name, version, f"{_overtaken(name, first)}; {remedy}")
    return now


def rollback(client: MlflowClient, name: str, reason: str = "") -> PromotionState:
    """Makes the previous champion the champion again.

    Raises:
        PromotionRefused: there is no previous champion, or another promotion was first.
        UserError: no such model.
    """
    state = sync_aliases(client, name)
    if not state.champions:
        raise PromotionRefused(f"{name} has no champion, so there is nothing to roll back; promote a version first")
    if not state.earlier:
        raise PromotionRefused(
            f"before version {state.champions[-1].number} no other version of {name} was champion, so there is none"
            " to roll back to; promote another version instead"
        )
    first, now = _append(client, name, state, ROLLBACK, state.earlier, reason or "no reason given")
    if first.promoted != state.earlier[-1]:
        raise PromotionRefused(f"{_overtaken(name, first)}; run `live`, and roll back again if you still want to")
    return now


def sync_aliases(client: MlflowClient, name: str) -> PromotionState:
    """Sets the aliases to the state of the log, also after the last writer of the log was killed; returns that state.

    An alias can only be overwritten, so a slow writer may undo the change of a newer entry. Every writer of an alias
    therefore reads again, until the aliases agree with the newest entry.
    """
    failures = 0
    while True:
        state = read_state(client, name)
        if not state.entries:
            return state
        last, earlier = state.entries[-1], state.earlier
        wanted: dict[str, str | None] = {PREVIOUS: earlier[-1].number if earlier else None}
        if state.champion:  # otherwise it was deleted, and its alias with it
            wanted[CHAMPION] = state.champion
        wrong = {alias: to for alias, to in wanted.items() if state.aliases.get(alias) != to}
        if not wrong:
            return state
        try:
            _tag(client, name, state, last)
            for alias, to in wrong.items():  # champion last: when it is right, all others are
                if to is None:
                    client.delete_registered_model_alias(name, alias)
                else:
                    client.set_registered_model_alias(name, alias, to)
        except MlflowException:
            # MLflow checks before it inserts, so of several simultaneous writers of one value, one may get an error.
            failures += 1
            if failures == WRITE_TRIES:
                raise


def read_state(client: MlflowClient, name: str) -> PromotionState:
    """The state of a registered model; reads the log last, so that decisions use its newest entry. Raises UserError."""
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"the registry has no model {name!r}; run the command register-trip, or give --name") from error
    versions = {str(version.version): version for version in client.search_model_versions(f"name = '{name}'")}
    entries: list[Entry] = []
    lines = client.search_model_versions(f"name = '{log_name(name)}'")
    for line in sorted(lines, key=lambda line: int(line.version)):
        # Its writer had read all valid entries up to `after`. If there are newer valid ones, another writer was first.
        if int(line.tags.get("after", -1)) >= (entries[-1].number if entries else 0):
            entries.append(_entry(line, versions))
    return PromotionState(tuple(entries), versions, {alias: str(version) for alias, version in aliases.items()})


def _entry(line: ModelVersion, versions: dict[str, ModelVersion]) -> Entry:
    tags = line.tags

    def parse(text: str) -> VersionRef:
        number, _, created = text.partition(":")
        if created:
            return VersionRef(number, int(created))
        # An old entry without a creation time means the version that existed when the entry was written.
        version = versions.get(number)
        old = version is not None and int(version.creation_timestamp) <= int(line.creation_timestamp)
        return version_ref(version) if version is not None and old else VersionRef(number, 0)

    champions = tuple(map(parse, tags["champions"].split()))
    former = parse(tags["replaced"].strip()) if tags["replaced"].strip() else None
    time = datetime.fromtimestamp(line.creation_timestamp / 1000, UTC)
    return Entry(int(line.version), tags["action"], former, champions, tags["reasons"], time)


def _append(
    client: MlflowClient, name: str, state: PromotionState, action: str, champions: tuple[VersionRef, ...], reasons: str
) -> tuple[Entry, PromotionState]:
    """Appends an entry after `state` in one call of the store.

    Returns the entry that follows `state`, another writer's if that was first, and the state after it.
    """
    version, replaced = champions[-1].number, state.champions[-1] if state.champions else None
    seen = state.entries[-1].number if state.entries else 0
    tags = {
        "action": action,
        "after": str(seen),
        "champions": " ".join(map(str, champions[-DEPTH:])),
        "replaced": str(replaced or " "),
        "reasons": reasons[:4900],
    }
    if not state.entries:
        about = f"The log of the champions of {name}; every version is one promotion or rollback. Do not delete it."
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
            if "Giving up after" not in str(error):  # the store tries three numbers; all were taken meanwhile
                raise
        after = [entry for entry in read_state(client, name).entries if entry.number > seen]
        if after:
            break
    return after[0], sync_aliases(client, name)


def _overtaken(name: str, first: Entry) -> str:
    if first.action == PROMOTE:
        return f"version {first.version} of {name} was promoted meanwhile"
    return f"{name} was rolled back to version {first.version} meanwhile"


def _refused(client: MlflowClient, name: str, version: str, sentence: str) -> PromotionRefused:
    """Returns the error to raise, after writing it to a tag of the version."""
    note = f"{datetime.now(UTC).isoformat(timespec='seconds')}: {sentence}"
    with contextlib.suppress(MlflowException):  # two processes may refuse one version at once, see `sync_aliases`
        client.set_model_version_tag(name, version, "trip.promotion_refused", note[:4900])
    return PromotionRefused(sentence)


def _objections(state: PromotionState, candidate: ModelVersion, reason: str) -> list[str]:
    tags, champion = candidate.tags, state.versions.get(state.champion)
    objections = []
    if tags.get("trip.gate") != "passed":
        objections.append(f"the gate of its report did not pass ({tags.get('trip.gate_reasons', 'it has no report')})")
    if not tags.get("trip.consumer_check"):
        objections.append("its consumer check is missing; run register-trip for it again")
    compared = {REPORT_DIGEST: tags.get("trip.compared_report"), EVALUATED_MODEL: tags.get("trip.compared_model")}
    if champion is not None and any(compared.values()):
        same = any(of and of == champion.tags.get(tag) for tag, of in compared.items())
        if not same:
            objections.append(
                f"its report compared it with another model than version {champion.version}, which is champion now;"
                f" evaluate it with --champion and the report of version {champion.version}, and register that report"
            )
    undone = [entry for entry in state.entries if (entry.action, entry.former) == (ROLLBACK, version_ref(candidate))]
    if undone and not reason:
        objections.append(
            f"it was rolled back on {undone[-1].time:%Y-%m-%d} ({undone[-1].reasons}); give a --reason to promote it"
            " anyway"
        )
    return objections


def _tag(client: MlflowClient, name: str, state: PromotionState, entry: Entry) -> None:
    """Writes an entry to the tags of its versions."""
    time = entry.time.isoformat(timespec="seconds")
    if entry.action == PROMOTE:
        version, tags = entry.promoted, {"trip.promoted_at": time, "trip.promotion_reasons": entry.reasons}
    else:
        version, tags = entry.former, {"trip.rolled_back_at": time, "trip.rollback_reason": entry.reasons}
    if version is not None and state.find(version):
        for tag, value in tags.items():
            client.set_model_version_tag(name, version.number, tag, value)
