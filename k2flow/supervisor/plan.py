"""Which processes of a flow run on this host, and at which addresses."""

import re
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from k2flow.config.settings import PREFIX
from k2flow.errors import SettingsError


@dataclass(frozen=True)
class ProcessPlan:
    """The processes of one flow that run on this host.

    `numbers` index `addresses`, those of all hosts. Without addresses all processes run on this host, and get new
    addresses at each start.
    """

    flow: str  # the name of its module in flows/: an exchange, or the candles
    numbers: Sequence[int]
    addresses: str | None = None


def plan_processes(flow: str, processes: int, cluster: str | None, process_id: int | None) -> ProcessPlan:
    """Plan `processes` processes on this host, or in a cluster the one numbered `process_id`. Raises SettingsError.

    Without `process_id` the number is the digits at the end of this host's name.
    """
    if cluster is None:
        if process_id is not None:
            raise SettingsError(f"{PREFIX}PROCESS_ID needs {PREFIX}CLUSTER, the addresses of all hosts: set both")
        return ProcessPlan(flow, range(processes))
    addresses = [address.strip() for address in cluster.split(";") if address.strip()]
    wrong = [address for address in addresses if not re.fullmatch(r"[^\s,]+:\d+", address)]
    if wrong or not addresses:
        raise SettingsError(f"{PREFIX}CLUSTER={cluster!r} is wrong: write it as host:port;host:port")
    if process_id is None:
        digits = re.search(r"\d+$", socket.gethostname().partition(".")[0])
        if digits is None:
            raise SettingsError(f"this host's name does not end with its number in the cluster: set {PREFIX}PROCESS_ID")
        process_id = int(digits[0])
    if process_id >= len(addresses):
        last = len(addresses) - 1
        raise SettingsError(f"process {process_id} is not in the cluster: its processes are 0 to {last}")
    return ProcessPlan(flow, [process_id], ";".join(addresses))


def free_addresses(count: int) -> list[str]:
    """Return `count` loopback addresses that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
