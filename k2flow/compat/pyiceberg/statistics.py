"""PyIceberg: the statistics of a data file, with bounds that are right for every value, or absent.

PyIceberg 0.12 fails on values that its bounds cannot express, and such a value would end a flow at each start:

- It shortens a text's upper bound to 16 characters and increments the last one. After U+D7FF come the surrogates, which
  UTF-8 cannot encode.
- It converts times to Python's types, which end at the year 9999.

It also takes a row group without bounds for one without values. But Parquet leaves out bounds of more than 4 KiB, so
the bounds of the other row groups would exclude rows from queries that ask for them.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.io import pyarrow as pyiceberg_arrow
from pyiceberg.io.pyarrow import (
    MetricModeTypes,
    MetricsMode,
    StatisticsCollector,
    data_file_statistics_from_parquet_metadata,
)

SURROGATES = range(0xD800, 0xE000)
LAST_CODE_POINT = 0x10FFFF
_COUNTS, _NONE = MetricsMode(MetricModeTypes.COUNTS), MetricsMode(MetricModeTypes.NONE)
_INEXPRESSIBLE = (ValueError, OverflowError, pa.ArrowException)
Plan = Mapping[int, StatisticsCollector]


def upper_bound_text(text: str, length: int | None) -> str | None:
    """Return a text of at most `length` characters that is not less than `text`, or None if there is none."""
    if length is None or len(text) <= length:
        return text
    for i in range(length - 1, -1, -1):
        after = ord(text[i]) + 1
        if after in SURROGATES:
            after = SURROGATES.stop
        if after <= LAST_CODE_POINT:
            return text[:i] + chr(after)
    return None


pyiceberg_arrow.truncate_upper_bound_text_string = upper_bound_text  # type: ignore[assignment, attr-defined]


def data_file_statistics(footer: pq.FileMetaData, plan: Plan, paths: Mapping[str, int]) -> dict[str, Any]:
    """Return the statistics of a written file, as `DataFile.from_args` takes them.

    `plan` and `paths` are PyIceberg's, of the file's schema. No value is less than a lower bound or more than an upper
    one. A bound that cannot be expressed is left out.
    """
    if footer.num_row_groups > 1:
        plan = _without_bounds(plan, _partly_bounded(footer, paths))
    try:
        return _statistics(footer, plan, paths)
    except _INEXPRESSIBLE:
        return _statistics(footer, _without_bounds(plan, _inexpressible(footer, plan, paths)), paths)


def only(plan: Plan, columns: Collection[str]) -> Plan:
    """Return a plan with statistics of some top-level columns only."""
    return {i: each if each.column_name in columns else replace(each, mode=_NONE) for i, each in plan.items()}


def _statistics(footer: pq.FileMetaData, plan: Plan, paths: Mapping[str, int]) -> dict[str, Any]:
    found = data_file_statistics_from_parquet_metadata(footer, dict(plan), dict(paths)).to_serialized_dict()
    # PyIceberg keeps the sizes of columns without other statistics. Java does not.
    sizes = {column: size for column, size in found["column_sizes"].items() if plan[column].mode != _NONE}
    return {**found, "column_sizes": sizes}


def _without_bounds(plan: Plan, columns: set[int]) -> Plan:
    return {i: replace(each, mode=_COUNTS) if i in columns and each.mode != _NONE else each for i, each in plan.items()}


def _partly_bounded(footer: pq.FileMetaData, paths: Mapping[str, int]) -> set[int]:
    """Return the ids of the columns with a row group that has values, but no bounds."""
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(footer.num_columns)]
    return {
        paths[chunk.path_in_schema]
        for chunk in chunks
        if chunk.is_stats_set and not chunk.statistics.has_min_max and chunk.statistics.null_count != chunk.num_values
    }


def _inexpressible(footer: pq.FileMetaData, plan: Plan, paths: Mapping[str, int]) -> set[int]:
    """Return the ids of the columns whose bounds raise an error, each tried alone."""
    found = set()
    for column in plan:
        alone = {i: each if i == column else replace(each, mode=_NONE) for i, each in plan.items()}
        try:
            _statistics(footer, alone, paths)
        except _INEXPRESSIBLE:
            found.add(column)
    return found
