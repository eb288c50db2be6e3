"""The messages that are something else today than before."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.inspection.files import Advance
from k2flow.reprocess.context import VALID, ReprocessContext
from k2flow.reprocess.scope import Scope
from k2flow.trades.messages import MessageBatch


class MovedMessages:
    """Reads table `moved` of the database, and the messages themselves from the scope."""

    def __init__(self, context: ReprocessContext, scope: Scope) -> None:
        self._store = context.store
        self._scope = scope

    def messages_in_scope(self) -> int:
        """Return how many messages were decoded."""
        return self._store.count("FROM message")

    def ambiguous_keys(self) -> int:
        """Return how many keys stay as they are, because it is unknown which rows their messages gave."""
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
            found = messages.filter(_is_in(keys, _keys(messages.partition, messages.offset)))
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
        keys = pa.RecordBatch.from_pydict(
            {"partition": pa.array(messages.partition), "offset": pa.array(messages.offset)}
        )
        values: npt.NDArray[np.int64] = self._store.hashes(
            keys,
            "coalesce((SELECT max(failed_at) FROM moved m WHERE m.partition = batch.partition "
            'AND m."offset" = batch."offset"), 0)',
        ).astype(np.int64)
        return values


def _keys(partition: npt.NDArray[np.int32], offset: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return one number for each message: no partition reaches offset 2^48."""
    keys: npt.NDArray[np.int64] = (partition.astype(np.int64) << 48) | offset
    return keys


def _is_in(ascending: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: npt.NDArray[np.bool_] = ascending[at] == values
    return found
