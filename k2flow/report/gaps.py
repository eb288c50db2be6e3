"""The holes in trade ids for a report."""

from k2flow.gaps.find import TradeRange, find_gaps
from k2flow.layers import GOLD_TABLE
from k2flow.report.figures import ExchangeGaps
from k2flow.report.queries import ReportSource

SHOWN_GAPS = 20  # of each exchange, the largest


def exchange_gaps(source: ReportSource) -> list[ExchangeGaps]:
    """Return the holes of each exchange with dense trade ids. Raises QueryError."""
    if GOLD_TABLE not in source.tables:
        return []
    return [
        ExchangeGaps(each.name, found.symbols, list(found.gaps(largest=SHOWN_GAPS)), found.unparsed)
        for each in source.exchanges
        if each.dense_trade_ids
        for found in [find_gaps(source.db, each, TradeRange(since_us=source.since_us))]
    ]
