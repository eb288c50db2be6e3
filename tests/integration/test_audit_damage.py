"""Damaged tables prove the audit: it reports every damage as a violation, and names it."""

import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal

import pyarrow.compute as pc
import pytest

from k2flow.audit import AuditReport, audit
from k2flow.audit.report import Reading, Verdict
from k2flow.config.settings import load_settings
from k2flow.exchange import exchange_names, find_exchange
from k2flow.inspection import pinned as snapshots
from k2flow.sandbox.kafka.local import LocalKafka
from tests.integration import damage as d
from tests.integration.conftest import fill
from tests.integration.harness import Lake, batches

pytestmark = pytest.mark.xdist_group("audit_damage")


@pytest.fixture(scope="module")
def lakes(kafka: LocalKafka, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, Lake]:
    """Two exchanges in the same tables, caught up. An audit has proven the first of their messages."""
    home = tmp_path_factory.mktemp("audited") / "lake"
    caught_up = []
    for exchange in ("binance", "kraken"):
        topic = f"{exchange}.{uuid.uuid4().hex}"
        kafka.start({topic: 2})
        lake = Lake(exchange, topic, home, kafka.bootstrap)
        fill(lake, count=d.PROVEN, seed=1)
        lake.catch_up()
        caught_up.append(lake)
    done = caught_up[0].command("audit", K2FLOW_KRAKEN_TOPIC=caught_up[1].topic)
    assert done.returncode == 0, done.stdout + done.stderr
    for lake in caught_up:
        fill(lake, count=800, bad=0.05, duplicates=0.05, seed=len(lake.exchange))
        lake.catch_up(**batches(300, lake.exchange))
    return caught_up[0], caught_up[1]


@pytest.fixture
def lake(lakes: tuple[Lake, Lake], monkeypatch: pytest.MonkeyPatch) -> Iterator[Lake]:
    """Binance's lake, which a test may damage: it is restored for the next one."""
    for each in lakes:
        for name, value in each.environment().items():
            if name.startswith("K2FLOW_"):
                monkeypatch.setenv(name, value)
    monkeypatch.setattr(snapshots, "WAIT_SECONDS", 0.2)  # no flow is about to commit what a ledger lacks
    with d.restored(lakes[0]):
        yield lakes[0]


def run_audit(lake: Lake, full: bool) -> AuditReport:
    """Audit both exchanges."""
    exchanges = [dataclasses.replace(find_exchange(name)) for name in ("binance", "kraken")]
    return audit(lake.catalog(), load_settings(exchange_names()), exchanges, full=full)


@pytest.mark.parametrize("full", [True, False], ids=["full", "incremental"])
def test_undamaged_tables_have_no_findings(lake: Lake, full: bool) -> None:
    report = run_audit(lake, full)
    assert report.verdict is Verdict.HOLDS
    assert report.findings == []
    assert report.reading is (Reading.FULL if full else Reading.INCREMENTAL), report.why_full


def delete_bronze(lake: Lake) -> None:
    d.delete(lake, "bronze", d.place(d.message_of(lake, valid=True)))


def delete_first_bronze(lake: Lake) -> None:
    first = first_new_offset(lake)
    d.delete(lake, "bronze", f"partition = 0 and offset >= {first} and offset < {first + 3}")


def first_new_offset(lake: Lake) -> int:
    """Return the first offset of partition 0 that no audit has proven: it may have had no message then."""
    (file,) = lake.home.glob("cache/audit/*/proof")
    logs = json.loads(file.read_bytes().split(b"\n", 2)[2])["extents"][lake.exchange]
    return next((int(held["bronze"][1]) for log, held in logs.items() if log.split("/")[1] == "0"), 0)


def delete_last_bronze(lake: Lake) -> None:
    last = max(r["offset"] for r in d.rows(lake, "bronze").to_pylist() if r["partition"] == 1)
    d.delete(lake, "bronze", f"partition = 1 and offset = {last}")


