"""The files of docker/ and kubernetes/ are consistent with k2flow. No engine runs here: the tests check the files."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import kubernetes_validate
import pyiceberg.catalog
import pyiceberg.catalog.rest
import pyiceberg.io
import pytest
import yaml
from prometheus_client import CollectorRegistry

import k2flow
from k2flow.cli.options import parse_duration
from k2flow.config.settings import Settings, load_exchange_settings, load_settings
from k2flow.errors import SettingsError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.iceberg.catalog import configured
from k2flow.kafka.topic import check_properties
from k2flow.observability.endpoint import serve
from k2flow.sandbox.kafka.local import free_port
from k2flow.supervisor.plan import plan_processes
from k2flow.trades.schema import trade_schema
from tests.deployment import (
    COMPOSE,
    COMPOSE_SECRETS,
    DOCKER,
    FLOW_NAMES,
    IMAGE,
    KUBERNETES,
    ROOT,
    Container,
    compose,
    compose_containers,
    example_secret,
    image_environment,
    instructions,
    kubernetes_containers,
    kustomization,
    last_stage,
    manifests,
    pod_containers,
    workloads,
)
from tests.documents import as_a_process, parse

SERVICES: dict[str, dict[str, Any]] = compose()["services"]
JOBS = {name for name, service in SERVICES.items() if service.get("restart") == "no"}
ON_DOCKER, ON_KUBERNETES = list(compose_containers()), list(kubernetes_containers())
EVERY = [*ON_DOCKER, *ON_KUBERNETES]
FLOWS = [each for each in EVERY if each.flow]
DIGEST = r"@sha256:[0-9a-f]{64}"
PINNED = re.compile(rf"[a-z0-9./-]+(:v?\d+\.\d+\.\d+[a-z0-9.-]*({DIGEST})?|{DIGEST})|chrislusf/seaweedfs:\d\.\d\d")
"""Exactly one version of an image. SeaweedFS uses two numbers, all others three."""
PORT = int(image_environment()["K2FLOW_METRICS_PORT"])
CLUSTER_PORT = 2101
KUBERNETES_VERSION = "1.34"
DOCKER_COMPOSE = Path(sys.executable).with_name("docker-compose")
PYICEBERG_PROPERTIES = {
    value
    for module in (pyiceberg.catalog, pyiceberg.catalog.rest, pyiceberg.io)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, str)
}


# Services of docker/compose.yml


def docker_compose(file: Path, *profiles: str, config: Sequence[str] = ("-q",)) -> subprocess.CompletedProcess[str]:
    """Run the real `docker compose config` on a file. Skip the test if Docker Compose is missing or does not run."""
    options = [word for profile in profiles for word in ("--profile", profile)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")}
    command = [str(DOCKER_COMPOSE), "-f", str(file), *options, "config", *config]
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    except OSError as error:
        pytest.skip(f"Docker Compose cannot be run here ({error}): install the extra dev")


@pytest.mark.parametrize("profiles", [(), ("demo",), ("cluster",), ("demo", "cluster")])
def test_docker_compose_accepts_the_file(profiles: tuple[str, ...]) -> None:
    done = docker_compose(COMPOSE, *profiles)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_docker_compose_and_these_tests_read_the_same_services() -> None:
    done = docker_compose(COMPOSE, "demo", "cluster", config=("--format", "json"))
    read = json.loads(done.stdout)["services"]
    assert read.keys() == SERVICES.keys()
    for name, service in SERVICES.items():
        for key in ("image", "restart", "command", "environment", "hostname", "read_only", "cap_drop", "profiles"):
            assert (read[name].get(key) or None) == (service.get(key) or None), (name, key)
        assert [each["source"] for each in read[name].get("secrets", [])] == service.get("secrets", []), name
        assert read[name].get("depends_on", {}).keys() == service.get("depends_on", {}).keys(), name


def test_docker_compose_rejects_an_invalid_file(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yml"
    wrong.write_text(COMPOSE.read_text("utf-8").replace("depends_on", "depends_upon", 1))
    assert docker_compose(wrong).returncode != 0


def test_all_profiles_are_tested() -> None:
    assert {profile for service in SERVICES.values() for profile in service.get("profiles", [])} == {"demo", "cluster"}


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_pinned_limited_and_confined(name: str) -> None:
    service = SERVICES[name]
    assert PINNED.fullmatch(service["image"]), service["image"]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert parse_duration(service["stop_grace_period"]) >= 10
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["image"].split(":")[0] != IMAGE or service["read_only"]


@pytest.mark.parametrize("name", SERVICES)
def test_service_has_a_health_check_or_ends(name: str) -> None:
    service = SERVICES[name]
    if name in JOBS:
        assert service["healthcheck"] == {"disable": True}
        assert "demo" in service.get("profiles", []) or conditions_on(name) == {"service_completed_successfully"}
        return
    assert service.get("restart") == "unless-stopped"
    assert conditions_on(name) <= {"service_healthy"}
    if "healthcheck" in service:
        check = service["healthcheck"]
        assert check["test"][0] in {"CMD", "CMD-SHELL"}
        assert parse_duration(check.get("start_interval", check["interval"])) <= 15  # others wait for the first one
    else:  # the image's own asks what is served
        assert [each.serves for each in ON_DOCKER if each.workload == name] == [True]


def conditions_on(name: str) -> set[str]:
    """Return the conditions that other services require of a service before they start."""
    wanted = (service.get("depends_on", {}).get(name) for service in SERVICES.values())
    return {each["condition"] for each in wanted if each}


def test_mounted_files_exist_and_are_read_only() -> None:
    volumes = set(compose()["volumes"])
    used = set()
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source, _, rest = mount.partition(":")
            if source.startswith("."):
                assert (DOCKER / source).exists(), mount
                assert rest.endswith(":ro"), mount
            else:
                used.add(source)
    assert used == volumes


def test_topics_match_the_declared_exchanges() -> None:
    (script,) = SERVICES["topics"]["command"]
    topics = dict(re.findall(r"^topic (\S+) (\d+)$", script, re.MULTILINE))
    assert topics == {each.declared["topic"]: str(each.declared["partitions"]) for each in all_exchanges()}
    subjects = SERVICES["schema"]["command"][4:]
    assert subjects == [f"{topic}-value" for topic in topics]


def test_prometheus_scrapes_each_server_once() -> None:
    (job,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for each in job["static_configs"] for target in each["targets"]]
    targets += [f"{name}:{each['port']}" for each in job["dns_sd_configs"] for name in each["names"]]
    served: dict[str, set[str]] = {}
    for name in (each.workload for each in ON_DOCKER if each.serves):
        aliases = (SERVICES[name].get("networks") or {}).get("default", {}).get("aliases", [name])
        for alias in aliases:
            served.setdefault(f"{alias}:{PORT}", set()).add(name)
    assert sorted(targets) == sorted(served)
    # Of a cluster's hosts only the first has the name of the service that it replaces.
    assert {frozenset(names) for names in served.values() if len(names) > 1} == {frozenset({"binance", "binance-0"})}


def test_grafana_has_its_dashboards_and_prometheus() -> None:
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    places = {target: DOCKER / source for source, target in mounts.items()}
    provisioning = places["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "k2flow.yml").read_text())["providers"]
    dashboards = list(places[provider["options"]["path"]].glob("*.json"))
    assert dashboards
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert SERVICES["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
    for dashboard in dashboards:
        asked = {panel["datasource"]["uid"] for panel in json.loads(dashboard.read_text())["panels"]}
        assert asked == {source["uid"]}, dashboard


# Secrets


@pytest.fixture(scope="module")
def created_secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that scripts/secrets creates."""
    project = tmp_path_factory.mktemp("project")
    (project / "scripts").mkdir()
    (project / "docker").mkdir()
    script = shutil.copy(ROOT / "scripts" / "secrets", project / "scripts")
    subprocess.run([script], check=True, timeout=30)
    return project / "docker" / "secrets"


