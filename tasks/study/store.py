"""Stores raters and votes in SQLite (write-ahead log) or PostgreSQL; a vote is on the disk before it is confirmed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from infra.redaction import redact
from tasks.records import UserError
from tasks.study.plan import Plan

LOCK_SECONDS = 30  # that a writer waits for another one
_WRITES = "study_writes"  # option of a connection: its transaction takes the lock of SQLite at once
_LOCK = 0x7472_6970  # of PostgreSQL, while a rater gets a place

_tables = MetaData()
STUDIES = Table(
    "studies", _tables, Column("study", String(32), primary_key=True), Column("plan_sha256", String(64), nullable=False)
)
RATERS = Table(
    "raters",
    _tables,
    Column("study", String(32), primary_key=True),
    Column("rater", Integer, primary_key=True, autoincrement=False),
    Column("token_sha256", String(64), nullable=False, unique=True),
    Column("participant_sha256", String(64), unique=True),
)
SHOWN = Table(
    "shown",
    _tables,
    Column("study", String(32), primary_key=True),
    Column("rater", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("seconds", Float, nullable=False),
)
VOTES = Table(
    "votes",
    _tables,
    Column("study", String(32), primary_key=True),
    Column("rater", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("pair", String(32), nullable=False),
    Column("swapped", Boolean, nullable=False),
    Column("answers", Text, nullable=False),
    Column("milliseconds", Integer, nullable=False),
    Column("plays", Integer, nullable=False),
    Column("device", String(8), nullable=False),
    Column("stored_at", Integer, nullable=False),
)


class Full(Exception):
    """Every place of the study is taken."""


class AlreadyStored(Exception):
    """There is a vote of this rater at this position."""


class NotNext(Exception):
    """The position is not the next one of the rater."""


@dataclass(frozen=True)
class Vote:
    """One stored vote: of the rater's pair at a position, with an answer ("left", "right", "unsure") by question."""

    rater: int
    position: int
    pair: str
    swapped: bool
    answers: dict[str, str]
    milliseconds: int
    plays: int
    device: str
    stored_at: int


def token_hash(token: str) -> str:
    """What is stored of a token: with the database alone nobody can vote."""
    return hashlib.sha256(token.encode()).hexdigest()


