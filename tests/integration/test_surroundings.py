"""k2flow with the real services around it: Kafka with SASL_SSL, a schema registry, PostgreSQL, REST catalog, S3."""

import json
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AclOperation

from k2flow.config.secret_files import VARIABLE as SECRETS_DIR
from k2flow.config.settings import load_settings
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.ledger import OffsetRange
from k2flow.iceberg.rewrite import set_property
from k2flow.iceberg.tables import create, definitions
from k2flow.kafka.admin import Admin
from k2flow.layers import GOLD_TABLE
from k2flow.sandbox.producer import ProduceOptions, produce
from k2flow.trades.registry import RegistrySchemas
from k2flow.trades.schema import trade_schema
from tests.clock import clock_ahead
from tests.integration.conftest import fill
from tests.integration.harness import ROOT, Lake, assert_tables, ledger_offsets, read_topic
from tests.integration.test_run import rows_of, running
from tests.messages import TRADE, decode, details, evolved, reasons, written
from tests.oracle import expect
from tests.surroundings.apicurio import Apicurio
from tests.surroundings.secure_kafka import PASSWORD, SecureKafka, create_user, denied, secure_kafka
from torture.catalogs import Postgres, postgres_programs, variables
from torture.store import SECRET, Seaweed, open_store

pytestmark = pytest.mark.xdist_group("surroundings")

BOTH = {"binance": 3, "kraken": 1}
LONG_AGO = timedelta(minutes=10)
RULES = ROOT / "docker" / "prometheus" / "rules.yml"


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    made = secure_kafka(tmp_path_factory.mktemp("kafka") / "secure")
    with made.local:
        create_user(made)
        yield made


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apicurio]:
    try:
        made = Apicurio(tmp_path_factory.mktemp("registry"))
    except (OSError, RuntimeError) as error:
        pytest.skip(f"Apicurio cannot be installed here: {error}")
    with made:
        yield made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    made = open_store(tmp_path_factory.mktemp("store") / "seaweed")
    assert made is not None
    yield made
    made.stop()


@pytest.fixture
def database(store: Seaweed) -> Iterator[dict[str, str]]:
    """The environment variables of a catalog in PostgreSQL, with a warehouse of its own in the store."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    properties = store.properties()
    made = Postgres({**properties, "warehouse": f"{properties['warehouse']}/{uuid.uuid4().hex}"}, programs)
    yield made.environment()
    made.stop()


class Site:
    """Two topics, and the environment of k2flow's processes. Secrets are in files."""

    def __init__(self, kafka: SecureKafka, registry: Apicurio, catalog: Mapping[str, str], folder: Path) -> None:
        self.kafka = kafka
        self._registry = registry
        self._folder = folder
        self.topics = {exchange: f"{exchange}.{uuid.uuid4().hex}" for exchange in BOTH}
        Admin(kafka.local.bootstrap).create({self.topics[exchange]: BOTH[exchange] for exchange in BOTH})
        secrets = {name: value for name, value in catalog.items() if value == SECRET or SECRET in value}
        secrets["K2FLOW_KAFKA_SASL_PASSWORD"] = PASSWORD
        (folder / "secrets").mkdir()
        for name, value in secrets.items():
            (folder / "secrets" / name).write_text(f"{value}\n")
        self.secrets = [PASSWORD, SECRET]
        self.variables = {
            SECRETS_DIR: str(folder / "secrets"),
            "K2FLOW_SCHEMA_REGISTRY_URL": registry.url,
            **{name: value for name, value in catalog.items() if name not in secrets},
            **kafka.client(),
            **{f"K2FLOW_{exchange.upper()}_TOPIC": topic for exchange, topic in self.topics.items()},
        }

    def lake(self) -> Lake:
        return Lake("binance", self.topics["binance"], self._folder / "home", self.kafka.secure)

    def send(self, exchange: str, schema_id: int, **options: Any) -> int:
        """Send messages over the connection that flows use. Return how many."""
        config = {
            name.removeprefix("K2FLOW_KAFKA_").lower().replace("_", "."): value
            for name, value in {**self.kafka.client(), "K2FLOW_KAFKA_SASL_PASSWORD": PASSWORD}.items()
        }
        wanted = ProduceOptions(schema_id=schema_id, **options)
        return produce(find_exchange(exchange).code, self.topics[exchange], config, wanted).sent

    def command(self, *arguments: str, code: int = 0) -> str:
        done = self.lake().command(*arguments, **self.variables)
        assert done.returncode == code, done.stdout + done.stderr
        assert not any(secret in done.stdout + done.stderr for secret in self.secrets)
        return done.stdout


