"""Messages whose schema was unknown when they came, or is now: what the audit takes them for.

- A message whose dead letter says `unknown_schema` was refused. The audit expects this dead letter, whatever is known
  of the schema today. `refused_too_early` notes those that `k2flow dlq replay` can decode today.
- A message with a schema id in a record header whose dead letter says `bad_magic` stays as Kafka has it: its GUID was
  unknown, or an older version of k2flow took it.
- Any other message whose schema neither the tables nor the registry have is unresolved: `schema_unknown` (audit
  incomplete). It may be a trade or a dead letter, and explains as many rows of the tables.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import override

from k2flow.audit.context import AuditContext
from k2flow.audit.database import within
from k2flow.audit.report import SAMPLES, Severity
from k2flow.exchange import Exchange
from k2flow.inspection.partitions import TopicPartitions
from k2flow.layers import DLQ
from k2flow.trades.decode import DecodedBatch, TradeDecoder
from k2flow.trades.messages import MessageBatch
from k2flow.trades.reasons import Reason
from k2flow.trades.record_decoder import RecordDecoder
from k2flow.trades.registry import Schemas
from k2flow.trades.registry_lookup import NoTextError, UnknownSchemaError
from k2flow.trades.schema_headers import put_ids_in_front, schema_key
from k2flow.trades.stored_schemas import StoredSchemas

MAX_IDS = 100  # of refused messages that are looked up, and of unresolved ones that are named
UNKNOWN = Reason.UNKNOWN_SCHEMA.code


@dataclass(frozen=True)
class CheckedBatch:
    """Messages as they are to be in the tables; `unresolved` has those (n rows of the dead letters) of no known schema.

    Their `partition` is the number of the TopicPartition.
    """

    trades: MessageBatch
    dead_letters: pa.RecordBatch
    unresolved: pa.RecordBatch


class NoSchemas(Schemas):
    """No schema is known."""

    @override
    def decoder(self, schema_id: int) -> RecordDecoder:
        raise NoTextError(f"schema id {schema_id} was unknown")


class SchemaCheck:
    """The checks above, of one exchange. Decodes messages."""

    def __init__(self, context: AuditContext, exchange: Exchange, schemas: StoredSchemas) -> None:
        self._context = context
        self._schemas = schemas
        self._topic = exchange.settings.topic
        self._decoder = TradeDecoder(exchange, schemas)
        self._refuser = TradeDecoder(exchange, NoSchemas())
        self._any_refused = False
        self._refused: Counter[int] = Counter()  # by schema id

    def find_refused(self) -> None:
        """Find the refused messages, once the dead letters are in the database."""
        store = self._context.store
        store.run(
            'CREATE OR REPLACE TABLE refused AS SELECT number, "offset" FROM dlq WHERE reason = ? ORDER BY ALL',
            [UNKNOWN],
        )
        self._any_refused = store.count("FROM refused") > 0

    def decode(self, messages: MessageBatch) -> list[CheckedBatch]:
        """Decode n messages. In another thread than the database's is allowed."""
        messages, unknown = self._framed(messages)
        refused = self._is_refused(messages)
        checked = [self._resolved(self._decoder.decode(messages.filter(~refused)), unknown)]
        if refused.any():
            decoded = self._refuser.decode(messages.filter(refused))
            letters = decoded.dead_letters.rows
            known = letters.filter(pc.equal(letters["reason"], UNKNOWN))
            self._count(known["schema_id"])
            checked.append(CheckedBatch(decoded.trades, letters, letters.slice(0, 0)))
        return checked

    def report(self, partitions: TopicPartitions) -> None:
        """Report the messages whose schema is unknown now, and those that were refused and need not be any more."""
        self._report_unresolved(partitions)
        known = []
        for schema_id in sorted(self._refused)[:MAX_IDS]:
            if self._schemas.unanswered is None:
                known += [schema_id] if self._decodes(schema_id) else []
        if known:
            count = sum(self._refused[schema_id] for schema_id in known)
            ids, pinned = ", ".join(map(str, known)), partitions.pinned
            replay = f"`k2flow dlq replay {pinned.exchange.name}` decodes them"
            text = f"{count:,} messages were refused as {UNKNOWN}; schema id {ids} is known today: {replay}"
            self._context.add("refused_too_early", Severity.NOTE, text, count, pinned, DLQ)

    def _decodes(self, schema_id: int) -> bool:
        try:
            self._schemas.decoder(schema_id)
        except UnknownSchemaError:
            return False
        return True

    def _is_refused(self, messages: MessageBatch) -> npt.NDArray[np.bool_]:
        if not self._any_refused or not len(messages.offset):
            return np.zeros(len(messages.offset), np.bool_)
        sql = 'SELECT number, "offset" FROM refused WHERE "offset" BETWEEN ? AND ?'
        span = [int(messages.offset.min()), int(messages.offset.max())]
        found = self._context.store.arrays_beside(sql, span)
        return np.isin(_keys(messages.partition, messages.offset), _keys(found["number"], found["offset"]))

    def _framed(self, messages: MessageBatch) -> tuple[MessageBatch, Collection[tuple[int, int]]]:
        """Put schema ids from record headers in front, and return the places of the messages whose GUID is unknown."""
        headers = messages.schema_headers
        if not headers:
            return messages, ()
        sql = 'SELECT number, "offset" FROM dlq WHERE reason = ? AND "offset" BETWEEN ? AND ?'
        span = [int(messages.offset.min()), int(messages.offset.max())]
        found = self._context.store.arrays_beside(sql, [Reason.BAD_MAGIC.code, *span])
        kept = set(zip(found["number"].tolist(), found["offset"].tolist(), strict=True))
        headers = {place: header for place, header in headers.items() if place not in kept}
        framed = put_ids_in_front(replace(messages, schema_headers=headers), self._schemas, self._topic)
        with_guid = {place for place, header in headers.items() if isinstance(schema_key(header), UUID)}
        return framed, with_guid & framed.header_details.keys()

    def _resolved(self, decoded: DecodedBatch, unknown: Collection[tuple[int, int]]) -> CheckedBatch:
        letters = decoded.dead_letters.rows
        unresolved = self._schemas.are_unresolved(letters)
        if unknown:
            places = zip(letters["partition"].to_pylist(), letters["offset"].to_pylist(), strict=True)
            unresolved |= np.array([place in unknown for place in places], np.bool_)
        mask = pa.array(unresolved)
        return CheckedBatch(decoded.trades, letters.filter(pc.invert(mask)), letters.filter(mask))

    def _count(self, schema_ids: pa.Int32Array) -> None:
        for each in schema_ids.value_counts().to_pylist():
            self._refused[each["values"] % 2**32] += each["counts"]
        if len(self._refused) > 100 * MAX_IDS:  # the smallest ids: registries count upwards
            self._refused = Counter({i: self._refused[i] for i in sorted(self._refused)[:MAX_IDS]})

    def _report_unresolved(self, partitions: TopicPartitions) -> None:
        store, pinned = self._context.store, partitions.pinned
        unresolved = (
            f"FROM unresolved v {within(DLQ)} WHERE e_dlq.exchange = {pinned.number} "
            f"AND v.day > {pinned.cutoff_day(DLQ)}"
        )
        counts: Sequence[tuple[int | None, int]] = store.run(
            f"SELECT schema_id, count(*) {unresolved} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {MAX_IDS}"
        )
        for schema_id, count in counts:
            text = f"audit incomplete: {count:,} messages {self._why_unresolved(schema_id)}"
            where = "AND v.schema_id IS NOT DISTINCT FROM ?"
            samples = store.run(
                f'SELECT v.number, v."offset" {unresolved} {where} ORDER BY ALL LIMIT {SAMPLES}', [schema_id]
            )
            self._context.add(
                "schema_unknown", Severity.UNKNOWN, text, count, pinned, samples=partitions.samples(samples)
            )

    def _why_unresolved(self, signed: int | None) -> str:
        """Return why messages of a schema id (int32; None: of a GUID) cannot be checked."""
        if signed is None:
            why = self._schemas.unanswered or "none is set, or it has none for this GUID"
            return (
                f"with a schema GUID in a record header cannot be checked: the registry did not give its id ({why}). "
                "Let the registry have it, and repeat"
            )
        schema_id = signed % 2**32
        why = self._schemas.unresolved.get(schema_id, "it was not asked for")
        return (
            f"of schema id {schema_id} cannot be checked: the tables do not have its schema ({why}). "
            "Let the registry have it, and repeat"
        )


def _keys(number: npt.NDArray[np.int32], offset: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return one number for each message: no partition reaches offset 2^48."""
    keys: npt.NDArray[np.int64] = (number.astype(np.int64) << 48) | offset
    return keys
