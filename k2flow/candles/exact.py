"""Exact sums of decimals: Arrow's own wrap around, and numpy's integers have 64 bits."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]
Objects = npt.NDArray[np.object_]
"""Python integers, of any size."""
DIGITS = 38
LIMIT = 10**DIGITS
"""No decimal128 has an unscaled value of this size."""
_HALF = 32
_LOW = (1 << _HALF) - 1
_LIMB = 30
_LOW_LIMB = (1 << _LIMB) - 1
_WORD = (1 << 64) - 1


def unscaled(amounts: pa.Array) -> Ints:
    """Return the unscaled values of n decimals of up to 18 digits without nulls: (n,)."""
    words = np.frombuffer(amounts.buffers()[1], np.int64)
    return words[2 * amounts.offset : 2 * (amounts.offset + len(amounts)) : 2]


def sums(values: Ints, starts: Ints) -> Objects:
    """Return the sum of each group of values: (groups,). A group of up to 2**31 begins at each of `starts`."""
    high = np.add.reduceat(values >> _HALF, starts).astype(object)
    low = np.add.reduceat(values & _LOW, starts).astype(object)
    found: Objects = (high << _HALF) + low
    return found


def sums_of_products(one: Ints, other: Ints, starts: Ints) -> Objects:
    """Return the sum of one x other in each group: (groups,). Each value has up to 18 digits. Groups as in `sums`."""
    one_high, one_low, other_high, other_low = one >> _LIMB, one & _LOW_LIMB, other >> _LIMB, other & _LOW_LIMB
    high = sums(one_high * other_high, starts)
    middle = sums(one_high * other_low + one_low * other_high, starts)
    low = sums(one_low * other_low, starts)
    found: Objects = (high << 2 * _LIMB) + (middle << _LIMB) + low
    return found


def to_decimals(values: Objects, kind: pa.Decimal128Type) -> pa.Array:
    """Return decimals with these unscaled values: (n,). One that is None, or beyond 38 digits, is null."""
    valid = np.array([value is not None and -LIMIT < value < LIMIT for value in values], bool)
    kept = np.where(valid, values, 0)
    words = np.empty((len(values), 2), np.uint64)
    words[:, 0] = kept & _WORD
    words[:, 1] = (kept >> 64) & _WORD
    mask = None if valid.all() else pa.array(valid).buffers()[1]
    return pa.Array.from_buffers(kind, len(values), [mask, pa.py_buffer(words)])


def from_decimals(amounts: pa.Array) -> Objects:
    """Return the unscaled values of n decimals: (n,). That of a null is None."""
    words = np.frombuffer(amounts.buffers()[1], np.int64)
    words = words[2 * amounts.offset : 2 * (amounts.offset + len(amounts))].reshape(-1, 2)
    values: Objects = (words[:, 1].astype(object) << 64) + words[:, 0].view(np.uint64).astype(object)
    if amounts.null_count:
        values[amounts.is_null().to_numpy(zero_copy_only=False)] = None
    return values
