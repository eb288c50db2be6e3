"""The catalog under torture: PostgreSQL behind a proxy if it is installed, else SQLite."""

import contextlib
import importlib.util
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from pyiceberg.catalog import Catalog, load_catalog

from k2flow.iceberg.catalog import CATALOG, default_properties
from k2flow.sandbox.kafka.local import free_port
from torture.plan import Fault, FaultKind
from torture.proxy import Proxy

PREFIX = "PYICEBERG_CATALOG__K2FLOW__"


class Sqlite:
    """The catalog that k2flow creates by default."""

    kinds = (FaultKind.CATALOG_LOCKED,)
    name = "SQLite"

    def __init__(self, home: Path) -> None:
        self._path = home / "catalog.db"

    def environment(self) -> dict[str, str]:
        return {}

    def open(self) -> Catalog:
        return load_catalog(CATALOG, **default_properties(self._path.parent))

    def inject(self, fault: Fault) -> None:
        """Hold the lock by another connection for the length of the fault."""
        with contextlib.closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(fault.seconds)
            connection.execute("ROLLBACK")

    def stop(self) -> None:
        """Do nothing: no server runs."""


class Postgres:
    """A private PostgreSQL in a temporary folder; it runs as the user `postgres` if this process is root."""

    kinds = (
        FaultKind.CATALOG_REFUSES,
        FaultKind.CATALOG_HANGS,
        FaultKind.ANSWER_LOST,
        FaultKind.REQUEST_LOST,
        FaultKind.CATALOG_CRASH,
        FaultKind.CATALOG_FROZEN,
    )
    name = "PostgreSQL"

    def __init__(self, warehouse: Mapping[str, str], binaries: Path) -> None:
        self._binaries = binaries
        self._user = "postgres" if os.getuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="k2flow-pg-"))  # short: a socket's path has at most 107 bytes
        self._data = self._folder / "data"
        self._warehouse = warehouse
        self._port = free_port()
        if self._user:
            shutil.chown(self._folder, self._user)
        self._run("initdb", "-D", str(self._data), "-U", "k2flow", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        self._start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self._port), "-U", "k2flow", "catalog")
        self._proxy = Proxy(self._port)

    def environment(self) -> dict[str, str]:
        """Return the settings of flows: their connections pass the proxy."""
        return variables(self._properties(self._proxy.port))

    def open(self) -> Catalog:
        """Open the catalog past the proxy: a cut that waits for a flow's commit must not meet one of a fault."""
        return load_catalog(CATALOG, **self._properties(self._port))

    def _properties(self, port: int) -> dict[str, str]:
        return {
            "type": "sql",
            "uri": f"postgresql+psycopg2://k2flow@127.0.0.1:{port}/catalog",
            "pool_pre_ping": "true",
            **self._warehouse,
        }

    def inject(self, fault: Fault) -> None:
        match fault.kind:
            case FaultKind.CATALOG_REFUSES:
                with self._proxy.refusing():
                    time.sleep(fault.seconds)
            case FaultKind.CATALOG_HANGS:
                with self._proxy.hanging():
                    time.sleep(fault.seconds)
            case FaultKind.ANSWER_LOST | FaultKind.REQUEST_LOST:
                self._proxy.cut_at_commit(after=fault.kind is FaultKind.ANSWER_LOST)
            case FaultKind.CATALOG_CRASH:
                self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "-w", "stop")
                time.sleep(fault.seconds / 2)
                self._start()
            case _:
                with self._frozen():
                    time.sleep(fault.seconds)

    def stop(self) -> None:
        self._proxy.close()
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "-w", "stop", check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        first = int((self._data / "postmaster.pid").read_text().split()[0])
        processes = [psutil.Process(first), *psutil.Process(first).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)

    def _start(self) -> None:
        options = f"-p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self._folder / "log")
        self._run("pg_ctl", "-D", str(self._data), "-l", log, "-w", "-t", "60", "-o", options, "start")

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        subprocess.run(
            [str(self._binaries / program), *arguments],
            check=check,
            user=self._user,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=None if check else subprocess.DEVNULL,
        )


def variables(properties: Mapping[str, str]) -> dict[str, str]:
    """Return these properties of the catalog as PyIceberg's environment variables."""
    return {PREFIX + name.upper().replace(".", "__").replace("-", "_"): value for name, value in properties.items()}


def postgres_programs() -> Path | None:
    """Return the folder of PostgreSQL's programs; None if they or the Python driver are not installed."""
    # Debian's pg_ctl on PATH is a wrapper that only knows Debian's clusters: the real one comes first.
    found = [
        *sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), reverse=True),
        Path(shutil.which("pg_ctl") or "/none"),
    ]
    programs = next((path.resolve().parent for path in found if path.exists()), None)
    return programs if importlib.util.find_spec("psycopg2") else None
