"""Gold: each key of an exchange once, and the rows that Silver has.

Each check proves:

- `gold_duplicated`: no key of an exchange is in Gold twice, except in different hours, at most one of them within the
  hot window (`dedup_window_hours` back from Gold's newest hour of the exchange up to now). Afterwards no more can be
  proved: two rows that are both outside the window now were perhaps inside when they were written.
- `gold_two_exchanges`: no key with a `message_id` is in Gold under two exchanges. Two exchanges may have the same trade
  ids.
- `gold_unexpected`: no row belongs to an exchange that has no file in flows/. Each row is one that Silver has, with
  the same values in all columns that Gold does not derive. Rows of days that Silver no longer keeps cannot be compared,
  nor rows of messages that only Gold's ledger holds yet.
- `gold_missing`: each key of Silver is in Gold, and each key of a valid message whose Silver row retention has
  removed. The key of a message that Gold's ledger does not hold yet counts as in flight.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from k2flow.audit.context import MAX_ROWS, AuditContext
from k2flow.audit.database import outside, within
from k2flow.audit.file_checks import read_checked
from k2flow.audit.id_runs import Ids
from k2flow.audit.report import SAMPLES, Severity
from k2flow.audit.sorted_ids import ids_without, repeated_ids
from k2flow.exchange import Exchange, all_exchanges
from k2flow.inspection.files import ReadPlan, prefetch
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import HOUR, RowHashStore, content_hash, hashable, id_hash
from k2flow.layers import GOLD, GOLD_TABLE, SILVER, Layer

UNAUDITED = -1  # the number of an exchange that is not audited now
UNDECLARED = -2  # the number of an exchange that no file in flows/ declares


class GoldKeyCheck:
    """The checks of Gold alone, for all audited exchanges together."""

    def __init__(self, context: AuditContext, pinned: Sequence[PinnedTables]) -> None:
        self._context = context
        self._store = context.store
        self._pinned = pinned
        exchanges = {each.code: each for each in all_exchanges()} | {
            each.exchange.code: each.exchange for each in pinned
        }
        self.exchanges = list(exchanges.values())
        self._numbers = dict.fromkeys(exchanges, UNAUDITED) | {each.exchange.code: each.number for each in pinned}
        self._ids = {code: id_hash(exchange) for code, exchange in exchanges.items()}

    def read(self, plan: ReadPlan) -> None:
        """Read Gold's rows into table `gold` of the database."""
        columns = f"file, {self.number}, {HOUR}, {self.id}, {content_hash(GOLD)}"
        for batch in prefetch(map(hashable, read_checked(self._context, plan))):
            self._store.insert("gold", batch, columns)

    def check(self) -> None:
        """Check Gold alone."""
        self._store.run("CREATE OR REPLACE TEMP TABLE repeated_ids (id UBIGINT)")
        for ids in repeated_ids(self._store, "SELECT id FROM gold"):
            self._store.insert("repeated_ids", pa.RecordBatch.from_pydict({"id": ids}))
        self._store.run("CREATE OR REPLACE TEMP TABLE repeated AS SELECT * FROM gold SEMI JOIN repeated_ids USING (id)")
        for pinned in self._pinned:
            self._check_duplicated(pinned)
        self._check_two_exchanges()
        undeclared = f"FROM gold WHERE exchange = {UNDECLARED}"
        if count := self._store.count(undeclared):
            text = f"{count:,} rows are of an exchange that no file in flows/ declares"
            self._broken("gold_unexpected", text, count, self._trades(content_hash(GOLD), f"SELECT row {undeclared}"))

    def _check_duplicated(self, pinned: PinnedTables) -> None:
        window, newest = pinned.exchange.settings.dedup_window_hours, newest_hour(self._store, pinned)
        duplicated = (
            f"FROM (SELECT id, count(*) AS n FROM repeated WHERE exchange = {pinned.number} GROUP BY id "
            f"HAVING count(*) > count(DISTINCT hour) OR count(*) FILTER (hour > {newest} - {window}) > 1)"
        )
        count, rows = self._store.one(f"SELECT count(*), coalesce(sum(n), 0) {duplicated}")
        if not count:
            return
        key = id_hash(pinned.exchange)
        samples = self._trades(key, f"SELECT id {duplicated}", pinned)
        samples = [sample for sample in samples if sample["exchange"] == pinned.exchange.code]
        if count <= SAMPLES and len(_keys(samples)) == len(samples):
            return  # different keys with one hash
        text = f"{count:,} keys exist more than once ({int(rows) - count:,} rows too many)"
        self._context.broken("gold_duplicated", text, count, pinned, GOLD, samples)

    def _check_two_exchanges(self) -> None:
        numbers = [UNAUDITED, UNDECLARED, *(each.number for each in self._pinned if is_global(each.exchange))]
        two = (
            f"FROM (SELECT id FROM repeated WHERE exchange IN ({', '.join(map(str, numbers))}) GROUP BY id "
            "HAVING min(exchange) <> max(exchange))"
        )
        if count := self._store.count(two):
            samples = self._trades(self.id, f"SELECT id {two}")
            if count > SAMPLES or len(_keys(samples)) < len(samples):
                self._broken("gold_two_exchanges", f"{count:,} keys exist under two exchanges", count, samples)

    @property
    def number(self) -> str:
        """The SQL of the number of a row's exchange."""
        return _by_exchange(self._numbers, UNDECLARED)

    @property
    def id(self) -> str:
        """The SQL that hashes the key of any exchange's trade."""
        if len(set(self._ids.values())) == 1:
            return next(iter(self._ids.values()))
        return _by_exchange(self._ids, id_hash(self._pinned[0].exchange))

    def _trades(self, hash_sql: str, sql: str, pinned: PinnedTables | None = None) -> list[dict[str, Any]]:
        hashes = self._store.column(f"{sql} LIMIT {SAMPLES}")
        return self._context.trades_with(pinned or self._pinned[0], GOLD, hash_sql, hashes)

    def _broken(self, check: str, text: str, count: int, samples: Sequence[dict[str, Any]]) -> None:
        self._context.report.add(check, Severity.BROKEN, text, count, None, GOLD_TABLE, samples)


