"""Decoded records: Arrow columns and at most one defect per record. The result of every record decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class Defect(IntEnum):
    """The first defect in the bytes of a record; 0 is none."""

    NONE = 0
    TRUNCATED = 1  # a field extends past the end of the record
    MALFORMED = 2  # bytes that encode no value of the schema, other than the cases below
    INVALID_ENUM = 3  # an index without a symbol, or a symbol that the reader's schema does not have
    INVALID_UTF8 = 4  # a text that is not UTF-8
    TRAILING_BYTES = 5  # bytes after the last field


@dataclass(frozen=True, kw_only=True)
class DecodedRecords:
    """The records of n payloads, in the order of the payloads."""

    batch: pa.RecordBatch  # n rows; the values of a row with a defect are arbitrary
    unknown: Sequence[pa.Array] = ()  # one array of n values for each of the decoder's `unknown_fields`
    defect: npt.NDArray[np.uint8]  # (n,): the Defect of each row, 0 for a good row
    position: npt.NDArray[np.int64]
    """(n,): the byte of the payload with the defect, from the payload's start; -1 for a good row, or if not known."""
    detail: Callable[[int], str]
    """Maps a row to a description of its defect, with the field and the byte; empty for a good row."""
