"""Collects the defects of a batch of Avro records: the first one of each record, its position and a description."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from k2flow.records import Defect

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Event:
    rows: Ints
    label: str
    text: str
    values: Sequence[npt.NDArray[Any]]


class DefectLog:
    """The defects of a batch of n records."""

    def __init__(self, n: int) -> None:
        self.defect = np.zeros(n, np.uint8)
        self.position = np.full(n, -1, np.int64)
        self._events: list[_Event] = []

    def __len__(self) -> int:
        return len(self._events)

    def add(self, rows: Ints, position: Ints, defect: Defect, label: str, text: str, *values: npt.NDArray[Any]) -> None:
        """Record a defect of `rows` at the bytes `position` of their payloads; each row keeps only its first byte.

        `text` is a format string for `values`, one array each, and for `at`, the position.
        """
        order = np.argsort(position, kind="stable")
        unique, first = np.unique(rows[order], return_index=True)
        chosen = order[first]
        # Texts are checked last. An empty text begins at the byte of the next field, and comes before it.
        is_first = (self.defect[unique] == Defect.NONE) | (position[chosen] <= self.position[unique])
        unique, chosen = unique[is_first], chosen[is_first]
        self.defect[unique] = defect
        self.position[unique] = position[chosen]
        self._events.append(_Event(unique, label, text, [value[chosen] for value in values]))

    def detail(self, row: int) -> str:
        """Describe the defect of a row; empty for a good row."""
        found = self._by_row.get(row)
        if found is None:
            return ""
        event, i = found
        numbers = [value[i] for value in event.values]
        return f"{event.label}: {event.text.format(*numbers, at=self.position[row])}"

    @cached_property
    def _by_row(self) -> dict[int, tuple[_Event, int]]:
        """The event of each bad row: the last one, because a later event holds only rows where it is first."""
        return {row: (event, i) for event in self._events for i, row in enumerate(event.rows.tolist())}


class DiscardingDefectLog(DefectLog):
    """Discards all defects; used while decoding bytes that may not be a value."""

    @override
    def add(self, *_: Any) -> None:
        pass
