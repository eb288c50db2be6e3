"""Decimals: from their bytes, from integers and from text. Always exact: no float, nothing is rounded.

A number that the type cannot hold is malformed. The detail has the number and the limit.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal as Number
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import override

from k2flow.avro.columns import Column, FixedWidth, VarBinary
from k2flow.avro.cursor import Block, Ints, Lanes, Mask, read_decimals
from k2flow.avro.plan import Integer, Node
from k2flow.records import Defect

_NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?)0*([0-9]{1,9}))?")
_MAX_SHOWN_BYTES = 64
_MAX_SHOWN_CHARACTERS = 100
_TOO_LARGE = "{0} at byte {at} does not fit into "


@dataclass(frozen=True)
class Decimal(Node):
    """A decimal in bytes, or in a fixed of `size` bytes; more digits than the precision are malformed."""

    size: int | None

    @property
    @override
    def own_size(self) -> int:
        return 1 if self.size is None else self.size

    @override
    def read(self, lanes: Lanes) -> Column:
        start, length = self.read_bytes(lanes)
        values, too_wide = read_decimals(lanes.block, start, length, self.type.precision, self.type.byte_width // 8)
        if too_wide.any():
            shown = _objects(too_wide, lambda i: _show(lanes.block, start[i], length[i], self.type.scale))
            text = _TOO_LARGE + _limit(self.type.precision, self.type.scale)
            lanes.reject(too_wide, Defect.MALFORMED, start, self.label, text, shown)
        return FixedWidth(self.type, values)

    def read_bytes(self, lanes: Lanes) -> tuple[Ints, npt.NDArray[Any]]:
        """Advance over the bytes, and return where they begin and how many there are."""
        if self.size is None:
            return lanes.read_length_prefixed(self.label)
        start = lanes.read_fixed(self.size, self.label, f"{self.size} bytes")
        return start, np.full(len(start), self.size)


@dataclass(frozen=True)
class WideDecimal(Decimal):
    """A decimal of more digits than Arrow's decimals have, returned as text."""

    precision: int
    scale: int

    @override
    def read(self, lanes: Lanes) -> Column:
        start, length = self.read_bytes(lanes)
        digits = (self.precision, self.scale)
        return _WideDecimals(self.type, lanes.block, start, length, self.label, is_text=False, digits=digits)


@dataclass(frozen=True)
class IntegerDecimal(Node):
    """An int or long, returned as a decimal of at most 18 digits."""

    bits: int

    @override
    def read(self, lanes: Lanes) -> Column:
        at, kind = lanes.pos, self.type
        column = Integer(pa.int64(), self.label, self.bits, np.int64).read(lanes)
        numbers = column.values
        limit = 10 ** (kind.precision - kind.scale)
        too_large = (numbers >= limit) | (numbers <= -limit)
        if too_large.any():
            text = _TOO_LARGE + _limit(kind.precision, kind.scale)
            lanes.reject(too_large, Defect.MALFORMED, at, self.label, text, numbers)
            numbers = np.where(too_large, 0, numbers)
        words = np.empty((len(numbers), 2), np.int64)
        words[:, 0] = numbers * 10**kind.scale
        words[:, 1] = words[:, 0] >> 63
        return FixedWidth(kind, words)


@dataclass(frozen=True)
class TextDecimal(Node):
    """A string with a decimal number, returned as a decimal of at most 18 digits."""

    @override
    def read(self, lanes: Lanes) -> Column:
        start, length = lanes.read_length_prefixed(self.label)
        return _TextDecimals(pa.string(), lanes.block, start, length, self.label, is_text=True, decimal=self.type)


@dataclass(frozen=True, slots=True)
class _WideDecimals(VarBinary):
    digits: tuple[int, int] = field(kw_only=True)  # precision and scale

    @override
    def to_arrow(self) -> pa.Array:
        precision, scale = self.digits
        limit = 10**precision
        texts: list[str | None] = [None] * len(self)
        valid = self.start < self.block.padding_start
        if self.valid is not None:
            valid &= self.valid
        for i in np.flatnonzero(valid).tolist():
            number = _number(self.block, self.start[i], self.length[i])
            if -limit < number < limit:
                texts[i] = _plain_text(number, scale)
            else:
                shown = np.array([_show(self.block, self.start[i], self.length[i], scale)], object)
                text = _TOO_LARGE + _limit(precision, scale)
                self.block.add_defect(self.start[i : i + 1], Defect.MALFORMED, self.label, text, shown)
        return pa.array(texts, pa.string())


