"""One torture run, from start to verdict."""

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

from k2flow.exchange import find_exchange
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.trades.schema import trade_schema
from tests.registry import Registry
from torture import clock
from torture.broker import PROPERTIES, Broker, BurstProducer, send
from torture.cache import Cache
from torture.catalogs import Postgres, Sqlite, postgres_programs
from torture.detection import Detection
from torture.disk import Disk
from torture.flows import FlowInstance, Restarter, flow_environment
from torture.hostile import hostile_messages
from torture.plan import ALONE, Fault, FaultKind, plan
from torture.report import console, print_differences, print_faults, print_heading
from torture.store import Seaweed, open_store
from torture.verdict import TableDifference, compare_tables, times_that_go_back

RATES = {"binance": 300, "kraken": 60}  # messages per second; the oracle reads each of them, one at a time
PARTITIONS = {"binance": 4, "kraken": 2}
BATCHES = {
    "K2FLOW_BINANCE_TRIGGER_SECONDS": "1",
    "K2FLOW_BINANCE_BATCH_ROWS": "250",
    "K2FLOW_BINANCE_COMMIT_BATCHES": "3",
    "K2FLOW_KRAKEN_TRIGGER_SECONDS": "1",
    "K2FLOW_KRAKEN_BATCH_ROWS": "100",
    "K2FLOW_KRAKEN_COMMIT_BATCHES": "2",
    "K2FLOW_WINDOW_MEMORY_IDS": "100",  # so that ids are spilled after most commits
}
CACHE_KINDS = (
    FaultKind.CACHE_DELETED,
    FaultKind.CACHE_DELETED_DOWN,
    FaultKind.CACHE_DAMAGED,
    FaultKind.CACHE_DAMAGED_DOWN,
    FaultKind.CACHE_OLDER,
)
FLOW_KINDS = (
    FaultKind.KILL,
    FaultKind.KILL_ALL,
    FaultKind.FREEZE,
    FaultKind.REPLACE_FROZEN,
    FaultKind.RESCALE,
    FaultKind.SECOND_COPY_HERE,
    FaultKind.SECOND_COPY_ELSEWHERE,
    FaultKind.BROKER_STOP,
    FaultKind.BROKER_KILL,
    FaultKind.PARTITION,
    FaultKind.READ_REFUSED,
    FaultKind.REGISTRY_LAGS,
    FaultKind.HOSTILE_VALUES,
    *CACHE_KINDS,
    FaultKind.ROLLBACK,
    FaultKind.OTHER_LOG,
    FaultKind.BIT_FLIP,
)
SCHEMA_ID = 1
SOME = 50  # messages of one fault
REGISTRY_LAG_SECONDS = 1.0
CLOCK_MINUTES = (-60, 60)
LANDED = "an attempt with an unknown outcome had landed"
USED, REFUSED = "hours of the deduplication window", "the ids of the window are read from Gold"
CATCH_UP_SECONDS = 180
CATCH_UP_STARTS = 3


