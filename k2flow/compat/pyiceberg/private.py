"""Private classes of PyIceberg, under names of their own.

k2flow.iceberg also uses these private members of them and of `Table`: `_commit`, `_summary`, `_manifests`,
`_clean_all_uncommitted`, `_target_size_bytes`, `_do_commit`.
"""

from pyiceberg.expressions.visitors import _InclusiveMetricsEvaluator as InclusiveMetricsEvaluator
from pyiceberg.table.update.snapshot import _MergeAppendFiles as MergeAppendFiles
from pyiceberg.table.update.snapshot import _SnapshotProducer as SnapshotProducer

__all__ = ["InclusiveMetricsEvaluator", "MergeAppendFiles", "SnapshotProducer"]
