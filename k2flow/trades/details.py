"""The text of a dead letter that broke a rule: the values that broke it."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

MAX_CHARACTERS = 200
"""Longer values are cut."""


def rule_details(
    batch: pa.RecordBatch, rows: npt.NDArray[np.int64], columns: tuple[str, ...], kafka_time: pa.TimestampArray
) -> list[str]:
    """Return the values of `columns` in m rows, as `name = value`; times as numbers, since they may be no date."""
    index = pa.array(rows)
    parts = [[f"{name} = {text}" for text in _texts(batch.column(name).take(index))] for name in columns]
    texts = [", ".join(of_row) for of_row in zip(*parts, strict=True)]
    if columns == ("timestamp",):
        known = kafka_time.take(index).cast(pa.int64()).to_pylist()
        pairs = zip(texts, known, strict=True)
        texts = [text if us is None else f"{text}, Kafka timestamp = {us} us" for text, us in pairs]
    return texts


def _texts(values: pa.Array) -> list[str]:
    """Return m values as a dead letter shows them."""
    if pa.types.is_timestamp(values.type):
        return [f"{us} us since 1970" for us in values.cast(pa.int64()).to_pylist()]
    show = repr if pa.types.is_string(values.type) else str
    texts = [show(value) for value in values.to_pylist()]
    return [t if len(t) <= MAX_CHARACTERS else f"{t[:MAX_CHARACTERS]}... ({len(t)} characters)" for t in texts]
