"""`scripts/fuzz`: the decoder against fastavro and a strict reader, on any number of damaged trades.

Each batch mixes valid and damaged trades: bit flips, cuts at every byte, splices of two records, inserted and removed
bytes, length and count bombs. For every payload, the verdict, the first defect, its position and all values must equal
those of decoding one record at a time. So the fuzzer also finds damaged records that affect their neighbours.
Between the batches it draws writer types for prices, quantities and times, and checks what is refused and each value.
Then `tests.fuzz_pipeline` sends hostile messages through the whole path.
"""

import random
import resource
import time
from collections import Counter
from typing import Annotated

import pyarrow as pa
import typer
from rich.console import Console
from rich.progress import track

from k2flow.avro.decoder import AvroDecoder
from k2flow.records import Defect
from k2flow.trades.schema import trade_schema
from tests.fuzz_pipeline import fuzz
from tests.property.test_avro_decoder import check, damage, trade
from tests.property.test_writer_types import check_types

BATCH = 400
HEADER = 5
BOMBS = (
    b"\xfe\xff\xff\xff\x0f",  # a length of 2^31 - 1
    b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # 2^63 - 1
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # -2^63
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",  # a varint of 11 bytes
    b"\x01\x02",  # a block of -1 items
)


def main(
    payloads: Annotated[int, typer.Option(help="The total number of payloads.")] = 1_000_000,
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed generates the same payloads; random by default.", envvar="TEST_SEED"),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Then send hostile messages through the whole path, at least once.")
    ] = 1.0,
) -> None:
    """Check all payloads, then the whole path; stop at the first wrong verdict or row and show it."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    schema, decoder = trade_schema(), AvroDecoder(trade_schema())
    defects: Counter[str] = Counter()
    accepted = 0
    slowest, began = 0.0, time.monotonic()
    batches = range(-(-payloads // BATCH))
    for number in track(batches, "fuzzing", console=Console(stderr=True)):
        batch = make_batch(rng, number)
        check(schema, batch, HEADER, rng)
        accepted += check_types({"fields": []}, rng)
        started = time.perf_counter()
        decoded = decoder.decode(pa.array(batch, pa.binary()), HEADER)
        slowest = max(slowest, time.perf_counter() - started)
        defects.update(Defect(code).name.lower() for code in decoded.defect.tolist())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"seed {seed}: {defects.total():,} payloads in {time.monotonic() - began:.0f} s, all verdicts correct")
    print(", ".join(f"{name} {count:,}" for name, count in defects.most_common()))
    print(f"{len(batches):,} writer schemas, {accepted:,} of them accepted")
    print(f"slowest batch of {BATCH}: {slowest * 1000:.1f} ms; {peak:.0f} MB peak resident", flush=True)
    fuzz(seed, minutes)


def make_batch(rng: random.Random, number: int) -> list[bytes]:
    """Create a batch: a third valid, the rest damaged by one or more changes, a cut at each byte in turn, or a bomb."""
    valid = [trade(rng) for _ in range(BATCH // 4)]
    batch = list(valid)
    while len(batch) < BATCH:
        payload = rng.choice(valid)
        kind = rng.randrange(8)
        if kind == 0:
            payload = payload[: HEADER + (number + len(batch)) % (len(payload) - HEADER)]
        elif kind == 1:
            at = rng.randrange(HEADER, len(payload))
            payload = payload[:at] + rng.choice(BOMBS) + payload[at + rng.randrange(3) :]
        elif kind < 7:
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                payload = payload[:HEADER] + damage(payload[HEADER:], rng.choice(valid)[HEADER:], rng)
        batch.append(payload)
    rng.shuffle(batch)
    return batch


if __name__ == "__main__":
    typer.run(main)
