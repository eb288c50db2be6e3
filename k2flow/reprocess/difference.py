"""What becomes of each message today that did not before, and which rows of the tables go for it.

A dead letter names its message. A row of Silver or Gold does not, but a valid message's row carries its message_id, and
its values are what the message gives. So, with rows as hashes in a database:

- a message that has a dead letter was bad, any other was valid;
- a message that was valid and is has changed if Silver has fewer rows of its values than such messages gave;
- the rows of Silver that a message leaves behind are those of its message_id that no unchanged message gives;
- a row of Gold goes where no row of Silver with its values is left, and one comes for each id that then has none.

Where that does not tell which row goes, a message is left as it is, and counted as `unclear`: its id has other rows in
Silver too, which messages out of scope may have given, or fewer than its messages must have given, since retention has
removed them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.manifest import DataFile

from k2flow.errors import ReprocessError
from k2flow.iceberg.catalog import catalog_errors
from k2flow.inspection.files import Plan, ahead, plan, read
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import CONTENT_HASH, ID_HASH, ROW_HASH, Store, hashable
from k2flow.layers import DLQ, SILVER
from k2flow.reprocess.scope import ALWAYS, Advance, Known, Letters, Scope
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.messages import MessageBatch

SCHEMA = """
CREATE TABLE message (partition INTEGER, "offset" BIGINT, id UBIGINT, row UBIGINT, day INTEGER,
                      reason VARCHAR, content UBIGINT);  -- as they are judged today; valid ones have no reason
CREATE TABLE letter (partition INTEGER, "offset" BIGINT, row UBIGINT, file INTEGER,
                     reason VARCHAR, content UBIGINT, failed_at BIGINT);
CREATE TABLE silver (id UBIGINT, row UBIGINT, day INTEGER, file INTEGER);
CREATE TABLE gold (id UBIGINT, row UBIGINT, file INTEGER);
CREATE TABLE moved (partition INTEGER, "offset" BIGINT, id UBIGINT, row UBIGINT, day INTEGER,
                    was VARCHAR, reason VARCHAR, failed_at BIGINT);  -- messages of which something else becomes
