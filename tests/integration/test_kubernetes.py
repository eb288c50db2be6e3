"""The API server of Kubernetes itself accepts kubernetes/, and admits the pods under the namespace's security level.

No kubelet runs, so no pod starts. `scripts/kubernetes` builds the programs.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from k2flow.sandbox.kafka.local import free_port
from tests.deployment import KUBERNETES, kustomization, manifests, workloads

PROGRAMS = ("etcd", "kube-apiserver", "kubectl")
TOKEN = "test"
START_SECONDS = 60
NAMESPACE = kustomization()["namespace"]


class Kubectl:
    """The real kubectl, as an administrator of a server that runs."""

    def __init__(self, config: Path) -> None:
        self._config = config

    def __call__(self, *arguments: str, document: Any = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["kubectl", f"--kubeconfig={self._config}", *arguments],
            input=json.dumps(document) if document else None,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def accepts(self, *arguments: str, document: Any = None) -> list[str]:
        done = self(*arguments, document=document)
        assert done.returncode == 0, done.stderr
        assert not done.stderr  # warnings too, such as those of Pod Security and of deprecated versions
        return done.stdout.splitlines()


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """Start etcd and the API server, with the namespace and what the missing controllers would create in it."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not on PATH: `scripts/kubernetes FOLDER` builds them")
    home = tmp_path_factory.mktemp("kubernetes")
    etcd, peer, port = (free_port() for _ in range(3))
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = serialization.Encoding.PEM
    private, public = home / "key", home / "key.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    (home / "tokens").write_text(f'{TOKEN},admin,1,"system:masters"\n')
    commands = (
        [
            "etcd",
            f"--data-dir={home}/etcd",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
        ],
        [
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={home}",
            f"--token-auth-file={home}/tokens",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.invalid",
            f"--service-account-key-file={public}",
            f"--service-account-signing-key-file={private}",
        ],
    )
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "here", "cluster": {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}}
        ],
        "users": [{"name": "admin", "user": {"token": TOKEN}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin"}}],
        "current-context": "here",
    }
    (home / "config").write_text(yaml.safe_dump(config))
    with ExitStack() as stack:
        for command in commands:
            log = stack.enter_context((home / f"{command[0]}.log").open("w"))
            process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            stack.callback(process.kill)
        found = Kubectl(home / "config")
        wait_until_ready(found, home / "kube-apiserver.log")
        found.accepts("apply", "-f", str(KUBERNETES / "namespace.yaml"))
        found.accepts("create", "serviceaccount", "default", "-n", NAMESPACE)  # a controller creates it in a cluster
        yield found


def wait_until_ready(kubectl: Kubectl, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while kubectl("get", "--raw=/readyz").returncode:
        assert time.monotonic() < deadline, log.read_text()[-2_000:]
        time.sleep(0.2)


def test_server_accepts_the_objects(kubectl: Kubectl) -> None:
    done = kubectl.accepts("apply", "--dry-run=server", "-k", str(KUBERNETES))
    assert len(done) == len(manifests())
    assert all(line.endswith("(server dry run)") for line in done)
    kubectl.accepts("apply", "--dry-run=server", "-f", str(KUBERNETES / "secret.example.yaml"))


def test_server_rejects_an_invalid_object(kubectl: Kubectl) -> None:
    wrong = deepcopy(workloads()[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["startupProbe"]["failureThreshold"] = -1
    assert "failureThreshold: Invalid value: -1" in apply(kubectl, wrong).stderr


def apply(kubectl: Kubectl, document: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return kubectl("apply", "--dry-run=server", "-f", "-", document=document)


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    """Return the pod that a controller would create."""
    template = deepcopy(workload["spec"]["template"])
    name = workload["metadata"]["name"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": name, "namespace": NAMESPACE},
        "spec": template["spec"],
    }


@pytest.mark.parametrize("workload", workloads(), ids=lambda each: each["metadata"]["name"])
def test_server_admits_the_pods(kubectl: Kubectl, workload: dict[str, Any]) -> None:
    done = apply(kubectl, pod_of(workload))
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_server_refuses_a_pod_with_more_rights(kubectl: Kubectl) -> None:
    pod = pod_of(workloads()[0])
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    assert 'violates PodSecurity "restricted' in apply(kubectl, pod).stderr
