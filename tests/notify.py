"""The service manager's end of sd_notify(3): a real datagram socket, as systemd opens it for a service."""

import socket
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self


class NotifySocket:
    """Receives the messages of a service. Its socket is in `folder`, or without one an abstract socket."""

    def __init__(self, folder: Path | None) -> None:
        self.address = str(folder / "notify") if folder else f"@k2flow-test-{uuid.uuid4()}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def __enter__(self) -> Self:
        self._socket.bind(self.address.replace("@", "\0", 1) if self.address.startswith("@") else self.address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def variables(self, watchdog_seconds: float) -> dict[str, str]:
        """Return the environment of the service. WATCHDOG_PID is missing: only its own parent knows it."""
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(int(watchdog_seconds * 1e6))}

    def receive(self, seconds: float = 10) -> dict[str, str]:
        """Return the next message as a mapping. Raise TimeoutError after `seconds`."""
        self._socket.settimeout(seconds)
        return dict(line.split("=", 1) for line in self._socket.recv(8192).decode().splitlines())

    def wait_for(self, name: str, value: str | None = None, seconds: float = 10) -> dict[str, str]:
        """Return the next message that has this name, with this value if one is given."""
        deadline = time.monotonic() + seconds
        while True:
            message = self.receive(max(0.01, deadline - time.monotonic()))
            if name in message and value in (None, message[name]):
                return message
