"""Every benchmark at its smallest: its code runs, its figures mean nothing here."""

import subprocess
import sys

import pytest

from bench.smoke import names
from tests.integration.harness import ROOT


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", names())
def test_benchmark_runs_at_its_smallest(name: str) -> None:
    command = [sys.executable, "-m", "bench", "smoke", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    if f"{name} skipped: " in done.stderr:
        pytest.skip(done.stderr.strip())
    assert f"passed: {name} " in done.stdout, done.stderr
