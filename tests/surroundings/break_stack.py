"""Breaks the stack of docker/compose.yml, one fault after the other, and reports what it saw: see scripts/stack."""

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.deployment import IMAGE
from tests.surroundings.engine import Engine, missing
from tests.surroundings.stack import (
    FIRST_VERSION,
    NEXT_VERSION,
    POLL_SECONDS,
    RECOVERY_SECONDS,
    Stack,
    Usage,
    UsageSampler,
)


@dataclass(frozen=True)
class Fault:
    """One fault: `strike` returns once it has ended, and the recovery begins."""

    name: str
    strike: Callable[[Stack, Engine], None]


KEYED = ("store", "binance", "kraken", "candles", "maintain", "audit")
"""Services that hold the keys of the store while they run."""
STATELESS = ("schema-registry", "candles", "maintain", "audit", "prometheus")
"""Services that no commit of an exchange needs, once their schemas are known: killed in turn, with one wait for all."""


def _crash(service: str) -> Fault:
    return Fault(f"kill {service}", lambda stack, _: stack.crash(service))


def _wait(seen: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + RECOVERY_SECONDS
    while not seen():
        if time.monotonic() > deadline:
            raise AssertionError(what())
        time.sleep(POLL_SECONDS)


def _crash_in_turn(stack: Stack, _: Engine) -> None:
    for service in STATELESS:
        stack.crash(service)
        _wait(partial(stack.is_started_again, service), lambda: f"not started again: {stack.problems()}")


def _power_off(_: Stack, engine: Engine) -> None:
    engine.power_off()
    engine.start()


def _cut_network(stack: Stack, _: Engine) -> None:
    with stack.without_network("store"):
        time.sleep(15)


def _fill_disk(service: str) -> Fault:
    """Fill the disk, free it, and start the service again, as the documents say."""

    def strike(stack: Stack, _: Engine) -> None:
        with stack.full_disk(service):
            time.sleep(20)
        stack.compose("restart", service)

    return Fault(f"fill the disk of {service} for 20 s", strike)


def _wrong_clock(stack: Stack, _: Engine) -> None:
    """Give one flow a clock that is an hour ahead, see that it says so, and give it the right one."""
    stack.set_clock("kraken", 3600)
    _wait(lambda: "set the clocks" in stack.log("kraken"), lambda: f"no word of the clock: {stack.log('kraken')}")
    stack.set_clock("kraken", 0)


def _upgrade(stack: Stack, engine: Engine) -> None:
    engine.docker("tag", f"{IMAGE}:{FIRST_VERSION}", f"{IMAGE}:{NEXT_VERSION}")
    stack.use_version(NEXT_VERSION)
    stack.up()


def _rotate_secrets(stack: Stack, _: Engine) -> None:
    stack.create_secrets()
    stack.compose("up", "--no-build", "--wait", "--force-recreate", *KEYED)


def _wrong_secret(stack: Stack, _: Engine) -> None:
    """Give one flow a key that the store does not know, and see that its log and its state say so."""
    path = stack.secret("PYICEBERG_CATALOG__K2FLOW__CREDENTIAL")
    right = path.read_text()
    path.unlink()
    path.write_text("unknown:key")
    stack.recreate("kraken")
    _wait(
        lambda: any(each.startswith("kraken: Restarting") for each in stack.problems()),
        lambda: f"docker compose ps does not show the wrong secret: {stack.problems()}",
    )
    assert "k2flow: error" in stack.log("kraken"), stack.log("kraken")
    path.unlink()
    path.write_text(right)
    path.chmod(0o444)
    stack.recreate("kraken")


FAULTS: Sequence[Fault] = (
    *(_crash(service) for service in ("kafka", "store", "binance")),
    Fault(f"kill {', '.join(STATELESS)} in turn", _crash_in_turn),
    Fault("cut the network of store for 15 s", _cut_network),
    _fill_disk("store"),
    _fill_disk("kafka"),
    Fault("power off and on", _power_off),
    Fault("give kraken a wrong secret", _wrong_secret),
    Fault("rotate the secrets", _rotate_secrets),
    Fault("set kraken's clock an hour ahead", _wrong_clock),
    Fault("upgrade the image", _upgrade),
)


@dataclass
class Report:
    """What a run saw: the seconds of each step and fault, the use of the machine, and the verdict of the audit."""

    seconds: list[tuple[str, float]] = field(default_factory=list)
    services: dict[str, Usage] = field(default_factory=dict)
    total_peak_bytes: float = 0.0
    image_bytes: int = 0
    alerts: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)

    def show(self, console: Console) -> None:
        """Print it."""
        steps = Table("step or fault", "seconds to recovery")
        for name, seconds in self.seconds:
            steps.add_row(name, f"{seconds:.0f}")
        used = Table("service", "peak memory, MB", "CPU, % of a core")
        for name, usage in sorted(self.services.items()):
            used.add_row(name, f"{usage.peak_bytes / 1e6:,.0f}", f"{sum(usage.cpu) / len(usage.cpu):.0f}")
        used.add_row("all at once", f"{self.total_peak_bytes / 1e6:,.0f}", "")
        console.print(steps, used, f"image: {self.image_bytes / 1e6:,.0f} MB", *self.shown, *self.alerts)


