"""Times in a unit other than the reader's."""

import numpy as np
from typing_extensions import override

from k2flow.avro.columns import Column, FixedWidth
from k2flow.avro.cursor import Lanes
from k2flow.avro.plan import Integer, Node

_MAX_MS = (2**63 - 1) // 1000


class MillisecondTime(Node):
    """A long in milliseconds, returned in microseconds.

    A time beyond the int64 of microseconds becomes the largest or smallest one. No rule accepts either: both are far
    outside the years 1 to 9999.
    """

    @override
    def read(self, lanes: Lanes) -> Column:
        milliseconds = Integer(self.type, self.label, 64, np.int64).read(lanes).values
        inside = (milliseconds <= _MAX_MS) & (milliseconds >= -_MAX_MS)
        limits = np.where(milliseconds > 0, 2**63 - 1, -(2**63))
        return FixedWidth(self.type, np.where(inside, milliseconds * 1000, limits))