class Torture:
    """A broker, a catalog, a store, two flows, two producers and a plan of faults; all files are under one folder."""

    def __init__(
        self, minutes: float, seed: int, sqlite: bool, local: bool, kinds: Collection[FaultKind], folder: Path
    ) -> None:
        self._seconds = minutes * 60
        self._seed = seed
        self._sqlite = sqlite
        self._local = local
        self._kinds = kinds
        self._folder = folder
        self._done: Counter[str] = Counter()
        self._problems: list[str] = []
        self._catalog_lock = threading.Lock()
        self._store_lock = threading.Lock()

    def run(self) -> bool:
        """Return whether no row is lost or duplicated, both flows catch up, and the audit agrees."""
        logs, home = self._folder / "logs", self._folder / "home"
        logs.mkdir(parents=True)
        with contextlib.ExitStack() as cleanup:
            self._disk = Disk(home, self._seconds)
            cleanup.callback(self._disk.close)
            kafka = cleanup.enter_context(LocalKafka(self._folder / "kafka", free_port(), properties=PROPERTIES))
            kafka.start({find_exchange(name).settings.topic: PARTITIONS[name] for name in RATES})
            self._broker = Broker(kafka)
            self._broker.keep_copy()
            self._open_tables(home, cleanup)
            self._registry = Registry()
            self._registry.register(SCHEMA_ID, trade_schema())
            self._schema_ids = [SCHEMA_ID]
            cleanup.enter_context(self._registry.running())
            settings = {
                "K2FLOW_SCHEMA_REGISTRY_URL": self._registry.url,
                "K2FLOW_HOME": str(home),
                "K2FLOW_CACHE_DIR": str(home / "cache"),  # on the disk that fills up
                "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
                **self._catalog.environment(),
            }
            os.environ.update(settings)
            subprocess.run([sys.executable, "-m", "k2flow", "tables", "create", "all"], check=True)
            chance = random.Random(self._seed)
            environment = flow_environment({**settings, **BATCHES})
            self._restarters = {
                name: Restarter(name, environment, logs, random.Random(chance.random())) for name in RATES
            }
            for restarter in self._restarters.values():
                cleanup.callback(restarter.kill_everything)
            copies = self._folder / "older caches"
            copies.mkdir()
            self._caches = {name: Cache(home / "cache", find_exchange(name).code, copies) for name in RATES}
            self._detection = Detection(self._broker, self._catalog.open, self._restarters, SCHEMA_ID)
            producers = [
                BurstProducer(name, kafka.bootstrap, rate, random.Random(chance.random()))
                for name, rate in RATES.items()
            ]
            self._run_faults(self._plan(), [*producers, *self._restarters.values()])
            print_heading("no more faults: both flows catch up")
            caught_up = [self._catch_up(name, flow_environment(settings), logs) for name in RATES]
            catalog, ids = self._catalog.open(), tuple(self._schema_ids)
            tables = [table for name in RATES for table in compare_tables(name, kafka.bootstrap, catalog, ids)]
            self._problems += times_that_go_back(catalog)
            correct = self._report(tables, sum(producer.failures for producer in producers), logs)
            return correct and all(caught_up) and self._audit() and not self._problems

    def _plan(self) -> list[Fault]:
        """Plan the faults that this machine's catalog and store allow."""
        store_kinds = self._store.kinds if self._store else (FaultKind.DISK_FULL,)
        clock_kinds = (FaultKind.CLOCK_JUMP,) if clock.COMPILER else ()
        possible = (*FLOW_KINDS, *clock_kinds, *store_kinds, *self._catalog.kinds)
        faults = plan(self._seed, self._seconds, [kind for kind in possible if kind in self._kinds])
        where = f"catalog in {self._catalog.name}, files in {'SeaweedFS' if self._store else 'a folder'}"
        print_heading(f"{len(faults)} faults in {self._seconds:.0f} s, seed {self._seed}, {where}")
        return faults

    def _report(self, tables: list[TableDifference], broken_bursts: int, logs: Path) -> bool:
        """Print the results. Return whether no row is lost and none is unexpected."""
        starts = {name: restarter.starts for name, restarter in self._restarters.items()}
        print_faults(self._done, starts, sum((each.reasons for each in self._restarters.values()), Counter()))
        print_differences(tables)
        lost, unexpected = sum(table.lost for table in tables), sum(table.unexpected for table in tables)
        messages = sum(table.rows for table in tables if table.table.startswith("bronze"))
        console.print(
            f"{messages:,} messages ({broken_bursts} bursts interrupted), {self._done.total()} faults, "
            f"{sum(starts.values())} starts: [bold]{lost} lost, {unexpected} duplicated"
        )
        landed = sum(log.read_text(errors="replace").count(LANDED) for log in logs.iterdir())
        console.print(f"commits that were found to have landed after their answer was lost: {landed}")
        used, refused = (
            sum(text in log.read_text(errors="replace") for log in logs.iterdir()) for text in (USED, REFUSED)
        )
        console.print(f"starts that used the window's cache: {used}, that refused it: {refused}")
        for problem in self._problems:
            console.print(f"[red]{problem}")
        return not lost and not unexpected

    def _open_tables(self, home: Path, cleanup: contextlib.ExitStack) -> None:
        """Open the catalog and the store of files: PostgreSQL and SeaweedFS if they are installed and wanted."""
        programs = None if self._sqlite else postgres_programs()
        self._store: Seaweed | None = None
        if programs and not self._local and (store := open_store(self._folder / "store")):
            self._store = store
            cleanup.callback(store.stop)
        warehouse = self._store.properties() if self._store else {"warehouse": f"file://{home / 'warehouse'}"}
        self._catalog: Sqlite | Postgres = Postgres(warehouse, programs) if programs else Sqlite(home)
        cleanup.callback(self._catalog.stop)

    def _run_faults(self, faults: list[Fault], threads: list[BurstProducer | Restarter]) -> None:
        """Start all threads, apply each fault at its time, then stop all threads."""
        began, ends = time.monotonic(), time.monotonic() + self._seconds
        for thread in threads:
            thread.start()
        applied: list[threading.Thread] = []
        for fault in faults:
            time.sleep(max(0.0, began + fault.at - time.monotonic()))
            if time.monotonic() > ends:
                break
            print(fault, flush=True)
            if fault.kind in ALONE:
                waited = time.monotonic()
                for running in applied:
                    running.join()
                self._apply(fault)
                began += time.monotonic() - waited  # the next fault comes as long after this one as planned
                continue
            thread = threading.Thread(target=self._apply, args=(fault,), daemon=True)
            thread.start()
            applied.append(thread)
        for running in applied:
            running.join()
        for thread in threads:
            thread.stop()

    def _apply(self, fault: Fault) -> None:
        try:
            if self._action(fault)() is not False:
                self._done[fault.kind] += 1
        except Exception as error:  # noqa: BLE001 - a fault that fails must not end the others
            self._problems.append(f"{fault}: {type(error).__name__}: {error}")

    def _action(self, fault: Fault) -> Callable[[], object]:
        restarter = self._restarters[fault.exchange]
        match fault.kind:
            case FaultKind.KILL:
                return lambda: restarter.kill(fault.pick)
            case FaultKind.KILL_ALL:
                return restarter.kill_all
            case FaultKind.FREEZE:
                return lambda: restarter.freeze(fault.pick, fault.seconds)
            case FaultKind.REPLACE_FROZEN:
                seconds = fault.seconds + 3  # the successor needs about 3 s to start
                return lambda: restarter.replace_while_frozen(seconds)
            case FaultKind.RESCALE:
                return lambda: restarter.rescale(fault.processes)
            case FaultKind.SECOND_COPY_HERE:
                return lambda: restarter.run_second_copy(fault.seconds, None)
            case FaultKind.SECOND_COPY_ELSEWHERE:
                return lambda: restarter.run_second_copy(fault.seconds, "elsewhere")
            case FaultKind.BROKER_STOP | FaultKind.BROKER_KILL:
                return lambda: self._broker.interrupt(fault.kind is FaultKind.BROKER_STOP, fault.seconds / 2)
            case FaultKind.PARTITION:
                return lambda: self._broker.add_partition(find_exchange(fault.exchange).settings.topic)
            case FaultKind.READ_REFUSED:
                return lambda: self._broker.refuse_reads(find_exchange(fault.exchange).settings.topic, fault.seconds)
            case FaultKind.REGISTRY_LAGS:
                return lambda: self._use_new_schema_id(fault)
            case FaultKind.HOSTILE_VALUES:
                return lambda: self._send_hostile(fault, SCHEMA_ID)
            case FaultKind.CLOCK_JUMP:
                minutes = CLOCK_MINUTES[fault.pick < 0.5]
                return lambda: restarter.run_with_clock(minutes, fault.seconds)
            case FaultKind.ROLLBACK:
                return lambda: self._detection.rollback(fault)
            case FaultKind.OTHER_LOG:
                return lambda: self._detection.other_log(fault)
            case FaultKind.BIT_FLIP:
                return lambda: self._detection.bit_flip(fault)
            case kind if kind in CACHE_KINDS:
                return lambda: self._break_cache(fault)
            case FaultKind.DISK_FULL:
                return lambda: self._fill_disk(fault.seconds)
            case kind if self._store and kind in self._store.kinds:
                return lambda: self._break_store(fault)
            case _:
                return lambda: self._break_catalog(fault)

    def _send_hostile(self, fault: Fault, schema_id: int) -> None:
        exchange = find_exchange(fault.exchange)
        messages = hostile_messages(exchange.code, SOME, schema_id, random.Random(fault.pick))
        fields = ({"key": each.key, "value": each.value, "timestamp": each.timestamp_ms} for each in messages)
        send(self._broker.kafka.bootstrap, exchange.settings.topic, fields)

    def _use_new_schema_id(self, fault: Fault) -> None:
        """Send messages with a schema id that the registry knows a little later, as a lagging replica does."""
        schema_id = SCHEMA_ID + len(self._schema_ids)
        self._schema_ids.append(schema_id)
        self._send_hostile(fault, schema_id)
        time.sleep(REGISTRY_LAG_SECONDS)
        self._registry.register(schema_id, trade_schema())

    def _fill_disk(self, seconds: float) -> None:
        with self._disk.full([pid for restarter in self._restarters.values() for pid in restarter.pids()]):
            time.sleep(seconds)

    def _break_cache(self, fault: Fault) -> bool:
        cache, restarter = self._caches[fault.exchange], self._restarters[fault.exchange]
        match fault.kind:
            case FaultKind.CACHE_DELETED:
                return cache.delete()
            case FaultKind.CACHE_DELETED_DOWN:
                return restarter.between_starts(cache.delete)
            case FaultKind.CACHE_DAMAGED:
                return cache.damage(fault.pick, in_place=False)
            case FaultKind.CACHE_DAMAGED_DOWN:
                return restarter.between_starts(lambda: cache.damage(fault.pick, in_place=True))
            case _:
                copy = cache.copy()
                time.sleep(fault.seconds)
                return restarter.between_starts(lambda: cache.put_back(copy))

    def _break_catalog(self, fault: Fault) -> None:
        with self._catalog_lock:
            self._catalog.inject(fault)

    def _break_store(self, fault: Fault) -> None:
        assert self._store
        with self._store_lock:
            self._store.inject(fault)

    def _catch_up(self, exchange: str, environment: dict[str, str], logs: Path) -> bool:
        """Return whether the flow reaches the end of its topic once the faults are over."""
        for i in range(CATCH_UP_STARTS):
            log = logs / f"{exchange}-end-{i}.log"
            instance = FlowInstance(exchange, 1 + i % 2, {**environment, "K2FLOW_UNTIL_CAUGHT_UP": "1"}, log)
            if instance.wait(CATCH_UP_SECONDS) and not any(instance.codes()):
                return True
            self._problems.append(f"{exchange} did not catch up: {instance.codes()} {instance.reasons()[-1:]}")
        return False

    def _audit(self) -> bool:
        """Return whether `k2flow audit` finds that all invariants hold."""
        command = [sys.executable, "-m", "k2flow", "audit", "--full", "--json"]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        console.print(f"k2flow audit: exit code {result.returncode}")
        if result.returncode:
            console.print(result.stdout[-4000:], result.stderr[-2000:], markup=False)
        return result.returncode == 0
