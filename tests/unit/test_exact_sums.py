"""Sums of decimals are exact, up to the largest and smallest values of their types."""

from decimal import Decimal

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from k2flow.candles.exact import LIMIT, from_decimals, sums, sums_of_products, to_decimals, unscaled
from tests.candles import EXACT

LARGEST = 10**18 - 1
VALUES = st.lists(st.one_of(st.integers(-LARGEST, LARGEST), st.sampled_from([0, 1, LARGEST, -LARGEST])), min_size=1)
AMOUNT, TOTAL = pa.decimal128(18, 8), pa.decimal128(38, 16)


@given(VALUES, st.data())
def test_sums_of_groups(values: list[int], data: st.DataObject) -> None:
    """Of values, and of their products with others, in groups that begin anywhere."""
    others = data.draw(st.permutations(values))
    starts = sorted({0, *data.draw(st.lists(st.integers(0, len(values) - 1)))})
    groups = [slice(start, end) for start, end in zip(starts, [*starts[1:], len(values)], strict=True)]
    one, other, at = np.array(values, np.int64), np.array(others, np.int64), np.array(starts)
    assert sums(one, at).tolist() == [sum(values[group]) for group in groups]
    products = [a * b for a, b in zip(values, others, strict=True)]
    assert sums_of_products(one, other, at).tolist() == [sum(products[group]) for group in groups]


@given(st.lists(st.one_of(st.none(), st.integers(1 - LIMIT, LIMIT - 1))), st.integers(0, 3))
def test_decimals_keep_their_values(values: list[int | None], skipped: int) -> None:
    """To Arrow and back, also as a slice."""
    amounts = to_decimals(np.array([*[1] * skipped, *values], object), TOTAL)
    expected = [None if value is None else EXACT.scaleb(Decimal(value), -16) for value in values]
    part = amounts.slice(skipped)
    part.validate(full=True)
    assert part.to_pylist() == expected
    assert from_decimals(part).tolist() == values


def test_a_value_with_too_many_digits_is_null() -> None:
    amounts = to_decimals(np.array([LIMIT, -LIMIT, LIMIT - 1, 2**200], object), TOTAL)
    assert amounts.is_null().to_pylist() == [True, True, False, True]


@given(VALUES, st.integers(0, 3))
def test_unscaled_values(values: list[int], skipped: int) -> None:
    amounts = pa.array([Decimal(value).scaleb(-8) for value in values], AMOUNT).slice(min(skipped, len(values)))
    assert unscaled(amounts).tolist() == values[skipped:]
