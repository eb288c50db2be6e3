"""What is asked of each peer, and how a peer in a Java process is measured and killed."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from bench.measure import Usage
from bench.peers.java import JavaProcess
from bench.peers.lake import Difference, difference, keys_of, load, wait_for_first_commit
from bench.peers.messages import Topic

COMMIT_SECONDS = 10
"""The time between commits, for every peer: the trigger of the flow of Binance."""
FIRST_COMMIT_SECONDS = 180.0


class Peer(ABC):
    """A program that writes a topic into Iceberg tables."""

    name: str
    omits: str
    """What it does not do."""

    def __init__(self, topic: Topic, folder: Path) -> None:
        self.topic = topic
        self.folder = folder / self.name
        self.folder.mkdir()

    @abstractmethod
    def tables(self) -> Mapping[str, str]:
        """Return the name of the table of each layer that it writes."""

    @abstractmethod
    def measure(self, lake: Path) -> Usage:
        """Write the whole topic into the folder `lake`; return what that took, without start-up."""

    @abstractmethod
    def survive_kill(self, lake: Path) -> None:
        """Write the whole topic, with a kill at the first commit and a restart."""

    def keys(self, lake: Path, table: str) -> pa.ChunkedArray:
        """Return the key of each row of a table."""
        return keys_of(load(lake, table))

    def verdict(self, lake: Path) -> tuple[dict[str, int], Difference]:
        """Return the rows of each layer, and how all of them together differ from the messages."""
        found = {layer: self.keys(lake, table) for layer, table in self.tables().items()}
        differences = [difference(keys, self.topic.keys[layer]) for layer, keys in found.items()]
        return {layer: len(keys) for layer, keys in found.items()}, sum(differences, Difference(0, 0))


class JavaPeer(Peer):
    """A peer in one Java process, which stays warm between two runs."""

    @abstractmethod
    def start(self) -> JavaProcess:
        """Start the process."""

    @abstractmethod
    def answers(self) -> bool:
        """Return whether the process takes requests."""

    @abstractmethod
    def create_tables(self, lake: Path) -> None:
        """Create empty tables."""

    @abstractmethod
    def begin(self, lake: Path) -> None:
        """Begin to write the topic, or continue after a kill."""

    @abstractmethod
    def finish(self, lake: Path) -> None:
        """Wait until all that it will write is committed."""

    def measure(self, lake: Path) -> Usage:
        with self._running() as process:
            self._write(lake.with_name("warm-up"))
            began, cpu = time.perf_counter(), process.cpu()
            self._write(lake)
            return Usage(time.perf_counter() - began, process.cpu() - cpu, process.peak())

    def survive_kill(self, lake: Path) -> None:
        self.create_tables(lake)
        with self._running() as process:
            self.begin(lake)
            wait_for_first_commit(lake, FIRST_COMMIT_SECONDS)
            process.kill()
        with self._running():
            self.begin(lake)
            self.finish(lake)

    def _write(self, lake: Path) -> None:
        self.create_tables(lake)
        self.begin(lake)
        self.finish(lake)

    @contextmanager
    def _running(self) -> Iterator[JavaProcess]:
        process = self.start()
        try:
            process.wait_until(self.answers)
            yield process
        finally:
            process.stop()
