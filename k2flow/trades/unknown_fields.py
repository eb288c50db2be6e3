"""Fields of a writer's schema that TradeV2 lacks: kept in a trade's `vendor_data` or ignored, and logged.

A pure function of the messages, of the schemas that their ids name, and of K2FLOW_<EXCHANGE>_UNKNOWN_FIELDS. It never
changes whether a message is valid: unknown fields are decoded and checked either way, and the rules see only TradeV2.
A field whose type can be no column (recursive, say) is left out either way.
"""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.errors import SchemaError
from k2flow.exchange import Exchange
from k2flow.trades.record_decoder import RecordDecoder

log = logging.getLogger(__name__)
MAX_BYTES = 1 << 30
"""The limit for the texts and names of a batch's unknown fields: half of Arrow's limit for one column."""
_MAX_LOGGED_NAMES = 20
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class UnknownFields:
    """Keeps or ignores unknown fields, as one exchange's settings say."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._keep = exchange.settings.unknown_fields == "keep"
        self._setting = exchange.setting("unknown_fields")
        self._logged: set[int] = set()

    def log_once(self, schema_id: int, decoder: RecordDecoder) -> None:
        """Log the unknown fields of a schema, once for each schema that has any."""
        if not decoder.unknown_fields or schema_id in self._logged:
            return
        self._logged.add(schema_id)
        names = [field.name for field in decoder.unknown_fields]
        more = f" and {len(names) - _MAX_LOGGED_NAMES} more" if len(names) > _MAX_LOGGED_NAMES else ""
        shown = ", ".join(names[:_MAX_LOGGED_NAMES]) + more
        done = "kept in vendor_data" if self._keep else f"ignored, as {self._setting} says"
        text = "%s: schema id %d has fields that TradeV2 does not know: %s: %s"
        log.info(text, self._exchange.name, schema_id, shown, done)

    def add(self, decoder: RecordDecoder, vendor_data: pa.MapArray, unknown: Sequence[pa.Array]) -> pa.MapArray:
        """Return the `vendor_data` of n trades with the values of their unknown fields; unchanged if they are ignored.

        `unknown` has n values for each of the decoder's `unknown_fields`. Raises SchemaError if they are too long for
        one batch.
        """
        if not self._keep or not decoder.unknown_fields or not len(vendor_data):
            return vendor_data
        names = [field.name for field in decoder.unknown_fields]
        try:
            texts = [field.to_texts(column) for field, column in zip(decoder.unknown_fields, unknown, strict=True)]
            size = sum(
                text.nbytes + len(name.encode()) * (len(text) - text.null_count)
                for name, text in zip(names, texts, strict=True)
            )
        except pa.ArrowInvalid:  # one of them exceeds Arrow's limit
            size = 2 * MAX_BYTES
        if size > MAX_BYTES:
            raise SchemaError(
                f"the fields that TradeV2 does not know take more than {MAX_BYTES >> 20} MiB as text in one batch: set "
                f"{self._exchange.setting('batch_rows')} lower, or {self._setting} to ignore"
            )
        return with_texts(vendor_data, names, texts)


def with_texts(maps: pa.MapArray, names: Sequence[str], texts: Sequence[pa.StringArray]) -> pa.MapArray:
    """Return n maps of texts, each with up to k more entries.

    `names` are k different keys, and `texts` has n values for each. A null adds no entry, and a key that a map already
    has keeps its value. New entries follow the map's own, in the order of `names`. A null map without a new entry stays
    null.
    """
    n = len(maps)
    edges: Ints = maps.offsets.to_numpy().astype(np.int64)
    has_map = _valid(maps)
    own = np.where(has_map, np.diff(edges), 0)
    given = np.column_stack([_valid(text) for text in texts])
    _clear_existing(given, maps.keys, edges, names)
    added = given.sum(axis=1)
    counts = own + added
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    keys, items = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.int64)
    place, source = _run_indices(offsets[:-1], own), _run_indices(edges[:-1], own)
    keys[place], items[place] = source, source
    rows, fields = np.nonzero(given)
    place = _run_indices(offsets[:-1] + own, added)
    keys[place], items[place] = len(maps.keys) + fields, len(maps.items) + fields * n + rows
    children = [
        pa.concat_arrays([maps.keys, pa.array(names, pa.string())]).take(pa.array(keys)),
        pa.concat_arrays([maps.items, *texts]).take(pa.array(items)),
    ]
    entries = pa.StructArray.from_arrays(children, fields=[maps.type.key_field, maps.type.item_field])
    nulls = pa.py_buffer(np.packbits(has_map | (added > 0), bitorder="little"))
    return pa.Array.from_buffers(maps.type, n, [nulls, pa.py_buffer(offsets.astype(np.int32))], children=[entries])


def _clear_existing(given: Mask, keys: pa.StringArray, edges: Ints, names: Sequence[str]) -> None:
    """Clear `given` (n, k) for each key that a map already has; the keys of n maps lie between n + 1 `edges`."""
    first, last = int(edges[0]), int(edges[-1])
    codes = pc.index_in(keys.slice(first, last - first), value_set=pa.array(names, pa.string()))
    if codes.null_count == len(codes):
        return
    entries = np.flatnonzero(_valid(codes))
    owner = np.searchsorted(edges, entries + first, "right") - 1
    given[owner, codes.drop_null().to_numpy()] = False


def _run_indices(starts: Ints, counts: Ints) -> Ints:
    """Return the numbers start, start + 1, ... of each run of `count` numbers, one run after the other."""
    ends = np.cumsum(counts)
    places: Ints = np.arange(counts.sum()) + np.repeat(starts - (ends - counts), counts)
    return places


def _valid(column: pa.Array) -> Mask:
    mask: Mask = column.is_valid().to_numpy(zero_copy_only=False)
    return mask