def test_kills_and_a_registry_outage_fire_an_alert_and_lose_nothing(
    kafka: SecureKafka, registry: Apicurio, database: Mapping[str, str], tmp_path: Path
) -> None:
    """Both exchanges; one process of each is killed, and the registry is down for a while. All invariants hold."""
    site = Site(kafka, registry, database, tmp_path)
    first = registry.register(f"{site.topics['binance']}-value", trade_schema())
    sent = {exchange: site.send(exchange, first, count=3_000, bad=0.05, duplicates=0.05) for exchange in BOTH}
    arguments = ("binance", "kraken", "--processes", "1", "--trigger", "0.5")
    with running(site.lake(), tmp_path / "log", *arguments, **site.variables) as run:
        run.wait_until_ready()
        for exchange in BOTH:
            (victim,) = run.children(exchange)
            assert_no_secrets(site, victim)
            victim.kill()
            sent[exchange] += site.send(exchange, first, count=500, seed=1)
        run.wait_for(lambda: {exchange: rows_of(run, exchange) for exchange in BOTH} == sent)

        second = registry.register(f"{site.topics['binance']}-value", evolved_further())
        registry.stop()
        letters = run.value("k2flow_table_rows", table="dlq_binance_trades")
        send_evolved(site, second, 10)
        sent["kraken"] += site.send("kraken", first, count=100, seed=2)
        run.wait_for(lambda: rows_of(run, "kraken") == sent["kraken"])
        run.wait_for(lambda: (lag := run.value("k2flow_lag_seconds", exchange="binance", layer="silver")) and lag > 500)
        assert_fires("K2flowLayerStale", run.get("/metrics")[1], {"exchange": "binance", "layer": "silver"}, tmp_path)
        assert run.value("k2flow_table_rows", table="dlq_binance_trades") == letters
        assert "waiting, no message is rejected for it" in run.log()
        registry.start()
        sent["binance"] += 10
        run.wait_for(lambda: rows_of(run, "binance") == sent["binance"])
        run.wait_for(lambda: run.value("binance_gold_lag") == 0)
        assert run.value("k2flow_table_rows", table="dlq_binance_trades") == letters
        assert run.stop() == 0, run.log()
        assert not any(secret in run.log() for secret in site.secrets)
    assert_holds(site)
    fees = f"SELECT count(*) AS fees FROM {GOLD_TABLE} WHERE vendor_data['fee'] = '0.25'"
    assert site.command("query", fees, "--format", "csv").split() == ["fees", "10"]
    site.command("config")


def test_flows_maintenance_queries_and_audit_work_with_a_rest_catalog(
    kafka: SecureKafka, registry: Apicurio, store: Seaweed, tmp_path: Path
) -> None:
    """The flow runs once as one process and once as two."""
    site = Site(kafka, registry, variables(store.rest_catalog()), tmp_path)
    first = registry.register(f"{site.topics['binance']}-value", trade_schema())
    for seed in (1, 2):
        site.send("binance", first, count=1_000, bad=0.05, duplicates=0.05, seed=seed)
        site.command("run", "binance", "--processes", str(seed), "--until-caught-up")
    site.command("maintain")
    rows = site.command("query", "SELECT count(*) AS rows FROM bronze_binance_trades", "--format", "csv")
    assert rows.split() == ["rows", "2000"]
    assert_holds(site, "binance")


