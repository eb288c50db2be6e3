"""CPU, memory and the end of a kill: k2flow and its peers, one after the other, on the same messages."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes

from bench.measure import Usage
from bench.peers.connect import KafkaConnect
from bench.peers.flink import Flink
from bench.peers.flow import Flow
from bench.peers.lake import Difference
from bench.peers.messages import PARTITIONS, produce_topics
from bench.peers.peer import Peer
from bench.report import BenchResult, report
from k2flow.exchange import find_exchange
from k2flow.layers import LAYERS
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import ProduceOptions
from k2flow.trades.schema import trade_schema
from tests.surroundings.apicurio import Apicurio

EXCHANGE = "binance"
DECODABLE = "decodable"
VALID = "valid"
PEERS = ("k2flow", "flink", "connect")


@dataclass(frozen=True)
class PeerResult:
    """What one peer did: its use, its rows, and what a kill did to them."""

    peer: Peer
    used: Usage
    rows: dict[str, int]
    without_kill: Difference
    after_kill: Difference

    @property
    def cpu_us(self) -> float:
        return self.used.cpu / self.peer.topic.messages * 1e6


def peers(
    messages: Annotated[int, typer.Option(help="Messages, 2 % of them bad, 3 % duplicates.")] = 1_000_000,
    only: Annotated[list[str] | None, typer.Option(help=f"Only this one, repeatable: {', '.join(PEERS)}.")] = None,
) -> None:
    """Write the same messages into Iceberg tables by k2flow, Flink and Kafka Connect, in turn; kill each once.

    The first run downloads 700 MB. The JVMs are warm. Each peer commits every 10 s.
    """
    unknown = {*(only or ())} - {*PEERS}
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(PEERS)}")
    exchange = find_exchange(EXCHANGE)
    names = (exchange.settings.topic, DECODABLE, VALID)
    with tempfile.TemporaryDirectory() as name, LocalKafka(Path(name) / "kafka", free_port()) as kafka:
        folder = Path(name)
        kafka.start(dict.fromkeys(names, PARTITIONS))
        (folder / "registry").mkdir()
        with Apicurio(folder / "registry") as registry:
            schema_id = registry.register(f"{DECODABLE}-value", trade_schema())
            options = ProduceOptions(
                count=messages, bad=0.02, duplicates=0.03, seed=1, start=datetime.now(UTC), schema_id=schema_id
            )
            every, decodable, valid = produce_topics(exchange, kafka.bootstrap, names, options)
            made = {
                "k2flow": lambda: Flow(every, folder, exchange),
                "flink": lambda: Flink(decodable, folder, exchange, registry.url),
                "connect": lambda: KafkaConnect(valid, folder, exchange, registry.native_url),
            }
            results = [_measure(make()) for each, make in made.items() if not only or each in only]
    _report(messages, results)


def _measure(peer: Peer) -> PeerResult:
    typer.echo(f"--- {peer.name}: {peer.topic.messages:,} messages", err=True)
    lake, killed = peer.folder / "measured", peer.folder / "killed"
    used = peer.measure(lake)
    peer.survive_kill(killed)
    rows, without_kill = peer.verdict(lake)
    result = PeerResult(peer, used, rows, without_kill, peer.verdict(killed)[1])
    typer.echo(
        f"{result.cpu_us:.1f} us CPU/message, {rows}, without a kill {without_kill}, with {result.after_kill}", err=True
    )
    return result


def _report(messages: int, results: Sequence[PeerResult]) -> None:
    rows = [
        [
            result.peer.name,
            f"{result.peer.topic.messages:,}",
            f"{result.cpu_us:.1f}",
            f"{result.used.peak / 1e6:,.0f}",
            *(f"{result.rows[layer.name]:,}" if layer.name in result.rows else "-" for layer in LAYERS),
            *(f"{count:,}" for count in (result.after_kill.lost, result.after_kill.duplicated)),
        ]
        for result in results
    ]
    figures = {
        result.peer.name: {
            "messages": result.peer.topic.messages,
            "cpu_us_per_message": round(result.cpu_us, 2),
            "seconds": round(result.used.wall, 1),
            "peak_bytes": result.used.peak,
            "rows": result.rows,
            "wrong_without_kill": [result.without_kill.lost, result.without_kill.duplicated],
            "lost": result.after_kill.lost,
            "duplicated": result.after_kill.duplicated,
        }
        for result in results
    }

    def plot(axes: Axes) -> None:
        axes.bar([result.peer.name for result in results], [result.cpu_us for result in results])
        axes.set_ylabel("us of CPU per message")

    columns = ["", "messages", "us CPU/message", "peak MB", *(layer.name for layer in LAYERS)]
    columns += ["lost by a kill", "duplicated by it"]
    notes = [f"{result.peer.name}: {result.peer.omits}." for result in results]
    report(BenchResult("peers", columns, rows, {"messages": messages, "peers": figures}, plot, notes))
