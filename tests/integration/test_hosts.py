"""One exchange on two hosts in a private network; one host is cut off for a while."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from k2flow.errors import CatalogError
from tests.integration.harness import ROOT, Lake, ledger_offsets
from tests.surroundings.hosts import ROUTER, Network, unavailable_reason

HOSTS = ("host-0", "host-1")
KAFKA_PORT, PEER_PORT = "9092", "2101"
QUICKLY = {"K2FLOW_PEER_SECONDS": "2", "K2FLOW_START_SECONDS": "15", "K2FLOW_BINANCE_TRIGGER_SECONDS": "0.5"}


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if reason := unavailable_reason():
        pytest.skip(reason)
    with Network(HOSTS) as made:
        yield made


@pytest.fixture
def lake(network: Network, tmp_path: Path) -> Iterator[Lake]:
    """A broker on the hub, and a folder for the tables that all hosts see, like a shared disk."""
    address, topic = network.address(ROUTER), "binance"
    command = [sys.executable, "-m", "tests.surroundings.hub_kafka", str(tmp_path / "kafka"), KAFKA_PORT, address]
    line = network.command(ROUTER, *command, topic, "4")
    with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as broker:
        assert broker.stdout is not None
        assert broker.stdout.readline() == b"ready\n"
        yield Lake("binance", topic, tmp_path / "lake", f"{address}:{KAFKA_PORT}")
    assert broker.returncode == 0


class Cluster:
    """`k2flow run` on each host, which takes its number from its name."""

    def __init__(self, network: Network, lake: Lake, folder: Path) -> None:
        addresses = ";".join(f"{network.address(host)}:{PEER_PORT}" for host in HOSTS)
        environment = lake.environment(K2FLOW_CLUSTER=addresses, **QUICKLY)
        command = [sys.executable, "-m", "k2flow", "run", "binance"]
        self._logs = {host: (folder / host).open("wb") for host in HOSTS}
        self._processes = {host: network.start(host, command, environment, ROOT, self._logs[host]) for host in HOSTS}

    def log(self, host: str) -> str:
        return Path(self._logs[host].name).read_text()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            for host, process in self._processes.items():
                assert process.poll() is None, self.log(host)
                assert time.monotonic() < deadline, "\n".join(f"{each}: {self.log(each)}" for each in HOSTS)
            time.sleep(0.2)

    def stop(self) -> list[int]:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        return [process.wait(90) for process in self._processes.values()]

    def close(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        for log in self._logs.values():
            log.close()


def test_cluster_restarts_together_when_a_lost_host_returns(network: Network, lake: Lake, tmp_path: Path) -> None:
    """The other host does not wait forever. Once the lost one is back, both restart where the tables end."""
    on_hub(network, lake, "produce", "binance", "--count", "4000", "--bad", "0.05", "--duplicates", "0.05")
    cluster = Cluster(network, lake, tmp_path)
    try:
        cluster.wait_for(lambda: committed(lake) == 4_000)
        network.cut(HOSTS[1])
        on_hub(network, lake, "produce", "binance", "--count", "2000", "--bad", "0.05", "--seed", "1")
        for host in HOSTS:
            cluster.wait_for(lambda host=host: "starting binance again" in cluster.log(host))  # type: ignore[misc]
        assert committed(lake) < 6_000  # the other host owns half of the partitions
        network.reconnect(HOSTS[1])
        cluster.wait_for(lambda: committed(lake) == 6_000, 120)
        assert cluster.stop() == [0, 0], [cluster.log(host) for host in HOSTS]
    finally:
        cluster.close()
    assert "another process of this flow is lost" in cluster.log(HOSTS[0])
    assert json.loads(on_hub(network, lake, "audit", "binance", "--json"))["verdict"] == "holds"


def on_hub(network: Network, lake: Lake, *arguments: str) -> str:
    """Run a command of k2flow on the hub and return its output."""
    line = network.command(ROUTER, sys.executable, "-m", "k2flow", *arguments)
    done = subprocess.run(line, cwd=ROOT, env=lake.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def committed(lake: Lake) -> int:
    """Return the number of messages that all four tables hold."""
    try:
        return min(sum(partitions.values()) for partitions in ledger_offsets(lake).values())
    except CatalogError:
        return 0
