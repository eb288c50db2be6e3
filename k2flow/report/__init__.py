"""One HTML page that tells how the flows did, made from the tables, and from Kafka where it can be reached.

`figures` are what it tells: `data` gathers them, `queries` has DuckDB sum them up, `freshness` knows when which offsets
were committed. `axes` divides time and values, `charts` draws, `words` writes numbers, `page` puts all of it into the
template and writes the file.
"""

from k2flow.report.data import gather
from k2flow.report.figures import Problem, attempt
from k2flow.report.page import check_writable, render, write

__all__ = ["Problem", "attempt", "check_writable", "gather", "render", "write"]
