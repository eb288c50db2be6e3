"""The audit: whether the conservation law holds in the tables, and where it does not.

    Each Kafka offset is in exactly one Bronze row. Each Bronze row is in exactly one of Silver or the dead-letter
    table. Each (exchange, message_id) of Silver is in Gold exactly once (twice only in different hours, of which one at
    the most is within the hot window).

How it is proved, in the order in which the modules are used:

- `snapshots` pins one snapshot of each table, and `partitions` says from their ledgers which offsets each one holds;
- `files` reads data files in bounded batches, and looks at each file's partition value and order on the way;
- `bronze` decodes Bronze again, with the flow's own decoder, into hashes; `offsets` finds what Bronze lacks or has
  twice, and asks Kafka (`kafka`) about it;
- `layers` compares the hashes with Silver's and the dead-letter table's rows, `gold` Silver's with Gold's, `ledgers`
  the ledgers' counts with all of them;
- `report` holds what was found.

Rows are compared by 64-bit hashes of all their columns: of n rows a wrong one goes unseen with a probability of
n / 2^64. What is reported as doubled is looked up and compared in full first.
"""

from k2flow.audit.report import Finding, Report, Severity
from k2flow.audit.run import audit

__all__ = ["Finding", "Report", "Severity", "audit"]