def is_global(exchange: Exchange) -> bool:
    """Return whether no other exchange may have the same key."""
    return "message_id" in exchange.dedup_key


def newest_hour(store: RowHashStore, pinned: PinnedTables) -> int:
    """Return the newest hour of an exchange in `gold`, up to now: rows ahead of it move no window, see k2flow.dedup."""
    sql = "SELECT max(hour) FROM gold WHERE exchange = ? AND hour <= ?"
    (hour,) = store.one(sql, [pinned.number, int(time.time() // 3600) + 1])
    return hour or 0


def check_gold_rows(context: AuditContext, pinned: PinnedTables) -> None:
    """Compare one exchange's Silver with Gold. If not everything was read, only look for the keys of the messages."""
    x = pinned.number
    due = f"SELECT v.id FROM valid v {within(GOLD)} WHERE e_gold.exchange = {x}"
    gold = f"SELECT id FROM gold WHERE exchange = {x}"
    if not context.whole:
        _check_missing(context, pinned, due, gold)
        return
    in_flight = f"SELECT v.id FROM valid v {outside(GOLD)} WHERE e_gold.exchange = {x}"
    silver = f"SELECT id FROM trades WHERE layer = '{SILVER.name}' AND exchange = {x}"
    ids = f"{silver} UNION ALL {due} AND v.day < {pinned.cutoff_day(SILVER)}"
    _check_missing(context, pinned, ids, gold, in_flight)
    _check_unexpected(context, pinned)


def _check_missing(context: AuditContext, pinned: PinnedTables, ids: str, *others: str) -> None:
    """Report the ids that are in none of the others."""
    count, hashes = _count(map(np.unique, ids_without(context.store, ids, *others)), MAX_ROWS)
    if not count:
        return
    key = id_hash(pinned.exchange)
    if not context.whole:  # they may be in an hour that was not read
        elsewhere = context.present(pinned, GOLD, key, hashes)
        count -= len(elsewhere)
        hashes = [h for h in hashes if h not in elsewhere]
    hashes = hashes[:SAMPLES]
    if count > _unresolved(context, pinned, GOLD):
        samples = context.trades_with(pinned, SILVER, key, hashes)
        text = f"{count:,} keys of Silver are not in Gold"
        context.broken("gold_missing", text, count, pinned, GOLD, samples)


def _check_unexpected(context: AuditContext, pinned: PinnedTables) -> None:
    x, row = pinned.number, context.hashes.column(GOLD)
    gold = f"SELECT row AS id FROM gold WHERE exchange = {x} AND hour >= {pinned.cutoff_day(SILVER)} * 24"
    silver = f"SELECT {row} AS id FROM trades WHERE layer = '{SILVER.name}' AND exchange = {x}"
    only_gold = f"SELECT v.{row} AS id FROM valid v {outside(SILVER)} WHERE e_silver.exchange = {x}"
    count, hashes = _count(ids_without(context.store, gold, silver, only_gold), SAMPLES)
    if count > _unresolved(context, pinned, SILVER):
        samples = context.trades_with(pinned, GOLD, content_hash(GOLD), hashes)
        text = f"{count:,} rows are not in Silver"
        context.broken("gold_unexpected", text, count, pinned, GOLD, samples)


def _count(batches: Iterable[Ids], limit: int) -> tuple[int, list[int]]:
    """Return how many ids there are, and some of them."""
    count, some = 0, list[int]()
    for ids in batches:
        count += len(ids)
        some += ids[: limit - len(some)].tolist()
    return count, some


def _unresolved(context: AuditContext, pinned: PinnedTables, layer: Layer) -> int:
    """Return how many unresolved messages a layer's ledger does not hold yet: they may be in the other table."""
    return context.store.count(f"FROM unresolved v {outside(layer)} WHERE e_{layer.name}.exchange = {pinned.number}")


def _by_exchange(values: Mapping[str, object], default: object) -> str:
    cases = " ".join(f"WHEN '{code}' THEN {value}" for code, value in values.items())
    return f"CASE exchange {cases} ELSE {default} END"


def _keys(samples: Sequence[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(v for name, v in sample.items() if name not in ("exchange", "timestamp")) for sample in samples}
