"""Schemas kept with the tables: the text of each writer's schema that was used, as a property of Bronze.

The commit that adds the first rows of a schema id to Bronze sets `k2flow.schema.<exchange>.<id>` too. So the messages
of Bronze can be decoded again without a registry, as they were.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import override

from k2flow.config.settings import Settings
from k2flow.errors import RegistryError, without_traceback
from k2flow.trades.bad_ids import MAX_BAD_IDS
from k2flow.trades.reasons import Reason
from k2flow.trades.record_decoder import RecordDecoder
from k2flow.trades.registry import Schemas, open_schemas, trade_decoder
from k2flow.trades.registry_lookup import Found, NoTextError, Place, UnknownSchemaError
from k2flow.trades.schema import canonical

log = logging.getLogger(__name__)
KEY = "k2flow.schema."  # prefix of the property; the exchange and the id follow


def schema_properties(exchange: str, texts: Mapping[int, str]) -> dict[str, str]:
    """Return the properties of Bronze that keep the texts of schemas by id."""
    return {f"{KEY}{exchange}.{schema_id}": text for schema_id, text in texts.items()}


def stored_texts(properties: Mapping[str, str], exchange: str) -> dict[int, str]:
    """Return the texts in Bronze's properties by schema id, without those that are damaged."""
    found, own = {}, f"{KEY}{exchange}."
    for key, text in properties.items():
        schema_id = key.removeprefix(own)
        if key.startswith(own) and schema_id.isdecimal():
            try:
                found[int(schema_id)] = canonical(text)
            except (ValueError, RecursionError):
                log.warning("table property %s is not a schema: it is not used", key)
    return found


class StoredSchemas(Schemas):
    """The schemas that the tables keep. Others come from the registry or the settings, without a wait.

    Attributes:
        refused: The ids whose schema is known and does not resolve to TradeV2.
        unresolved: Ids whose schema is not known, and why: at most MAX_BAD_IDS of them.
        unanswered: The failure of the registry. After it, the registry is not asked again.
    """

    def __init__(self, settings: Settings, properties: Mapping[str, str], exchange: str) -> None:
        """Take the properties of Bronze. Raises SettingsError."""
        self._texts = stored_texts(properties, exchange)
        self._others = open_schemas(settings)
        self._decoders: dict[int, RecordDecoder] = {}
        self._lock = threading.Lock()
        self.refused: dict[int, str] = {}
        self.unresolved: dict[int, str] = {}
        self.unanswered: RegistryError | None = None

    @override
    def decoder(self, schema_id: int) -> RecordDecoder:
        with self._lock:
            if schema_id in self.refused:
                raise UnknownSchemaError(self.refused[schema_id])
            if schema_id not in self._decoders:
                self._decoders[schema_id] = self._find(schema_id)
            return self._decoders[schema_id]

    @override
    def ids_of_guids(self, guids: Sequence[UUID], place: Place[UUID]) -> Found[UUID, int]:
        with self._lock:
            if self.unanswered is None:
                try:
                    return self._others.ids_of_guids(guids, lambda _: "a message with a schema GUID")
                except RegistryError as error:
                    self.unanswered = without_traceback(error)
                    log.warning("%s: messages with a schema GUID in a record header are not checked", error)
            return {guid: NoTextError(str(self.unanswered)) for guid in guids}

    @override
    def new_texts(self) -> Mapping[int, str]:
        return {i: text for i, text in self._others.new_texts().items() if i not in self._texts}

    def are_unresolved(self, letters: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """Return for each of n dead letters that these schemas gave whether its schema is not known: (n,)."""
        unknown = pc.equal(letters["reason"], Reason.UNKNOWN_SCHEMA.code).to_numpy(zero_copy_only=False)
        ids = letters["schema_id"].fill_null(0).to_numpy().view(np.uint32)
        found: npt.NDArray[np.bool_] = unknown & ~np.isin(ids, list(self.refused))
        return found

    def _find(self, schema_id: int) -> RecordDecoder:
        if schema_id in self.unresolved:
            raise NoTextError(self.unresolved[schema_id])
        if len(self.unresolved) == MAX_BAD_IDS:
            raise NoTextError(f"schema id {schema_id} was not asked for: {MAX_BAD_IDS:,} others are not known")
        try:
            if schema_id in self._texts:
                return trade_decoder(schema_id, self._texts[schema_id])
            if self.unanswered is None:
                return self._others.decoder(schema_id)
            text = str(self.unanswered)
        except NoTextError as error:
            text = str(error)
        except UnknownSchemaError as error:
            self.refused[schema_id] = str(error)
            raise
        except RegistryError as error:
            self.unanswered, text = without_traceback(error), str(error)
            log.warning("%s: messages whose schema the tables do not have stay as they are", error)
        self.unresolved[schema_id] = text
        raise NoTextError(text)