def test_secrets_are_created_once_and_private(created_secrets: Path) -> None:
    before = {path.name: path.read_text() for path in created_secrets.iterdir()}
    again = subprocess.run(
        [created_secrets.parents[1] / "scripts" / "secrets"], capture_output=True, text=True, timeout=30
    )
    assert again.returncode == 1
    assert "stays as it is" in again.stderr
    assert {path.name: path.read_text() for path in created_secrets.iterdir()} == before
    assert created_secrets.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in created_secrets.iterdir()} == {0o444}
    assert "secrets/" in (DOCKER / ".gitignore").read_text().split()


def test_services_use_the_created_secrets(created_secrets: Path) -> None:
    declared = {name: secret["file"] for name, secret in compose()["secrets"].items()}
    assert declared == {path.name: f"secrets/{path.name}" for path in created_secrets.iterdir()}
    assert {name for service in SERVICES.values() for name in service.get("secrets", [])} == set(declared)
    identity = json.loads((created_secrets / "s3.json").read_text())["identities"][0]
    key, secret = identity["credentials"][0]["accessKey"], identity["credentials"][0]["secretKey"]
    catalog = "PYICEBERG_CATALOG__K2FLOW__"
    assert (created_secrets / f"{catalog}S3__ACCESS_KEY_ID").read_text() == key
    assert (created_secrets / f"{catalog}S3__SECRET_ACCESS_KEY").read_text() == secret
    assert (created_secrets / f"{catalog}CREDENTIAL").read_text() == f"{key}:{secret}"
    assert f"-s3.config={COMPOSE_SECRETS}/s3.json" in SERVICES["store"]["command"]
    assert (
        SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] == f"{COMPOSE_SECRETS}/grafana_password"
    )


