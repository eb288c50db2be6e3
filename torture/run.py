"""One torture from start to verdict."""

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from k2flow.exchange import find_exchange
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from torture.broker import Broker, Production
from torture.catalogs import Postgres, Sqlite, postgres_programs
from torture.disk import Disk
from torture.flows import Copy, Keeper, flow_environment
from torture.plan import Fault, Kind, plan
from torture.report import console, print_faults, print_layers, say
from torture.store import Seaweed, open_store
from torture.verdict import judge

RATES = {"binance": 300, "kraken": 60}  # messages a second; the oracle looks at each of them, one by one
PARTITIONS = {"binance": 4, "kraken": 2}
BATCHES = {
    "K2FLOW_BINANCE_TRIGGER_SECONDS": "1",
    "K2FLOW_BINANCE_BATCH_ROWS": "250",
    "K2FLOW_BINANCE_COMMIT_BATCHES": "3",
    "K2FLOW_KRAKEN_TRIGGER_SECONDS": "1",
    "K2FLOW_KRAKEN_BATCH_ROWS": "100",
    "K2FLOW_KRAKEN_COMMIT_BATCHES": "2",
}
FLOW_KINDS = (
    Kind.KILL,
    Kind.KILL_ALL,
    Kind.FREEZE,
    Kind.SUPPLANT,
    Kind.RESCALE,
    Kind.TWIN_HERE,
    Kind.TWIN_ELSEWHERE,
    Kind.BROKER_STOP,
    Kind.BROKER_KILL,
    Kind.PARTITION,
)
LANDED = "an attempt whose outcome was unknown had landed"
CATCH_UP_SECONDS = 180
CATCH_UP_STARTS = 3