def duplicate_bronze(lake: Lake) -> None:
    d.append(lake, "bronze", d.message_of(lake, valid=True))


def bronze_after_the_ledger(lake: Lake) -> None:
    d.append(lake, "bronze", d.changed(d.message_of(lake, valid=True), offset=1_000_000))


def bronze_of_another_topic(lake: Lake) -> None:
    d.append(lake, "bronze", d.changed(d.message_of(lake, valid=True), topic="another"))


def bronze_key_changed(lake: Lake) -> None:
    one = d.message_of(lake, valid=True)
    d.delete(lake, "bronze", d.place(one))
    d.append(lake, "bronze", d.changed(one, message_key="forged"))


def silver_and_dead_letters(lake: Lake) -> None:
    d.append(lake, "dlq", d.dead_letter(lake, d.message_of(lake, valid=True)))


def dead_letter_of_unknown_schema_dropped(lake: Lake) -> None:
    letters = d.rows(lake, "dlq")
    d.delete(lake, "dlq", d.place(letters.filter(pc.equal(letters["reason"], "unknown_schema")).slice(0, 1)))


def dead_letter_dropped(lake: Lake) -> None:
    d.delete(lake, "dlq", d.place(d.message_of(lake, valid=False)))


def dead_letter_duplicated(lake: Lake) -> None:
    d.append(lake, "dlq", d.rows(lake, "dlq").slice(3, 1))


def dead_letter_changed(lake: Lake) -> None:
    one = d.rows(lake, "dlq").slice(3, 1)
    d.delete(lake, "dlq", d.place(one))
    d.append(lake, "dlq", d.changed(one, payload=b"other"))


def dead_letter_after_the_ledger(lake: Lake) -> None:
    d.append(lake, "dlq", d.changed(d.rows(lake, "dlq").slice(3, 1), partition=7))


def silver_dropped(lake: Lake) -> None:
    d.delete(lake, "silver", f"message_id = '{d.single_trade(lake)['message_id'][0].as_py()}'")


def silver_duplicated(lake: Lake) -> None:
    d.append(lake, "silver", d.single_trade(lake))


def silver_changed(lake: Lake) -> None:
    one = d.single_trade(lake)
    d.delete(lake, "silver", f"message_id = '{one['message_id'][0].as_py()}'")
    d.append(lake, "silver", d.changed(one, price=one["price"][0].as_py() + Decimal("0.00000001")))


def silver_map_changed(lake: Lake) -> None:
    one = d.single_trade(lake)
    d.delete(lake, "silver", f"message_id = '{one['message_id'][0].as_py()}'")
    d.append(lake, "silver", d.changed(one, vendor_data=[("a", "forged")]))


def silver_null_instead_of_empty(lake: Lake) -> None:
    trades = d.rows(lake, "silver")
    empty = trades.filter(pc.equal(pc.list_value_length(trades["trade_conditions"]), 0))
    one = empty.sort_by([("timestamp", "descending")]).slice(0, 1)
    d.delete(lake, "silver", f"message_id = '{one['message_id'][0].as_py()}'")
    d.append(lake, "silver", d.changed(one, trade_conditions=None))


def gold_dropped(lake: Lake) -> None:
    d.delete(lake, "gold", f"message_id = '{d.single_trade(lake)['message_id'][0].as_py()}'")


def gold_duplicated(lake: Lake) -> None:
    d.append(lake, "gold", d.single_trade(lake, "gold"))


def gold_unknown(lake: Lake) -> None:
    d.append(lake, "gold", d.changed(d.single_trade(lake, "gold"), message_id="unknown"))


def gold_of_undeclared_exchange(lake: Lake) -> None:
    d.append(lake, "gold", d.changed(d.single_trade(lake, "gold"), exchange="UNKNOWN", message_id="unknown"))


def gold_under_two_exchanges(lake: Lake) -> None:
    d.append(lake, "gold", d.changed(d.single_trade(lake, "gold"), exchange="KRAKEN"))


def gold_unsorted(lake: Lake) -> None:
    d.rewrite_hour(lake, d.unsorted)


