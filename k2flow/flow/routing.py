"""Keys that Bytewax routes to a worker of our choice.

Bytewax sends an item to worker hash(key) % workers, where hash is that of Rust's standard library (SipHash-1-3 with a
zero key over the string's bytes and 0xff). For each worker there is a smallest number whose decimal text hashes to it.
SipHash: Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012.
"""

from functools import cache

_MASK = (1 << 64) - 1


@cache
def worker_key(worker: int, workers: int) -> str:
    """The key of worker `worker` of `workers`."""
    number = 0
    while siphash13(str(number).encode() + b"\xff") % workers != worker:
        number += 1
    return str(number)


def siphash13(data: bytes) -> int:
    """SipHash with one compression and three finalisation rounds and a zero key, 64 bits."""
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
