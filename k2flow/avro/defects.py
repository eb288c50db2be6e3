"""What can be wrong with the bytes of an Avro record, and where in a batch it was met."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from k2flow.records import Defect


@dataclass(frozen=True, slots=True)
class _Event:
    """Rows that met the same kind of defect in the same field."""

    rows: npt.NDArray[np.int64]
    label: str
    text: str
    values: Sequence[npt.NDArray[Any]]


class Faults:
    """The defects of a batch of n records."""

    def __init__(self, n: int) -> None:
        self.defect = np.zeros(n, np.uint8)
        self.position = np.full(n, -1, np.int64)
        self._events: list[_Event] = []

    def __len__(self) -> int:
        """How often a defect was noted; it grows whenever a row is flagged."""
        return len(self._events)

    def flag(
        self,
        rows: npt.NDArray[np.int64],
        position: npt.NDArray[np.int64],
        defect: Defect,
        label: str,
        text: str,
        *values: npt.NDArray[Any],
    ) -> None:
        """Notes a defect of `rows` at the bytes `position` of their payloads; of several in a row the first byte wins.

        `text` says what is wrong: a format string for `values`, one array each, and for `at`, the position.
        """
        order = np.argsort(position, kind="stable")
        unique, first = np.unique(rows[order], return_index=True)
        chosen = order[first]
        wins = (self.defect[unique] == Defect.NONE) | (position[chosen] < self.position[unique])
        unique, chosen = unique[wins], chosen[wins]
        self.defect[unique] = defect
        self.position[unique] = position[chosen]
        self._events.append(_Event(unique, label, text, [value[chosen] for value in values]))

    def detail(self, row: int) -> str:
        """What is wrong with a row, in words; empty for a good one."""
        found = self._by_row.get(row)
        if found is None:
            return ""
        event, i = found
        numbers = [value[i] for value in event.values]
        return f"{event.label}: {event.text.format(*numbers, at=self.position[row])}"

    @cached_property
    def _by_row(self) -> dict[int, tuple[_Event, int]]:
        """The event that holds for each bad row: the last one, since a later event was noted only where it wins."""
        return {row: (event, i) for event in self._events for i, row in enumerate(event.rows.tolist())}


class IgnoredFaults(Faults):
    """Takes the defects of what may be no item at all, and forgets them."""

    def __init__(self) -> None:
        super().__init__(0)

    def flag(
        self,
        rows: npt.NDArray[np.int64],
        position: npt.NDArray[np.int64],
        defect: Defect,
        label: str,
        text: str,
        *values: npt.NDArray[Any],
    ) -> None:
        """Does nothing."""
