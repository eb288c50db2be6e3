"""One HTML page about the flows, from the tables, and from Kafka if it answers.

`data` gathers the `figures`: `queries`, `freshness` and `gaps` aggregate them in DuckDB. `axes` divides time and
values, `charts` draws, `formats` formats numbers, `page` renders the template and writes the file.
"""

from k2flow.report.data import gather
from k2flow.report.figures import Unavailable, attempt
from k2flow.report.page import check_writable, render, write

__all__ = ["Unavailable", "attempt", "check_writable", "gather", "render", "write"]
