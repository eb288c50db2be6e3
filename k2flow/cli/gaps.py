"""`k2flow gaps`."""

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import typer
from rich.table import Column

from k2flow.cli.output import console, new_table
from k2flow.cli.process import exit_on_error
from k2flow.config.settings import load_settings
from k2flow.errors import QueryError
from k2flow.exchange import Exchange, exchange_names, find_exchange
from k2flow.gaps.find import FoundGaps, Gap, TradeRange, check_dense, find_gaps, iso
from k2flow.gaps.gold import open_gold
from k2flow.iceberg.catalog import open_catalog
from k2flow.layers import MAX_TIME_US, MIN_TIME_US
from k2flow.printable import printable

EXIT_HOLES, EXIT_UNCHECKED = 1, 2
_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def show_gaps(
    exchange: str, symbols: Sequence[str], since: datetime | None, until: datetime | None, as_json: bool
) -> None:
    """Print each hole of an exchange from `since` to before `until`, then sums by symbol; exit with 1 if there is one.

    Holes are printed as they are read, so memory is bounded, however many there are.
    """
    wanted = TradeRange(tuple(dict.fromkeys(symbols)), _us(since), _us(until))
    if wanted.since_us is not None and wanted.until_us is not None and wanted.since_us >= wanted.until_us:
        raise typer.BadParameter(f"--to {until} is not after --from {since}")
    with exit_on_error(EXIT_UNCHECKED, "gaps not checked: "):
        found = find_exchange(exchange)
        check_dense(found)
        _check_text(symbols)
        with open_gold(open_catalog(load_settings(exchange_names()))) as db:
            gaps = find_gaps(db, found, wanted)
            if as_json:
                _print_json(found, gaps)
            else:
                _print_text(found, gaps)
    raise SystemExit(EXIT_HOLES if gaps.holes else 0)


def _us(at: datetime | None) -> int | None:
    """Return us since 1970, of a time in UTC if it has no zone."""
    if at is None:
        return None
    us = ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _UNIX_EPOCH) // timedelta(microseconds=1)
    return min(max(us, MIN_TIME_US), MAX_TIME_US)


def _check_text(symbols: Sequence[str]) -> None:
    for symbol in symbols:
        try:
            symbol.encode()
        except UnicodeEncodeError as error:
            raise QueryError(f"the symbol {symbol!r} is not valid UTF-8: type it again") from error


def _print_json(exchange: Exchange, found: FoundGaps) -> None:
    """Print one object."""
    symbols = {
        name: {"holes": its.holes, "missing": its.missing, "first": its.first, "last": its.last}
        for name, its in found.symbols.items()
    }
    print(f'{{"exchange": {json.dumps(exchange.name)}, "gaps": [')
    separator = ""
    for gap in found.gaps():
        print(separator + json.dumps(_as_json(gap)), end="")
        separator = ",\n"
    print(f'], "symbols": {json.dumps(symbols)}, "unparsed": {found.unparsed}}}', flush=True)


def _as_json(gap: Gap) -> dict[str, Any]:
    return {
        "symbol": gap.symbol,
        "first": gap.first,
        "last": gap.last,
        "missing": gap.missing,
        "after": iso(gap.after_us),
        "before": iso(gap.before_us),
    }


def _print_text(exchange: Exchange, found: FoundGaps) -> None:
    if found.holes:
        for line in _hole_lines(found):
            print(line)
        print()
    if found.symbols:
        right = [Column(name, justify="right") for name in ("holes", "missing", "share", "first id", "last id")]
        table = new_table("symbol", *right)
        for name, its in found.symbols.items():
            table.add_row(
                name, f"{its.holes:,}", f"{its.missing:,}", f"{100 * its.share:.3g} %", str(its.first), str(its.last)
            )
        console().print(table)
    else:
        print(f"there are no trades of {exchange.name} to check")
    if found.unparsed:
        shown = ", ".join(map(repr, found.examples))
        print(
            printable(f"{found.unparsed:,} trades are not checked: their ids are no {exchange.code}-<integer>: {shown}")
        )


def _hole_lines(found: FoundGaps) -> Iterator[str]:
    """Yield a line for each hole, below one with the names of the columns."""
    holed = {name: its for name, its in found.symbols.items() if its.holes}
    symbol = max(map(len, ("symbol", *map(printable, holed))))
    number = max(len("first"), *(len(str(its.last)) for its in holed.values()))
    missing = max(len("missing"), *(len(str(its.missing)) for its in holed.values()))

    def line(name: str, first: object, last: object, count: object, after: str, before: str) -> str:
        return f"{name:{symbol}}  {first:>{number}}  {last:>{number}}  {count:>{missing}}  {after:<32}  {before}"

    yield line("symbol", "first", "last", "missing", "trade before it", "trade after it")
    for gap in found.gaps():
        times = (iso(us) or "unknown" for us in (gap.after_us, gap.before_us))
        yield line(printable(gap.symbol), gap.first, gap.last, gap.missing, *times)
