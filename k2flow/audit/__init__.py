"""The audit: whether all invariants hold in the tables, and where they are violated.

    Each Kafka offset is in exactly one Bronze row. Each Bronze row is in exactly one of Silver or the dead-letter
    table. Each deduplication key of an exchange's Silver is in Gold exactly once (twice only in different hours, at
    most one of them within the hot window).

Together they are the conservation law: no message appears or disappears on its way. The modules, in the order of use:

- `inspection.pinned` pins one snapshot of each table, and `inspection.partitions` reads from their ledgers which
  offsets each one holds;
- `proof` has what earlier audits have proven, and `scope` leaves it out: an audit reads each file once;
- `file_checks` checks each data file as it is read: partition value, order, derived columns;
- `bronze` reads Bronze and decodes it again, with the flow's own decoder, into hashes (`database`);
- `offsets` finds the offsets that Bronze lacks or has twice, and asks Kafka about them. `bronze` compares the newest
  rows with Kafka's messages;
- `trades` and `dead_letters` compare the hashes with the rows of Silver and of the dead letters, `gold` checks Gold's
  keys and compares it with Silver, `ledgers` compares the ledgers' counts with all of them;
- `sums` adds up the rows of files, `gold_changes` checks Gold's new files against the ids in `id_runs`, and `proving`
  makes the next proof;
- `candles` checks the candle table: `candle_rows` computes its rows again from Gold's;
- `coverage` declares which check covers each column, and `report` holds the findings.

Rows are compared by 64-bit hashes of all their columns: of n rows a wrong one stays unseen with a probability of
n / 2^64. Duplicated keys are looked up and compared in full before they are reported.
"""

from k2flow.audit.report import AuditReport, Finding, Severity
from k2flow.audit.run import audit

__all__ = ["AuditReport", "Finding", "Severity", "audit"]
