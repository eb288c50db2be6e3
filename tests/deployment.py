"""Reads docker/ and kubernetes/: each container of k2flow, as Docker or Kubernetes would set it up."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from k2flow.cli.options import parse_duration

ROOT = Path(__file__).parents[1]
DOCKER, KUBERNETES = ROOT / "docker", ROOT / "kubernetes"
DOCKERFILE, COMPOSE = DOCKER / "Dockerfile", DOCKER / "compose.yml"
COMPOSE_SECRETS = "/run/secrets"
IMAGE = "k2flow"


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
    def exchange(self) -> str | None:
        """The exchange of the flow that it runs, if any."""
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
    """Return the compose file with its anchors and merges resolved."""
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text("utf-8"))
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
