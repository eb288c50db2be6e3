"""The interface between record formats and the flow: payloads in, Arrow columns and at most one defect per row out.

Avro is one format (`avro.decoder.AvroDecoder`). To read another, implement `RecordDecoder` and return it from
`Schemas.decoder`.
"""

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

from k2flow.records import DecodedRecords, Defect

__all__ = ["DecodedRecords", "Defect", "RecordDecoder", "UnknownField"]


class UnknownField(Protocol):
    """A field of the writer's schema that TradeV2 lacks."""

    @property
    def name(self) -> str:
        """The field's name, the key of its entries in `vendor_data`."""

    def to_texts(self, column: pa.Array) -> pa.StringArray:
        """Convert n values to text, null to null. Raises pyarrow.ArrowInvalid if they take 2 GiB or more in total."""


class RecordDecoder(Protocol):
    """Decodes payloads of one schema id into TradeV2's columns: a pure function of the payload and the schema."""

    @property
    def unknown_fields(self) -> Sequence[UnknownField]:
        """The fields to keep in `vendor_data`; usually none."""

    def decode(self, payloads: pa.BinaryArray, skip: int) -> DecodedRecords:
        """Decode n payloads into n rows; `skip` is the size of the header before each record, in bytes.

        Never raise for bad bytes: report a defect for that row. A batch may contain nulls, payloads shorter than
        `skip` and records of other schemas; their rows are discarded. `batch` has at least the fields of TradeV2, in
        Silver's Arrow types. A good row has a value in each field that TradeV2 requires, a row with a defect may be
        null anywhere. Times may be outside years 1-9999: validation rejects them later.
        """
