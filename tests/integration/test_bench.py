"""Every benchmark at its smallest: its code runs, its figures mean nothing here."""

import os

import pytest

from bench.smoke import names
from tests.integration.forked import call
from tests.integration.harness import ROOT


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", names())
def test_benchmark_runs_at_its_smallest(name: str) -> None:
    done = call("bench", ["smoke", name], {**os.environ, "PYTHONPATH": str(ROOT)}, ROOT, 580)
    errors = done.stderr.decode()
    assert done.returncode == 0, errors
    if f"{name} skipped: " in errors:
        pytest.skip(errors.strip())
    assert f"passed: {name} " in done.stdout.decode(), errors
