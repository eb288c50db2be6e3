"""Fields of the writer's record that the reader's schema lacks, decoded as the writer's types beside the others."""

from dataclasses import dataclass, replace

import pyarrow as pa

from k2flow.avro.plan import Record
from k2flow.avro.schemas import Json, ParsedSchema
from k2flow.avro.texts import to_texts


@dataclass(frozen=True)
class WriterOnlyField:
    """A field of the writer's schema, of the type `schema`; `names` defines its named types."""

    name: str
    schema: Json
    names: ParsedSchema

    def to_texts(self, column: pa.Array) -> pa.StringArray:
        """Convert n values of this field to text, null to null; see texts.py.

        Raises:
            pyarrow.ArrowInvalid: The texts take 2 GiB or more in total.
        """
        return to_texts(self.schema, self.names, column)


def keep_dropped_fields(plan: Record, writer: ParsedSchema) -> tuple[Record, tuple[WriterOnlyField, ...]]:
    """Return a plan that appends the fields that `plan` drops to its fields, and these fields in order."""
    fields = [(i, field) for i, field in enumerate(writer.root["fields"]) if plan.places[i] is None]
    places = list(plan.places)
    for place, (i, _) in enumerate(fields, len(plan.type)):
        places[i] = place
    kind = pa.struct([*plan.type, *(pa.field(field["name"], plan.fields[i].type) for i, field in fields)])
    unknown = tuple(WriterOnlyField(field["name"], field["type"], writer) for _, field in fields)
    return replace(plan, type=kind, places=places), unknown
