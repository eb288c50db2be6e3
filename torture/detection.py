"""Faults that a flow must detect and stop at: each is made, seen to be detected, and then undone or answered."""

import contextlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping

from pyiceberg.catalog import Catalog
from pyiceberg.table import Table
from sqlalchemy.exc import OperationalError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from k2flow.errors import CatalogError
from k2flow.exchange import find_exchange
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.catalog import load_table
from k2flow.layers import GOLD_TABLE
from torture.broker import Broker, send
from torture.flows import FlowInstance, Restarter
from torture.hostile import hostile_messages
from torture.plan import Fault
from torture.segments import batches, flipped_bit

DETECT_SECONDS = 120.0
RECOVERY_SECONDS = 60.0
OTHER_MESSAGES = 40
UNREAD = 500  # messages that no flow has read, so that one of their batches is damaged
ANCESTORS = 6  # snapshots, at most
REWOUND = "does not hold the rows of its ledger"
OTHER_LOG = "Kafka has other messages than those"
UNREADABLE = "cannot be read"
REREAD_FIELD, REREAD = "after_rollback", "reread"


class Detection:
    """Runs the faults that must be detected, while the flows of `restarters` are paused."""

    def __init__(
        self, broker: Broker, catalog: Callable[[], Catalog], restarters: Mapping[str, Restarter], schema_id: int
    ) -> None:
        self._broker = broker
        self._catalog = catalog
        self._restarters = restarters
        self._schema_id = schema_id

    def rollback(self, fault: Fault) -> bool:
        """Roll a table back. The flow must stop; set to read again from there, it loses and duplicates nothing."""
        with self._paused():
            names = [*find_exchange(fault.exchange).layer_by_table]
            name = names[int(fault.pick * len(names))]
            table = self._load(name)
            exchanges = list(self._restarters) if name == GOLD_TABLE else [fault.exchange]
            chosen = _older_snapshot(table, exchanges, fault.pick)
            if chosen is None:
                return False
            older, lacking = chosen
            table.manage_snapshots().rollback_to_snapshot(older).commit()
            for exchange in lacking:
                restarter = self._restarters[exchange]
                _refuses(restarter.run_once(DETECT_SECONDS), REWOUND)
                setting = find_exchange(exchange).setting(REREAD_FIELD)
                _succeeds(restarter.run_once(DETECT_SECONDS, **{setting: REREAD}))
        return True

    def other_log(self, fault: Fault) -> bool:
        """Start the broker from an older copy of its disk, with other messages at the offsets that the tables hold."""
        exchange = find_exchange(fault.exchange)
        topic = exchange.settings.topic
        chance = random.Random(fault.pick)
        with self._paused():
            before = self._ledger(exchange.name, exchange.bronze)
            if not before.partitions:
                return False
            with self._broker.older_disk():
                present = self._broker.partitions(topic)  # without those that were added after the copy
                for partition in sorted(before.partitions.keys() & present):
                    more = hostile_messages(exchange.code, OTHER_MESSAGES, self._schema_id, chance)
                    values = [each.value for each in more]
                    count = before.partitions[partition].next + OTHER_MESSAGES
                    messages = ({"partition": partition, "value": values[i % len(values)]} for i in range(count))
                    send(self._broker.kafka.bootstrap, topic, messages)
                _refuses(self._restarters[exchange.name].run_once(DETECT_SECONDS), OTHER_LOG)
            if (after := self._ledger(exchange.name, exchange.bronze)).partitions != before.partitions:
                raise RuntimeError(f"messages of the other log are committed: {before} to {after}")
        return True

    def bit_flip(self, fault: Fault) -> bool:
        """Flip a bit among messages that are not read yet. The flow must stop there, until the bit is right again."""
        exchange = find_exchange(fault.exchange)
        topic = exchange.settings.topic
        restarter = self._restarters[exchange.name]
        with self._paused():
            more = hostile_messages(exchange.code, UNREAD, self._schema_id, random.Random(fault.pick))
            send(self._broker.kafka.bootstrap, topic, ({"value": each.value, "partition": 0} for each in more))
            committed = self._ledger(exchange.name, exchange.bronze).next_offset(0) or 0
            unread = [b for b in batches(self._broker.partition_folder(topic, 0)) if b.first_offset >= committed]
            with flipped_bit(unread[int(fault.pick * len(unread))], fault.pick):
                _refuses(restarter.run_once(DETECT_SECONDS), UNREADABLE)
            _succeeds(restarter.run_once(DETECT_SECONDS))
        return True

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for each in self._restarters.values():
                stack.enter_context(each.paused())
            yield

    def _load(self, name: str) -> Table:
        """Load a table, once the catalog has recovered from its own faults."""
        retrying = Retrying(
            retry=retry_if_exception_type((CatalogError, OperationalError)),
            stop=stop_after_delay(RECOVERY_SECONDS),
            wait=wait_fixed(0.5),
            reraise=True,
        )
        return retrying(lambda: load_table(self._catalog(), name))

    def _ledger(self, exchange: str, table: str) -> ledgers.Ledger:
        properties = self._load(table).properties
        return ledgers.read(properties, exchange, find_exchange(exchange).settings.topic)


def _offsets(table: Table, snapshot_id: int | None, exchange: str) -> str | None:
    """Return the offsets of an exchange that a snapshot's rows are from, as JSON: the newest copy of its ledger."""
    while snapshot_id is not None and (snapshot := table.snapshot_by_id(snapshot_id)) is not None:
        copy = snapshot.summary.get(ledgers.KEY + exchange) if snapshot.summary else None
        if copy is not None:
            return json.dumps(json.loads(copy)["partitions"])
        snapshot_id = snapshot.parent_snapshot_id
    return None


def _older_snapshot(table: Table, exchanges: Iterable[str], pick: float) -> tuple[int, list[str]] | None:
    """Choose an ancestor of the head that lacks offsets. Return it with the exchanges that it lacks offsets of."""
    found = []
    snapshot = table.current_snapshot()
    now = {each: _offsets(table, table.metadata.current_snapshot_id, each) for each in exchanges}
    for _ in range(ANCESTORS):
        parent = snapshot.parent_snapshot_id if snapshot else None
        snapshot = table.snapshot_by_id(parent) if parent is not None else None
        if snapshot is None:
            break
        then = {each: _offsets(table, snapshot.snapshot_id, each) for each in exchanges}
        if all(then.values()) and then != now:
            found.append((snapshot.snapshot_id, [each for each in exchanges if then[each] != now[each]]))
    return found[int(pick * len(found))] if found else None


def _refuses(instance: FlowInstance, reason: str) -> None:
    """Check that a flow ended with this reason."""
    if not any(instance.codes()) or not any(reason in each for each in instance.reasons()):
        raise RuntimeError(f"not detected: exit codes {instance.codes()}, {instance.reasons()}")


def _succeeds(instance: FlowInstance) -> None:
    if any(instance.codes()):
        raise RuntimeError(f"the flow does not continue: exit codes {instance.codes()}, {instance.reasons()}")