def run(folder: Path, rate: int, steady_seconds: float, faults: Sequence[Fault], log: Callable[[str], None]) -> Report:
    """Build the images, start the stack, break it, and audit it. Raise AssertionError if it does not recover."""
    report = Report()

    def note(name: str, seconds: float) -> None:
        report.seconds.append((name, seconds))
        log(f"{name}: {seconds:.0f} s")

    def timed(name: str, step: Callable[[], object]) -> None:
        began = time.monotonic()
        step()
        note(name, time.monotonic() - began)

    with Engine(folder / "engine") as engine:
        timed("make the base", engine.import_base)
        timed("build the image", lambda: engine.build(f"{IMAGE}:{FIRST_VERSION}"))
        timed("make the other images", engine.build_stand_ins)
        report.image_bytes = engine.inspect(f"{IMAGE}:{FIRST_VERSION}")["Size"]
        stack = Stack(engine, folder, rate)
        try:
            timed("docker compose up --wait", stack.up)
            timed("until all messages of now are in all tables", stack.await_recovery)
            with UsageSampler(stack) as sampler:
                time.sleep(steady_seconds)
                report.services, report.total_peak_bytes = dict(sampler.services), sampler.total_peak_bytes
            for fault in faults:
                fault.strike(stack, engine)
                note(fault.name, stack.await_recovery())
                stack.start_trades()
            report.shown = [
                stack.compose("ps", "--all"),
                stack.k2flow("query", CANDLES),
                stack.k2flow("audit", "--full"),
            ]
            report.alerts = [f"{each['labels']['alertname']}: {each['state']}" for each in stack.alerts()]
        finally:
            stack.close()
    return report


def main(
    rate: Annotated[int, typer.Option(min=21, help="Messages a second of both exchanges together.")] = 1000,
    steady: Annotated[float, typer.Option(min=0, help="Seconds to measure before the first fault.")] = 120.0,
    faults: Annotated[bool, typer.Option(help="Break it.")] = True,
) -> None:
    """Run docker/compose.yml on an engine of its own, break it, and report what happened."""
    if reason := missing():
        sys.exit(f"scripts/stack: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the cleanups run
    console = Console()
    with tempfile.TemporaryDirectory(prefix="k2flow-stack-") as folder:
        run(Path(folder), rate, steady, FAULTS if faults else (), console.print).show(console)


CANDLES = """
SELECT symbol, open_time, open, high, low, close, volume, trades FROM candles('1m')
ORDER BY open_time DESC, symbol LIMIT 3
"""

if __name__ == "__main__":
    typer.run(main)