@dataclass(frozen=True, slots=True)
class _TextDecimals(VarBinary):
    decimal: pa.DataType = field(kw_only=True)

    @override
    def to_arrow(self) -> pa.Array:
        texts = VarBinary.to_arrow(self)
        kind = self.decimal
        # Arrow converts what surely fits, whole columns at once. Anything else is rare and converted one by one.
        usual = pc.match_substring_regex(texts, _usual_text(kind.precision - kind.scale, kind.scale))
        if usual.true_count == len(texts):
            return texts.cast(kind)
        numbers = pc.if_else(usual.fill_null(True), texts, "0").cast(kind)
        words = np.frombuffer(numbers.buffers()[1], np.int64)[: 2 * len(self)].reshape(-1, 2).copy()
        other = ~usual.fill_null(True).to_numpy(zero_copy_only=False) & (self.start < self.block.padding_start)
        for i in np.flatnonzero(other).tolist():
            unscaled = parse_decimal(texts[i].as_py(), kind.precision, kind.scale)
            if isinstance(unscaled, int):
                words[i] = unscaled, unscaled >> 63
            else:
                shown = np.array([_quote(texts[i].as_py())], object)
                self.block.add_defect(self.start[i : i + 1], Defect.MALFORMED, self.label, unscaled, shown)
        buffers = [numbers.buffers()[0], pa.py_buffer(words)]
        return pa.Array.from_buffers(kind, len(self), buffers, numbers.null_count)


def _usual_text(before: int, after: int) -> str:
    """Return the regular expression of numbers with at most `before` and `after` digits around the point."""
    whole = rf"[0-9]{{1,{before}}}" if before else "0"
    return f"^-?{whole}$" if not after else rf"^-?{whole}(\.[0-9]{{1,{after}}})?$"


def parse_decimal(text: str, precision: int, scale: int) -> int | str:
    """Return the unscaled value of a decimal number in ASCII, or what is wrong: a format string for the text.

    Accepted are a sign, digits, a point and an exponent, as Java's BigDecimal prints and reads them.
    """
    found = _NUMBER.fullmatch(text)
    whole, fraction = (found[2], found[3] or "") if found else ("", "")
    if found is None or not whole + fraction:
        return "{0} at byte {at} is not a decimal number"
    exponent = int((found[4] or "") + (found[5] or "0")) - len(fraction)
    digits = (whole + fraction).lstrip("0")
    significant = digits.rstrip("0")
    if not significant:
        return 0
    exponent += len(digits) - len(significant)
    if len(significant) + exponent > precision - scale:
        return _TOO_LARGE + _limit(precision, scale)
    if exponent < -scale:
        return f"{{0}} at byte {{at}} has more than {scale} digits after the point, and is never rounded"
    unscaled: int = int(significant) * 10 ** (exponent + scale)
    return -unscaled if found[1] == "-" else unscaled


def _limit(precision: int, scale: int) -> str:
    limit = "9" * (precision - scale) or "0"
    return f"decimal({precision}, {scale}): the limit is {limit}{'.' if scale else ''}{'9' * scale}"


def _number(block: Block, start: int, length: int) -> int:
    return int.from_bytes(block.data[start : start + length].tobytes(), "big", signed=True)


def _plain_text(unscaled: int, scale: int) -> str:
    return f"{Number(f'{unscaled}E-{scale}'):f}"


def _show(block: Block, start: int, length: int, scale: int) -> str:
    if length > _MAX_SHOWN_BYTES:
        return f"a number of {length} bytes"
    return _plain_text(_number(block, start, length), scale)


def _quote(text: str) -> str:
    if len(text) <= _MAX_SHOWN_CHARACTERS:
        return repr(text)
    return f"{text[:_MAX_SHOWN_CHARACTERS]!r}... ({len(text)} characters)"


def _objects(rows: Mask, value: Callable[[int], object]) -> npt.NDArray[np.object_]:
    found = np.full(len(rows), None, object)
    for i in np.flatnonzero(rows).tolist():
        found[i] = value(i)
    return found
