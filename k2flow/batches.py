"""Joins record batches."""

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa


def joined(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Return the rows of at least one batch as one. A single batch is not copied."""
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


def gathered(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of batches, about `rows` at once: most of a small batch's cost does not depend on its size."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(each.num_rows for each in waiting) >= rows:
            yield joined(waiting)
            waiting = []
    if waiting:
        yield joined(waiting)