def test_commits_without_rows_land_while_the_rest_catalogs_clock_is_behind(
    store: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalog itself refuses them: its clock is behind the newest snapshot. The ledger and the rows stay right."""
    for name, value in {**variables(store.rest_catalog()), "K2FLOW_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    kraken = find_exchange("kraken")
    catalog = open_catalog(load_settings())
    create(catalog, definitions(kraken).values())
    committer = Committer(catalog, kraken.dlq, kraken.name, kraken.settings.topic)
    with clock_ahead(monkeypatch, 3_600):
        committer.fence("id")
        committer.commit([], [OffsetRange(0, 0, 5, 0)])
    committer.commit([], [OffsetRange(0, 5, 9, 0)])
    assert set_property(catalog, kraken.dlq, "owner", "desk")
    table = load_table(catalog, kraken.dlq)
    assert table.properties["owner"] == "desk"
    assert len(table.metadata.snapshots) == 4
    held = Committer(catalog, kraken.dlq, kraken.name, kraken.settings.topic).ledger
    assert held.next_offset(0) == 9


def test_real_registry_resolves_references_and_knows_bad_ids(registry: Apicurio) -> None:
    """Types of other subjects, one of them used twice. Messages of an id that it does not have stop no others."""
    subjects = {name: f"{name}-{uuid.uuid4().hex}" for name in ("side", "leg", "trades")}
    side = {"type": "enum", "name": "TradeSide", "namespace": "market", "symbols": ["BUY", "SELL", "UNKNOWN"]}
    leg = {"type": "record", "name": "Leg", "namespace": "market", "fields": [{"name": "side", "type": "TradeSide"}]}
    schema = evolved(side={"type": "market.TradeSide"})
    schema["fields"].append({"name": "leg", "type": "market.Leg"})
    registry.register(subjects["side"], side)
    registry.register(subjects["leg"], leg, {"market.TradeSide": subjects["side"]})
    references = {"market.TradeSide": subjects["side"], "market.Leg": subjects["leg"]}
    schema_id = registry.register(subjects["trades"], schema, references)
    whole = {**schema, "fields": [{**f, "type": side} if f["name"] == "side" else f for f in schema["fields"]]}
    whole["fields"][-1] = {"name": "leg", "type": leg}
    values = [written(whole, each, leg={"side": "SELL"}) for each in (schema_id, 0, 2**31, 2**32 - 1, schema_id)]
    decoded = decode(values, RegistrySchemas({"url": registry.url}, threading.Event(), 0))
    assert reasons(decoded) == dict.fromkeys((1, 2, 3), "unknown_schema")
    assert all("not found" in text for text in details(decoded))
    rows = decoded.trades.rows.to_pylist()
    assert [(row["side"], dict(row["vendor_data"])["leg"]) for row in rows] == [("BUY", '{"side":"SELL"}')] * 2


def assert_holds(site: Site, *exchanges: str) -> None:
    audit = json.loads(site.command("audit", *exchanges, "--json"))
    assert audit["verdict"] == "holds", audit


def assert_no_secrets(site: Site, process: psutil.Process) -> None:
    """Assert that neither its command nor its environment, both visible in `ps`, shows a secret."""
    shown = [*process.cmdline(), *process.environ().values()]
    assert not [each for each in shown for secret in site.secrets if secret in each]


def evolved_further() -> dict[str, Any]:
    schema = evolved()
    schema["fields"].append({"name": "fee", "type": ["null", "double"], "default": None})
    return schema


def send_evolved(site: Site, schema_id: int, count: int) -> None:
    """Send trades in the evolved schema, with Kafka timestamps of LONG_AGO."""
    producer = Producer({"bootstrap.servers": site.kafka.local.bootstrap})
    at = datetime.now(UTC) - LONG_AGO
    microseconds = int(at.timestamp() * 1e6)
    for number in range(count):
        trade = {
            **TRADE,
            "message_id": str(uuid.uuid4()),
            "trade_id": f"BINANCE-{number}",
            "timestamp": microseconds,
            "ingestion_timestamp": microseconds,
            "fee": 0.25,
        }
        value = written(evolved_further(), schema_id, **trade)
        producer.produce(site.topics["binance"], value, partition=0, timestamp=microseconds // 1000)
    assert producer.flush(30) == 0


def assert_fires(alert: str, scraped: str, labels: Mapping[str, str], folder: Path) -> None:
    """Assert that the alert fires for `labels`, and for nothing of Kraken, if the scraped values persist."""
    if shutil.which("promtool") is None:
        return
    series = [line.rpartition(" ") for line in scraped.splitlines() if line and not line.startswith("#")]
    wanted = ",".join(f'{name}="{value}"' for name, value in {**labels, "alertstate": "firing"}.items())
    test = {
        "rule_files": [str(RULES)],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": f"{value}x10"} for name, _, value in series],
                "promql_expr_test": [
                    {
                        "expr": f'count by (exchange, layer, alertstate) (ALERTS{{alertname="{alert}",{wanted}}})',
                        "eval_time": "5m",
                        "exp_samples": [{"labels": f"{{{wanted}}}", "value": 1}],
                    },
                    {"expr": f'ALERTS{{alertname="{alert}",exchange="kraken"}}', "eval_time": "5m", "exp_samples": []},
                ],
            }
        ],
    }
    file = folder / "alert.test.yml"
    file.write_text(json.dumps(test))  # JSON is YAML
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def insecure(kafka: SecureKafka, tmp_path: Path) -> Callable[..., str]:
    """Return the log of a flow that cannot connect. It waits, says why, and ends on SIGTERM."""

    def run_flow(**extra: str) -> str:
        topic = f"binance.{uuid.uuid4().hex}"
        Admin(kafka.local.bootstrap).create({topic: 1})
        lake = Lake("binance", topic, tmp_path / "home", kafka.secure)
        with lake.start(**{**kafka.client(), "K2FLOW_KAFKA_SASL_PASSWORD": PASSWORD, **extra}) as flow:
            deadline = time.monotonic() + 60
            while "waiting" not in flow.log() and flow.processes[0].poll() is None:
                assert time.monotonic() < deadline, flow.log()
                time.sleep(0.1)
            flow.signal(signal.SIGTERM)
            return flow.wait(30)

    return run_flow


def test_flow_waits_for_rights_that_are_taken_away(kafka: SecureKafka, tmp_path: Path) -> None:
    """At the start it may not describe its topic, then not read it: it warns, continues, and ends by SIGTERM only."""
    topic = f"binance.{uuid.uuid4().hex}"
    Admin(kafka.local.bootstrap).create({topic: 2})
    lake = Lake("binance", topic, tmp_path / "home", kafka.local.bootstrap)
    fill(lake, count=200, seed=1)
    settings = {**kafka.client(), "K2FLOW_KAFKA_SASL_PASSWORD": PASSWORD, "K2FLOW_BINANCE_TRIGGER_SECONDS": "0.5"}
    with ExitStack() as running:
        with denied(kafka, topic, AclOperation.DESCRIBE):
            flow = running.enter_context(lake.start(**settings))
            flow.wait_for_log("Topic authorization failed; waiting")
        flow.wait_for_log(" rows in ", count=4)
        with denied(kafka, topic, AclOperation.READ):
            fill(lake, count=300, seed=2)
            flow.wait_for_log("failed: Broker: Topic authorization failed; librdkafka keeps trying")
            time.sleep(3)
            assert flow.codes() == [None], flow.log()
        deadline = time.monotonic() + 60
        while sum(ledger_offsets(lake)["gold"].values()) < 500:
            assert time.monotonic() < deadline, flow.log()
            time.sleep(0.2)
        flow.signal(signal.SIGTERM)
        log = flow.wait(30)
        assert flow.codes() == [0], log
    assert_tables(lake, expect(read_topic(lake.bootstrap, topic), "BINANCE"))


def test_wrong_password_is_reported_without_showing_it(insecure: Callable[..., str]) -> None:
    log = insecure(K2FLOW_KAFKA_SASL_PASSWORD="guess")
    assert "Authentication failed" in log
    assert "guess" not in log


def test_expired_certificate_is_reported(kafka: SecureKafka, insecure: Callable[..., str]) -> None:
    log = insecure(K2FLOW_KAFKA_BOOTSTRAP_SERVERS=kafka.expired)
    assert "certificate has expired" in log, log


def test_untrusted_authority_is_reported(insecure: Callable[..., str], tmp_path: Path) -> None:
    other = secure_kafka(tmp_path / "other")
    log = insecure(K2FLOW_KAFKA_SSL_CA_LOCATION=str(other.authority))
    assert "certificate is not trusted: 127.0.0.1:" in log
    assert "unable to get local issuer certificate" in log or "self-signed certificate" in log, log


def test_processes_can_create_the_catalog_at_once(
    database: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each first checks that the catalog's own tables are missing, then creates them: all but one would fail."""
    monkeypatch.chdir(tmp_path)
    for name, text in database.items():
        monkeypatch.setenv(name, text)
    settings = load_settings()
    together = threading.Barrier(8)

    def create(_: int) -> int:
        together.wait()
        return len(open_catalog(settings).list_namespaces())

    with ThreadPoolExecutor(together.parties) as pool:
        assert list(pool.map(create, range(together.parties))) == [0] * together.parties
