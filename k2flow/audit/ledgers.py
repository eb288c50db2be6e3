"""The ledgers' counts against each other and against the tables.

What each check proves:

- `ledger_rows`: of each partition as many messages were valid as Silver's and Gold's ledgers count and as many bad as
  the dead letters' counts, wherever all its messages could be decoded. No ledger counts more rows than offsets, and no
  table has more rows than its ledger counts (Gold: at most as many, since it counts before deduplication).
- `ledgers_disagree`: where the ledgers hold the same offsets, Silver's and the dead letters' rows add up to Bronze's,
  and Gold's are as many as Silver's. This holds for all messages ever, those included that retention has removed.
"""

from k2flow.audit.layers import within
from k2flow.audit.report import Report, Severity
from k2flow.inspection.partitions import Part
from k2flow.inspection.pinned import LAYERS, PinnedTables
from k2flow.inspection.row_hashes import Store


def check_ledgers(store: Store, report: Report, parts: list[Part], whole: bool) -> None:
    """All checks of one exchange's partitions; `whole`: all of Bronze that is kept was read."""
    decoded = {
        layer: dict(store.run(f"SELECT v.part, count(*) FROM {rows} v {within(layer)} GROUP BY 1"))
        for layer, rows in (("silver", "valid"), ("dlq", "bad"), ("gold", "valid"))
    }
    for part in parts:
        for layer in LAYERS:
            extent = part.extent(layer)
            if extent.first > extent.next or extent.rows > extent.next - extent.first:
                text = f"{part}: the ledger counts {extent.rows:,} rows of offsets {extent.first} to {extent.next - 1}"
                _broken(report, "ledger_rows", part, text, layer)
            elif layer != "bronze" and whole and part.covered:
                n = decoded[layer].get(part.number, 0)
                if n != extent.rows:
                    text = f"{part}: the ledger counts {extent.rows:,} messages that are the table's, Bronze has {n:,}"
                    _broken(report, "ledger_rows", part, text, layer, abs(n - extent.rows))
        _compare(report, part)


def check_totals(report: Report, pinned: PinnedTables, parts: list[Part], layer: str, rows: int) -> None:
    """Whether a table of `rows` rows has more than its ledger counts."""
    counted = sum(part.extent(layer).rows for part in parts)
    if rows > counted:
        text = f"the table has {rows:,} rows, its ledger counts {counted:,}"
        name = pinned.exchange.name
        report.add("ledger_rows", Severity.BROKEN, text, rows - counted, name, pinned.name(layer))


def _compare(report: Report, part: Part) -> None:
    bronze, silver, dlq, gold = (part.extent(layer) for layer in LAYERS)
    spans = {layer: (part.extent(layer).first, part.extent(layer).next) for layer in LAYERS}
    if spans["bronze"] == spans["silver"] == spans["dlq"] and silver.rows + dlq.rows != bronze.rows:
        text = f"{part}: Silver's {silver.rows:,} and the dead letters' {dlq.rows:,} are not Bronze's {bronze.rows:,}"
        _broken(report, "ledgers_disagree", part, text, None, abs(silver.rows + dlq.rows - bronze.rows))
    if spans["silver"] == spans["gold"] and silver.rows != gold.rows:
        text = f"{part}: Gold's {gold.rows:,} (before deduplication) are not Silver's {silver.rows:,}"
        _broken(report, "ledgers_disagree", part, text, None, abs(silver.rows - gold.rows))


def _broken(report: Report, check: str, part: Part, text: str, layer: str | None, count: int = 1) -> None:
    table = part.pinned.name(layer) if layer else None
    sample = {"topic": part.topic, "partition": part.partition}
    report.add(check, Severity.BROKEN, text, count, part.pinned.exchange.name, table, [sample])
