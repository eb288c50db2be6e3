"""The committable: what a writer passes to a committer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from pyiceberg.manifest import DataFile

from k2flow.iceberg.ledger import OffsetRange
from k2flow.observability.metrics import EMPTY_STATS, BatchStats


@dataclass(frozen=True, kw_only=True)
class Committable:
    """Data files of one table, and offset ranges whose rows are all in files that arrive before the next commit.

    Files and ranges need not come together. Gold's files come from the worker that owns the keys, its ranges from the
    worker that read them.

    `files` waits until the files are written, and raises their errors; the next steps need not wait. `ranges` have the
    number of rows from each. `stats` go to Prometheus after the commit. `properties` of the table are set by the commit
    unless it has them. `ends_checkpoint`: whether the table commits at the end of this epoch.
    """

    table: str
    files: Callable[[], Sequence[DataFile]] = list
    ranges: Sequence[OffsetRange] = ()
    stats: BatchStats = EMPTY_STATS
    properties: Mapping[str, str] = field(default_factory=dict)
    ends_checkpoint: bool = False

    def __reduce__(self) -> tuple[Callable[..., "Committable"], tuple[object, ...]]:
        """Wait for the files: only finished ones can go to another process."""
        return partial(Committable, **{**vars(self), "files": partial(list, self.files())}), ()
