"""The warehouse under torture: SeaweedFS, a real S3 store with an Iceberg REST catalog, behind a proxy."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from pyiceberg.catalog import load_catalog
from pyiceberg.exceptions import NoSuchNamespaceError, RESTError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from torture.plan import Fault, FaultKind
from torture.proxy import Proxy

BUCKET = "warehouse"
KEY, SECRET = "torture", "torture-secret"
TABLES = "tables"  # the bucket of the REST catalog
SERVERS = ("master", "volume", "filer", "admin", "s3", "s3.port.iceberg")
GRPC = 10_000  # each server also listens on the port that is higher by this
PORTS = range(11_000, 19_000, len(SERVERS))
START_SECONDS = 40.0
STOP_SECONDS = 5.0
SLOW_SECONDS = 0.06
WRITES = (b"PUT ", b"POST ")  # the first bytes of S3 requests that change something


class Seaweed:
    """One SeaweedFS process with its own folder and bucket."""

    kinds = (
        FaultKind.STORE_REFUSES,
        FaultKind.STORE_HANGS,
        FaultKind.STORE_CUTS,
        FaultKind.STORE_RESTART,
        FaultKind.STORE_SLOW,
    )

    def __init__(self, folder: Path, program: Path) -> None:
        self._folder = folder
        self._program = program
        self._ports = _free_ports()
        folder.mkdir(parents=True)
        self._start()
        self._proxy = Proxy(self._ports["s3"])

    def properties(self) -> dict[str, str]:
        """Return PyIceberg's properties of a catalog whose warehouse is this store."""
        return {"warehouse": f"s3://{BUCKET}/k2flow", **self._access()}

    def rest_catalog(self) -> dict[str, str]:
        """Return PyIceberg's properties of the store's REST catalog, once it has its bucket."""
        properties = {
            "type": "rest",
            "uri": self._rest,
            "credential": f"{KEY}:{SECRET}",
            "warehouse": f"s3://{TABLES}",
            **self._access(),
        }
        for attempt in Retrying(
            retry=retry_if_exception_type((NoSuchNamespaceError, RESTError)),
            stop=stop_after_delay(START_SECONDS),
            wait=wait_fixed(0.1),
        ):
            with attempt:
                load_catalog(BUCKET, **properties).list_namespaces()
        return properties

    @property
    def _rest(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3.port.iceberg']}"

    def _access(self) -> dict[str, str]:
        return {
            "py-io-impl": "pyiceberg.io.pyarrow.PyArrowFileIO",
            "s3.endpoint": f"http://127.0.0.1:{self._proxy.port}",
            "s3.access-key-id": KEY,
            "s3.secret-access-key": SECRET,
            "s3.region": "us-east-1",
            "s3.connect-timeout": "2",
            "s3.request-timeout": "5",
        }

    def inject(self, fault: Fault) -> None:
        match fault.kind:
            case FaultKind.STORE_REFUSES:
                with self._proxy.refusing():
                    time.sleep(fault.seconds)
            case FaultKind.STORE_HANGS:
                with self._proxy.hanging():
                    time.sleep(fault.seconds)
            case FaultKind.STORE_CUTS:
                with self._proxy.losing_answers(WRITES):
                    time.sleep(fault.seconds)
            case FaultKind.STORE_SLOW:
                with self._proxy.slow(SLOW_SECONDS):
                    time.sleep(fault.seconds)
            case _:
                self._end(gently=fault.pick < 0.5)
                time.sleep(fault.seconds / 2)
                self._start()

    def stop(self) -> None:
        self._proxy.close()
        self._end(gently=False)

    def _start(self) -> None:
        environment = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "GOMEMLIMIT": "512MiB"}
        command = [
            str(self._program),
            "mini",
            f"-dir={self._folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.lance=0",
            f"-bucket={BUCKET}",
            f"-tableBucket={TABLES}",
            *(f"-{name if '.' in name else f'{name}.port'}={port}" for name, port in self._ports.items()),
        ]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS does not start: see {self._folder / 'log'}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            for url in (f"http://127.0.0.1:{self._ports['s3']}/healthz", f"{self._rest}/v1/config"):
                urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            return False
        return True

    def _end(self, gently: bool) -> None:
        """End the process; kill it if it does not end in time: with clients connected that may take 20 s."""
        if gently:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self._process.kill()
        self._process.wait()


def open_store(folder: Path) -> Seaweed | None:
    """Open a store in `folder`; return None if SeaweedFS is not installed."""
    program = seaweed_program()
    return Seaweed(folder, program) if program else None


def seaweed_program() -> Path | None:
    """Return SeaweedFS' program: of this Python's environment, or else of PATH."""
    beside = Path(sys.executable).with_name("weed")
    found = beside if beside.exists() else shutil.which("weed")
    return Path(found) if found else None


def _free_ports() -> dict[str, int]:
    """Find free ports below the range that the system assigns to clients, those for gRPC included."""
    for i in range(len(PORTS)):
        first = PORTS[(os.getpid() + i) % len(PORTS)]  # two torture runs that start at once choose different ports
        ports = dict(zip(SERVERS, range(first, first + len(SERVERS)), strict=True))
        if all(_is_free(port) and _is_free(port + GRPC) for port in ports.values()):
            return ports
    raise RuntimeError("no ports are free for SeaweedFS")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
