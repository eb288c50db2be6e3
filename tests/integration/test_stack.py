"""docker/compose.yml runs on a real container engine, and survives what the machine and its operator do to it."""

import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from tests.surroundings import break_stack, engine

RATE = 105  # messages a second
STEADY_SECONDS = 10.0


@pytest.mark.timeout(2400)
def test_stack_survives_every_fault() -> None:
    if reason := engine.missing():
        pytest.skip(reason)
    # In no folder of pytest: it would keep the gigabytes of the engine.
    with tempfile.TemporaryDirectory(prefix="k2flow-stack-") as folder:
        break_stack.run(Path(folder), RATE, STEADY_SECONDS, break_stack.FAULTS, print).show(Console(width=160))
