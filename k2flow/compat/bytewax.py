"""Bytewax: its command line, and the hash that routes items to workers.

bytewax.run gives a flow no hook before or after the run, and its epoch is 10 s by default. So a flow's module, which
bytewax.run imports, replaces the `cli_main` that bytewax.run is about to call.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from importlib.metadata import version
from typing import Any

from k2flow.compat import require_version

require_version("bytewax", version("bytewax"), (0, 21, 1), (0, 21, 2))

WEB_SERVER = "BYTEWAX_DATAFLOW_API_ENABLED"
"""The environment variable that makes Bytewax open port 3030 on every interface."""
PANIC = "PanicException"
"""The class of an error in Bytewax's own code, such as a lost connection to another process. It cannot be imported."""
CliMain = Callable[..., None]
_MASK = (1 << 64) - 1


def replace_cli_main(run: Callable[[CliMain, timedelta | None, dict[str, Any]], None]) -> None:
    """If bytewax.run is this process's main program, have it call `run` instead of its `cli_main`.

    `run` takes Bytewax's `cli_main`, the epoch interval of the command line (None without one), and the arguments for
    `cli_main`, in which bytewax.run has replaced a missing interval by 10 s.
    """
    main = sys.modules["__main__"]
    if getattr(getattr(main, "__spec__", None), "name", None) != "bytewax.run":
        return
    cli_main: CliMain = main.cli_main
    interval: timedelta | None = getattr(main, "snapshot_interval", None)

    def replacement(**kwargs: Any) -> None:
        run(cli_main, interval, kwargs)

    main.cli_main = replacement  # type: ignore[attr-defined]


@cache
def worker_key(worker: int, workers: int) -> str:
    """Return a key that Bytewax routes to worker `worker` of `workers`.

    Bytewax sends an item to worker hash(key) % workers. The hash is that of Rust's standard library: SipHash-1-3 with a
    zero key, over the string's bytes and 0xff. The key is the smallest number whose decimal text hashes to the worker.
    """
    number = 0
    while siphash13(str(number).encode() + b"\xff") % workers != worker:
        number += 1
    return str(number)


def siphash13(data: bytes) -> int:
    """Return SipHash-1-3 with a zero key, 64 bits: Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012."""
    v = [0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573]
    padded = data + b"\0" * (7 - len(data) % 8) + bytes([len(data) & 0xFF])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= word
        _round(v)
        v[0] ^= word
    v[2] ^= 0xFF
    for _ in range(3):
        _round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def _round(v: list[int]) -> None:
    v[0] = (v[0] + v[1]) & _MASK
    v[1] = _rotate(v[1], 13) ^ v[0]
    v[0] = _rotate(v[0], 32)
    v[2] = (v[2] + v[3]) & _MASK
    v[3] = _rotate(v[3], 16) ^ v[2]
    v[0] = (v[0] + v[3]) & _MASK
    v[3] = _rotate(v[3], 21) ^ v[0]
    v[2] = (v[2] + v[1]) & _MASK
    v[1] = _rotate(v[1], 17) ^ v[2]
    v[2] = _rotate(v[2], 32)


def _rotate(word: int, by: int) -> int:
    return (word << by | word >> (64 - by)) & _MASK
