"""docker/compose.yml runs on a real container engine, and survives what the machine and its operator do to it."""

import pytest
from rich.console import Console

from tests.surroundings import break_stack, engine

RATE = 210  # messages a second


@pytest.mark.timeout(2400)
def test_stack_survives_every_fault(tmp_path_factory: pytest.TempPathFactory) -> None:
    if reason := engine.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("stack")
    try:
        report = break_stack.run(folder, RATE, 5.0, break_stack.FAULTS, print)
    except engine.EngineError as error:
        pytest.skip(str(error))
    report.show(Console())