CREATE TABLE leaving (partition INTEGER, "offset" BIGINT, id UBIGINT);  -- messages that leave a row of Silver behind
CREATE TABLE gone (layer VARCHAR, file INTEGER, row UBIGINT, n BIGINT, present BIGINT);  -- n of those in a file
CREATE TABLE picked (id UBIGINT, row UBIGINT);  -- rows of Silver that come into Gold
"""

LETTER_HASH = 'hash("partition", "offset", failed_at)'
HASHES = {"dlq": LETTER_HASH, "silver": ROW_HASH, "gold": ROW_HASH}
VALID = "valid"
_SILVER = SILVER.columns
_DLQ = DLQ.columns
_VALID = 'message ANTI JOIN letter USING (partition, "offset") WHERE reason IS NULL'


@dataclass
class Replaced:
    """What changes in one table: files that go (by path) and come, and how many rows do."""

    removed: list[str] = field(default_factory=list)
    added: list[DataFile] = field(default_factory=list)
    rows_gone: int = 0
    rows_come: int = 0


class Difference:
    """The difference, of one scope. `plans` are the files of each table that were read, numbered in that order."""

    def __init__(
        self, store: Store, pinned: PinnedTables, decoder: TradeDecoder, newest_hour: Callable[[], int | None]
    ) -> None:
        """`newest_hour` (since 1970) in which Gold has a row of the exchange: the hot window ends with it."""
        self._newest_hour = newest_hour
        self.store = store
        self.plans: dict[str, Plan] = {}
        self._pinned = pinned
        self._decoder = decoder

    def judge(self, scope: Scope, known: Known, advance: Advance) -> int:
        """Decodes every message of the scope, and compares with the dead letters and Silver; how many there are."""
        for messages in scope.messages(advance):
            self._store_messages(messages)
        self._read_letters(known, advance)
        if not isinstance(scope, Letters):
            self._read_silver(advance)
            self._find_changed()
        self._find_moved(reworded=not isinstance(scope, Letters))
        (judged,) = self.store.one("SELECT count(*) FROM message")
        return int(judged)

    def counts(self) -> dict[tuple[str, str], int]:
        """Of how many messages something else becomes, by what they were and are: a reason code, or VALID."""
        counted = self.store.run("SELECT was, reason, count(*) FROM moved GROUP BY ALL ORDER BY 3 DESC, 1, 2")
        return {(was or VALID, now or VALID): n for was, now, n in counted}

    def moving(self, scope: Scope, advance: Advance, where: str = "true") -> Iterator[MessageBatch]:
        """The messages of `moved` alone, or those of them of which a condition holds."""
        wanted = self.store.arrays(f'SELECT partition, "offset" FROM moved WHERE {where} ORDER BY ALL')
        keys = _keys(wanted["partition"], wanted["offset"])
        if not len(keys):
            return
        for messages in scope.messages(advance):
            found = messages.filter(_among(keys, _keys(messages.partition, messages.offset)))
            if found.rows.num_rows:
                yield found

    def find_leaving(self, scope: Scope, advance: Advance) -> None:
        """Which messages leave a row behind in Silver: those that have changed, or were valid and are bad.

        Raises ReprocessError for one that cannot be decoded any more.
        """
        self.store.run(
            'INSERT INTO leaving SELECT partition, "offset", id FROM moved WHERE was IS NULL AND reason IS NULL'
        )
        for messages in self.moving(scope, advance, "was IS NULL AND reason IS NOT NULL"):
            identities = self._decoder.identify(messages)
            unread = identities.column("message_id").is_null().to_numpy(zero_copy_only=False)
            if unread.any():
                i = int(np.flatnonzero(unread)[0])
                raise ReprocessError(
                    f"partition {messages.partition[i]}, offset {messages.offset[i]} was a valid trade and cannot be "
                    "decoded any more, so that its row in Silver cannot be told: make its schema known again, or leave "
                    "its day out"
                )
            columns = {"part": messages.partition, "kafka_offset": messages.offset}
            for name, values in columns.items():
                identities = identities.append_column(name, pa.array(values))
            self.store.insert("leaving", identities, f"part, kafka_offset, {ID_HASH}")

    def settle(self) -> int:
        """Takes the unclear ones out of `moved`, and finds which rows of Silver the others leave behind.

        How many message ids are unclear: among them those of messages that seem unchanged and whose ids have rows in
        Silver that no message of the scope gives.
        """
        run = self.store.run
        run(
            "CREATE OR REPLACE TEMP TABLE surplus AS SELECT id, row, s - least(s, coalesce(e, 0)) AS n FROM "
            "(SELECT id, row, count(*) AS s FROM silver GROUP BY ALL) "
            f"LEFT JOIN (SELECT row, count(*) AS e FROM {_VALID} GROUP BY row) USING (row) WHERE s > coalesce(e, 0)"
        )
        run(
            "CREATE OR REPLACE TEMP TABLE found AS SELECT id, wanted, coalesce(sum(s.n), 0)::BIGINT AS there, "
            "count(s.row) AS kinds FROM (SELECT id, count(*) AS wanted FROM leaving GROUP BY id) "
            "LEFT JOIN surplus s USING (id) GROUP BY ALL"
        )
        run(
            "CREATE OR REPLACE TEMP TABLE unclear AS SELECT id FROM found "
            "WHERE there < wanted OR (there > wanted AND kinds > 1) UNION "
            f"SELECT id FROM surplus s WHERE id IN (SELECT id FROM {_VALID}) AND id NOT IN (SELECT id FROM found) "
            "AND row NOT IN (SELECT row FROM message WHERE reason IS NULL)"
        )
        run(
            'DELETE FROM moved USING leaving l WHERE moved.partition = l.partition AND moved."offset" = l."offset" '
            "AND l.id IN (SELECT id FROM unclear)"
        )
        run("DELETE FROM leaving WHERE id IN (SELECT id FROM unclear)")
        run(
            "CREATE OR REPLACE TEMP TABLE removal AS SELECT s.id, s.row, "
            "CASE kinds WHEN 1 THEN wanted ELSE s.n END AS n FROM surplus s JOIN found USING (id) "
            "ANTI JOIN unclear USING (id)"
        )
        (count,) = self.store.one("SELECT count(*) FROM unclear")
        return int(count)

    def find_gone(self, advance: Advance) -> None:
        """Which rows of which files go, and which come into Gold."""
        run = self.store.run
        run(
            "INSERT INTO gone SELECT 'dlq', file, l.row, count(*), count(*) FROM letter l JOIN moved "
            'USING (partition, "offset") WHERE was IS NOT NULL GROUP BY ALL'
        )
        run(
            "INSERT INTO gone SELECT 'silver', file, row, count(*) FILTER (k <= n), count(*) FROM ("
            "SELECT file, row, n, row_number() OVER (PARTITION BY row ORDER BY file) AS k "
            "FROM silver JOIN removal USING (row)) GROUP BY file, row HAVING count(*) FILTER (k <= n) > 0"
        )
        self._find_gold(advance)

    def rows_by_partition(self) -> dict[int, int]:
        """By how many more messages of each partition are valid."""
        found = self.store.run(
            "SELECT partition, count(*) FILTER (was IS NOT NULL AND reason IS NULL) "
            "- count(*) FILTER (was IS NULL AND reason IS NOT NULL) FROM moved GROUP BY 1"
        )
        return {p: n for p, n in found if n}

    def sizes(self) -> dict[str, Replaced]:
        """How many rows go and come, by layer."""
        gone = dict(self.store.run("SELECT layer, sum(n)::BIGINT FROM gone GROUP BY 1"))
        trades, letters = self.store.one(
            "SELECT count(*) FILTER (reason IS NULL), count(*) FILTER (reason IS NOT NULL) FROM moved"
        )
        (picked,) = self.store.one("SELECT count(*) FROM picked")
        come = {"dlq": letters, "silver": trades, "gold": picked}
        return {layer: Replaced(rows_gone=gone.get(layer, 0), rows_come=n) for layer, n in come.items()}

    def files_of(self, layer: str) -> list[int]:
        """The numbers of the files of a table from which rows go."""
        return [n for (n,) in self.store.run("SELECT DISTINCT file FROM gone WHERE layer = ? ORDER BY 1", [layer])]

    def gone(self, layer: str, file: int) -> Mapping[str, npt.NDArray[np.uint64]]:
        """`row` (hashes, ascending), how many of each go (`n`) and are `present`, of one file."""
        return self.store.arrays(
            "SELECT row, n, present FROM gone WHERE layer = ? AND file = ? ORDER BY row", [layer, file]
        )

    def failed_at(self, messages: MessageBatch) -> npt.NDArray[np.int64]:
        """When each of n messages failed (us since 1970), 0 for one that has no dead letter."""
        keys = pa.RecordBatch.from_pydict(
            {"partition": pa.array(messages.partition), "offset": pa.array(messages.offset)}
        )
        values: npt.NDArray[np.int64] = self.store.hashes(
            keys,
            "coalesce((SELECT max(failed_at) FROM moved m WHERE m.partition = batch.partition "
            'AND m."offset" = batch."offset"), 0)',
        ).astype(np.int64)
        return values

    def _store_messages(self, messages: MessageBatch) -> None:
        decoded = self._decoder.decode(messages)
        trades, failures = decoded.trades, decoded.failures
        if trades.rows.num_rows:
            batch = hashable(trades.rows)
            batch = batch.append_column("part", pa.array(trades.partition))
            batch = batch.append_column("kafka_offset", pa.array(trades.offset))
            day = "exchange_date - DATE '1970-01-01'"
            self.store.insert("message", batch, f"part, kafka_offset, {ID_HASH}, {ROW_HASH}, {day}, NULL, NULL")
        if failures.rows.num_rows:
            columns = f'partition, "offset", NULL, NULL, NULL, reason, {CONTENT_HASH}'
            self.store.insert("message", failures.rows, columns)

    def _read_letters(self, known: Known, advance: Advance) -> None:
        for number, batch in self._batches("dlq", plan(self._pinned, "dlq", ALWAYS), _DLQ, advance):
            batch = batch.filter(pa.array(known.mask("dlq", batch, "failed_at")))
            if batch.num_rows:
                columns = f'partition, "offset", {LETTER_HASH}, {number}, reason, {CONTENT_HASH}, epoch_us(failed_at)'
                self.store.insert("letter", batch, columns)

    def _read_silver(self, advance: Advance) -> None:
        for number, batch in self._batches("silver", plan(self._pinned, "silver", ALWAYS), _SILVER, advance):
            columns = f"{ID_HASH}, {ROW_HASH}, exchange_date - DATE '1970-01-01', {number}"
            self.store.insert("silver", hashable(batch), columns)

    def _find_changed(self) -> None:
        """Valid messages, then and now, of whose row Silver has fewer than they gave: the last ones of each row."""
        self.store.run(
            f"CREATE OR REPLACE TEMP TABLE short AS SELECT row, e - coalesce(s, 0) AS n "
            f"FROM (SELECT row, count(*) AS e FROM {_VALID} GROUP BY row) LEFT JOIN "
            f"(SELECT row, count(*) AS s FROM silver GROUP BY row) USING (row) WHERE e > coalesce(s, 0)"
        )
        self.store.run(
            'INSERT INTO moved SELECT partition, "offset", id, row, day, NULL, NULL, NULL FROM ('
            'SELECT *, row_number() OVER (PARTITION BY row ORDER BY partition, "offset" DESC) AS k '
            f"FROM {_VALID} AND row IN (SELECT row FROM short)) JOIN short USING (row) WHERE k <= n"
        )

    def _find_moved(self, reworded: bool) -> None:
        differs = "(m.reason IS NULL) <> (l.reason IS NULL)"
        if reworded:
            differs += " OR (m.reason IS NOT NULL AND l.reason IS NOT NULL AND m.content <> l.content)"
        self.store.run(
            'INSERT INTO moved SELECT m.partition, m."offset", m.id, m.row, m.day, l.reason, m.reason, l.failed_at '
            f'FROM message m LEFT JOIN letter l USING (partition, "offset") WHERE {differs}'
        )

    def _find_gold(self, advance: Advance) -> None:
        run = self.store.run
        run(
            "CREATE OR REPLACE TEMP TABLE affected AS "
            "SELECT id FROM moved WHERE reason IS NULL UNION SELECT id FROM leaving"
        )
        run(
            'CREATE OR REPLACE TEMP TABLE silver_after AS SELECT id, row, min("offset") AS "offset" FROM ('
            'SELECT id, row, 1 AS n, NULL AS "offset" FROM silver SEMI JOIN affected USING (id) UNION ALL '
            'SELECT id, row, 1, "offset" FROM moved WHERE reason IS NULL UNION ALL '
            "SELECT id, row, -n, NULL FROM removal) GROUP BY id, row HAVING sum(n) > 0"
        )
        for number, batch in self._batches("gold", self._gold_plan(), _SILVER, advance):
            own = batch.filter(pc.equal(batch.column("exchange"), self._pinned.exchange.code))
            if own.num_rows:
                columns = f"{ID_HASH}, {ROW_HASH}, {number}"
                self.store.insert("gold", hashable(own), columns, f"{ID_HASH} IN (SELECT id FROM affected)")
        run(
            "CREATE OR REPLACE TEMP TABLE vanished AS SELECT DISTINCT row FROM removal "
            "ANTI JOIN silver_after USING (row)"
        )
        run(
            "INSERT INTO gone SELECT 'gold', file, row, count(*), count(*) FROM gold "
            "SEMI JOIN vanished USING (row) GROUP BY ALL"
        )
        run(
            'INSERT INTO picked SELECT id, arg_min(row, coalesce("offset", -1)) FROM silver_after ANTI JOIN '
            "(SELECT DISTINCT id FROM gold ANTI JOIN vanished USING (row)) USING (id) GROUP BY id"
        )

    def _gold_plan(self) -> Plan:
        """The files of Gold of the affected trades' days, and of the hot window."""
        days = {
            day
            for (day,) in self.store.run(
                "SELECT DISTINCT day FROM moved WHERE reason IS NULL UNION "
                "SELECT DISTINCT day FROM silver SEMI JOIN affected USING (id)"
            )
        }
        whole = plan(self._pinned, "gold", ALWAYS)
        if days and whole.tasks:
            newest, window = self._newest_hour(), self._pinned.exchange.settings.dedup_window_hours
            if newest is not None:
                days.update(range((newest - window) // 24, newest // 24 + 1))
        return replace(whole, tasks=[task for task in whole.tasks if task.file.partition[0] in days])

    def _batches(
        self, layer: str, files: Plan, columns: Sequence[str], advance: Advance
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of a table's files, each batch with its file's number in `plans`."""
        self.plans[layer] = files

        def numbered() -> Iterator[tuple[int, pa.RecordBatch]]:
            for number, task in enumerate(files.tasks):
                for batch in read(replace(files, tasks=[task]), columns, None, advance):
                    yield number, batch

        with catalog_errors():
            yield from ahead(numbered())


def _keys(partition: npt.NDArray[np.int32], offset: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """One number for each message: no partition will have had 2^48 of them."""
    keys: npt.NDArray[np.int64] = (partition.astype(np.int64) << 48) | offset
    return keys


def _among(ascending: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: npt.NDArray[np.bool_] = ascending[at] == values
    return found
