"""Silver against Gold, of one exchange: each key is in Gold, and Gold has no row that Silver does not have.

Each check proves:

- `gold_missing`: each key of Silver is in Gold, and each key of a valid message whose Silver row retention has
  removed. The key of a message that Gold's ledger does not hold yet counts as in flight.
- `gold_unexpected`: each Gold row is one that Silver has, with the same values in all columns that Gold does not
  derive. Rows of days that Silver no longer keeps cannot be compared, nor rows of messages that only Gold's ledger
  holds yet.
"""

from k2flow.audit.context import AuditContext
from k2flow.audit.extents import outside, within
from k2flow.audit.lookup import MAX_ROWS, present, trades_with
from k2flow.audit.report import SAMPLES
from k2flow.inspection.content import content_hash, id_hash
from k2flow.inspection.pinned import PinnedTables
from k2flow.layers import GOLD, SILVER


class GoldRowCheck:
    """The checks above, of one exchange."""

    def __init__(self, context: AuditContext, pinned: PinnedTables) -> None:
        self._context = context
        self._store = context.store
        self._pinned = pinned
        self._cutoff = pinned.cutoff_day(SILVER)

    def check(self) -> None:
        """Compare. If not everything was read, only look for the keys of the messages."""
        x = self._pinned.number
        due = f"SELECT v.id FROM valid v {within(GOLD)} WHERE e_gold.exchange = {x}"
        self._store.run(f"CREATE OR REPLACE TEMP VIEW gold_ids AS SELECT id FROM gold WHERE exchange = {x}")
        if not self._context.whole:
            self._check_missing(f"FROM ({due}) ANTI JOIN gold_ids USING (id)")
            return
        in_flight = f"SELECT v.id FROM valid v {outside(GOLD)} WHERE e_gold.exchange = {x}"
        silver = f"SELECT id FROM trades WHERE layer = '{SILVER.name}' AND exchange = {x}"
        ids = f"{silver} UNION ALL {due} AND v.day < {self._cutoff}"
        self._check_missing(
            f"FROM (SELECT id FROM ({ids}) ANTI JOIN gold_ids USING (id)) ANTI JOIN ({in_flight}) USING (id)"
        )
        self._check_unexpected()

    def _check_missing(self, missing: str) -> None:
        count = int(self._store.one(f"SELECT count(DISTINCT id) {missing}")[0])
        if not count:
            return
        key = id_hash(self._pinned.exchange)
        limit = SAMPLES if self._context.whole else MAX_ROWS
        hashes = [h for (h,) in self._store.run(f"SELECT DISTINCT id {missing} LIMIT {limit}")]
        if not self._context.whole:  # they may be in an hour that was not read
            elsewhere = present(self._context, self._pinned, GOLD, key, hashes)
            count -= len(elsewhere)
            hashes = [h for h in hashes if h not in elsewhere][:SAMPLES]
        if count:
            samples = trades_with(self._context, self._pinned, SILVER, key, hashes)
            text = f"{count:,} keys of Silver are not in Gold"
            self._context.broken("gold_missing", text, count, self._pinned, GOLD, samples)

    def _check_unexpected(self) -> None:
        x, row = self._pinned.number, self._context.hashes.column(GOLD)
        silver = f"SELECT {row} AS row FROM trades WHERE layer = '{SILVER.name}' AND exchange = {x}"
        only_gold = f"SELECT v.{row} AS row FROM valid v {outside(SILVER)} WHERE e_silver.exchange = {x}"
        rows = (
            f"FROM (SELECT row FROM gold WHERE exchange = {x} AND hour >= {self._cutoff} * 24) "
            f"ANTI JOIN ({silver}) USING (row) ANTI JOIN ({only_gold}) USING (row)"
        )
        if count := self._store.count(rows):
            hashes = [h for (h,) in self._store.run(f"SELECT row {rows} LIMIT {SAMPLES}")]
            samples = trades_with(self._context, self._pinned, GOLD, content_hash(GOLD), hashes)
            text = f"{count:,} rows are not in Silver"
            self._context.broken("gold_unexpected", text, count, self._pinned, GOLD, samples)
