"""Messages, decoded again: what each one is today, and which are something else than before.

A dead letter names its message. A row of Silver has no offset, but the id of its message (`message_id`), and the values
that the message gives. So, with rows as hashes in a database:

- a message with a dead letter was bad, any other was valid;
- a message that was valid and still is has changed if Silver has fewer rows of its values than such messages give;
- a message supersedes its row of Silver if it has changed, or was valid and is bad. The row is one of those of its id
  that no unchanged message gives.

If that does not identify the row, the message stays as it is, and its id counts as ambiguous: the id has other rows
in Silver too, which messages out of scope may have given, or fewer than its messages must have given, since retention
has removed them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.errors import ReprocessError
from k2flow.inspection.files import Advance, plan
from k2flow.inspection.row_hashes import content_hash, hash_of, hashable
from k2flow.layers import DLQ, SILVER
from k2flow.reprocess.context import ID, UNRESOLVED, VALID, ReplaceableMessages, ReprocessContext, Scope
from k2flow.trades.messages import MessageBatch

LETTER_KEY = ("partition", "offset", "failed_at")  # the columns that name a dead-letter row
_VALID = 'message ANTI JOIN letter USING (partition, "offset") WHERE reason IS NULL'


class MovedMessages:
    """Reads table `moved` of the database, and the messages themselves from the scope."""

    def __init__(self, context: ReprocessContext, scope: Scope) -> None:
        self._store = context.store
        self._scope = scope

    def messages_in_scope(self) -> int:
        """Return how many messages were decoded."""
        return self._store.count("FROM message")

    def ambiguous_ids(self) -> int:
        """Return how many ids stay as they are, because it is unknown which rows their messages gave."""
        return self._store.count("FROM ambiguous")

    def counts(self) -> dict[tuple[str, str], int]:
        """Return the number of messages by what they were and are: a reason code, or VALID."""
        counted = self._store.run("SELECT was, reason, count(*) FROM moved GROUP BY ALL ORDER BY 3 DESC, 1, 2")
        return {(was or VALID, now or VALID): n for was, now, n in counted}

    def messages(self, advance: Advance, where: str = "true") -> Iterator[MessageBatch]:
        """Read the moved messages that meet a condition. About 25 bytes of memory per message."""
        wanted = self._store.arrays(f'SELECT partition, "offset" FROM moved WHERE {where} ORDER BY ALL')
        keys = _keys(wanted["partition"], wanted["offset"])
        if not len(keys):
            return
        for messages in self._scope.messages(advance):
            _, is_moved = find_sorted(keys, _keys(messages.partition, messages.offset))
            found = messages.filter(is_moved)
            if found.rows.num_rows:
                yield found

    def rows_by_partition(self) -> dict[int, int]:
        """Return by how many more messages of each partition are valid."""
        found = self._store.run(
            "SELECT partition, count(*) FILTER (was IS NOT NULL AND reason IS NULL) "
            "- count(*) FILTER (was IS NULL AND reason IS NOT NULL) FROM moved GROUP BY 1"
        )
        return {p: n for p, n in found if n}

    def failed_at(self, messages: MessageBatch) -> npt.NDArray[np.int64]:
        """Return when each of n messages failed (us since 1970), 0 for one that has no dead letter: (n,)."""
        keys = pa.RecordBatch.from_arrays([messages.partition, messages.offset], ["partition", "offset"])
        failed_at = (
            "coalesce((SELECT max(failed_at) FROM moved m WHERE m.partition = batch.partition "
            'AND m."offset" = batch."offset"), 0)'
        )
        return self._store.hashes(keys, failed_at).astype(np.int64)


def letter_hash() -> str:
    """Return the SQL that hashes the name of a dead-letter row."""
    return hash_of(LETTER_KEY, DLQ.arrow_schema)


def revalidate(
    context: ReprocessContext, scope: Scope, replaceable: ReplaceableMessages, advance: Advance
) -> MovedMessages:
    """Decode every message of the scope, compare with the dead letters and Silver, and return the moved ones.

    Raises ReprocessError if a message that was valid cannot be decoded any more, AuditError, CatalogError and
    RegistryError.
    """
    for messages in scope.messages(advance):
        _store_messages(context, messages)
    _read_letters(context, replaceable, advance)
    if scope.whole:
        _read_silver(context, advance)
        _find_changed(context)
    _find_moved(context, compare_content=scope.whole)
    moved = MovedMessages(context, scope)
    _find_superseded(context, moved, advance)
    _drop_ambiguous(context)
    return moved


def _store_messages(context: ReprocessContext, messages: MessageBatch) -> None:
    decoded = context.decoder.decode(messages)
    trades, failures = decoded.trades, decoded.dead_letters
    if trades.rows.num_rows:
        batch = hashable(trades.rows)
        batch = batch.append_column("part", pa.array(trades.partition))
        batch = batch.append_column("kafka_offset", pa.array(trades.offset))
        hashes = f"{ID}, {context.key}, {content_hash(SILVER)}"
        context.store.insert("message", batch, f"part, kafka_offset, {hashes}, {_day()}, NULL, NULL")
    if failures.rows.num_rows:
        unresolved = context.schemas.are_unresolved(failures.rows)
        rows = hashable(failures.rows).append_column("unresolved", pa.array(unresolved))
        reason = f"CASE WHEN unresolved THEN '{UNRESOLVED}' ELSE reason END"
        context.store.insert(
            "message", rows, f'partition, "offset", NULL, NULL, NULL, NULL, {reason}, {content_hash(DLQ)}'
        )


def _read_letters(context: ReprocessContext, replaceable: ReplaceableMessages, advance: Advance) -> None:
    for number, batch in context.files.read(plan(context.pinned, DLQ), DLQ.columns, advance):
        batch = batch.filter(pa.array(replaceable.mask(DLQ, batch)))
        if batch.num_rows:
            content = f"reason, {content_hash(DLQ)}, epoch_us(failed_at)"
            columns = f'partition, "offset", {letter_hash()}, {number}, {content}'
            context.store.insert("letter", hashable(batch), columns)


def _read_silver(context: ReprocessContext, advance: Advance) -> None:
    for number, batch in context.files.read(plan(context.pinned, SILVER), SILVER.columns, advance):
        columns = f"{ID}, {context.key}, {content_hash(SILVER)}, {_day()}, {number}"
        context.store.insert("silver", hashable(batch), columns)


def _day() -> str:
    return f"{SILVER.date_column} - DATE '1970-01-01'"


def _find_changed(context: ReprocessContext) -> None:
    """Find messages that were and are valid, and whose row Silver has too few of: the last ones of each row."""
    context.store.run(
        f"CREATE OR REPLACE TEMP TABLE too_few AS SELECT row, e - coalesce(s, 0) AS n "
        f"FROM (SELECT row, count(*) AS e FROM {_VALID} GROUP BY row) LEFT JOIN "
        f"(SELECT row, count(*) AS s FROM silver GROUP BY row) USING (row) WHERE e > coalesce(s, 0)"
    )
    context.store.run(
        'INSERT INTO moved SELECT partition, "offset", id, key, row, day, NULL, NULL, NULL FROM ('
        'SELECT *, row_number() OVER (PARTITION BY row ORDER BY partition, "offset" DESC) AS k '
        f"FROM {_VALID} AND row IN (SELECT row FROM too_few)) JOIN too_few USING (row) WHERE k <= n"
    )


def _find_moved(context: ReprocessContext, compare_content: bool) -> None:
    """Find messages that were valid and are bad, or the reverse, or are bad for another reason.

    A dead letter stays as it is if its schema is not known any more.
    """
    differs = "(m.reason IS NULL) <> (l.reason IS NULL)"
    if compare_content:
        differs += " OR (m.reason IS NOT NULL AND l.reason IS NOT NULL AND m.content <> l.content)"
    context.store.run(
        'INSERT INTO moved SELECT m.partition, m."offset", m.id, m.key, m.row, m.day, l.reason, m.reason, l.failed_at '
        f'FROM message m LEFT JOIN letter l USING (partition, "offset") WHERE ({differs}) '
        f"AND (l.reason IS NULL OR m.reason IS DISTINCT FROM '{UNRESOLVED}')"
    )


def _find_superseded(context: ReprocessContext, moved: MovedMessages, advance: Advance) -> None:
    """Find the messages whose row of Silver is removed. Raises ReprocessError for one that cannot be decoded."""
    context.store.run(
        'INSERT INTO superseded SELECT partition, "offset", id FROM moved WHERE was IS NULL AND reason IS NULL'
    )
    for messages in moved.messages(advance, "was IS NULL AND reason IS NOT NULL"):
        identities = context.decoder.identify(messages)
        unread = identities.column(0).is_null()
        if unread.true_count:
            i = unread.index(True).as_py()
            raise ReprocessError(
                f"partition {messages.partition[i]}, offset {messages.offset[i]} was a valid trade and cannot be "
                f"decoded any more{_why(context)}, so its row in Silver is unknown: restore its schema, or exclude its "
                "day"
            )
        for name, values in (("part", messages.partition), ("kafka_offset", messages.offset)):
            identities = identities.append_column(name, pa.array(values))
        context.store.insert("superseded", identities, f"part, kafka_offset, {ID}")


def _why(context: ReprocessContext) -> str:
    """Return which schemas are not known, and why; an empty text if all are."""
    texts = [f"schema id {schema_id}: {why}" for schema_id, why in context.schemas.unresolved.items()]
    return f" ({'; '.join(texts[:3])})" if texts else ""


def _drop_ambiguous(context: ReprocessContext) -> None:
    """Drop ambiguous ids from `moved`, and find the rows of Silver that the other messages supersede.

    Ids of messages that seem unchanged are ambiguous too, if Silver has rows of them that no message of the scope
    gives.
    """
    run = context.store.run
    run(
        "CREATE OR REPLACE TEMP TABLE surplus AS SELECT id, key, row, s - least(s, coalesce(e, 0)) AS n FROM "
        "(SELECT id, key, row, count(*) AS s FROM silver GROUP BY ALL) "
        f"LEFT JOIN (SELECT row, count(*) AS e FROM {_VALID} GROUP BY row) USING (row) WHERE s > coalesce(e, 0)"
    )
    run(
        "CREATE OR REPLACE TEMP TABLE found AS SELECT id, wanted, coalesce(sum(s.n), 0)::BIGINT AS existing, "
        "count(s.row) AS kinds FROM (SELECT id, count(*) AS wanted FROM superseded GROUP BY id) "
        "LEFT JOIN surplus s USING (id) GROUP BY ALL"
    )
    run(
        "CREATE OR REPLACE TEMP TABLE ambiguous AS SELECT id FROM found "
        "WHERE existing < wanted OR (existing > wanted AND kinds > 1) UNION "
        f"SELECT id FROM surplus s WHERE id IN (SELECT id FROM {_VALID}) AND id NOT IN (SELECT id FROM found) "
        "AND row NOT IN (SELECT row FROM message WHERE reason IS NULL)"
    )
    run(
        'DELETE FROM moved USING superseded s WHERE moved.partition = s.partition AND moved."offset" = s."offset" '
        "AND s.id IN (SELECT id FROM ambiguous)"
    )
    run("DELETE FROM superseded WHERE id IN (SELECT id FROM ambiguous)")
    run(
        "CREATE OR REPLACE TEMP TABLE silver_removed AS SELECT s.id, s.key, s.row, "
        "CASE kinds WHEN 1 THEN wanted ELSE s.n END AS n FROM surplus s JOIN found USING (id) "
        "ANTI JOIN ambiguous USING (id)"
    )


def _keys(partition: npt.NDArray[np.int32], offset: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return one number for each message: no partition reaches offset 2^48."""
    return (partition.astype(np.int64) << 48) | offset


def find_sorted(
    ascending: npt.NDArray[Any], values: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return for each of n values an index in `ascending`, and whether the value is there: (n,) and (n,)."""
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return at, ascending[at] == values
