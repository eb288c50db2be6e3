"""One leader for each table, however many processes maintain it: the one whose lease the table's properties hold.

The lease saves work and conflicts; nothing depends on it. Two that both think they lead, in the moments in which a
catalog lets two such commits pass, get in each other's way as two commits do: one of them steps back.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from pyiceberg.catalog import Catalog

from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.ledger import Writer
from k2flow.iceberg.rewrite import set_property

log = logging.getLogger(__name__)

LEASE = "k2flow.maintenance.leader"
LEASE_SECONDS = 900


class Leadership:
    """The leases of this process."""

    def __init__(self, catalog: Catalog, clock: Callable[[], float] = time.time) -> None:
        self._catalog = catalog
        self._clock = clock
        self._me = Writer.this()
        self._mine: set[str] = set()

    def take(self, name: str) -> Writer | None:
        """Takes or renews the lease of a table. None if this process leads now, else who does. Raises CatalogError."""
        holder, until = self._read(name)
        now = self._clock()
        if holder == self._me and until - now > LEASE_SECONDS / 2:
            return None
        # Of its own host a process can tell whether a holder is gone; of another's only once the lease is over.
        gone = holder is None or until <= now or (holder.host == self._me.host and not holder.running_here())
        if holder not in (None, self._me) and not gone:
            return holder
        text = json.dumps({**asdict(self._me), "until": now + LEASE_SECONDS})
        set_property(self._catalog, name, LEASE, text)
        holder, _ = self._read(name)
        if holder != self._me:
            return holder
        self._mine.add(name)
        return None

    def release(self) -> None:
        """Gives the leases back, so that the next process need not wait for their end. Raises CatalogError."""
        for name in sorted(self._mine):
            if self._read(name)[0] == self._me:
                set_property(self._catalog, name, LEASE, None)
        self._mine.clear()

    def _read(self, name: str) -> tuple[Writer | None, float]:
        return lease(name, load_table(self._catalog, name).properties)


def lease(name: str, properties: Mapping[str, str]) -> tuple[Writer | None, float]:
    """Who leads the maintenance of table `name`, by its properties, and until when (seconds since 1970)."""
    text = properties.get(LEASE)
    if text is None:
        return None, 0
    try:
        raw = json.loads(text)
        return Writer(raw["host"], raw["pid"], raw["started"]), float(raw["until"])
    except (ValueError, TypeError, KeyError) as error:
        log.warning("%s: property %s is not a lease (%s): taken as free", name, LEASE, error)
        return None, 0
