"""Silver against Gold: each (exchange, message_id) once, and no row that Silver does not have.

What each check proves:

- `gold_doubled`: no id of an exchange is in Gold twice, except in different hours of which one at the most is within
  the hot window (`dedup_window_hours` back from Gold's newest hour of the exchange). That is what can be told
  afterwards: two rows that are both outside the window now were perhaps within it when they were written.
- `gold_two_exchanges`: no id is in Gold under two exchanges.
- `gold_missing`: each id of Silver is in Gold, and each id of a valid message whose Silver row retention has removed.
  An id of a message that Gold's ledger does not hold yet counts as in flight.
- `gold_unexpected`: each Gold row is one that Silver has, with the same 16 values. Rows of days that Silver no longer
  keeps cannot be compared, nor rows of messages that only Gold's ledger holds yet; those of an exchange that has no
  file in flows/ are unexpected.
"""

from collections.abc import Callable, Sequence
from typing import Any

from k2flow.audit.file_checks import FileChecks
from k2flow.audit.layers import SILVER_COLUMNS, beyond, within
from k2flow.audit.lookup import MAX_ROWS, present, trades_with
from k2flow.audit.report import SAMPLES, Report, Severity
from k2flow.exchange import all_exchanges
from k2flow.inspection.files import Plan, ahead, read
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import ID_HASH, ROW_HASH, Store, hashable
from k2flow.layers import GOLD_TABLE, MIN_TIME_US

COLUMNS = (*SILVER_COLUMNS, "exchange_hour")
UNAUDITED = -1
"""The number of an exchange that is not audited now."""
UNKNOWN = -2
"""The number of an exchange that no file in flows/ declares."""


