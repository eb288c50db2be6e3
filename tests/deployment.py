"""Reads docker/, kubernetes/ and systemd/: each container or unit, as Docker, Kubernetes or systemd would set it up."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from k2flow.cli.options import parse_duration
from k2flow.exchange import exchange_names
from k2flow.layers import CANDLES

ROOT = Path(__file__).parents[1]
DOCKER, KUBERNETES, SYSTEMD = ROOT / "docker", ROOT / "kubernetes", ROOT / "systemd"
DOCKERFILE, COMPOSE = DOCKER / "Dockerfile", DOCKER / "compose.yml"
COMPOSE_SECRETS = "/run/secrets"
IMAGE = "k2flow"
FLOW_NAMES = (*exchange_names(), CANDLES.name)


@dataclass(frozen=True)
class Container:
    """One container of the image k2flow.

    `workload` is the service or object that starts it, `host` its host name. `environment` includes the image's
    variables, `secrets` are the names of the files in `secrets_folder`, and `grace_seconds` is the time from SIGTERM
    to SIGKILL.
    """

    name: str
    workload: str
    host: str
    image: str
    command: Sequence[str]
    environment: Mapping[str, str]
    secrets: Sequence[str]
    secrets_folder: str | None
    grace_seconds: float

    def __str__(self) -> str:
        return self.name

    @property
    def flow(self) -> str | None:
        """The flow that it runs, if any: of an exchange, or of the candles."""
        return self.command[2] if list(self.command[:2]) == ["k2flow", "run"] else None

    @property
    def serves(self) -> bool:
        """Whether it serves /metrics, /healthz and /readyz."""
        return list(self.command[:2]) in (["k2flow", "run"], ["k2flow", "audit"])


@cache
def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, each with its arguments on one line, without comments."""
    lines = [line for line in DOCKERFILE.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined if line.strip())]


def last_stage() -> list[tuple[str, str]]:
    """Return the instructions of the last stage, which is the image."""
    found = instructions()
    return found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]


def image_environment() -> dict[str, str]:
    """Return the environment variables that the image sets."""
    pairs = [word for name, rest in last_stage() if name == "ENV" for word in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


@cache
def compose() -> dict[str, Any]:
    """Return the compose file with its anchors and merges resolved, and the defaults of its variables."""
    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-(\w+)\}", r"\1", COMPOSE.read_text("utf-8")))
    return found


def compose_containers() -> Iterator[Container]:
    for name, service in compose()["services"].items():
        if service["image"].split(":")[0] == IMAGE:
            yield Container(
                f"compose {name}",
                name,
                service.get("hostname", name),
                service["image"],
                service["command"],
                {**image_environment(), **service["environment"]},
                service["secrets"],
                COMPOSE_SECRETS if service["secrets"] else None,
                parse_duration(service["stop_grace_period"]),
            )


@cache
def kustomization() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text("utf-8"))
    return found


@cache
def manifests(*paths: Path) -> list[dict[str, Any]]:
    """Return the objects in these files; without any, those that kustomization.yaml applies, in its namespace."""
    every = paths or tuple(KUBERNETES / name for name in kustomization()["resources"])
    found = [each for path in every for each in yaml.safe_load_all(path.read_text("utf-8"))]
    for each in found if not paths else []:
        if each["kind"] != "Namespace":
            each["metadata"]["namespace"] = kustomization()["namespace"]
    return found


def example_secret() -> dict[str, str]:
    """Return the contents of the Secret, by file name."""
    (secret,) = manifests(KUBERNETES / "secret.example.yaml")
    found: dict[str, str] = secret["stringData"]
    return found


def workloads() -> list[dict[str, Any]]:
    """Return the objects that start pods."""
    return [each for each in manifests() if each["kind"] in {"StatefulSet", "Deployment"}]


def pod_containers(workload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all containers of a workload's pod as written, init containers included."""
    pod = workload["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def kubernetes_containers() -> Iterator[Container]:
    """Yield the containers of every pod."""
    settings = {each["metadata"]["name"]: each["data"] for each in manifests() if each["kind"] == "ConfigMap"}
    images = {each["name"]: f"{each['newName']}:{each['newTag']}" for each in kustomization()["images"]}
    for workload in workloads():
        pod, name = workload["spec"]["template"]["spec"], workload["metadata"]["name"]
        folders = {each["name"] for each in pod["volumes"] if "secret" in each}
        for number in range(workload["spec"]["replicas"]):
            for each in pod_containers(workload):
                environment = image_environment()
                for source in each["envFrom"]:
                    environment |= settings[source["configMapRef"]["name"]]
                environment |= {variable["name"]: variable["value"] for variable in each.get("env", [])}
                (folder,) = [mount["mountPath"] for mount in each["volumeMounts"] if mount["name"] in folders]
                yield Container(
                    f"kubernetes {name}-{number} {each['name']}",
                    name,
                    f"{name}-{number}",
                    images.get(each["image"], each["image"]),
                    each["args"],
                    environment,
                    list(example_secret()),
                    folder,
                    pod["terminationGracePeriodSeconds"],
                )


@dataclass(frozen=True)
class Unit:
    """One service of systemd: `file` in systemd/, as the unit `name`, with %i replaced if it is a template."""

    name: str
    file: str
    text: str
    flow: str | None

    def __str__(self) -> str:
        return self.name

    def all(self, key: str) -> list[str]:
        """Return all values of a key, in order."""
        return assignments(self.text, key)

    def one(self, key: str) -> str:
        """Return the value of a key that the unit has once."""
        (value,) = self.all(key)
        return value

    @property
    def command(self) -> list[str]:
        """The words of its command line."""
        return shlex.split(self.one("ExecStart"))

    @property
    def environment_files(self) -> list[str]:
        """The names of its environment files, which systemd/ has as examples."""
        return [Path(value.removeprefix("-")).name for value in self.all("EnvironmentFile")]

    @property
    def environment(self) -> dict[str, str]:
        """Its variables, with those of its environment files, which count more."""
        found = dict(word.split("=", 1) for value in self.all("Environment") for word in shlex.split(value))
        for name in self.environment_files:
            found |= environment_file(name)
        return found


def units() -> Iterator[Unit]:
    """Yield the services of systemd/, the template once for each flow."""
    for path in sorted(SYSTEMD.glob("*.service")):
        text = path.read_text("utf-8")
        for name in FLOW_NAMES if "@" in path.name else [None]:
            instance = text.replace("%i", name or "%i")
            yield Unit(path.name.replace("@", f"@{name}"), path.name, instance, name)


def assignments(text: str, key: str) -> list[str]:
    """Return all values of a key in a file of systemd."""
    return [line.partition("=")[2] for line in text.splitlines() if line.partition("=")[0] == key]


def environment_file(name: str) -> dict[str, str]:
    """Return the variables of an example in systemd/."""
    lines = (SYSTEMD / name).read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def secrets_drop_in() -> tuple[dict[str, str], dict[str, str]]:
    """Return the variables that secrets.conf sets, and the file of each credential."""
    text = (SYSTEMD / "secrets.conf").read_text("utf-8")
    variables = dict(value.split("=", 1) for value in assignments(text, "Environment"))
    return variables, dict(value.split(":", 1) for value in assignments(text, "LoadCredential"))
