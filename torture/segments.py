"""The files of a stopped or running broker: where a batch of messages is, and how one of its bits flips."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PREFIX = struct.Struct(">qi")  # base offset, and the length of the rest of the batch
HEADER_BYTES = 61  # of a batch of format 2; its records follow


@dataclass(frozen=True)
class LogBatch:
    """One batch of messages in a segment file, `size` bytes at `position`."""

    segment: Path
    position: int
    size: int
    first_offset: int


def batches(partition: Path) -> Iterator[LogBatch]:
    """Return the batches of a partition's folder in the order of their offsets."""
    for segment in sorted(partition.glob("*.log")):
        data, position = segment.read_bytes(), 0
        while position + HEADER_BYTES <= len(data):
            offset, length = PREFIX.unpack_from(data, position)
            if length <= 0:
                break  # the rest is allocated and not yet written
            yield LogBatch(segment, position, PREFIX.size + length, offset)
            position += PREFIX.size + length


@contextmanager
def flipped_bit(batch: LogBatch, pick: float) -> Iterator[None]:
    """Flip one bit among the records of a batch, and flip it back at the end. `pick`, 0 to 1, chooses it."""
    bit = int(pick * (batch.size - HEADER_BYTES) * 8)
    position = batch.position + HEADER_BYTES + bit // 8
    _flip(batch.segment, position, bit % 8)
    try:
        yield
    finally:
        _flip(batch.segment, position, bit % 8)


def _flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))
