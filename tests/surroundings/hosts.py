"""Hosts in a private network: Linux network namespaces, joined by a bridge without a way out."""

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

SUBNET = "192.0.2"  # TEST-NET-1, RFC 5737: assigned to no host
ROUTER, BRIDGE = "hub", "bridge"
NAMED = 'hostname "$1" && shift && exec "$@"'


class Network:
    """A hub with the bridge, and hosts; as a context manager it removes all of them at the end.

    The hub is at `address("hub")`. A process on a host sees the host's name, and reaches the other hosts only.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._id = uuid.uuid4().hex[:6]
        self._hosts = (ROUTER, *hosts)

    def address(self, host: str) -> str:
        return f"{SUBNET}.{self._hosts.index(host) + 1}"

    def command(self, host: str, *command: str) -> list[str]:
        """Return the command that runs `command` on a host."""
        return ["ip", "netns", "exec", self._space(host), "unshare", "--uts", "sh", "-c", NAMED, "sh", host, *command]

    def start(
        self, host: str, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command(host, *command), env=dict(environment), cwd=folder, stdout=log, stderr=log)

    def cut(self, host: str) -> None:
        """Drop all packets to and from the host, without closing connections."""
        _ip("-n", self._space(ROUTER), "link", "set", host, "down")

    def reconnect(self, host: str) -> None:
        _ip("-n", self._space(ROUTER), "link", "set", host, "up")

    def __enter__(self) -> Self:
        try:
            for host in self._hosts:
                _ip("netns", "add", self._space(host))
                _ip("-n", self._space(host), "link", "set", "lo", "up")
            hub = self._space(ROUTER)
            _ip("-n", hub, "link", "add", BRIDGE, "type", "bridge")
            _ip("-n", hub, "addr", "add", f"{self.address(ROUTER)}/24", "dev", BRIDGE)
            _ip("-n", hub, "link", "set", BRIDGE, "up")
            for host in self._hosts[1:]:
                space = self._space(host)
                _ip("-n", hub, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", space)
                _ip("-n", hub, "link", "set", host, "master", BRIDGE, "up")
                _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for host in self._hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", self._space(host))

    def _space(self, host: str) -> str:
        return f"k2flow-{self._id}-{host}"


def unavailable_reason() -> str | None:
    """Return why this machine cannot create such hosts; None if it can."""
    if os.getuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need root, ip and unshare"
    try:
        with Network(["probe"]) as network:
            subprocess.run(network.command("probe", "true"), check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be created here: {error.stderr}"
    return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
