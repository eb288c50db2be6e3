"""Private classes and functions of PyIceberg, under public names.

k2flow.iceberg also uses these private members of the classes and of `Table`: `_commit`, `_summary`, `_manifests`,
`_clean_all_uncommitted`, `_target_size_bytes`, `_do_commit`.
"""

from pyiceberg.expressions.visitors import _InclusiveMetricsEvaluator as InclusiveMetricsEvaluator
from pyiceberg.io.pyarrow import _get_column_projection_values as get_column_projection_values
from pyiceberg.io.pyarrow import _to_requested_schema as to_requested_schema
from pyiceberg.table.update.snapshot import _MergeAppendFiles as MergeAppendFiles
from pyiceberg.table.update.snapshot import _SnapshotProducer as SnapshotProducer

__all__ = [
    "InclusiveMetricsEvaluator",
    "MergeAppendFiles",
    "SnapshotProducer",
    "get_column_projection_values",
    "to_requested_schema",
]
