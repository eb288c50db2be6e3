"""Checks of whole data files while the audit reads them: partition value, order."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.table import FileScanTask

from k2flow.audit.report import Report, Severity
from k2flow.inspection.files import Plan
from k2flow.layers import LAYERS

_DAY_US, _HOUR_US = 86_400_000_000, 3_600_000_000
_LAYERS = {layer.name: layer for layer in LAYERS}


class FileChecks:
    """What is wrong with whole data files. Proves for each file that was read to its end:

    - `file_partition`: its partition value is what its rows say: every row's date column, the day of every row's
      time and, for Gold, the hour are those of the partition. A reader that prunes by partition misses no row.
    - `file_order` (Gold): its rows are in the order of `timestamp`, as the table's sort order declares.

    It says nothing of files that are left out because their day is beyond retention.
    """

    def __init__(self, plan: Plan) -> None:
        self._layer = plan.layer
        self._name = plan.table.name()[-1]
        layer = _LAYERS[plan.layer]
        self._date, self._time = layer.date_column, layer.event_time
        self._wrong: dict[str, dict[str, dict[str, Any]]] = {"file_partition": {}, "file_order": {}}
        self._last = np.iinfo(np.int64).min

    def begin(self) -> None:
        self._last = np.iinfo(np.int64).min

    def look(self, task: FileScanTask, batch: pa.RecordBatch) -> None:
        """Takes the next batch of a file."""
        days, times = batch.column(self._date), batch.column(self._time)
        values = times.cast(pa.int64()).to_numpy(zero_copy_only=False)
        day = task.file.partition[0]
        bad = self._not(days.cast(pa.int32()), day) or times.null_count or (values // _DAY_US != day).any()
        if self._layer == "gold":
            hour = task.file.partition[1]
            bad = bad or self._not(batch.column("exchange_hour"), hour) or (values // _HOUR_US % 24 != hour).any()
            if len(values) and (values[0] < self._last or (values[1:] < values[:-1]).any()):
                self._note("file_order", task)
            self._last = values[-1] if len(values) else self._last
        if bad:
            self._note("file_partition", task)

    def report(self, report: Report) -> None:
        texts = {
            "file_partition": "the partition value of {} data files is not what their rows say",
            "file_order": "{} data files are not in the order of timestamp",
        }
        for check, files in self._wrong.items():
            if files:
                samples = list(files.values())
                report.add(
                    check, Severity.BROKEN, texts[check].format(len(files)), len(files), None, self._name, samples
                )

    def _note(self, check: str, task: FileScanTask) -> None:
        file = task.file
        value = "/".join(str(file.partition[i]) for i in range(len(file.partition)))
        self._wrong[check].setdefault(
            file.file_path, {"file": file.file_path, "partition_value": value, "rows": file.record_count}
        )

    @staticmethod
    def _not(column: pa.Array, value: int | None) -> bool:
        found = pc.min_max(column).as_py()
        return bool(column.null_count or (len(column) and (found["min"] != value or found["max"] != value)))


