"""k2flow with one of its safeguards switched off, to prove that the tests would notice."""

from dataclasses import replace

from k2flow.iceberg.commit import Committer, LedgerCommit
from k2flow.iceberg.ledger import CommittedRange, Ledger
from k2flow.trades.messages import MessageBatch


def no_guard() -> None:
    """An attempt no longer checks that the ledger is unchanged: it trusts the ledger in memory."""
    real = Committer._read
    Committer._read = lambda self: getattr(self, "ledger", None) or real(self)


def no_contiguity() -> None:
    """A range of offsets may begin anywhere."""

    def advanced(self, ranges, accept_gaps=False):
        partitions = dict(self.partitions)
        for r in sorted(ranges, key=lambda r: (r.partition, r.first)):
            old = partitions.get(r.partition, CommittedRange(r.first, r.first, 0))
            partitions[r.partition] = CommittedRange(old.first, r.next, old.rows + r.rows)
        return replace(self, sequence=self.sequence + 1, partitions=partitions)

    Ledger.advanced = advanced


def no_fence() -> None:
    """A flow starts without a new writer epoch."""
    Committer.fence = lambda self, topic_id, began_with=None: None


def weak_fence() -> None:
    """The fence changes only the ledger and leaves the table's current snapshot as it was."""

    def fence(self, topic_id, began_with=None):
        self._commit(LedgerCommit(after=self.ledger.fenced(self._writer, topic_id), append=False))

    Committer.fence = fence


def no_replay_filter() -> None:
    """Rows that a table already holds are written again."""
    MessageBatch.after = lambda self, committed: self


MUTATIONS = {
    "guard": no_guard,
    "contiguity": no_contiguity,
    "fence": no_fence,
    "weak-fence": weak_fence,
    "replay-filter": no_replay_filter,
}
