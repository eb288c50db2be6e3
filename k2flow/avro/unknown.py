"""Fields of a writer's record that the reader's schema does not know: kept as they were written, beside the others."""

from dataclasses import dataclass, replace

import pyarrow as pa

from k2flow.avro.plan import Record
from k2flow.avro.schemas import Json, Parsed
from k2flow.avro.texts import texts


@dataclass(frozen=True)
class UnknownField:
    """A field of the writer's schema, of the type `schema`, whose names `names` defines."""

    name: str
    schema: Json
    names: Parsed

    def texts(self, column: pa.Array) -> pa.StringArray:
        """N values of this field as text, null where they are null, see texts.py. Raises pyarrow's ArrowInvalid."""
        return texts(self.schema, self.names, column)


def with_unknown(plan: Record, writer: Parsed) -> tuple[Record, tuple[UnknownField, ...]]:
    """A plan that puts the fields that `plan` drops after those that it has, and what these are, in their order."""
    fields = [(i, field) for i, field in enumerate(writer.root["fields"]) if plan.places[i] is None]
    places = list(plan.places)
    for place, (i, _) in enumerate(fields, len(plan.type)):
        places[i] = place
    kind = pa.struct([*plan.type, *(pa.field(field["name"], plan.fields[i].type) for i, field in fields)])
    unknown = tuple(UnknownField(field["name"], field["type"], writer) for _, field in fields)
    return replace(plan, type=kind, places=places), unknown
