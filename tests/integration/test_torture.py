"""`scripts/torture` for a minute, by the seed of the run."""

import subprocess
import sys

import pytest

from tests.integration.harness import ROOT

MINUTES = 1.0


@pytest.mark.timeout(600)
def test_torture_loses_and_duplicates_nothing(seed: int) -> None:
    """Both flows catch up, and the audit agrees with the oracle."""
    command = [sys.executable, "-m", "torture", "--minutes", str(MINUTES), "--seed", str(seed)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ": 0 lost, 0 duplicated" in result.stdout
