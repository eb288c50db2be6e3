"""Leases: one process maintains each table, however many run. The table's properties hold the lease.

A lease saves work and conflicts; correctness does not depend on it. A catalog may let two such commits pass at the same
moment, so two processes may both hold a lease. Their commits then conflict, and one of them yields.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pyiceberg.catalog import Catalog

from k2flow.errors import K2flowError
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.ledger import Writer, first_error
from k2flow.iceberg.rewrite import set_property

log = logging.getLogger(__name__)
LEASE = "k2flow.maintenance.leader"
LEASE_SECONDS = 900


@dataclass(frozen=True)
class _Lease(Writer):
    """The property's JSON: the holder, and the end of the lease in seconds since 1970."""

    __pydantic_config__: ClassVar = ConfigDict(extra="ignore")
    until: float


_JSON: TypeAdapter[_Lease] = TypeAdapter(_Lease)


class MaintenanceLeases:
    """The leases of this process."""

    def __init__(self, catalog: Catalog, clock: Callable[[], float] = time.time) -> None:
        self._catalog = catalog
        self._clock = clock
        self._process = Writer.this()
        self._held: set[str] = set()

    def acquire(self, name: str) -> Writer | None:
        """Acquire or renew the lease of a table. Return None, or the process that holds it. Raises CatalogError."""
        own, now = self._process, self._clock()
        holder, until = self._read(name)
        if holder == own and until - now > LEASE_SECONDS / 2:
            return None
        # A holder on the same host is known to have ended; one on another host only after the lease ends.
        ended = holder is None or until <= now or (holder.host == own.host and not holder.running_here())
        ended |= until - now > 2 * LEASE_SECONDS  # an end that no right clock gives
        if holder != own and not ended:
            return holder
        lease = _Lease(own.host, own.pid, own.started, now + LEASE_SECONDS)
        set_property(self._catalog, name, LEASE, _JSON.dump_json(lease, ensure_ascii=True).decode())
        holder, _ = self._read(name)
        if holder != own:
            return holder
        self._held.add(name)
        return None

    def release(self) -> None:
        """Release all leases, so that the next process need not wait for their end. Log those that cannot be."""
        for name in sorted(self._held):
            try:
                if self._read(name)[0] == self._process:
                    set_property(self._catalog, name, LEASE, None)
            except K2flowError as error:
                log.warning("%s: the lease ends by itself: %s", name, error)
        self._held.clear()

    def _read(self, name: str) -> tuple[Writer | None, float]:
        return read_lease(name, load_table(self._catalog, name).properties)


def read_lease(name: str, properties: Mapping[str, str]) -> tuple[Writer | None, float]:
    """Return the holder of the lease of table `name`, by its properties, and its end in seconds since 1970."""
    text = properties.get(LEASE)
    if text is None:
        return None, 0
    try:
        lease = _JSON.validate_json(text)
    except ValidationError as error:
        log.warning("%s: property %s is not a lease (%s): treated as free", name, LEASE, first_error(error))
        return None, 0
    return Writer(lease.host, lease.pid, lease.started), lease.until
