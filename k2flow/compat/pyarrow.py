"""PyArrow: memory that is kept between batches."""

import ctypes

import pyarrow as pa

from k2flow.compat import require_version

require_version("pyarrow", pa.__version__, (22, 0, 0), (27, 0, 0))

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
ARENAS = 2
MMAP_BYTES, TRIM_BYTES = 32 << 20, 64 << 20  # the most that glibc would raise them to by itself


def keep_freed_memory() -> None:
    """Let all threads share two heaps. By default each thread has its own in glibc, and no other can reuse its memory.

    Arrow shares them too: the first lines of k2flow set its memory pool to the system's. Its default pool (mimalloc)
    returns the memory of each batch to the system and requests it again for the next one. With large batches this costs
    nearly as much system time as the decoding.

    glibc also returns large blocks. It raises this limit when it frees a larger one, but not for blocks that grow, such
    as a batch that is pickled for another process. To send it would take twice the CPU. So the limit is the highest one
    from the start.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc only
        libc.mallopt(M_ARENA_MAX, ARENAS)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
