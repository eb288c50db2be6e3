"""k2flow itself, as its peers are measured."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from bench.measure import FlowProcess, Usage, run
from bench.peers.lake import keys_of, wait_for_first_commit
from bench.peers.messages import Topic
from bench.peers.peer import COMMIT_SECONDS, FIRST_COMMIT_SECONDS, Peer
from k2flow.config.settings import load_settings
from k2flow.exchange import Exchange, exchange_names
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.layers import LAYERS


class Flow(Peer):
    """All four layers, by one process."""

    name = "k2flow"
    omits = "nothing: it reads also the messages that Avro cannot decode"

    def __init__(self, topic: Topic, folder: Path, exchange: Exchange) -> None:
        super().__init__(topic, folder)
        self._exchange = exchange

    def tables(self) -> Mapping[str, str]:
        return {layer.name: layer.table(self._exchange.name) for layer in LAYERS}

    def measure(self, lake: Path) -> Usage:
        command = [sys.executable, "-m", "bytewax.run", f"flows.{self._exchange.name}"]
        caught_up = run(command, self._settings(lake))
        return caught_up.minus(run(command, self._settings(lake)))

    def survive_kill(self, lake: Path) -> None:
        flow = FlowProcess(self._exchange.name, self._settings(lake))
        try:
            wait_for_first_commit(lake, FIRST_COMMIT_SECONDS)
        finally:
            flow.kill()
        again = FlowProcess(self._exchange.name, self._settings(lake))
        try:
            again.check()
        finally:
            again.kill()

    def keys(self, lake: Path, table: str) -> pa.ChunkedArray:
        catalog = open_catalog(load_settings(exchange_names()).model_copy(update={"home": lake}))
        return keys_of(load_table(catalog, table))

    def _settings(self, lake: Path) -> Mapping[str, str]:
        return {
            "K2FLOW_HOME": str(lake),
            "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": self.topic.bootstrap,
            f"K2FLOW_{self._exchange.name.upper()}_TRIGGER_SECONDS": str(COMMIT_SECONDS),
            "K2FLOW_UNTIL_CAUGHT_UP": "1",
        }
