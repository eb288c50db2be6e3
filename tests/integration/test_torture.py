"""`scripts/torture` for a short while, by a fixed seed."""

import subprocess
import sys

import pytest

from tests.integration.harness import ROOT

pytestmark = pytest.mark.integration

SEED = 20
MINUTES = 1.0


@pytest.mark.timeout(600)
def test_torture() -> None:
    """Nothing is lost, nothing doubled, both flows catch up, and the audit agrees."""
    command = [sys.executable, "-m", "torture", "--minutes", str(MINUTES), "--seed", str(SEED)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ": 0 lost, 0 doubled" in result.stdout
