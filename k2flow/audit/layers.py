"""Bronze against Silver and the dead letters: each message in exactly one of the two, as it was decoded.

What each check proves, for the messages that Bronze still has and offsets that both tables' ledgers hold:

- `in_neither`: a valid message's row is in Silver, with the same 16 values, as often as such messages came; a bad
  message's offset is in the dead-letter table.
- `in_both`: a valid message that is in Silver has no dead-letter row. `misplaced`: nor has one that is not.
- `silver_unexpected`, `silver_doubled`: Silver has no row that no message gives, and none more often than messages give
  it. Where Bronze no longer has all messages, Silver may have rows of those: then only their number is bounded, by
  Silver's ledger, and `silver_repeated` notes rows that an expired message may have given once more.
- `dlq_doubled`, `dlq_unexpected`, `dlq_changed`: no offset is there twice, none that is no message's, and each one's
  payload, schema id, Kafka timestamp and reason are what the message gives. `dlq_outside_ledger`: none is beyond the
  ledger's extent.

Not compared: `detail` and `failed_at`; which of two messages with equal values a Silver row came from; trades of days
that Silver's retention leaves out, and bad messages ingested on days that the dead letters' leaves out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from k2flow.audit.file_checks import FileChecks
from k2flow.audit.lookup import trades_with
from k2flow.audit.report import SAMPLES, Report, Severity
from k2flow.inspection.files import Plan, ahead, read
from k2flow.inspection.partitions import OUTSIDE, Part, Parts
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import CONTENT_HASH, ID_HASH, ROW_HASH, Store, hashable
from k2flow.layers import SILVER

SILVER_COLUMNS = SILVER.columns
DLQ_COLUMNS = (
    *("topic", "partition", "offset", "kafka_timestamp"),
    *("payload", "schema_id", "reason", "failed_at", "failed_date"),
)


def within(layer: str, rows: str = "v") -> str:
    """SQL that joins messages `rows` to those that the ledger of `layer` holds."""
    return (
        f"JOIN parts p_{layer} ON p_{layer}.part = {rows}.part AND p_{layer}.layer = '{layer}' "
        f'AND {rows}."offset" >= p_{layer}.first AND {rows}."offset" < p_{layer}.next'
    )


def beyond(layer: str, rows: str = "v") -> str:
    """SQL that joins messages `rows` to the partitions in which the ledger of `layer` does not hold them."""
    return (
        f"JOIN parts p_{layer} ON p_{layer}.part = {rows}.part AND p_{layer}.layer = '{layer}' "
        f'AND NOT ({rows}."offset" >= p_{layer}.first AND {rows}."offset" < p_{layer}.next)'
    )


class Layers:
    """The checks above, of one exchange."""

    def __init__(self, store: Store, report: Report, pinned: PinnedTables, parts: Parts) -> None:
        self._store = store
        self._report = report
        self._pinned = pinned
        self._parts = parts
        self._by_number: dict[int, Part] = {part.number: part for part in parts}

    def read_silver(self, plan: Plan, checks: FileChecks, advance: Callable[[int], None]) -> None:
        columns = f"{self._pinned.number}, {ID_HASH}, {ROW_HASH}"
        for batch in ahead(map(hashable, read(plan, SILVER_COLUMNS, checks, advance))):
            self._store.insert("silver", batch, columns)

    def read_dlq(self, plan: Plan, checks: FileChecks, advance: Callable[[int], None]) -> None:
        outside, samples = 0, []
        for batch in ahead(read(plan, DLQ_COLUMNS, checks, advance)):
            partition = batch.column("partition").fill_null(OUTSIDE).to_numpy()
            offset = batch.column("offset").fill_null(OUTSIDE).to_numpy()
            written = batch.column("failed_at").cast(pa.int64()).fill_null(0).to_numpy()
            part = self._parts.numbers("dlq", partition, offset, written)
            if (part == OUTSIDE).any():
                rows = batch.filter(pa.array(part == OUTSIDE)).select(["topic", "partition", "offset"])
                outside += rows.num_rows
                samples += rows.slice(0, SAMPLES).to_pylist()
            batch = batch.append_column("part", pa.array(part.astype(np.int32)))
            self._store.insert("dlq", batch, f'part, "offset", reason, {CONTENT_HASH}')
        if outside:
            text = f"{outside:,} rows have an offset that the table's ledger does not hold"
            self._broken("dlq_outside_ledger", text, outside, "dlq", samples)

    def check(self, whole: bool) -> None:
        """Compares. `whole`: all of Silver was read, not only the days of the messages."""
        self._check_silver(whole)
        self._check_dlq()

    def _check_silver(self, whole: bool) -> None:
        x, store = self._pinned.number, self._store
        store.run(
            f"CREATE OR REPLACE TEMP VIEW expected AS SELECT v.* FROM valid v {within('silver')} "
            f"WHERE p_silver.exchange = {x} AND v.day >= {self._pinned.cutoff_day('silver')}"
        )
        sums = "SELECT count(*), sum(row::HUGEINT) FROM"
        wanted, found = store.one(f"{sums} expected"), store.one(f"{sums} silver WHERE exchange = {x}")
        if wanted == found:
            self._check_both(())
            return
        store.run(
            "CREATE OR REPLACE TEMP TABLE differing AS SELECT row, sum(e) AS e, sum(s) AS s FROM ("
            "SELECT row, 1 AS e, 0 AS s FROM expected UNION ALL "
            f"SELECT row, 0, 1 FROM silver WHERE exchange = {x}) GROUP BY row HAVING sum(e) <> sum(s)"
        )
        (missing,) = store.one("SELECT coalesce(sum(e - s), 0) FROM differing WHERE e > s")
        self._check_both(("e.row IN (SELECT row FROM differing WHERE e > s)",))
        if missing:
            self._report_missing(int(missing))
        if whole:
            self._check_surplus()

    def _report_missing(self, missing: int) -> None:
        rows = self._store.run(
            'SELECT e.part, e."offset" FROM expected e WHERE row IN (SELECT row FROM differing WHERE e > s) '
            'AND NOT EXISTS (SELECT 1 FROM dlq d WHERE d.part = e.part AND d."offset" = e."offset") '
            f"ORDER BY ALL LIMIT {SAMPLES}"
        )
        (misplaced,) = self._store.one(
            'SELECT count(*) FROM expected e JOIN dlq d USING (part, "offset") '
            "WHERE row IN (SELECT row FROM differing WHERE e > s)"
        )
        if missing > misplaced:
            text = (
                f"{missing - misplaced:,} valid messages are neither in Silver, as they were decoded, nor dead letters"
            )
            self._broken("in_neither", text, missing - misplaced, "silver", self._places(rows))

    def _check_both(self, missing: Sequence[str]) -> None:
        """Valid messages that have a dead-letter row: in both, or in the wrong one."""
        is_missing = missing[0] if missing else "false"
        for check, condition, what in (
            ("in_both", f"NOT ({is_missing})", "are both in Silver and dead letters"),
            ("misplaced", is_missing, "are dead letters and not in Silver, though they are valid"),
        ):
            base = f'FROM expected e JOIN dlq d USING (part, "offset") WHERE {condition}'
            (count,) = self._store.one(f"SELECT count(*) {base}")
            if count:
                rows = self._store.run(f'SELECT part, "offset" {base} ORDER BY ALL LIMIT {SAMPLES}')
                self._broken(check, f"{count:,} messages {what}", count, "dlq", self._places(rows))

    def _check_surplus(self) -> None:
        """Silver's rows beyond what Bronze's messages give."""
        covered = all(part.covered for part in self._parts)
        allowed = 0
        if not covered:
            allowed = sum(part.extent("silver").rows - self._decoded(part) for part in self._parts)
        for check, condition, what in (
            ("silver_unexpected", "e = 0", "are what no message gives"),
            ("silver_doubled", "e > 0", "are there more often than messages give them"),
        ):
            count, few = self._store.one(
                f"SELECT coalesce(sum(s - e), 0), count(*) FROM differing WHERE s > e AND {condition}"
            )
            beyond = int(count) - allowed
            if beyond > 0:
                hashes = self._store.run(f"SELECT row FROM differing WHERE s > e AND {condition} LIMIT {SAMPLES}")
                samples = [] if allowed and few > SAMPLES else self._trades(hashes)
                self._broken(check, f"{beyond:,} rows {what}", beyond, "silver", samples)
            elif count and check == "silver_doubled":
                text = (
                    f"{int(count):,} rows are there more often than Bronze's messages give them; expired ones may have"
                )
                exchange, table = self._pinned.exchange.name, self._pinned.name("silver")
                self._report.add("silver_repeated", Severity.NOTE, text, int(count), exchange, table)
            allowed = max(0, allowed - int(count))

    def _decoded(self, part: Part) -> int:
        """How many of the messages that Silver's ledger counts were decoded here."""
        (count,) = self._store.one(f"SELECT count(*) FROM valid v {within('silver')} WHERE v.part = ?", [part.number])
        return int(count)

    def _check_dlq(self) -> None:
        x = self._pinned.number
        self._store.run(
            f"CREATE OR REPLACE TEMP VIEW expected_bad AS SELECT v.* FROM bad v {within('dlq')} "
            f"WHERE p_dlq.exchange = {x} AND v.day > {self._pinned.cutoff_day('dlq')}"
        )
        ours = f"part IN (SELECT part FROM parts WHERE exchange = {x})"
        lows = ", ".join(f"({part.number}, {part.low}, {part.high})" for part in self._parts) or "(NULL, 0, 0)"
        same = 'd.part = e.part AND d."offset" = e."offset"'
        checks = {
            "in_neither": (
                f"FROM expected_bad e WHERE NOT EXISTS (SELECT 1 FROM dlq d WHERE {same})",
                "bad messages are not dead letters (nor can they be in Silver)",
            ),
            "dlq_doubled": (
                f'FROM (SELECT part, "offset" FROM dlq WHERE {ours} GROUP BY ALL HAVING count(*) > 1) e',
                "messages are more than once in the table",
            ),
            "dlq_changed": (
                f"FROM expected_bad e JOIN dlq d ON {same} WHERE d.content IS DISTINCT FROM e.content",
                "rows differ from what their message gives: payload, schema id, Kafka timestamp or reason",
            ),
            "dlq_unexpected": (
                f"FROM dlq e JOIN (VALUES {lows}) low(part, first, next) ON low.part = e.part "
                'WHERE e."offset" >= low.first AND e."offset" < low.next '
                f"AND NOT EXISTS (SELECT 1 FROM bad d WHERE {same}) "
                f"AND NOT EXISTS (SELECT 1 FROM valid d WHERE {same})",
                "rows have an offset that no message has",
            ),
        }
        for check, (rows, what) in checks.items():
            (count,) = self._store.one(f"SELECT count(*) {rows}")
            if count:
                samples = self._store.run(f'SELECT e.part, e."offset" {rows} ORDER BY ALL LIMIT {SAMPLES}')
                self._broken(check, f"{count:,} {what}", count, "dlq", self._places(samples))

    def _places(self, rows: Sequence[tuple[int, int]]) -> list[dict[str, object]]:
        return [self._by_number[part].at(offset) for part, offset in rows]

    def _trades(self, hashes: Sequence[tuple[int]]) -> list[dict[str, Any]]:
        return trades_with(self._store, self._pinned, "silver", ROW_HASH, [h for (h,) in hashes])

    def _broken(self, check: str, text: str, count: int, layer: str, samples: Sequence[dict[str, Any]]) -> None:
        exchange, table = self._pinned.exchange.name, self._pinned.name(layer)
        self._report.add(check, Severity.BROKEN, text, count, exchange, table, samples)