class Store:
    """The raters and votes of one study; several processes may use one database.

    Raises `UserError` for a database that cannot be used, or one that has votes under another plan of the study.
    """

    def __init__(self, address: str, plan: Plan) -> None:
        self._study, self._places = plan.study, len(plan.assignments)
        try:
            self._engine = create_engine(address, pool_size=16, max_overflow=32, pool_timeout=LOCK_SECONDS)
        except (ArgumentError, ImportError) as error:
            raise UserError(
                f"--database {redact(address)} cannot be used ({error}); give sqlite:///FILE or postgresql+psycopg2://HOST/NAME"
            ) from error
        self._sqlite = self._engine.dialect.name == "sqlite"
        self._prepare_connections()
        try:
            with self._writing() as connection:
                _tables.create_all(connection)
                known = connection.execute(select(STUDIES.c.plan_sha256).where(STUDIES.c.study == self._study)).scalar()
                if known is None:
                    connection.execute(insert(STUDIES).values(study=self._study, plan_sha256=plan.sha256))
        except SQLAlchemyError as error:
            raise UserError(
                f"--database {redact(address)} cannot be used ({redact(str(error.__cause__ or error))})"
            ) from error
        if known not in (None, plan.sha256):
            raise UserError(
                f"the database has this study under another plan ({known[:12]}, the plan is {plan.sha256[:12]}); a plan"
                " is fixed before the first vote: restore plan.json, or build a new study"
            )

    def close(self) -> None:
        self._engine.dispose()

    def enrol(self, token: str, participant_sha256: str | None) -> int:
        """Gives a rater the next free place, or the one that a returning participant has; returns its number.

        A returning participant's new token replaces the old one. Raises `Full`.
        """
        with self._writing() as connection:
            if not self._sqlite:
                connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            mine = RATERS.c.study == self._study
            if participant_sha256 is not None:
                same = mine & (RATERS.c.participant_sha256 == participant_sha256)
                rater = connection.execute(select(RATERS.c.rater).where(same)).scalar()
                if rater is not None:
                    connection.execute(update(RATERS).where(same).values(token_sha256=token_hash(token)))
                    return rater
            taken = connection.execute(select(func.count()).select_from(RATERS).where(mine)).scalar_one()
            if taken >= self._places:
                raise Full
            connection.execute(
                insert(RATERS).values(
                    study=self._study,
                    rater=taken,
                    token_sha256=token_hash(token),
                    participant_sha256=participant_sha256,
                )
            )
            return taken

    def rater(self, token: str) -> int | None:
        """The number of the rater with this token; None for a token that this study has not given."""
        with self._engine.connect() as connection:
            where = (RATERS.c.study == self._study) & (RATERS.c.token_sha256 == token_hash(token))
            return connection.execute(select(RATERS.c.rater).where(where)).scalar()

    def position(self, rater: int) -> int:
        """The position of the rater's next pair, which is the number of votes."""
        with self._engine.connect() as connection:
            return self._position(connection, rater)

    def show(self, rater: int, position: int) -> None:
        """Notes that a pair is shown; the first time counts."""
        with self._writing() as connection:
            if self._shown(connection, rater, position) is None:
                values = {"study": self._study, "rater": rater, "position": position, "seconds": time.time()}
                connection.execute(insert(SHOWN).values(**values))

    def seconds_since_shown(self, rater: int, position: int) -> float | None:
        """How long ago a pair was shown first; None if it was not."""
        with self._engine.connect() as connection:
            shown = self._shown(connection, rater, position)
        return None if shown is None else time.time() - shown

    def add(self, vote: Vote) -> None:
        """Stores a vote; when this returns it is on the disk. Raises `AlreadyStored` or `NotNext`."""
        values = {name: value for name, value in vars(vote).items() if name != "answers"}
        values |= {"study": self._study, "answers": json.dumps(vote.answers, sort_keys=True)}
        try:
            with self._writing() as connection:
                next_position = self._position(connection, vote.rater)
                if vote.position < next_position:
                    raise AlreadyStored
                if vote.position > next_position:
                    raise NotNext
                connection.execute(insert(VOTES).values(**values))
        except IntegrityError as error:  # two at once, on PostgreSQL
            raise AlreadyStored from error

    def votes(self) -> list[Vote]:
        """All votes, by rater and position."""
        columns = [column for column in VOTES.c if column.name != "study"]
        query = select(*columns).where(VOTES.c.study == self._study).order_by(VOTES.c.rater, VOTES.c.position)
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [Vote(**_with_answers(row)) for row in rows]

    def _position(self, connection: Connection, rater: int) -> int:
        where = (VOTES.c.study == self._study) & (VOTES.c.rater == rater)
        return connection.execute(select(func.count()).select_from(VOTES).where(where)).scalar_one()

    def _shown(self, connection: Connection, rater: int, position: int) -> float | None:
        where = (SHOWN.c.study == self._study) & (SHOWN.c.rater == rater) & (SHOWN.c.position == position)
        return connection.execute(select(SHOWN.c.seconds).where(where)).scalar()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(**{_WRITES: True}) as connection, connection.begin():
            yield connection

    def _prepare_connections(self) -> None:
        @event.listens_for(self._engine, "connect")
        def prepare(connection: Any, _: Any) -> None:
            if self._sqlite:
                connection.isolation_level = None  # `begin` below starts transactions, not the driver
                statements = ["journal_mode=WAL", "synchronous=FULL", f"busy_timeout={LOCK_SECONDS * 1000}"]
                statements = [f"pragma {statement}" for statement in statements]
            else:
                statements = ["set synchronous_commit to on"]
            cursor = connection.cursor()
            for statement in statements:
                cursor.execute(statement)
            cursor.close()
            if not self._sqlite:
                connection.commit()

        if self._sqlite:

            @event.listens_for(self._engine, "begin")
            def begin(connection: Connection) -> None:
                # A transaction that first reads and then writes could not wait for another writer.
                writes = connection.get_execution_options().get(_WRITES, False)
                connection.exec_driver_sql("begin immediate" if writes else "begin")


def _with_answers(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {**row, "answers": json.loads(row["answers"])}
