"""Message ids as fixed-width integer keys, without loss, whole Arrow arrays at a time.

An id has one of five forms, and the form and the words of 64 bits together *are* the id:

    form          words
    UUID              2  canonical: 36 bytes, lower-case hex, dashes in place
    0-15 bytes        2  the bytes, padded with zeros; the last byte of the key is the length
    16-31 bytes       4  the same
    32-63 bytes       8  the same
    longer            8  its BLAKE2b-512: the only form that stands on a hash

A key is (head, rest): `rest` is all words but the first, and `head` is the first, scrambled by a bijection
that `rest` chooses. So nothing is lost, and `head` alone is spread evenly over 64 bits whatever the ids look
like.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.errors import DedupError

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

WORDS = (2, 2, 4, 8, 8)
"""The number of words of each form."""

_UUID, _DIGEST = 0, len(WORDS) - 1
_LONGEST = np.array([8 * words - 1 for words in WORDS[1:-1]])  # bytes of text; one more is for the length
_UUID_BYTES, _DASH = 36, ord("-")
_UUID_DIGITS = ((0, 8), (9, 13), (14, 18), (19, 23), (24, 36))
_U64 = np.dtype("<u8")
_FIRST_BYTES = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # masks of 0-8 bytes
_BLOCK = 4096  # rows at once: larger temporaries go back to the kernel and fault in again, twice as slow


class Keys(NamedTuple):
    """The m ids of one form among n ids.

    rows: (m,), their positions among the n, ascending; head: (m,); rest: (m, words of the form - 1).
    """

    rows: Ints
    head: Words
    rest: Words


def keys(ids: pa.Array | pa.ChunkedArray) -> list[Keys]:
    """The keys of n strings: one `Keys` for each form, in the order of WORDS, empty ones too.

    Equal strings have equal keys of the same form, and different ones have not; above 63 bytes this is as
    sure as that nobody finds two strings with one BLAKE2b-512. Any Arrow string type will do, sliced or not.

    Raises DedupError if an id is null.
    """
    ids = ids.cast(pa.large_string())
    if ids.null_count:
        raise DedupError("A message id is null: reject rows without an id before the deduplication.")
    found: list[list[Keys]] = [[] for _ in WORDS]
    base = 0
    for chunk in ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]:
        for first in range(0, len(chunk), _BLOCK):
            for form, rows, words in _block_words(*_buffers(chunk.slice(first, _BLOCK))):
                found[form].append(Keys(rows + (base + first), *_scramble(words)))
        base += len(chunk)
    return [_joined(parts, words) for parts, words in zip(found, WORDS, strict=True)]


def owner(ids: pa.Array | pa.ChunkedArray, workers: int) -> Ints:
    """Which worker, 0 to workers - 1, owns each of n ids: (n,). Even, and the same in every process and run.

    Raises DedupError if an id is null or workers is less than 1.
    """
    if workers < 1:
        raise DedupError(f"workers is {workers}: it must be 1 or more.")
    owners = np.zeros(len(ids), np.int64)
    for rows, head, _ in keys(ids):
        owners[rows] = owner_of(head, workers)
    return owners


def owner_of(head: Words, workers: int) -> Ints:
    """The worker that owns each of n keys: (n,).

    By the low half of head, since the high bits must still spread the keys that one worker owns.
    Source: D. Lemire, Fast random integer generation in an interval, 2019 (multiply and shift, no division).
    """
    return ((head & np.uint64(0xFFFFFFFF)) * np.uint64(workers) >> np.uint64(32)).astype(np.int64)


def _joined(parts: list[Keys], words: int) -> Keys:
    if not parts:
        return Keys(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty((0, words - 1), np.uint64))
    if len(parts) == 1:
        return parts[0]
    rows, heads, rests = zip(*parts, strict=True)
    return Keys(np.concatenate(rows), np.concatenate(heads), np.concatenate(rests))


def _buffers(ids: pa.LargeStringArray) -> tuple[Bytes, Ints]:
    """The bytes of n > 0 strings, and where in them each begins, with the end of the last: (n + 1,)."""
    _, offsets, data = ids.buffers()
    at = np.frombuffer(offsets, np.int64, len(ids) + 1, ids.offset * 8)
    return np.frombuffer(data or b"", np.uint8)[at[0] : at[-1]], at - at[0]


def _block_words(data: Bytes, at: Ints) -> Iterator[tuple[int, Ints, Words]]:
    """(form, rows, words) for each form met in a block of strings."""
    start, size = at[:-1], np.diff(at)
    rows = np.flatnonzero(size == _UUID_BYTES)
    if len(rows) == len(size):
        text = data.reshape(-1, _UUID_BYTES)
    else:
        text = data[start[rows, None] + np.arange(_UUID_BYTES)]
    words, canonical = _uuid_words(text)
    if not canonical.all():
        rows, words = rows[canonical], words[canonical]
    if len(rows):
        yield _UUID, rows, words
    if len(rows) == len(size):
        return
    forms = 1 + np.searchsorted(_LONGEST, size)
    forms[rows] = _UUID
    padded = np.concatenate([data, np.zeros(8 * max(WORDS), np.uint8)])  # words are read past the last string
    for form in range(_UUID + 1, len(WORDS)):
        rows = np.flatnonzero(forms == form)
        if len(rows):
            make = _digest_words if form == _DIGEST else _padded_words
            yield form, rows, make(padded, start[rows], size[rows], WORDS[form])


def _uuid_words(text: Bytes) -> tuple[Words, Bools]:
    """(n, 36) bytes -> (n, 2) words, and which rows are canonical UUIDs (of others the words mean nothing).

    Eight hex digits at a time, one in each byte of a word, by arithmetic that never carries into the next
    byte.
    """
    hexes = np.concatenate([text[:, a:b] for a, b in _UUID_DIGITS], axis=1).view(_U64)  # (n, 4)
    each = np.uint64(0x0101010101010101)
    is_letter = hexes >> np.uint64(6) & each
    value = (hexes & each * np.uint64(0x0F)) + is_letter * np.uint64(9)
    # Committable back as lower-case hex they must be the same bytes. So would g-o be, as 16-24: no value is
    # above 15.
    above_nine = value + each * np.uint64(6) >> np.uint64(4) & each
    wrong = value + each * np.uint64(ord("0")) + above_nine * np.uint64(ord("a") - ord("0") - 10) ^ hexes
    wrong |= value & each * np.uint64(0xF0)
    dashes = text[:, [8, 13, 18, 23]] == _DASH
    return value[:, ::2] | value[:, 1::2] << np.uint64(4), dashes.all(axis=1) & ~wrong.any(axis=1)


def _padded_words(padded: Bytes, start: Ints, size: Ints, words: int) -> Words:
    """Each string's bytes, then zeros, then its length. (8 * words bytes must follow the last string.)"""
    step = 8 * np.arange(words)
    unaligned = np.ndarray(len(padded) - 7, _U64, padded, strides=(1,))  # the word that begins at each byte
    text: Words = unaligned[start[:, None] + step] & _FIRST_BYTES[np.clip(size[:, None] - step, 0, 8)]
    text[:, -1] |= size.astype(np.uint64) << np.uint64(56)
    return text


def _digest_words(padded: Bytes, start: Ints, size: Ints, words: int) -> Words:
    """Each string's BLAKE2b-512 (J. Aumasson et al., RFC 7693)."""
    ends = (start + size).tolist()
    digests = [blake2b(padded[a:b].data).digest() for a, b in zip(start.tolist(), ends, strict=True)]
    return np.frombuffer(b"".join(digests), _U64).reshape(-1, words)


def _scramble(words: Words) -> tuple[Words, Words]:
    """(n, words) -> head and rest.

    For a given rest, head is a bijection of the first word: an exclusive or with a number made of the rest,
    then the finaliser of SplitMix64 (G. Steele, D. Lea, C. Flood, Fast splittable pseudorandom number
    generators, 2014).
    """
    rest = words[:, 1:]
    head = np.zeros(len(words), np.uint64)
    for column in rest.T:
        head = (head ^ column) * np.uint64(0x9E3779B97F4A7C15)
        head ^= head >> np.uint64(32)
    head ^= words[:, 0]
    head = (head ^ head >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    head = (head ^ head >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return head ^ head >> np.uint64(31), rest