def test_example_secret_is_a_placeholder_and_not_applied() -> None:
    assert all(re.fullmatch(r"REPLACE-ME(:REPLACE-ME)?", value) for value in example_secret().values())
    assert "secret.example.yaml" not in kustomization()["resources"]


# Settings and commands of all containers


@contextmanager
def inside(
    container: Container, files: Mapping[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Give this process the variables and secrets of a container, with files in the layout of Kubernetes."""
    monkeypatch.setattr("k2flow.config.secret_files._from_files", {})
    version = folder / "..2026_01_31"
    version.mkdir()
    (folder / "..data").symlink_to(version.name)
    for name in container.secrets:
        (version / name).write_text(files[name])
        (folder / name).symlink_to(f"..data/{name}")
    ours = ("K2FLOW_", "PYICEBERG_", "AWS_", "PG")
    with as_a_process():
        for name in [name for name in os.environ if name.startswith(ours)]:
            del os.environ[name]
        os.environ.update({name: value for name, value in container.environment.items() if name.startswith(ours)})
        if container.secrets_folder:
            assert os.environ["K2FLOW_SECRETS_DIR"] == container.secrets_folder
            os.environ["K2FLOW_SECRETS_DIR"] = str(folder)
        yield


def load_all_settings() -> Settings:
    """Load all settings from the environment. Raise SettingsError for an unknown one."""
    settings = load_settings(exchange_names())
    for exchange in all_exchanges():
        load_exchange_settings(exchange.name, exchange.declared)
    unknown = configured(settings).keys() - PYICEBERG_PROPERTIES
    if unknown:
        raise SettingsError(f"PyIceberg knows no {', '.join(sorted(unknown))}")
    check_properties(settings.kafka)
    return settings


@pytest.mark.parametrize("container", EVERY, ids=str)
def test_settings_are_known_and_accepted(
    container: Container, created_secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**{path.name: path.read_text() for path in created_secrets.iterdir()}, **example_secret()}
    with inside(container, files, tmp_path, monkeypatch):
        settings = load_all_settings()
        assert settings.metrics_port == PORT
        assert settings.metrics_host == "0.0.0.0"
        assert str(settings.home) == "/var/lib/k2flow"
        if container.command[0] == "k2flow":
            assert "bootstrap.servers" in settings.kafka
            needed = {
                "type",
                "uri",
                "warehouse",
                "credential",
                "s3.endpoint",
                "s3.access-key-id",
                "s3.secret-access-key",
            }
            assert needed <= configured(settings).keys()
        if container.flow:
            assert container.grace_seconds >= settings.stop_seconds + 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("K2FLOW_STOP_SECOND", "60"),
        ("K2FLOW_STOP_SECONDS", "a while"),
        ("K2FLOW_KRAKEN_TRIGGER", "5"),
        ("K2FLOW_KAFKA_BOOTSTRAP_SERVER", "kafka:9092"),
        ("PYICEBERG_CATALOG__K2FLOW__S3__END_POINT", "http://store:8333"),
        ("K2FLOW_METRICS_SERVICE_HOST", "10.0.0.1"),
    ],
)
def test_invalid_setting_fails(name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = FLOWS[0]
    wrong = Container(**{**vars(flow), "environment": {**flow.environment, name: value}, "secrets": []})
    with inside(wrong, {}, tmp_path, monkeypatch), pytest.raises(SettingsError):
        load_all_settings()


@pytest.mark.parametrize("container", EVERY, ids=str)
def test_commands_exist(container: Container) -> None:
    if container.command[0] == "python":
        script = container.command[1]
        sources = [mount.split(":") for service in SERVICES.values() for mount in service.get("volumes", [])]
        assert any(target == script and (DOCKER / source).is_file() for source, target, *_ in sources)
        return
    assert container.command[0] == "k2flow"
    parse(container.command)
    if container.command[1] in {"run", "produce"}:
        assert container.command[2] in (FLOW_NAMES if container.flow else exchange_names())
    if "--every" in container.command:
        assert parse_duration(container.command[container.command.index("--every") + 1]) >= 300


def test_health_check_commands_exist() -> None:
    compose_checks = [
        service["healthcheck"].get("test", []) for service in SERVICES.values() if "healthcheck" in service
    ]
    probes = [
        ["CMD", *probe["exec"]["command"]]
        for workload in workloads()
        for each in pod_containers(workload)
        if "exec" in (probe := each.get("livenessProbe", {}))
    ]
    ours = [words[1:] for words in [*compose_checks, *probes] if words[1:2] == ["k2flow"]]
    assert len(ours) == 2
    for command in ours:
        parse(command)


@pytest.mark.parametrize(
    "command", [["k2flow", "rum", "binance"], ["k2flow", "run"], ["k2flow", "maintain", "--evry", "5m"]], ids=" ".join
)
def test_unknown_command_fails(command: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such command|Missing parameter|No such option"):
        parse(command)


def test_every_flow_runs_on_docker_and_kubernetes() -> None:
    for started in (ON_DOCKER, ON_KUBERNETES):
        assert {each.flow for each in started} - {None} == set(FLOW_NAMES)


def test_cluster_addresses_match_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters: dict[str, list[Container]] = {}
    for each in FLOWS:
        if cluster := each.environment.get("K2FLOW_CLUSTER"):
            clusters.setdefault(cluster, []).append(each)
    assert len(clusters) == 2
    for cluster, hosts in clusters.items():
        numbers = []
        for host in hosts:
            number = host.environment.get("K2FLOW_PROCESS_ID")
            monkeypatch.setattr("socket.gethostname", lambda name=host.host: name)
            plan = plan_processes(str(host.flow), 1, cluster, int(number) if number else None)
            (found,) = plan.numbers
            numbers.append(found)
            assert plan.addresses is not None
            name, port = plan.addresses.split(";")[found].split(":")
            assert name.split(".")[0] == host.host
            assert int(port) == CLUSTER_PORT
        assert numbers == list(range(len(hosts)))
        assert len(cluster.split(";")) == len(hosts)


# The image


def test_image_has_two_stages_and_pinned_bases() -> None:
    stages: list[str] = []
    arguments: dict[str, str] = {}
    for name, rest in instructions():
        assert name not in {"ADD", "MAINTAINER"}, rest
        if name == "ARG":
            arguments |= [rest.split("=", 1)]
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            base = arguments.get(base.strip("${}"), base)
            assert base in stages or PINNED.fullmatch(base), base
            stages.append(stage)
    assert len(stages) >= 2
    assert not any(name == "RUN" and "pip" in rest for name, rest in last_stage())


def test_build_context_is_exactly_the_copied_files() -> None:
    sources = [
        source
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]
    assert {"k2flow", "flows", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored_by_docker(source), source
    for source in (".git", ".venv", "docker/secrets", "docker/secrets/s3.json", "tests", "k2flow/__pycache__"):
        assert ignored_by_docker(source), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["readme"] in sources
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) <= set(sources)


def ignored_by_docker(name: str) -> bool:
    """Return whether .dockerignore excludes a path. The last line that matches it or a parent folder decides."""
    ignored = False
    paths = [Path(name), *list(Path(name).parents)[:-1]]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if pattern and not pattern.startswith("#") and any(path.match(pattern) for path in paths):
            ignored = not line.startswith("!")
    return ignored


def test_image_runs_unprivileged_and_holds_no_secret() -> None:
    stage = last_stage()
    (user,) = [rest for name, rest in stage if name == "USER"]
    (groups,) = [re.findall(r"--[ug]id (\d+)", rest) for name, rest in stage if name == "RUN"]
    assert user == "10001:10001"
    assert set(groups) == {"10001"}
    (entry,) = [json.loads(rest) for name, rest in stage if name == "ENTRYPOINT"]
    assert entry == ["tini", "--"]  # SIGTERM reaches k2flow, which would not get it as a shell's child
    (command,) = [json.loads(rest) for name, rest in stage if name == "CMD"]
    assert command == ["k2flow", "--help"]
    for name, rest in instructions():
        assert name not in {"ENV", "ARG"} or not re.search(r"password|secret|token|key", rest, re.IGNORECASE), rest
    (exposed,) = [rest for name, rest in stage if name == "EXPOSE"]
    assert int(exposed) == PORT
    assert ("VOLUME", image_environment()["K2FLOW_HOME"]) in stage


def test_image_installs_pinned_versions_and_existing_extras() -> None:
    (install,) = [rest for name, rest in instructions() if name == "RUN" and " install -c constraints.txt " in rest]
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", install)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras == "postgres,traces"
    assert set(extras.split(",")) <= known.keys()


def test_all_files_name_one_version() -> None:
    version = k2flow.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version
    assert ("ARG", f"VERSION={version}") in instructions()
    assert "org.opencontainers.image.version" in next(rest for name, rest in last_stage() if name == "LABEL")
    assert {each.image.rpartition(":")[2] for each in EVERY} == {version}


@pytest.mark.parametrize(("wrong", "code"), [(None, 0), ("binance: the supervisor failed", 1)])
def test_health_check_follows_the_served_health(wrong: str | None, code: int) -> None:
    (line,) = [rest for name, rest in last_stage() if name == "HEALTHCHECK"]
    python, *arguments = json.loads(line[line.index("[") :])
    assert python == "python"
    port = free_port()
    serve("127.0.0.1", port, CollectorRegistry(), lambda: wrong, lambda: None)
    environment = {**os.environ, "K2FLOW_METRICS_PORT": str(port)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, timeout=30)
    assert done.returncode == code


def test_schemas_are_registered_and_a_different_id_fails() -> None:
    asked: list[tuple[str, Any]] = []

    class Registry(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, json.loads(body["schema"])))
            answer = b'{"id": 7}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the test's output quiet."""

    with HTTPServer(("127.0.0.1", 0), Registry) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        script, url = DOCKER / "register_schema.py", f"http://127.0.0.1:{server.server_port}/apis/ccompat/v7"
        for wanted, code in (("7", 0), ("1", 1)):
            done = subprocess.run(
                [sys.executable, script, url, wanted, "a-value"], cwd=ROOT, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == code, done.stderr
        assert "not 1" in done.stderr
        server.shutdown()
    assert asked == [("/apis/ccompat/v7/subjects/a-value/versions", trade_schema())] * 2


# The objects of kubernetes/


@pytest.mark.parametrize(
    "manifest", [*manifests(), *manifests(KUBERNETES / "secret.example.yaml")], ids=lambda m: m["kind"]
)
def test_kubernetes_schemas_accept_the_objects(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


def test_kubernetes_schemas_reject_an_invalid_object() -> None:
    wrong = deepcopy(workloads()[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES_VERSION, strict=True)


def test_kustomization_lists_every_file() -> None:
    others = {"kustomization.yaml", "secret.example.yaml", "keda.example.yaml", "prometheus.yml"}
    assert {path.name for path in KUBERNETES.iterdir()} - others == set(kustomization()["resources"])
    assert {each.image for each in ON_KUBERNETES if not PINNED.fullmatch(each.image)} == set()


@pytest.mark.parametrize("workload", workloads(), ids=lambda workload: workload["metadata"]["name"])
def test_pods_are_confined_limited_and_probed(workload: dict[str, Any]) -> None:
    template = workload["spec"]["template"]
    pod = template["spec"]
    user = int(next(rest for name, rest in last_stage() if name == "USER").split(":")[0])
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert not pod["enableServiceLinks"]
    assert not pod["automountServiceAccountToken"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    flows = {"cache"} if workload["metadata"]["name"] in ("k2flow-binance", "k2flow-kraken") else set()
    assert {volume["name"] for volume in pod["volumes"]} == {"secrets", "tmp", "home", *flows}
    for each in pod_containers(workload):
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert each["resources"]["limits"]["memory"]
        assert {"cpu", "memory"} <= each["resources"]["requests"].keys()
        places = {mount["mountPath"] for mount in each["volumeMounts"]}
        assert {"/tmp", image_environment()["K2FLOW_HOME"]} < places
    serves = {each.serves for each in ON_KUBERNETES if each.workload == workload["metadata"]["name"]}
    for each in pod["containers"]:
        if serves != {True}:
            assert "exec" in each["livenessProbe"]
            continue
        ports = {port["name"]: port["containerPort"] for port in each["ports"]}
        assert ports["metrics"] == PORT
        asked = {name: each[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
        assert {get["port"] for get in asked.values()} == {"metrics"}
        assert {name: get["path"] for name, get in asked.items()} == {
            "startup": "/healthz",
            "liveness": "/healthz",
            "readiness": "/readyz",
        }


def services() -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in manifests() if each["kind"] == "Service"}


@pytest.mark.parametrize(
    "workload", [each for each in workloads() if each["kind"] == "StatefulSet"], ids=lambda w: w["metadata"]["name"]
)
def test_pods_of_a_cluster_resolve_each_other(workload: dict[str, Any]) -> None:
    spec, name, namespace = workload["spec"], workload["metadata"]["name"], kustomization()["namespace"]
    service = services()[spec["serviceName"]]["spec"]
    assert service["clusterIP"] == "None"
    assert service["selector"] == spec["template"]["metadata"]["labels"]
    (flow,) = spec["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in flow["ports"]}
    assert {port["name"]: port["port"] for port in service["ports"]} == ports
    assert all(port["targetPort"] == port["name"] for port in service["ports"])
    cluster = next((each["value"] for each in flow["env"] if each["name"] == "K2FLOW_CLUSTER"), None)
    if cluster is None:
        assert spec["replicas"] == 1
        return
    domain = f"{spec['serviceName']}.{namespace}.svc.cluster.local:{ports['cluster']}"
    assert [each.strip() for each in cluster.split(";")] == [f"{name}-{i}.{domain}" for i in range(spec["replicas"])]
    assert service["publishNotReadyAddresses"]
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["updateStrategy"] == {"type": "OnDelete"}


def test_cluster_links_admit_only_its_pods() -> None:
    policies = [each["spec"] for each in manifests() if each["kind"] == "NetworkPolicy"]
    assert all(policy["policyTypes"] == ["Ingress"] for policy in policies)
    for workload in workloads():
        name, labels = workload["metadata"]["name"], workload["spec"]["template"]["metadata"]["labels"].items()
        mine = [each for each in policies if each["podSelector"]["matchLabels"].items() <= labels]
        assert mine, "a pod without a policy accepts connections from everywhere"
        opened = {port["port"]: rule["from"] for each in mine for rule in each["ingress"] for port in rule["ports"]}
        pods = [{"podSelector": {"matchLabels": dict(labels)}}]
        clustered = any("K2FLOW_CLUSTER" in each.environment for each in ON_KUBERNETES if each.workload == name)
        assert (opened.pop(CLUSTER_PORT, None) == pods) == clustered
        assert opened.keys() == {PORT}


def test_prometheus_discovers_the_pods() -> None:
    (job,) = yaml.safe_load((KUBERNETES / "prometheus.yml").read_text())["scrape_configs"]
    (local,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == local["job_name"]
    assert f'job="{job["job_name"]}"' in (DOCKER / "prometheus" / "rules.yml").read_text()
    (found,) = job["kubernetes_sd_configs"]
    assert found["namespaces"] == {"names": [kustomization()["namespace"]]}
    kept = {
        rule["source_labels"][0].rpartition("__meta_kubernetes_")[2]: rule["regex"]
        for rule in job["relabel_configs"]
        if rule.get("action") == "keep"
    }
    assert kept == {"pod_label_app_kubernetes_io_name": IMAGE, "pod_container_port_number": str(PORT)}
    for workload in workloads():
        assert workload["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] == IMAGE


def test_autoscaler_starts_and_stops_an_exchange_without_a_cluster() -> None:
    """Another number of pods than the addresses of a cluster would stop the flow: see docs/deploy.md."""
    login, scaled = manifests(KUBERNETES / "keda.example.yaml")
    spec = scaled["spec"]
    (target,) = [each for each in workloads() if each["metadata"]["name"] == spec["scaleTargetRef"]["name"]]
    assert target["kind"] == spec["scaleTargetRef"]["kind"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 1)
    (container,) = [each for each in ON_KUBERNETES if each.workload == target["metadata"]["name"]]
    assert container.flow
    assert "K2FLOW_CLUSTER" not in container.environment
    (trigger,) = spec["triggers"]
    assert trigger["authenticationRef"]["name"] == login["metadata"]["name"]
    wanted = trigger["metadata"]
    assert wanted["topic"] == find_exchange(container.flow).settings.topic
    assert wanted["consumerGroup"] == f"k2flow-{container.flow}"
    assert wanted["bootstrapServers"] == container.environment["K2FLOW_KAFKA_BOOTSTRAP_SERVERS"]
    assert wanted["sasl"].replace("_", "").upper() == container.environment["K2FLOW_KAFKA_SASL_MECHANISM"].replace(
        "-", ""
    )
    for each in login["spec"]["secretTargetRef"]:
        assert each["name"] == "k2flow"
        assert each["key"] in example_secret()


def test_cluster_refuses_a_pod_that_its_addresses_lack() -> None:
    """An autoscaler that adds pods makes no flow faster: each added pod ends with this error."""
    flow = next(each for each in ON_KUBERNETES if "K2FLOW_CLUSTER" in each.environment)
    cluster = flow.environment["K2FLOW_CLUSTER"]
    with pytest.raises(SettingsError, match="process 3 is not in the cluster"):
        plan_processes(str(flow.flow), 1, cluster, len(cluster.split(";")))
