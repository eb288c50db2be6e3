"""PyArrow: pickling of record batches, and memory that is kept between batches."""

import copyreg
import ctypes
from collections.abc import Callable

import pyarrow as pa

from k2flow.compat import require_version

require_version("pyarrow", pa.__version__, (22, 0, 0), (27, 0, 0))

M_ARENA_MAX = -8  # malloc.h
ARENAS = 2


def pickle_batches_as_ipc() -> None:
    """Have `pickle` send a RecordBatch as an IPC stream: by default it sends the whole parent of a small slice."""
    copyreg.pickle(pa.RecordBatch, _reduce_batch)


def _reduce_batch(batch: pa.RecordBatch) -> tuple[Callable[[bytes], pa.RecordBatch], tuple[bytes]]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return _restore_batch, (sink.getvalue().to_pybytes(),)


def _restore_batch(data: bytes) -> pa.RecordBatch:
    return pa.ipc.open_stream(data).read_next_batch()


def keep_freed_memory() -> None:
    """Let all threads share two heaps. By default each thread has its own in glibc, and no other can reuse its memory.

    Arrow shares them too: the first lines of k2flow set its memory pool to the system's. Its default pool (mimalloc)
    returns the memory of each batch to the system and requests it again for the next one. With large batches this costs
    nearly as much system time as the decoding.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc only
        libc.mallopt(M_ARENA_MAX, ARENAS)
