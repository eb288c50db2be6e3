"""The key column of a batch, and its ids as fixed-width integer keys, whole Arrow arrays at a time.

Encoding is lossless. An id has one of five forms, and its form and 64-bit words together identify it:

    form          words
    UUID              2  canonical: 36 bytes, lower-case hex, dashes in place
    0-15 bytes        2  the bytes, padded with zeros; the last byte of the key is the length
    16-31 bytes       4  the same
    32-63 bytes       8  the same
    longer            8  its BLAKE2b-512: the only form that relies on a hash

A key is (head, rest). `rest` holds all words but the first. `head` is the first word, scrambled by a bijection that
`rest` selects. So no information is lost, and `head` alone is uniform over 64 bits for any set of ids. The high half of
`head` says which worker owns the key. So the keys of one worker are adjacent in any sorted run, of any writer.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.errors import DedupError

Ids: TypeAlias = pa.Array | pa.ChunkedArray
Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
WORDS = (2, 2, 4, 8, 8)  # the number of words of each form
_UUID, _DIGEST = 0, len(WORDS) - 1
_MAX_BYTES = np.array([8 * words - 1 for words in WORDS[1:-1]])  # bytes of text; one more byte holds the length
_UUID_BYTES, _DASH = 36, ord("-")
_DASHES = (8, 13, 18, 23)
EACH_BYTE = np.uint64(0x0101010101010101)
_U64 = np.dtype("<u8")
_BYTE_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # the low 0-8 bytes of a word
_HALF = np.uint64(32)
_BLOCK_ROWS = 4096  # larger temporaries are returned to the kernel and fault in again, which is twice as slow


class Share(NamedTuple):
    """The heads that one worker owns: those whose high half is at least `first` and less than `end`."""

    first: int
    end: int

    def cells(self, head: Words, count: int) -> Ints:
        """Divide the share into `count` cells of equal size, and return the cell of each of n heads: (n,).

        Ascending heads have ascending cells. `count` is less than 2**32.
        """
        per_head = np.uint64((count << 32) // (self.end - self.first))
        return (((head >> _HALF) - np.uint64(self.first)) * per_head >> _HALF).view(np.int64)

    def holds(self, head: Words) -> Bools:
        """Return which of n heads are in the share: (n,)."""
        high = head >> _HALF
        return (high >= np.uint64(self.first)) & (high < np.uint64(self.end))

    def meets(self, other: "Share") -> bool:
        """Return whether a head is in both shares."""
        return self.first < other.end and other.first < self.end


class EncodedKeys(NamedTuple):
    """The keys of the m ids that have one form, out of n ids.

    rows: (m,), their positions among the n ids, ascending; head: (m,); rest: (m, words of the form - 1).
    """

    rows: Ints
    head: Words
    rest: Words


def key_column(rows: pa.RecordBatch, columns: tuple[str, ...]) -> pa.StringArray:
    """Form one id per row from string columns: two ids are equal only if all columns of their rows are.

    A single column is returned as it is, without a copy. Of several columns, each but the last is prefixed with its
    length in bytes: ("a", "bc") becomes "1:abc", ("ab", "c") becomes "2:abc". A null in any column gives a null id.
    Raises DedupError if there are no columns, or one does not hold strings.
    """
    if not columns:
        raise DedupError("the deduplication key has no columns: name at least one")
    for name in columns:
        if not pa.types.is_string(rows.schema.field(name).type):
            raise DedupError(f"deduplication key column {name} is {rows.schema.field(name).type}: use string columns")
    *prefixed, last = (rows.column(name) for name in columns)
    if not prefixed:
        return last
    parts = [part for values in prefixed for part in (pc.binary_length(values).cast(pa.string()), ":", values)]
    return pc.binary_join_element_wise(*parts, last, "")


def encode_keys(ids: Ids) -> list[EncodedKeys]:
    """Encode n strings: one `EncodedKeys` per form, in the order of WORDS, including empty ones.

    Equal strings have equal keys of the same form, different strings have different keys. Above 63 bytes this holds
    unless two strings have the same BLAKE2b-512. Accepts any Arrow string type, sliced or not. Raises DedupError if an
    id is null.
    """
    ids = ids.cast(pa.large_string())
    if ids.null_count:
        raise DedupError("a deduplication key is null: reject rows without a key before deduplication")
    found: list[list[EncodedKeys]] = [[] for _ in WORDS]
    base = 0
    for chunk in ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]:
        for first in range(0, len(chunk), _BLOCK_ROWS):
            for form, rows, words in _encode_block(*_buffers(chunk.slice(first, _BLOCK_ROWS))):
                head, rest = _scramble(words)
                found[form].append(EncodedKeys(rows + (base + first), head >> _HALF | head << _HALF, rest))
        base += len(chunk)
    return [_concat(parts, words) for parts, words in zip(found, WORDS, strict=True)]


def owners_of(ids: Ids, workers: int) -> Ints:
    """Return the worker, 0 to workers - 1, that owns each of n ids: (n,).

    Ids are spread evenly over the workers. The result is the same in every process and run. Raises DedupError if an id
    is null or workers is less than 1.
    """
    if workers < 1:
        raise DedupError(f"workers is {workers}: use at least 1")
    owners = np.zeros(len(ids), np.int64)
    for rows, head, _ in encode_keys(ids):
        owners[rows] = owners_of_heads(head, workers)
    return owners


def share_of(worker: int, workers: int) -> Share:
    """Return the heads that worker number `worker` of `workers` owns."""
    return Share(-(-(worker << 32) // workers), -(-((worker + 1) << 32) // workers))


def owners_of_heads(head: Words, workers: int) -> Ints:
    """Return the worker that owns each of n keys: (n,). Worker w owns `share_of(w, workers)`.

    Source: D. Lemire, Fast random integer generation in an interval, 2019 (multiply and shift, no division).
    """
    return ((head >> _HALF) * np.uint64(workers) >> _HALF).astype(np.int64)


def _concat(parts: list[EncodedKeys], words: int) -> EncodedKeys:
    if not parts:
        return EncodedKeys(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty((0, words - 1), np.uint64))
    if len(parts) == 1:
        return parts[0]
    rows, heads, rests = zip(*parts, strict=True)
    return EncodedKeys(np.concatenate(rows), np.concatenate(heads), np.concatenate(rests))


def _buffers(ids: pa.LargeStringArray) -> tuple[Bytes, Ints]:
    """Return the bytes of n > 0 strings, and the n + 1 offsets of the strings in them."""
    _, offsets, data = ids.buffers()
    at = np.frombuffer(offsets, np.int64, len(ids) + 1, ids.offset * 8)
    return np.frombuffer(data or b"", np.uint8)[at[0] : at[-1]], at - at[0]


def _encode_block(data: Bytes, at: Ints) -> Iterator[tuple[int, Ints, Words]]:
    """Yield (form, rows, words) for each form in a block of strings."""
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
    forms = 1 + np.searchsorted(_MAX_BYTES, size)
    forms[rows] = _UUID
    padded = np.concatenate([data, np.zeros(8 * max(WORDS), np.uint8)])  # room to read words past the last string
    for form in range(_UUID + 1, len(WORDS)):
        rows = np.flatnonzero(forms == form)
        if len(rows):
            make = _digest_words if form == _DIGEST else _padded_words
            yield form, rows, make(padded, start[rows], size[rows], WORDS[form])


def _uuid_words(text: Bytes) -> tuple[Words, Bools]:
    """Convert (n, 36) bytes to (n, 2) words, and return which rows are canonical UUIDs; other words are arbitrary.

    Converts eight hex digits at a time, one in each byte of a word. The arithmetic never carries between bytes.
    Works on columns, which are much faster than rows of a few words.
    """
    hexes = np.empty((4, len(text)), _U64)
    halves = hexes.view("<u4").reshape(4, -1, 2)
    hexes[0], hexes[3] = _column(text, 0, "<u8"), _column(text, 28, "<u8")
    for column, (first, second) in zip((1, 2), ((9, 14), (19, 24)), strict=True):
        halves[column, :, 0], halves[column, :, 1] = _column(text, first, "<u4"), _column(text, second, "<u4")
    is_letter = hexes >> np.uint64(6)
    is_letter &= EACH_BYTE
    value = hexes & EACH_BYTE * np.uint64(0x0F)
    value += is_letter * np.uint64(9)
    # Formatted back as lower-case hex, the values must give the same bytes. The letters g-o would too, as 16-24, so
    # values above 15 are rejected as well.
    wrong = value + EACH_BYTE * np.uint64(6)  # above 9: the higher digit is 1
    wrong >>= np.uint64(4)
    wrong &= EACH_BYTE
    wrong *= np.uint64(ord("a") - ord("0") - 10)
    wrong += value
    wrong += EACH_BYTE * np.uint64(ord("0"))
    wrong ^= hexes
    wrong |= value & EACH_BYTE * np.uint64(0xF0)
    canonical = np.bitwise_or.reduce(wrong) == 0
    for place in _DASHES:
        canonical &= text[:, place] == _DASH
    return (value[::2] | value[1::2] << np.uint64(4)).T, canonical


def _column(text: Bytes, first: int, kind: str) -> npt.NDArray[Any]:
    """Return the word that begins at byte `first` of each row of text: (n,), not aligned."""
    return text[:, first : first + np.dtype(kind).itemsize].view(kind)[:, 0]


def _padded_words(padded: Bytes, start: Ints, size: Ints, words: int) -> Words:
    """Pack each string's bytes, zeros and its length; 8 * words bytes must follow the last string."""
    step = 8 * np.arange(words)
    unaligned = np.ndarray(len(padded) - 7, _U64, padded, strides=(1,))  # the word that begins at each byte
    text: Words = unaligned[start[:, None] + step] & _BYTE_MASKS[np.clip(size[:, None] - step, 0, 8)]
    text[:, -1] |= size.astype(np.uint64) << np.uint64(56)
    return text


def _digest_words(padded: Bytes, start: Ints, size: Ints, words: int) -> Words:
    """Hash each string with BLAKE2b-512 (J. Aumasson et al., RFC 7693)."""
    ends = (start + size).tolist()
    digests = [blake2b(padded[a:b].data).digest() for a, b in zip(start.tolist(), ends, strict=True)]
    return np.frombuffer(b"".join(digests), _U64).reshape(-1, words)


def _scramble(words: Words) -> tuple[Words, Words]:
    """Split (n, words) into head and rest.

    For a given rest, head is a bijection of the first word: an exclusive or with a number derived from rest, then the
    finaliser of SplitMix64 (G. Steele, D. Lea, C. Flood, Fast splittable pseudorandom number generators, 2014).
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
