"""Speed of decoding: k2flow's decoder, a batch at a time, compared with fastavro, a record at a time."""

from collections.abc import Sequence
from io import BytesIO
from statistics import median
from typing import Annotated, Any

import fastavro
import pyarrow as pa
import typer
from matplotlib.axes import Axes

from bench.lake import message_batches
from bench.measure import Stopwatch
from bench.report import BenchResult, report
from k2flow.avro.decoder import AvroDecoder
from k2flow.sandbox.producer import ProduceOptions
from k2flow.trades.messages import HEADER_BYTES
from k2flow.trades.schema import trade_schema

SAMPLE = 10_000


def decode(
    records: Annotated[int, typer.Option(help="Valid TradeV2 records, decoded as one batch.")] = 200_000,
    runs: Annotated[int, typer.Option(help="Counted runs of both, alternating.")] = 3,
) -> None:
    """Measure CPU per record of k2flow's decoder, into Arrow columns, and of fastavro, into Python objects.

    fastavro's records are dropped at once, which saves it the cost of keeping them. Before the runs both decode a
    sample, as a warm-up; it is an error if a value differs.
    """
    options = ProduceOptions(count=records, seed=1)
    payloads = pa.concat_arrays([one.rows.column("value") for one in message_batches(options, records)])
    values = payloads.to_pylist()
    decoder = AvroDecoder(trade_schema())
    schema = fastavro.parse_schema(trade_schema())
    check_equal(decoder, payloads.slice(0, SAMPLE), [read_one(value, schema) for value in values[:SAMPLE]])
    ours, theirs = [], []
    for _ in range(runs):
        with Stopwatch() as watch:
            decoder.decode(payloads, HEADER_BYTES)
        ours.append(watch.cpu / records * 1e6)
        with Stopwatch() as watch:
            for value in values:
                read_one(value, schema)
        theirs.append(watch.cpu / records * 1e6)
    _report(records, runs, ours, theirs)


def read_one(value: bytes, schema: Any) -> Any:
    """Decode the record of one message with fastavro."""
    stream = BytesIO(value)
    stream.seek(HEADER_BYTES)
    return fastavro.schemaless_reader(stream, schema, None)


def check_equal(decoder: AvroDecoder, payloads: pa.BinaryArray, wanted: Sequence[Any]) -> None:
    """Raise ValueError if a record has a defect or differs from the wanted one."""
    decoded = decoder.decode(payloads, HEADER_BYTES)
    for i, (found, record) in enumerate(zip(decoded.batch.to_pylist(maps_as_pydicts="strict"), wanted, strict=True)):
        if decoded.defect[i] or found != record:
            raise ValueError(f"record {i} is {found} ({decoded.detail(i) or 'no defect'}), by fastavro {record}")


def _report(records: int, runs: int, ours: Sequence[float], theirs: Sequence[float]) -> None:
    ratios = [slow / fast for fast, slow in zip(ours, theirs, strict=True)]
    measured = {"k2flow, us CPU/record": ours, "fastavro, us CPU/record": theirs, "fastavro / k2flow": ratios}
    rows = [[name, f"{median(v):.2f}", f"{min(v):.2f}-{max(v):.2f}"] for name, v in measured.items()]
    figures = {
        "records": records,
        "runs": runs,
        "k2flow_cpu_us_per_record": _spread(ours),
        "fastavro_cpu_us_per_record": _spread(theirs),
        "ratio": _spread(ratios),
        "fastavro_version": fastavro.__version__,
    }

    def plot(axes: Axes) -> None:
        for name, values in (("k2flow", ours), ("fastavro", theirs)):
            middle = median(values)
            ends = [[middle - min(values)], [max(values) - middle]]
            axes.bar_label(axes.bar([name], [middle], yerr=ends, capsize=6), fmt="%.2f", padding=2)
        axes.margins(y=0.12)
        axes.set(xlabel="decoder", ylabel="us of CPU per record")

    columns = ["", "median", "min-max"]
    notes = [f"fastavro {fastavro.__version__}; the ratio is computed for each run."]
    report(BenchResult("decode", columns, rows, figures, plot, notes))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(f(values), 3) for name, f in (("median", median), ("min", min), ("max", max))}