def gold_in_another_partition(lake: Lake) -> None:
    d.rewrite_hour(lake, d.in_another_partition)


def forged(layer: str, key: str, by: int) -> Callable[[Lake], None]:
    def forge(lake: Lake) -> None:
        d.forge(lake, layer, key, by)

    forge.__name__ = f"{layer}_{key}_{by:+d}"
    return forge


DAMAGE: list[tuple[Callable[[Lake], None], set[str]]] = [
    (delete_bronze, {"bronze_missing"}),
    (delete_first_bronze, {"bronze_missing"}),
    (delete_last_bronze, {"bronze_missing"}),
    (duplicate_bronze, {"bronze_duplicated"}),
    (bronze_after_the_ledger, {"bronze_outside_ledger"}),
    (bronze_of_another_topic, {"bronze_outside_ledger"}),
    (bronze_key_changed, {"bronze_changed"}),
    (silver_and_dead_letters, {"in_both"}),
    (dead_letter_dropped, {"in_neither"}),
    (dead_letter_of_unknown_schema_dropped, {"in_neither"}),
    (dead_letter_duplicated, {"dlq_duplicated"}),
    (dead_letter_changed, {"dlq_changed"}),
    (dead_letter_after_the_ledger, {"dlq_outside_ledger"}),
    (silver_dropped, {"in_neither", "gold_unexpected"}),
    (silver_duplicated, {"silver_duplicated"}),
    (silver_changed, {"in_neither", "silver_unexpected", "gold_unexpected"}),
    (silver_map_changed, {"in_neither", "silver_unexpected", "gold_unexpected"}),
    (silver_null_instead_of_empty, {"in_neither", "silver_unexpected", "gold_unexpected"}),
    (gold_dropped, {"gold_missing"}),
    (gold_duplicated, {"gold_duplicated"}),
    (gold_unknown, {"gold_unexpected"}),
    (gold_of_undeclared_exchange, {"gold_unexpected"}),
    (gold_under_two_exchanges, {"gold_two_exchanges", "gold_unexpected"}),
    (gold_unsorted, {"file_order"}),
    (gold_in_another_partition, {"file_partition"}),
    *[(forged(layer, "next", 10), {"ledger_beyond_kafka"}) for layer in ("bronze", "silver", "dlq", "gold")],
    *[(forged(layer, "rows", by), {"ledger_rows"}) for layer in ("bronze", "silver", "dlq", "gold") for by in (1, -1)],
    (forged("bronze", "next", -10), {"bronze_outside_ledger", "ledger_rows"}),
    (forged("silver", "next", -10), {"ledger_rows", "silver_unexpected"}),
    (forged("dlq", "next", -200), {"ledger_rows", "dlq_outside_ledger"}),
    (forged("gold", "next", -10), {"ledger_rows"}),
]


ALLOWED_TOO = {"ledger_rows", "ledgers_disagree", "silver_duplicated", "head_moved", "schema_unknown"}
"""Damage to rows or to a ledger may also violate a count. Rows after the end of a forged ledger may be copies.

A forged ledger is not the one in the head's snapshot, if that had rows. A lost dead letter may have shown that a
schema was unknown.
"""


@pytest.mark.parametrize(("damage", "checks"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damage_is_reported_with_samples(lake: Lake, damage: Callable[[Lake], None], checks: set[str]) -> None:
    """Two audits in one: the incremental one finds the damage, in rows not yet proven, and a full one names it.

    The full audit is that of `--full`: it does not use what was proven.
    """
    damage(lake)
    report = run_audit(lake, full=False)
    assert report.verdict is Verdict.BROKEN
    assert report.reading is Reading.FULL
    assert report.why_full
    assert not any(finding.check.startswith("proof_") for finding in report.findings)
    found = report.checks()
    assert checks <= found <= checks | ALLOWED_TOO, report.findings
    for finding in report.findings:
        if finding.check in checks and finding.check != "ledger_rows":
            assert finding.samples, finding
