"""docker/compose.yml on a real engine: up until healthy, then broken in turn. See scripts/stack.

Each fault is followed by the wait for recovery: all services run and are healthy again, and the tables hold all
messages that Kafka had when the fault ended, the candles included.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import RESTError

from k2flow.candles.updating import SOURCE_KEY
from k2flow.exchange import Exchange, all_exchanges
from k2flow.iceberg.ledger import read
from k2flow.layers import CANDLES_TABLE, GOLD_TABLE
from k2flow.sandbox.kafka.local import free_port
from tests.deployment import DOCKER, IMAGE, ROOT, compose
from tests.surroundings.engine import Engine
from torture import clock

COMPOSE = Path(sys.executable).with_name("docker-compose")
PORTS = ("KAFKA_PORT", "S3_PORT", "CATALOG_PORT", "REGISTRY_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
DISKS = {"store": 1000, "kafka": 1000}
"""Services whose volume is a file system of its own, so that it can be filled, and the user that owns it."""
DISK_BYTES = 768 << 20
BYTES_OF_RATE = 1 << 20
"""More disk for each message a second: at 1,000 a second, a run of 25 minutes fills DISK_BYTES."""
UP_SECONDS = 600.0
RECOVERY_SECONDS = 300.0
POLL_SECONDS = 2.0  # each question reads the metadata of all tables
ONE_PROCESS_RATE = 500  # messages a second below which one process serves Binance
SAMPLE_SECONDS = 2.0
FIRST_VERSION = compose()["services"]["binance"]["image"].rpartition(":")[2]
NEXT_VERSION = f"{FIRST_VERSION}.next"
RARE_INTERVAL = "20s"
AVAILABLE_SINCE = 25  # the major version of the engine that knows `start_interval`
UNITS = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass
class Usage:
    """What one service has used: memory in bytes at its peak, CPU in percent of one core in the mean of all samples."""

    peak_bytes: float = 0.0
    cpu: list[float] = field(default_factory=list)


class Stack:
    """The services of docker/compose.yml under a project name and ports of their own, without Grafana.

    Its files are a copy of docker/ in `folder`, with secrets of its own. Each of `DISKS` is small.
    """

    def __init__(self, engine: Engine, folder: Path, rate: int) -> None:
        self._engine = engine
        self._folder = folder
        self._docker = folder / "docker"
        self._disks = {service: folder / "disks" / service for service in DISKS}
        self._name = f"k2flow-{uuid.uuid4().hex[:6]}"
        self._ports = {name: free_port() for name in PORTS}
        self._override = folder / "override.yml"
        self._rate = rate
        self._version = FIRST_VERSION
        self._clocks: dict[str, float] = {}  # the seconds that a service's clock is ahead
        self._killed: dict[str, str] = {}  # when a killed service had been started
        shutil.copytree(DOCKER, self._docker, ignore=shutil.ignore_patterns("secrets"))
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "secrets", folder / "scripts")
        self.create_secrets()
        self._write_override()
        for service, disk in self._disks.items():
            disk.mkdir(parents=True)
            size = DISK_BYTES + rate * BYTES_OF_RATE
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
            os.chown(disk, DISKS[service], DISKS[service])

    def close(self) -> None:
        """Remove the containers, networks and volumes, and the file system."""
        try:
            self.compose("--profile", "demo", "down", "--volumes", "--timeout", "1")
        finally:
            for disk in self._disks.values():
                subprocess.run(["umount", "--lazy", disk], check=True)

    def compose(self, *arguments: str, seconds: float = UP_SECONDS) -> str:
        """Run Docker Compose and return its output. Raise RuntimeError with the errors if it fails."""
        files = ("-f", str(self._docker / "compose.yml"), "-f", str(self._override))
        command = [str(COMPOSE), "-p", self._name, *files, *arguments]
        environment = {**self._engine.environment, **{name: str(port) for name, port in self._ports.items()}}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        if done.returncode != 0:
            raise RuntimeError(f"docker compose {' '.join(arguments)}: {done.stderr[-2000:]}{done.stdout[-2000:]}")
        return done.stdout

    def up(self) -> None:
        """Start or update all services and the simulated trades, and wait until they are healthy."""
        try:
            self.compose("--profile", "demo", "up", "--no-build", "--wait")
        except RuntimeError as error:
            raise AssertionError(f"{error}\n{self.compose('logs', '--tail', '20')}") from error

    def start_trades(self) -> None:
        """Start the simulated trades again if they have ended: no other service ends without a broker."""
        self.compose("--profile", "demo", "up", "-d", "--no-build", "--no-deps", "demo-binance", "demo-kraken")

    def create_secrets(self) -> None:
        """Create new secrets, as the documents say."""
        shutil.rmtree(self._docker / "secrets", ignore_errors=True)
        subprocess.run([self._folder / "scripts" / "secrets"], check=True, timeout=30)

    def secret(self, name: str) -> Path:
        """Return the file of a secret."""
        return self._docker / "secrets" / name

    def use_version(self, version: str) -> None:
        """Use this version of the image from now on."""
        self._version = version
        self._write_override()

    def set_clock(self, service: str, ahead_seconds: float) -> None:
        """Replace the container of a service by one whose clock is ahead; 0: whose clock is right."""
        self._clocks = {service: ahead_seconds} if ahead_seconds else {}
        self._write_override()
        self.recreate(service)

    def states(self) -> dict[str, dict[str, Any]]:
        """Return the containers as `docker compose ps --all` shows them, by service."""
        lines = self.compose("--profile", "demo", "ps", "--all", "--format", "json").splitlines()
        return {each["Service"]: each for each in map(json.loads, lines)}

    def problems(self) -> list[str]:
        """Return the services that should run and be healthy, and are not."""
        wanted = {name for name, service in compose()["services"].items() if self._is_long_running(service)}
        found = self.states()
        if dead := [name for name in self._killed if not self.is_started_again(name)]:
            return [f"{name}: not started again yet" for name in dead]
        return [
            f"{name}: {state['Status'] if state else 'absent'}"
            for name in sorted(wanted)
            if not (state := found.get(name)) or state["State"] != "running" or state["Health"] not in ("healthy", "")
        ]

    @staticmethod
    def _is_long_running(service: Mapping[str, Any]) -> bool:
        return service.get("restart") != "no" and not service.get("profiles") and "grafana" not in service["image"]

    def container(self, service: str) -> str:
        """Return the name of a service's container."""
        return f"{self._name}-{service}-1"

    def crash(self, service: str) -> None:
        """Kill the main process of a container: the engine sees a crash, and starts it again."""
        state = self._engine.inspect(self.container(service))["State"]
        self._killed[service] = state["StartedAt"]
        os.kill(state["Pid"], signal.SIGKILL)

    def is_started_again(self, service: str) -> bool:
        """Return whether a service that was killed has been started since."""
        state = self._engine.inspect(self.container(service))["State"]
        return bool(state["Running"]) and state["StartedAt"] != self._killed.get(service)

    @contextmanager
    def without_network(self, service: str) -> Iterator[None]:
        """Take a service's network away."""
        network = f"{self._name}_default"
        self._engine.docker("network", "disconnect", network, self.container(service))
        yield
        self._engine.docker("network", "connect", "--alias", service, network, self.container(service))

    @contextmanager
    def full_disk(self, service: str) -> Iterator[None]:
        """Leave no space on the disk of a service."""
        filler = self._disks[service] / "filler"
        with filler.open("wb") as file, suppress(OSError):
            while True:
                file.write(bytes(2**20))
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(2**10))
        yield
        filler.unlink()

    def log(self, service: str) -> str:
        """Return the end of a service's log."""
        return self.compose("logs", "--no-log-prefix", "--tail", "40", service)

    def recreate(self, service: str) -> None:
        """Replace the container of one service, with the secrets of now."""
        self.compose("up", "-d", "--no-build", "--no-deps", "--force-recreate", service)

    def k2flow(self, *arguments: str) -> str:
        """Run a command of k2flow in the container of the audit, as the documents say."""
        return self.compose("exec", "-T", "audit", "k2flow", *arguments)

    def log_ends(self) -> dict[tuple[str, int], int]:
        """Return the end of each partition in Kafka. Wait for the broker."""
        consumer = Consumer(
            {"bootstrap.servers": f"127.0.0.1:{self._ports['KAFKA_PORT']}", "group.id": "stack", "log_level": 0}
        )
        try:
            return {
                (exchange.name, p): self._log_end(consumer, exchange, p)
                for exchange in all_exchanges()
                for p in range(exchange.declared["partitions"])
            }
        finally:
            consumer.close()

    @staticmethod
    def _log_end(consumer: Consumer, exchange: Exchange, partition: int) -> int:
        deadline = time.monotonic() + RECOVERY_SECONDS
        while True:
            try:
                place = TopicPartition(exchange.declared["topic"], partition)
                return int(consumer.get_watermark_offsets(place, timeout=5)[1])
            except KafkaException:
                if time.monotonic() > deadline:
                    raise

    def behind(self, ends: Mapping[tuple[str, int], int]) -> int:
        """Return how many messages before these ends are not in all tables of their exchange yet."""
        missing, catalog = 0, self._catalog()
        for exchange in all_exchanges():
            for name in exchange.tables:
                properties = catalog.load_table(f"market_data.{name}").properties
                ledger = read(properties, exchange.name, exchange.declared["topic"])
                held = {p: ledger.next_offset(p) or 0 for e, p in ends if e == exchange.name}
                missing = max(missing, sum(max(0, ends[exchange.name, p] - held[p]) for p in held))
        return missing or self._commits_behind(catalog)

    @staticmethod
    def _commits_behind(catalog: Catalog) -> int:
        """Return how many of Gold's commits up to now are not in the candles yet."""
        head = catalog.load_table(f"market_data.{GOLD_TABLE}").current_snapshot()
        properties = catalog.load_table(f"market_data.{CANDLES_TABLE}").properties
        held = json.loads(properties.get(SOURCE_KEY, "{}")).get("sequence_number", 0)
        return max(0, (head.sequence_number or 0) - held) if head else 0

    def _catalog(self) -> Catalog:
        return load_catalog(
            "stack",
            type="rest",
            uri=f"http://127.0.0.1:{self._ports['CATALOG_PORT']}",
            warehouse="s3://lake",
            credential=self.secret("PYICEBERG_CATALOG__K2FLOW__CREDENTIAL").read_text(),
        )

    def await_recovery(self, seconds: float = RECOVERY_SECONDS) -> float:
        """Wait until all services are healthy and the tables hold all messages of now. Return the seconds."""
        began = time.monotonic()
        ends = self.log_ends()
        problem: object = "not asked"
        while time.monotonic() - began < seconds:
            try:
                problem = self.behind(ends) or self.problems()
            except (OSError, RESTError, RuntimeError) as error:
                problem = error
            if not problem:
                return time.monotonic() - began
            time.sleep(POLL_SECONDS)
        raise AssertionError(f"not recovered after {seconds:.0f} s: {problem}\n{self.log('binance')}")

    def alerts(self) -> list[dict[str, Any]]:
        """Return the alerts that Prometheus shows."""
        text = self.compose("exec", "-T", "audit", "python", "-c", ASK_PROMETHEUS)
        found: list[dict[str, Any]] = json.loads(text)["data"]["alerts"]
        return found

    def usage(self) -> dict[str, tuple[float, float]]:
        """Return bytes of memory and percent of one core of each service, now."""
        lines = self._engine.docker("stats", "--no-stream", "--format", "{{json .}}").splitlines()
        found = {}
        for each in map(json.loads, lines):
            service = each["Name"].removeprefix(f"{self._name}-").rpartition("-")[0]
            found[service] = (_bytes(each["MemUsage"].split("/")[0].strip()), float(each["CPUPerc"].rstrip("%")))
        return found

    def _write_override(self) -> None:
        """Write what differs from docker/compose.yml: the version, disks, clocks, the rate, no image of Grafana."""
        services: dict[str, list[str]] = defaultdict(list, {"grafana": ["profiles: [without-image]"]})
        major = int(self._engine.docker("version", "--format", "{{.Server.Version}}").partition(".")[0])
        for name, service in compose()["services"].items():
            if service["image"].startswith(f"{IMAGE}:"):
                services[name].append(f"image: {IMAGE}:{self._version}")
            check = service.get("healthcheck", {})
            # A check of once in minutes is a whole program: every few seconds it would be the greatest load of all.
            interval = RARE_INTERVAL if check.get("interval", "").endswith("m") else check.get("start_interval")
            if interval and major < AVAILABLE_SINCE:
                services[name].append(f"healthcheck: {{interval: {interval}, start_interval: !reset null}}")
        for name, share in (("demo-binance", 20), ("demo-kraken", 1)):
            rate = max(1, self._rate * share // 21)
            command = f"k2flow produce {name.removeprefix('demo-')} --rate {rate} --count {rate * 3600}"
            services[name].append(f"command: {command} --bad 0.01 --duplicates 0.02")
        if self._rate < ONE_PROCESS_RATE:
            services["binance"].append("environment: {K2FLOW_BINANCE_PROCESSES: '1'}")
        for name, seconds in self._clocks.items():
            environment = clock.shifted(seconds)
            services[name].append(f"environment: {json.dumps(environment)}")
            services[name].append(f"volumes: ['{clock.library()}:{clock.library()}:ro']")
        lines = ["services:"]
        for name, settings in services.items():
            lines += [f"  {name}:", *(f"    {setting}" for setting in settings)]
        lines.append("volumes:")
        for name, disk in self._disks.items():
            lines.append(f"  {name}: {{driver: local, driver_opts: {{type: none, o: bind, device: {disk}}}}}")
        self._override.write_text("\n".join([*lines, ""]))


ASK_PROMETHEUS = (
    "import urllib.request as u; print(u.urlopen('http://prometheus:9090/api/v1/alerts', timeout=9).read().decode())"
)


def _bytes(text: str) -> float:
    number = text.rstrip("BkKMGi")
    return float(number) * UNITS[text[len(number) :]]


class UsageSampler:
    """Samples the services' usage in a thread until it is left."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.services: dict[str, Usage] = defaultdict(Usage)
        self.total_peak_bytes = 0.0

    def __enter__(self) -> "UsageSampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            with suppress(RuntimeError, subprocess.TimeoutExpired):  # the engine is off
                self._add(self._stack.usage())

    def _add(self, sample: Mapping[str, tuple[float, float]]) -> None:
        self.total_peak_bytes = max(self.total_peak_bytes, sum(memory for memory, _ in sample.values()))
        for service, (memory, cpu) in sample.items():
            usage = self.services[service]
            usage.peak_bytes = max(usage.peak_bytes, memory)
            usage.cpu.append(cpu)