class Torture:
    """A broker, a catalog, a store, two flows, two producers, and a plan of what goes wrong; all under one folder."""

    def __init__(self, minutes: float, seed: int, sqlite: bool, local: bool, folder: Path) -> None:
        self._seconds = minutes * 60
        self._seed = seed
        self._sqlite = sqlite
        self._local = local
        self._folder = folder
        self._done: Counter[str] = Counter()
        self._troubles: list[str] = []
        self._catalog_lock = threading.Lock()
        self._store_lock = threading.Lock()

    def run(self) -> bool:
        """Whether nothing was lost or doubled, and the flows could catch up."""
        logs = self._folder / "logs"
        logs.mkdir(parents=True)
        with contextlib.ExitStack() as cleanup:
            self._disk = Disk(self._folder / "home", self._seconds)
            cleanup.callback(self._disk.close)
            kafka = cleanup.enter_context(LocalKafka(self._folder / "kafka", free_port()))
            exchanges = {name: find_exchange(name) for name in RATES}
            kafka.start({e.settings.topic: PARTITIONS[name] for name, e in exchanges.items()})
            self._broker = Broker(kafka)
            home = self._folder / "home"
            self._open_tables(home, cleanup)
            self._settings = {
                "K2FLOW_HOME": str(home),
                "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
                **self._catalog.environment(),
            }
            os.environ.update(self._settings)
            subprocess.run([sys.executable, "-m", "k2flow", "tables", "create", "all"], check=True)
            environment = flow_environment({**self._settings, **BATCHES})
            regular = flow_environment(self._settings)
            chance = random.Random(self._seed)
            self._keepers = {name: Keeper(name, environment, logs, random.Random(chance.random())) for name in RATES}
            for keeper in self._keepers.values():
                cleanup.callback(keeper.kill_everything)
            producers = [
                Production(name, kafka.bootstrap, rate, random.Random(chance.random())) for name, rate in RATES.items()
            ]
            kinds = (*FLOW_KINDS, *(self._store.kinds if self._store else (Kind.DISK_FULL,)), *self._catalog.kinds)
            faults = plan(self._seed, self._seconds, kinds)
            where = f"catalog in {self._catalog.name}, files in {'SeaweedFS' if self._store else 'a folder'}"
            say(f"{len(faults)} faults in {self._seconds:.0f} s, seed {self._seed}, {where}")
            self._suffer(faults, [*producers, *self._keepers.values()])
            say("no more faults: both flows until caught up")
            caught_up = [self._catch_up(name, regular, logs) for name in RATES]
            layers = [layer for name in RATES for layer in judge(name, kafka.bootstrap, self._catalog.open())]
            starts = {name: keeper.starts for name, keeper in self._keepers.items()}
            reasons = sum((keeper.reasons for keeper in self._keepers.values()), Counter())
            print_faults(self._done, starts, reasons)
            print_layers(layers)
            lost, wrong = sum(layer.lost for layer in layers), sum(layer.wrong for layer in layers)
            messages = sum(layer.rows for layer in layers if layer.table.startswith("bronze"))
            broken = sum(producer.failures for producer in producers)
            console.print(
                f"{messages:,} messages ({broken} bursts broken off), {self._done.total()} faults, "
                f"{sum(starts.values())} starts: [bold]{lost} lost, {wrong} doubled"
            )
            landed = sum(log.read_text(errors="replace").count(LANDED) for log in logs.iterdir())
            console.print(f"commits whose answer was lost and that were found to have landed: {landed}")
            for trouble in self._troubles:
                console.print(f"[red]{trouble}")
            return not lost and not wrong and all(caught_up) and self._audit() and not self._troubles

    def _open_tables(self, home: Path, cleanup: contextlib.ExitStack) -> None:
        """The catalog and the store of files: PostgreSQL and SeaweedFS where they are there and wanted."""
        programs = None if self._sqlite else postgres_programs()
        self._store: Seaweed | None = None
        if programs and not self._local and (store := open_store(self._folder / "store")):
            self._store = store
            cleanup.callback(store.stop)
        warehouse = self._store.properties() if self._store else {"warehouse": f"file://{home / 'warehouse'}"}
        self._catalog: Sqlite | Postgres = Postgres(warehouse, programs) if programs else Sqlite(home)
        cleanup.callback(self._catalog.stop)

    def _suffer(self, faults: list[Fault], threads: list[Production | Keeper]) -> None:
        """Everything runs, the faults happen at their times, and everything ends."""
        began = time.monotonic()
        for thread in threads:
            thread.start()
        suffered = []
        for fault in faults:
            time.sleep(max(0.0, began + fault.at - time.monotonic()))
            print(fault, flush=True)
            thread = threading.Thread(target=self._inflict, args=(fault,), daemon=True)
            thread.start()
            suffered.append(thread)
        for each in suffered:
            each.join()
        for thread in threads:
            thread.stop()

    def _inflict(self, fault: Fault) -> None:
        try:
            if self._action(fault)() is not False:
                self._done[fault.kind] += 1
        except Exception as error:  # noqa: BLE001 - one fault that cannot be had must not end the others
            self._troubles.append(f"{fault}: {type(error).__name__}: {error}")

    def _action(self, fault: Fault) -> Callable[[], object]:
        keeper = self._keepers[fault.exchange]
        match fault.kind:
            case Kind.KILL:
                return lambda: keeper.kill(fault.pick)
            case Kind.KILL_ALL:
                return keeper.kill_all
            case Kind.FREEZE:
                return lambda: keeper.freeze(fault.pick, fault.seconds)
            case Kind.SUPPLANT:
                return lambda: keeper.supplant(fault.seconds + 3)  # the successor needs about 3 s to take over
            case Kind.RESCALE:
                return lambda: keeper.rescale(fault.processes)
            case Kind.TWIN_HERE:
                return lambda: keeper.twin(fault.seconds, None)
            case Kind.TWIN_ELSEWHERE:
                return lambda: keeper.twin(fault.seconds, "elsewhere")
            case Kind.BROKER_STOP | Kind.BROKER_KILL:
                return lambda: self._broker.interrupt(fault.kind is Kind.BROKER_STOP, fault.seconds / 2)
            case Kind.PARTITION:
                return lambda: self._broker.add_partition(find_exchange(fault.exchange).settings.topic)
            case Kind.DISK_FULL:
                return lambda: self._fill_disk(fault.seconds)
            case Kind.STORE_REFUSES | Kind.STORE_HANGS | Kind.STORE_CUTS | Kind.STORE_RESTART:
                return lambda: self._break_store(fault)
            case _:
                return lambda: self._break_catalog(fault)

    def _fill_disk(self, seconds: float) -> None:
        with self._disk.full([pid for keeper in self._keepers.values() for pid in keeper.pids()]):
            time.sleep(seconds)

    def _break_catalog(self, fault: Fault) -> None:
        with self._catalog_lock:
            self._catalog.break_it(fault)

    def _break_store(self, fault: Fault) -> None:
        assert self._store
        with self._store_lock:
            self._store.break_it(fault)

    def _catch_up(self, exchange: str, environment: dict[str, str], logs: Path) -> bool:
        """Whether the flow comes to the end of its topic when nothing goes wrong any more."""
        for i in range(CATCH_UP_STARTS):
            log = logs / f"{exchange}-end-{i}.log"
            copy = Copy(exchange, 1 + i % 2, {**environment, "K2FLOW_UNTIL_CAUGHT_UP": "1"}, log)
            if copy.wait(CATCH_UP_SECONDS) and not any(copy.codes()):
                return True
            self._troubles.append(f"{exchange} did not catch up: {copy.codes()} {copy.reasons()[-1:]}")
        return False

    def _audit(self) -> bool:
        """Whether `k2flow audit` finds that the law holds."""
        command = [sys.executable, "-m", "k2flow", "audit", "--json"]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        console.print(f"k2flow audit: exit code {result.returncode}")
        if result.returncode:
            console.print(result.stdout[-4000:], result.stderr[-2000:], markup=False)
        return result.returncode == 0