class Gold:
    """The checks above, for all audited exchanges together."""

    def __init__(self, store: Store, report: Report, pinned: Sequence[PinnedTables]) -> None:
        self._store = store
        self._report = report
        self._pinned = pinned

    def read(self, plan: Plan, checks: FileChecks, advance: Callable[[int], None]) -> None:
        numbers = {exchange.code: UNAUDITED for exchange in all_exchanges()}
        numbers |= {pinned.exchange.code: pinned.number for pinned in self._pinned}
        cases = " ".join(f"WHEN '{code}' THEN {number}" for code, number in numbers.items())
        hour = f"(epoch_us(timestamp) - {MIN_TIME_US}) // 3_600_000_000 + {MIN_TIME_US // 3_600_000_000}"  # rounds down
        columns = f"CASE exchange {cases} ELSE {UNKNOWN} END, {hour}, {ID_HASH}, {ROW_HASH}"
        for batch in ahead(map(hashable, read(plan, COLUMNS, checks, advance))):
            self._store.insert("gold", batch, columns)

    def check_ids(self) -> None:
        """The checks that need Gold alone."""
        self._store.run(
            "CREATE OR REPLACE TEMP TABLE repeated AS SELECT g.* FROM gold g "
            "WHERE id IN (SELECT id FROM gold GROUP BY id HAVING count(*) > 1)"
        )
        for pinned in self._pinned:
            self._check_doubled(pinned)
        two = "FROM (SELECT id FROM repeated GROUP BY id HAVING min(exchange) <> max(exchange))"
        (count,) = self._store.one(f"SELECT count(*) {two}")
        if count:
            samples = self._trades(ID_HASH, self._store.run(f"SELECT id {two} LIMIT {SAMPLES}"))
            ids = {sample["message_id"] for sample in samples}
            if count > SAMPLES or len(ids) < len(samples):
                text = f"{count:,} message ids are there under two exchanges"
                self._report.add("gold_two_exchanges", Severity.BROKEN, text, count, None, GOLD_TABLE, samples)
        (count,) = self._store.one(f"SELECT count(*) FROM gold WHERE exchange = {UNKNOWN}")
        if count:
            hashes = self._store.run(f"SELECT row FROM gold WHERE exchange = {UNKNOWN} LIMIT {SAMPLES}")
            text = f"{count:,} rows are of an exchange that no file in flows/ declares"
            samples = self._trades(ROW_HASH, hashes)
            self._report.add("gold_unexpected", Severity.BROKEN, text, count, None, GOLD_TABLE, samples)

    def _check_doubled(self, pinned: PinnedTables) -> None:
        window = pinned.exchange.settings.dedup_window_hours
        (newest,) = self._store.one("SELECT max(hour) FROM gold WHERE exchange = ?", [pinned.number])
        doubled = (
            f"FROM (SELECT id, count(*) AS n FROM repeated WHERE exchange = {pinned.number} GROUP BY id "
            f"HAVING count(*) > count(DISTINCT hour) OR count(*) FILTER (hour > {newest or 0} - {window}) > 1)"
        )
        count, rows = self._store.one(f"SELECT count(*), coalesce(sum(n), 0) {doubled}")
        if not count:
            return
        hashes = self._store.run(f"SELECT id {doubled} LIMIT {SAMPLES}")
        samples = [s for s in self._trades(ID_HASH, hashes) if s["exchange"] == pinned.exchange.code]
        if count <= SAMPLES and len({sample["message_id"] for sample in samples}) == len(samples):
            return  # ids that are different and have one hash
        text = f"{count:,} message ids are there more than once ({int(rows) - count:,} rows too many)"
        self._broken("gold_doubled", text, count, pinned, samples)

    def check_silver(self, pinned: PinnedTables, whole: bool) -> None:
        """Silver against Gold. `whole`: all of both was read; else only the messages' own ids are looked for."""
        x, cutoff = pinned.number, pinned.cutoff_day("silver")
        due = f"SELECT v.id FROM valid v {within('gold')} WHERE p_gold.exchange = {x}"
        if whole:
            late = f"SELECT v.id FROM valid v {beyond('gold')} WHERE p_gold.exchange = {x}"
            ids = f"SELECT id FROM silver WHERE exchange = {x} UNION ALL {due} AND v.day < {cutoff}"
            missing = f"FROM (SELECT id FROM ({ids}) ANTI JOIN gold_ids USING (id)) ANTI JOIN ({late}) USING (id)"
        else:
            missing = f"FROM ({due}) ANTI JOIN gold_ids USING (id)"
        self._store.run(f"CREATE OR REPLACE TEMP VIEW gold_ids AS SELECT id FROM gold WHERE exchange = {x}")
        self._check_missing(pinned, missing, whole)
        if whole:
            early = f"SELECT v.row FROM valid v {beyond('silver')} WHERE p_silver.exchange = {x}"
            self._check_unexpected(pinned, cutoff, early)

    def _check_missing(self, pinned: PinnedTables, missing: str, whole: bool) -> None:
        (count,) = self._store.one(f"SELECT count(DISTINCT id) {missing}")
        if not count:
            return
        hashes = self._store.run(f"SELECT DISTINCT id {missing} LIMIT {SAMPLES if whole else MAX_ROWS}")
        if not whole:  # they may be in an hour that was not read
            elsewhere = present(self._store, pinned, "gold", ID_HASH, [h for (h,) in hashes])
            count -= len(elsewhere)
            hashes = [(h,) for (h,) in hashes if h not in elsewhere][:SAMPLES]
        if count:
            samples = trades_with(self._store, pinned, "silver", ID_HASH, [h for (h,) in hashes])
            self._broken("gold_missing", f"{count:,} message ids of Silver are not there", count, pinned, samples)

    def _check_unexpected(self, pinned: PinnedTables, cutoff: int, early: str) -> None:
        x = pinned.number
        rows = (
            f"FROM (SELECT row FROM gold WHERE exchange = {x} AND hour >= {cutoff} * 24) "
            f"ANTI JOIN (SELECT row FROM silver WHERE exchange = {x}) USING (row) ANTI JOIN ({early}) USING (row)"
        )
        (count,) = self._store.one(f"SELECT count(*) {rows}")
        if count:
            samples = self._trades(ROW_HASH, self._store.run(f"SELECT row {rows} LIMIT {SAMPLES}"))
            self._broken("gold_unexpected", f"{count:,} rows are not in Silver", count, pinned, samples)

    def _trades(self, hash_sql: str, hashes: Sequence[tuple[int]]) -> list[dict[str, Any]]:
        return trades_with(self._store, self._pinned[0], "gold", hash_sql, [h for (h,) in hashes])

    def _broken(
        self, check: str, text: str, count: int, pinned: PinnedTables, samples: Sequence[dict[str, Any]]
    ) -> None:
        self._report.add(check, Severity.BROKEN, text, count, pinned.exchange.name, GOLD_TABLE, samples)
